"""Readers of measured kernel tables: AIConfigurator (Parquet), LLMServingSim and Vidur (CSV).

Each gives a `KernelTable`: sizes and seconds of one kind of kernel on one GPU. Which file is of
which GPU, and in which folder layout, is in `SOURCES`. Windowed attention is left out, and fp8 KV
in prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..core.errors import CacheTuneError
from .table_columns import positive, read_columns

Array = NDArray[np.float64]

LLAMA_8B = (4096, 14336, 32, 8, 128, 128256)
"""hidden, intermediate, heads, KV heads, head size, vocabulary of Llama-3.1-8B."""


@dataclass(frozen=True)
class KernelTable:
    """Measured calls of one kind of kernel; every array has one element per row."""

    kind: str
    gpu: str
    sizes: dict[str, Array]
    seconds: Array
    source: str

    def take(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> KernelTable:
        """Some of the rows."""
        sizes = {name: values[rows] for name, values in self.sizes.items()}
        return KernelTable(self.kind, self.gpu, sizes, self.seconds[rows], self.source)

    def shapes(self) -> NDArray[np.str_]:
        """What a model fixes, row by row: (n, k) of a matrix, heads and head size of attention."""
        names = ("n", "k") if "n" in self.sizes else ("n_heads", "n_kv_heads", "head_dim")
        columns = [self.sizes[n].astype(int).astype(str) for n in names if n in self.sizes]
        if not columns:
            return np.full(len(self.seconds), "-")
        found = columns[0]
        for column in columns[1:]:
            found = np.char.add(np.char.add(found, "x"), column)
        return found


def join(tables: Iterable[KernelTable]) -> list[KernelTable]:
    """One table per (GPU, kind), in order of first appearance."""
    groups: dict[tuple[str, str], list[KernelTable]] = {}
    for table in tables:
        groups.setdefault((table.gpu, table.kind), []).append(table)
    return [
        KernelTable(
            kind,
            gpu,
            {n: np.concatenate([t.sizes[n] for t in parts]) for n in parts[0].sizes},
            np.concatenate([t.seconds for t in parts]),
            "; ".join(dict.fromkeys(t.source for t in parts)),
        )
        for (gpu, kind), parts in groups.items()
    ]


def aic_gemm(path: Path, gpu: str, source: str) -> list[KernelTable]:
    """AIConfigurator `gemm_perf.parquet`, ms; bfloat16 and per-tensor fp8."""
    frame = read_columns(path, ("m", "n", "k", "latency"), ("gemm_dtype",))
    found = []
    for dtype, n_bytes in (("bfloat16", 2), ("fp8", 1)):
        rows = frame[frame.gemm_dtype == dtype]
        if len(rows):
            sizes = {c: rows[c].to_numpy() for c in ("m", "n", "k")}
            sizes["operand_bytes"] = np.full(len(rows), float(n_bytes))
            seconds = positive(path, rows.latency.to_numpy() / 1e3)
            found.append(KernelTable(f"gemm.{dtype}", gpu, sizes, seconds, source))
    return found


def aic_attention(path: Path, gpu: str, source: str) -> list[KernelTable]:
    """AIConfigurator `{context,generation}_attention_perf.parquet`, ms."""
    keys = ["batch_size", "isl", "step", "num_heads", "num_key_value_heads", "head_dim"]
    frame = read_columns(path, (*keys, "latency"), ("kv_cache_dtype",), extra=("window_size",))
    frame = frame[(frame.window_size.fillna(0) == 0) & (frame.head_dim <= 256)]
    if path.name.startswith("context"):
        dtypes = {"bfloat16": "prefill"}
    else:
        dtypes = {"bfloat16": "decode", "fp8": "decode.fp8"}
    found = []
    for dtype, kind in dtypes.items():
        rows = frame[frame.kv_cache_dtype == dtype]
        if not len(rows):
            continue
        rows = rows.groupby(keys, as_index=False).latency.median()  # some were measured twice
        sizes = {
            "batch": rows.batch_size.to_numpy(),
            "n_heads": rows.num_heads.to_numpy(),
            "n_kv_heads": rows.num_key_value_heads.to_numpy(),
            "head_dim": rows.head_dim.to_numpy(),
        }
        if kind == "prefill":
            sizes |= {"n_query": rows.isl.to_numpy(), "n_cached": np.zeros(len(rows))}
        else:
            sizes["context"] = rows.step.to_numpy() + 1  # the new token sees itself
        seconds = positive(path, rows.latency.to_numpy() / 1e3)
        found.append(KernelTable(kind, gpu, sizes, seconds, source))
    return found


def _attention(
    kind: str, gpu: str, source: str, seconds: Array, shape: tuple[int, int, int], **sizes: Array
) -> KernelTable:
    heads = dict(zip(("n_heads", "n_kv_heads", "head_dim"), shape, strict=True))
    fixed = {name: np.full(len(seconds), float(v)) for name, v in heads.items()}
    return KernelTable(kind, gpu, {**sizes, **fixed}, seconds, source)


def sim_attention(path: Path, gpu: str, source: str) -> list[KernelTable]:
    """LLMServingSim `tpN/attention.csv`, µs: rows of prefill alone and of decode alone."""
    names = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
    frame = read_columns(path, names)
    tp = _tp(path)
    shape = (LLAMA_8B[2] // tp, LLAMA_8B[3] // tp, LLAMA_8B[4])
    one = frame[(frame.n_decode == 0) & (frame.prefill_chunk > 0)]
    steps = frame[(frame.prefill_chunk == 0) & (frame.n_decode > 0) & (frame.kv_decode > 0)]
    return [
        _attention(
            "prefix",
            gpu,
            source,
            positive(path, one.time_us.to_numpy() / 1e6),
            shape,
            batch=np.ones(len(one)),
            n_query=one.prefill_chunk.to_numpy(),
            n_cached=one.kv_prefill.to_numpy(),
        ),
        _attention(
            "decode",
            gpu,
            source,
            positive(path, steps.time_us.to_numpy() / 1e6),
            shape,
            batch=steps.n_decode.to_numpy(),
            context=steps.kv_decode.to_numpy(),
        ),
    ]


def sim_dense(path: Path, gpu: str, source: str) -> list[KernelTable]:
    """LLMServingSim `tpN/dense.csv`, µs per layer by tokens: matrices, and what moves bytes."""
    frame = read_columns(path, ("tokens", "time_us"), ("layer",))
    return _dense(path, gpu, source, LLAMA_8B, _tp(path), _long(frame, 1e6))


def _long(frame: pd.DataFrame, per_s: float) -> dict[str, tuple[Array, Array]]:
    return {
        str(name): (rows.tokens.to_numpy(), rows.time_us.to_numpy() / per_s)
        for name, rows in frame.groupby("layer", sort=True)
    }


def _dense(
    path: Path,
    gpu: str,
    source: str,
    model: tuple[int, int, int, int, int, int],
    tp: int,
    times: dict[str, tuple[Array, Array]],
) -> list[KernelTable]:
    hidden, inter, heads, kv_heads, head_dim, _ = model
    heads, kv_heads, inter = heads // tp, max(1, kv_heads // tp), inter // tp
    matrices = {
        "qkv_proj": ((heads + 2 * kv_heads) * head_dim, hidden),
        "o_proj": (hidden, heads * head_dim),
        "gate_up_proj": (2 * inter, hidden),
        "down_proj": (hidden, inter),
    }
    moved = {
        "layernorm": 8 * hidden,
        "rotary_emb": 4 * (heads + kv_heads) * head_dim,
        "act_fn": 6 * inter,
    }
    found = []
    for name, (tokens, seconds) in times.items():
        seconds = positive(path, seconds)
        if name in matrices:
            n, k = matrices[name]
            sizes = {"m": tokens, "n": np.full(len(tokens), float(n))}
            sizes |= {
                "k": np.full(len(tokens), float(k)),
                "operand_bytes": np.full(len(tokens), 2.0),
            }
            found.append(KernelTable("gemm.bfloat16", gpu, sizes, seconds, source))
        elif name in moved:
            sizes = {"n_bytes": tokens * moved[name]}
            found.append(KernelTable("elementwise", gpu, sizes, seconds, source))
    return found


def sim_v0_attention(path: Path, gpu: str, source: str) -> list[KernelTable]:
    """LLMServingSim's older `attention.csv`, ms: prefill rows.

    There `kv_cache_size` counts the chunk too: times step with it at whole tiles of 64 keys, and it
    never is below the chunk.
    """
    names = ("prefill_chunk_size", "kv_cache_size", "batch_size")
    frame = read_columns(path, names, ("is_prefill", *_medians("attn_prefill")))
    frame = frame[_flags(path, frame.is_prefill)]
    median = pd.to_numeric(frame[_medians("attn_prefill")[0]], errors="coerce")
    seconds = median.to_numpy(dtype=float) / 1e3
    tp = 4
    query = frame.prefill_chunk_size.to_numpy()
    cached = frame.kv_cache_size.to_numpy() - query
    return [
        _attention(
            "prefix",
            gpu,
            source,
            positive(path, seconds),
            (64 // tp, 8 // tp, 128),
            batch=frame.batch_size.to_numpy(),
            n_query=query,
            n_cached=cached,
        )
    ]


def _flags(path: Path, column: pd.Series[Any]) -> NDArray[np.bool_]:
    if column.dtype != bool:
        raise CacheTuneError(
            f"{path}: {column.name} must be True or False in every row",
            values=", ".join(map(repr, column.unique()[:3])),
            remedy="the file may be cut short; copy it again",
        )
    found: NDArray[np.bool_] = column.to_numpy(dtype=bool)
    return found


def _shape(path: Path, rows: pd.DataFrame, columns: tuple[str, ...]) -> tuple[int, ...]:
    """What these rows say of a model, at the first of them."""
    found = {name: int(rows[name].iloc[0]) for name in columns}
    if min(found.values()) < 1:
        raise CacheTuneError(
            f"{path} must hold a model's shape, each number at least 1",
            values=", ".join(f"{name}={n}" for name, n in found.items()),
            remedy="copy the file again",
        )
    return tuple(found.values())


def _medians(*names: str) -> list[str]:
    return [f"time_stats.{name}.median" for name in names]


def vidur_attention(path: Path, gpu: str, source: str) -> list[KernelTable]:
    """Vidur `attention.csv`, ms: prefill behind a prefix; decode (context without itself)."""
    names = ("prefill_chunk_size", "kv_cache_size", "batch_size", "n_q_head", "n_kv_head", "n_embd")
    frame = read_columns(path, (*names, *_medians("attn_prefill", "attn_decode")), ("is_prefill",))
    heads, kv_heads, hidden = _shape(path, frame, ("n_q_head", "n_kv_head", "n_embd"))
    whole = (heads, kv_heads, hidden // heads)
    is_prefill = _flags(path, frame.is_prefill)
    one, steps = frame[is_prefill], frame[~is_prefill]
    prefill, decode = _medians("attn_prefill", "attn_decode")
    return [
        _attention(
            "prefix",
            gpu,
            source,
            positive(path, one[prefill].to_numpy() / 1e3),
            whole,
            batch=one.batch_size.to_numpy(),
            n_query=one.prefill_chunk_size.to_numpy(),
            n_cached=one.kv_cache_size.to_numpy(),
        ),
        _attention(
            "decode",
            gpu,
            source,
            positive(path, steps[decode].to_numpy() / 1e3),
            whole,
            batch=steps.batch_size.to_numpy(),
            context=steps.kv_cache_size.to_numpy() + 1,
        ),
    ]


VIDUR_OPS = {
    "attn_pre_proj": "qkv_proj",
    "attn_post_proj": "o_proj",
    "mlp_up_proj": "gate_up_proj",
    "mlp_down_proj": "down_proj",
    "attn_rope": "rotary_emb",
    "mlp_act": "act_fn",
    "post_attention_layernorm": "layernorm",
}


def vidur_mlp(path: Path, gpu: str, source: str) -> list[KernelTable]:
    """Vidur `mlp.csv`, ms by tokens and tensor-parallel degree.

    The mean is read, not the median: most of these files hold whole microseconds.
    """
    shape = ("n_head", "n_kv_head", "n_embd", "n_expanded_embd", "vocab_size")
    means = {op: f"time_stats.{op}.mean" for op in VIDUR_OPS}
    found = []
    frame = read_columns(path, (*shape, "num_tokens", "num_tensor_parallel_workers"))
    frame = frame.join(read_columns(path, means.values(), gaps=True))
    for tp, rows in frame.groupby("num_tensor_parallel_workers"):
        if tp < 1:
            raise CacheTuneError(
                f"{path}: num_tensor_parallel_workers must be at least 1", values=f"{tp:g}"
            )
        heads, kv_heads, hidden, inter, vocab = _shape(path, rows, shape)
        model = (hidden, inter, heads, kv_heads, hidden // heads, vocab)
        tokens = rows.num_tokens.to_numpy()
        times = {}
        for op, column in means.items():
            seconds = rows[column].to_numpy() / 1e3
            there = seconds > 0  # below half a microsecond some files say 0
            times[VIDUR_OPS[op]] = (tokens[there], seconds[there])
        found += _dense(path, gpu, source, model, int(tp), times)
    return found


def _tp(path: Path) -> int:
    number = path.parent.name.removeprefix("tp")
    if not (number.isascii() and number.isdigit() and int(number)):
        raise CacheTuneError(
            "a folder tp<N> must name the tensor-parallel degree", values=str(path.parent)
        )
    return int(number)


Reader = Callable[[Path, str, str], list[KernelTable]]
AIC = "ai-dynamo/aiconfigurator @095f58a, Apache-2.0"
SIM = "casys-kaist/LLMServingSim @5daddb2, MIT"
VIDUR = "microsoft/vidur @7d47513, MIT"
FORK = "AKafakA/vidur_opt_scheduler, MIT"
AIC_GPUS = {"a100_sxm": "A100-SXM-80GB", "h100_sxm": "H100-SXM", "l40s": "L40S"}
SIM_GPUS = {"RTX4090": "RTX-4090", "RTXPRO6000": "RTX-PRO-6000"}

SOURCES: tuple[tuple[str, str, str, Reader], ...] = (
    *(
        (f"aiconfigurator/data/{folder}/{table}", gpu, AIC, reader)
        for folder, gpu in AIC_GPUS.items()
        for table, reader in (
            ("gemm/vllm/*/gemm_perf.parquet", aic_gemm),
            ("attention/vllm/*/context_attention_perf.parquet", aic_attention),
            ("attention/vllm/*/generation_attention_perf.parquet", aic_attention),
        )
    ),
    *(
        (f"llmservingsim/profiles/{folder}/*/Llama-3.1-8B/bf16/tp*/{table}", gpu, SIM, reader)
        for folder, gpu in SIM_GPUS.items()
        for table, reader in (("attention.csv", sim_attention), ("dense.csv", sim_dense))
    ),
    (
        "llmservingsim/profiles/H100-v0/v0_H100_llama70b_tp4/attention.csv",
        "H100-SXM",
        SIM,
        sim_v0_attention,
    ),
    ("vidur/compute/a30/Qwen-2-7B/attention.csv", "A30", FORK, vidur_attention),
    ("vidur/compute/a30/Qwen-2-7B/mlp.csv", "A30", FORK, vidur_mlp),
    ("vidur/compute/a40/*/*/mlp.csv", "A40", VIDUR, vidur_mlp),
    ("vidur/compute/a100/*/*/mlp.csv", "A100-SXM-80GB", VIDUR, vidur_mlp),
    ("vidur/compute/h100/*/*/mlp.csv", "H100-SXM", VIDUR, vidur_mlp),
)
"""(glob under the data folder, GPU, source and licence, reader)."""


def read_tables(data: Path) -> list[KernelTable]:
    """All tables under `data`, joined by GPU and kind.

    Where AIConfigurator measured the matrices of a GPU, Vidur's are not mixed in: another engine
    and whole microseconds. They stay for what moves bytes only.

    Raises:
        CacheTuneError: no table there, or a malformed one.
    """
    found: list[KernelTable] = []
    for pattern, gpu, source, reader in SOURCES:
        for path in sorted(data.glob(pattern)):
            tables = reader(path, gpu, source)
            has = {t.kind for t in found if t.gpu == gpu and t.source != source}
            found += [t for t in tables if t.kind not in has and len(t.seconds)]
    if not found:
        raise CacheTuneError(
            "the data folder must hold measured kernel tables",
            values=str(data),
            remedy="give the folder above aiconfigurator/, llmservingsim/ and vidur/",
        )
    return join(found)
