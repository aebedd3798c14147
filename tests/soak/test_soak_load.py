"""The real executor under Poisson load, below capacity and above: nothing lost, nothing grows."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from cachetune.core.generators import rag_workload
from cachetune.core.invariants import check
from cachetune.core.metrics import littles_law, per_request
from cachetune.core.units import ns_to_ms
from cachetune.core.workload import Workload
from cachetune.runtime.runner import Runner, RunResult

from ..runtime import model_cases as cases
from .soak_log import Counts, Soak

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

N_REQUESTS = 50
"""In one round; a full run serves at least 300."""

LOADS = (0.5, 2.0)
"""Arrivals per second, relative to what the runner can do."""

RSS_GROWTH_MAX_MIB = 8.0
"""Since the warm-up, over all rounds. A lost KV buffer (half a MiB) per request shows at once."""

IDLE_NS = 500_000_000
PLAN = cases.plan_with(
    "cachetune", 0.4, 0.2, n_io_workers=2, prefill_chunk_tokens=64, max_num_seqs=16
)


def rss_mib() -> float:
    """Memory of this process that is in RAM, without what its allocator keeps for later.

    Every run starts threads, whose arenas would seem to grow for some thousand requests.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # other systems than glibc have no such call
        ctypes.CDLL(None).malloc_trim(0)
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def workload_of(seed: int, rate_rps: float | None) -> Workload:
    """Prompts of three of this seed's twelve passages."""
    return rag_workload(
        "load", seed, n_requests=N_REQUESTS, n_contents=12, chunk_tokens=(20, 80),
        chunks_per_request=3, suffix_tokens=(4, 20), output_tokens=(1, 12), rate_rps=rate_rps,
        vocab_size=cases.VOCAB,
    )  # fmt: skip


@dataclass
class Load:
    """A warm runner and what it could do and held then."""

    runner: Runner
    capacity_rps: float = 0.0
    rss_mib: float = 0.0
    threads: set[threading.Thread] = field(default_factory=set)

    def serve(self, seed: int, rate_rps: float | None, tier: str) -> tuple[Workload, RunResult]:
        """A round's requests on chunks in `tier`; chunks of former rounds leave the store."""
        workload = workload_of(seed, rate_rps)
        for entry, _ in list(self.runner.index(PLAN)._entries.values()):
            if entry.content_id not in workload.contents:
                self.runner.store.discard(entry.key)
        self.runner.prepare(workload, PLAN, tier)
        return workload, self.runner.serve(workload, PLAN, self.runner.index(PLAN))

    def warm_up(self) -> None:
        """Fill pools from both tiers with all requests at once, which also shows the capacity."""
        self.threads = set(threading.enumerate())
        for seed, tier in ((1000, "dram"), (1001, "file"), (1002, "dram")):
            timeline = self.serve(seed, None, tier)[1].timeline
            self.capacity_rps = 1e3 * N_REQUESTS / ns_to_ms(timeline.end_ns - timeline.start_ns)
        self.rss_mib = rss_mib()

    def one_round(self, number: int) -> Counts:
        """Serve and check; even rounds come below capacity, odd ones above."""
        if not self.rss_mib:
            self.warm_up()
        load, tier = LOADS[number % 2], ("dram", "file")[number // 2 % 2]
        interval_s = sys.getswitchinterval()
        workload, result = self.serve(number, load * self.capacity_rps, tier)
        check(result.timeline, workload, idle_ns=IDLE_NS)
        assert littles_law(result.timeline, workload).error < 1e-9
        assert (result.n_fallbacks, result.n_read_failures) == (0, 0)
        for request in workload.requests:
            made = len(result.token_ids.get(request.request_id, ()))
            assert made == request.output_tokens, f"request {request.request_id} made {made}"
        assert set(threading.enumerate()) == self.threads, "threads are left"
        assert sys.getswitchinterval() == interval_s
        free = self.runner._pool._free
        assert len({id(b) for b in free}) == len(free), "a buffer was given back twice"
        grown = rss_mib() - self.rss_mib
        assert grown <= RSS_GROWTH_MAX_MIB, f"{grown:.1f} MiB more than after the warm-up"
        waits = sorted(m.ttft_ms for m in per_request(result.timeline, workload))
        name = "above" if load > 1 else "below"
        return {
            f"requests_{name}": len(waits),
            f"ttft_{name}_ms_max": round(waits[-1], 3),
            "tokens": sum(len(made) for made in result.token_ids.values()),
            "rss_growth_mib_max": round(grown, 2),
        }


def test_load(soak: Soak, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    loaded, _ = cases.make_twins("llama")
    with Runner(loaded, tmp_path, cases.TIERS, kv_capacity_tokens=4096) as runner:
        soak.run("load", "tests/soak/test_soak_load.py", Load(runner).one_round)
