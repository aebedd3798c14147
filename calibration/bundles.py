"""Readers of end-to-end bundles: what one real vLLM engine did with a few hundred requests.

A bundle is a folder with `requests.jsonl` and `meta.json`, as the bench of LLMServingSim writes it
(casys-kaist/LLMServingSim, MIT). TTFT runs from `queued_ts`, when the
engine took the request from its inbox: `arrival_time` is of another clock.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from ..core.catalogue import key_of, load_catalogue
from ..core.errors import ModelError, WorkloadError
from ..core.memory_sum import EngineMemory, memory_sum
from ..core.model_presets import PRESETS, model_preset
from ..core.model_spec import ModelSpec
from ..core.record import parse_json
from ..simulator.step_scheduler import Arrival, EngineLimits
from .shared_prefixes import BLOCK_TOKENS, block_names

Floats = NDArray[np.float64]

MAX_CAPTURE = 512
TIMES = ("queued_ts", "first_token_ts", "last_token_ts")


@dataclass(frozen=True)
class Bundle:
    """One real run. Times are seconds from the first arrival, one element per request."""

    name: str
    gpu: str
    model: str
    engine: str
    started_at: str
    """When it began, as the bundle says: no two runs are alike in it."""
    tp: int
    n_engines: int
    """In lockstep, one GPU each, with the experts spread over them; else 1."""
    limits: EngineLimits
    capture_sizes: tuple[int, ...]
    """Token counts that small steps are padded to; empty: none."""
    arrivals: tuple[Arrival, ...]
    queued_s: Floats
    first_token_s: Floats
    last_token_s: Floats
    link_bytes_per_s: float
    link_latency_s: float
    assumed: tuple[str, ...]

    @property
    def n_output(self) -> Floats:
        """Output tokens of each request."""
        return np.array([a.n_output for a in self.arrivals], dtype=float)


def read_bundle(folder: str | Path, workloads: str | Path | None = None) -> Bundle:
    """The bundle in `folder`, or in its `vllm` folder.

    `workloads` is a folder of the prompts that were sent: prefixes that prompts share are read from
    the file whose SHA-256 the bundle names, since vLLM serves them from its prefix cache.

    Raises:
        WorkloadError: a file is missing or malformed (which line and field).
        ModelError: several engines that do not share experts.
    """
    folder = Path(folder)
    home = folder / "vllm" if (folder / "vllm").is_dir() else folder
    root = home.parent if home.name == "vllm" else home
    meta = _object(home / "meta.json")
    kwargs = _section(home, meta, "engine_kwargs")
    n_engines = int(_number(home, kwargs, "data_parallel_size", 1))
    tp = int(_number(home, kwargs, "tensor_parallel_size", 1))
    if n_engines > 1 and (tp > 1 or not kwargs.get("enable_expert_parallel")):
        raise ModelError(
            "a bundle of several engines must be of one GPU each, and share experts",
            values=f"{home}: data_parallel_size={n_engines}, tensor_parallel_size={tp}, "
            f"enable_expert_parallel={kwargs.get('enable_expert_parallel')}",
            remedy="choose a bundle without data parallelism, or with expert parallelism",
        )
    rows = _requests(home / "requests.jsonl")
    assumed: list[str] = []
    wanted = str(meta.get("dataset_hash", ""))
    sent = None if workloads is None else Path(workloads)
    names = block_names(wanted, [int(r["input_toks"]) for r in rows], sent)
    if names is None:
        assumed.append("no two prompts share a prefix")
        names = [()] * len(rows)
    column = {k: np.array([float(r[k]) for r in rows]) for k in ("arrival_time", *TIMES)}
    # The two clocks are aligned where the inbox was emptied soonest.
    offset = float(np.min(column["queued_ts"] - column["arrival_time"]))
    arrival = column["arrival_time"] + offset
    start = float(arrival.min())
    link = _link(root / "config.json")
    if tp * n_engines > 1:
        what = "all-reduce and gather" if tp > 1 else "all-gather and reduce-scatter"
        assumed.append(f"{what} over a link of {link[0] / 1e9:g} GB/s, {link[1] * 1e6:g} us")
    if n_engines > 1:
        assumed.append("rows go to all experts alike often")
    return Bundle(
        name="/".join(root.parts[-2:]),
        gpu=root.parts[-2] if len(root.parts) > 1 else "",
        model=str(meta.get("model", kwargs.get("model", ""))),
        engine=f"vllm {meta.get('vllm_version', '?')}",
        started_at=str(meta.get("started_at", "")),
        tp=tp,
        n_engines=n_engines,
        limits=_limits(root, kwargs, meta, assumed),
        capture_sizes=_capture_sizes(home, kwargs, meta),
        arrivals=tuple(
            Arrival(float(t - start), int(r["input_toks"]), int(r["output_toks"]), content)
            for t, r, content in zip(arrival, rows, names, strict=True)
        ),
        queued_s=column["queued_ts"] - start,
        first_token_s=column["first_token_ts"] - start,
        last_token_s=column["last_token_ts"] - start,
        link_bytes_per_s=link[0],
        link_latency_s=link[1],
        assumed=tuple(assumed),
    )


def capture_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Token counts vLLM captures CUDA graphs for, and pads small steps to, by default."""
    top = min(2 * max_num_seqs, MAX_CAPTURE)
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, MAX_CAPTURE + 1, 16)]
    return tuple(s for s in sizes if s <= top)


def model_of(name: str) -> ModelSpec:
    """The shape of a Hugging Face model: bundles hold none.

    Raises:
        ModelError: none of the known models begins its name.
    """
    return model_preset(known_as(name, PRESETS) or name)


def known_as(name: str, models: Iterable[str]) -> str | None:
    """Which of `models` the name of a Hugging Face model begins with."""
    last = name.rsplit("/", 1)[-1].lower().removeprefix("meta-")
    found = (m for m in models if re.match(rf"{re.escape(m.lower())}(?![0-9a-z.])", last))
    return next(found, None)


def _capture_sizes(home: Path, kwargs: dict[str, Any], meta: dict[str, Any]) -> tuple[int, ...]:
    """What the bundle says that the engine captured, or what vLLM does by default."""
    if kwargs.get("enforce_eager"):
        return ()
    resolved = _section(home, _section(home, meta, "resolved_config"), "compilation_config")
    said = kwargs.get("cudagraph_capture_sizes") or resolved.get("cudagraph_capture_sizes")
    if said:
        try:
            return tuple(sorted(int(n) for n in said))
        except (TypeError, ValueError):
            raise _wrong(home, "cudagraph_capture_sizes", "a list of numbers", said) from None
    return capture_sizes(int(kwargs["max_num_seqs"]))


def _limits(
    root: Path, kwargs: dict[str, Any], meta: dict[str, Any], assumed: list[str]
) -> EngineLimits:
    for key in ("max_num_seqs", "max_num_batched_tokens"):
        if not isinstance(kwargs.get(key), int) or kwargs[key] <= 0:
            raise WorkloadError(
                f"{root} meta.json engine_kwargs.{key} must be a positive integer",
                values=repr(kwargs.get(key)),
                remedy="take the value the engine ran with",
            )
    cache_facts = _section(root, meta, "kv_cache")
    blocks: int | None = int(_number(root, cache_facts, "num_gpu_blocks", 0)) or None
    if blocks is None:
        blocks = _blocks(root, kwargs, meta)
        assumed.append(
            f"KV memory of {blocks} blocks: an itemised sum"
            if blocks
            else "KV memory never runs out"
        )
    scheduler = _section(root, _section(root, meta, "resolved_config"), "scheduler_config")
    return EngineLimits(
        max_num_seqs=kwargs["max_num_seqs"],
        max_num_batched_tokens=kwargs["max_num_batched_tokens"],
        n_blocks=None if blocks is None else blocks - 1,  # one block is vLLM's null block
        block_size=int(_number(root, cache_facts, "block_size", BLOCK_TOKENS)),
        prefix_caching=bool(cache_facts.get("enable_prefix_caching", True)),
        async_scheduling=bool(scheduler.get("async_scheduling", True)),
    )


def _blocks(root: Path, kwargs: dict[str, Any], meta: dict[str, Any]) -> int | None:
    """KV blocks by the sum over memory; None where the GPU or the model is not in the catalogue."""
    gpus = {key_of(name): row for name, row in load_catalogue().gpus.items()}
    gpu = gpus.get(key_of(root.parts[-2])) if len(root.parts) > 1 else None
    try:
        spec = model_of(str(meta.get("model", kwargs.get("model", ""))))
    except ModelError:
        return None
    if gpu is None or kwargs.get("quantization"):
        return None
    engine = EngineMemory(
        utilization=_number(root, kwargs, "gpu_memory_utilization", 0.9),
        max_num_batched_tokens=kwargs["max_num_batched_tokens"],
        max_num_seqs=kwargs["max_num_seqs"],
        kv="fp8" if str(kwargs.get("kv_cache_dtype", "")).startswith("fp8") else "bfloat16",
        graphs=not kwargs.get("enforce_eager"),
    )
    found = memory_sum(spec, gpu, int(_number(root, kwargs, "tensor_parallel_size", 1)), engine)
    return found.n_blocks if found.n_blocks > 0 else None


def _requests(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as e:
            raise WorkloadError(
                f"{path} line {number} must be JSON", values=str(e), remedy="it may be cut short"
            ) from None
        for key in ("input_toks", "output_toks", "arrival_time", *TIMES):
            value = row.get(key) if isinstance(row, dict) else None
            if not _is_finite(value) or (key.endswith("_toks") and value < 1):
                raise WorkloadError(
                    f"{path} line {number}: {key} must be a finite number"
                    + (" of at least 1" if key.endswith("_toks") else ""),
                    values=repr(value),
                    remedy="leave out requests that did not finish",
                )
        if not row["queued_ts"] <= row["first_token_ts"] <= row["last_token_ts"]:
            raise WorkloadError(
                f"{path} line {number}: time must not run backwards",
                values=", ".join(f"{k}={row[k]}" for k in TIMES),
                remedy="correct the line",
            )
        rows.append(row)
    if not rows:
        raise WorkloadError(f"{path} must hold requests", values="none", remedy="run the bench")
    return rows


def _is_finite(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < math.inf


def _link(path: Path) -> tuple[float, float]:
    """(bytes/s, latency s) of the link between GPUs from the bundle's `config.json`; 64 GB/s, 0."""
    if not path.exists():
        return 64e9, 0.0
    data = _object(path)
    gb_per_s, ns = (_number(path, data, k, n) for k, n in (("link_bw", 64), ("link_latency", 0)))
    return gb_per_s * 1e9, ns * 1e-9


def _wrong(where: Path, key: str, rule: str, value: object) -> WorkloadError:
    return WorkloadError(
        f"{where}: {key} must be {rule}", values=repr(value)[:60], remedy="copy it again"
    )


def _section(where: Path, data: dict[str, Any], key: str) -> dict[str, Any]:
    """An object within an object; empty where it is left out."""
    found = data.get(key) or {}
    if not isinstance(found, dict):
        raise _wrong(where, key, "an object", found)
    return found


def _number(where: Path, data: dict[str, Any], key: str, default: float) -> float:
    """A number above 0 in an object; `default` where it is left out, or 0."""
    found = data.get(key) or default
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    if not is_number or not 0 <= found < float("inf"):
        raise _wrong(where, key, "a number above 0", found)
    return found


def _object(path: Path) -> dict[str, Any]:
    try:
        data = parse_json(_text(path))
    except ValueError as e:
        raise WorkloadError(f"{path} must be JSON", values=str(e), remedy="copy it again") from None
    if not isinstance(data, dict):
        raise WorkloadError(f"{path} must hold an object", values=type(data).__name__)
    return data


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise WorkloadError(
            "a bundle must hold requests.jsonl and meta.json",
            values=f"{path}: {e.strerror}",
            remedy="give the folder that holds them",
        ) from None
    except UnicodeDecodeError as e:
        raise WorkloadError(
            f"{path} must be text in UTF-8",
            values=f"byte {e.start}: {e.reason}",
            remedy="copy it again",
        ) from None
