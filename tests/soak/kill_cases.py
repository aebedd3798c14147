"""A process that works on a store until it is killed, and what must hold of the store then."""

from __future__ import annotations

import mmap
import random
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from cachetune.core.chunk_index import content_id_of
from cachetune.core.layout import chunk_bytes
from cachetune.core.model_spec import PACKED_BITS, STORED_FORMATS, Stored
from cachetune.core.plan import SelectorName
from cachetune.core.workload import Workload
from cachetune.kernels.packing import Per, pack
from cachetune.runtime.loaded_model import LoadedModel
from cachetune.runtime.runner import Runner
from cachetune.runtime.tiers import TierConfig

from ..runtime import model_cases as cases
from .soak_log import Counts

PHASES = ("open", "ingest", "evict", "place", "discard", "serve")
"""What the process is at, by the number it leaves in shared memory."""

TEXTS = [cases.tokens(20 + number % 60, number) for number in range(60)]
ID_OF = {content_id_of(text): text for text in TEXTS}
FORMATS = STORED_FORMATS
SELECTORS: tuple[SelectorName, ...] = ("low_pass", "high_pass", "random")
PLAN = cases.plan_with("cachetune", 0.3, n_io_workers=2, layer_group=1)


def open_runner(loaded: LoadedModel, root: Path) -> Runner:
    """A store whose tiers hold a part of `TEXTS`, so that most puts and places evict."""
    most = chunk_bytes(loaded.spec, 80)
    tiers = (
        TierConfig("file", "file", capacity_bytes=20 * most),
        TierConfig("dram", "dram", capacity_bytes=5 * most),
        TierConfig("hbm", "device", capacity_bytes=3 * most, demote_to="dram"),
    )
    return Runner(loaded, root, tiers, kv_capacity_tokens=4096)


def work_forever(
    root: Path, loaded: LoadedModel, seed: int, phase: mmap.mmap, ready: Connection
) -> None:
    """Ingest, place, discard and serve until killed."""
    torch.set_num_threads(1)
    runner, draw = open_runner(loaded, root), random.Random(seed)
    ready.send(True)
    acts = (_ingest, _ingest, _place, _discard, _serve)
    focus = acts[seed % len(acts)]  # else most kills would fall into what takes longest
    while True:
        act = draw.choice(acts) if draw.random() < 0.15 else focus
        act(runner, draw, phase)


def _at(phase: mmap.mmap, name: str) -> None:
    phase[0] = PHASES.index(name)


def _putting(runner: Runner, tier: str) -> str:
    return "ingest" if runner.store.tiers[tier].fits(chunk_bytes(runner.spec, 80)) else "evict"


def _ingest(runner: Runner, draw: random.Random, phase: mmap.mmap) -> None:
    text, tier = draw.choice(TEXTS), draw.choice(["file", "file", "dram", "hbm"])
    _at(phase, _putting(runner, tier))
    runner.ingestor.ingest(text, selector=draw.choice(SELECTORS), tier=tier)


def _keys(runner: Runner) -> list[str]:
    return sorted(runner.store._catalog.kept)


def _place(runner: Runner, draw: random.Random, phase: mmap.mmap) -> None:
    keys = _keys(runner)
    if keys:
        _at(phase, "place")
        runner.store.place(draw.choice(keys), draw.choice(["dram", "dram", "file", "hbm"]))


def _discard(runner: Runner, draw: random.Random, phase: mmap.mmap) -> None:
    keys = _keys(runner)
    if len(keys) < 8:  # something must be left to read
        _ingest(runner, draw, phase)
    else:
        _at(phase, "discard")
        runner.store.discard(draw.choice(keys))


def _serve(runner: Runner, draw: random.Random, phase: mmap.mmap) -> None:
    workload, tier = workload_of(draw), draw.choice(["file", "dram", "hbm"])
    _at(phase, _putting(runner, tier))
    runner.prepare(workload, PLAN, tier, only_missing=True)
    _at(phase, "serve")
    runner.serve(workload, PLAN, runner.index(PLAN))


def workload_of(draw: random.Random) -> Workload:
    """Two prompts over texts that the store may hold."""
    prompts = [(*draw.sample(TEXTS, 2), cases.tokens(8, draw.randrange(100))) for _ in range(2)]
    return cases.prompt_workload(prompts, n_output=4)


def check_store(runner: Runner, draw: random.Random) -> Counts:
    """Every chunk reads back, files are those of the index, bytes add up (INV-4)."""
    store = runner.store
    kept = dict(store._catalog.kept)
    n_layers, used = runner.spec.n_layers, Counter[str]()
    for key, chunk in kept.items():
        entry, n = store.entry(key), chunk.entry.n_tokens
        for tier in {"file", entry.tier}:
            store.read(key, 0, n_layers, [n] * n_layers, 1 << 16, tier)
        assert sorted(store.order(key).tolist()) == list(range(n))
        assert chunk.path.stat().st_size == chunk.row.header_bytes + entry.n_bytes
        assert entry.tier in chunk.tiers
        for tier in chunk.tiers:
            used[tier] += chunk_bytes(runner.spec, n)
    if kept:
        _check_values(runner, draw.choice(sorted(kept)))
    names = {p.name for p in (store.root / "chunks").iterdir()}
    assert names == {f"{key}.chunk" for key in kept}, "files and index differ"
    listed = {row.key for row in store._index.rows()}
    assert listed == set(kept), "rows and index differ"
    for name, tier in store.tiers.items():
        assert tier.used_bytes == used[name], f"INV-4 {name}: {tier.used_bytes}, {used[name]}"
        assert not tier.overfull, f"INV-4 {name} holds {tier.used_bytes}"
    for selector in SELECTORS:
        store.index(selector).check_integrity()
    assert store.counters.bad_groups == store.counters.missing_files == 0
    return {"chunks_verified": len(kept), "reads": store.counters.reads}


def _check_values(runner: Runner, key: str) -> None:
    """A valid checksum over the wrong numbers would pass all else: encode the text again."""
    store, n_layers = runner.store, runner.spec.n_layers
    entry, order = store.entry(key), store.order(key)
    rows = store.read(key, 0, n_layers, [entry.n_tokens] * n_layers, 1 << 16)
    true = runner.transformer.encode(torch.tensor(ID_OF[entry.content_id]))
    for layer in range(n_layers):
        for found, values, per in (
            (rows.k, true.host_k, "channel"),
            (rows.v, true.host_v, "token"),
        ):
            kept = values[layer, order]
            gap = (found(layer) - kept).abs()
            assert bool((gap <= allowed_gap(kept, runner.spec.stored, per)).all()), (key, layer)


def allowed_gap(values: torch.Tensor, stored: Stored, per: Per) -> torch.Tensor:
    """How far stored values `[N, HK, D]` may lie from `values`: half a step of their group's codes.

    Beside that, what the second of two encodings and fp16 scales and zeros may be off.
    """
    rounding = torch.full_like(values, 1e-5)
    if stored == "native":
        return rounding
    if stored == "fp8":  # three bits behind the leading one; below 2**-6 steps of 2**-9
        return values.abs() * 2.0**-4 + 2.0**-10 + rounding
    step = pack(values, PACKED_BITS[stored], per).scale.float()
    dim = 0 if per == "channel" else 2
    step = step.repeat_interleave(32, dim).narrow(dim, 0, values.shape[dim])
    top = values.abs().amax(dim, keepdim=True)
    return step / 2 + top * 2.0**-9 + rounding
