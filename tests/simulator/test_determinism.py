"""INV-6: the same seed gives the same bytes, whatever the process and its hash seed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from cachetune.core.block_pool import BlockPool
from cachetune.core.engine import Engine
from cachetune.core.executor import execute, serve
from cachetune.core.generators import rag_workload
from cachetune.core.metrics import summary
from cachetune.core.ops import Schedule
from cachetune.core.plan import RatioRule, ReusePlan
from cachetune.core.record import canonical_json
from cachetune.core.timeline import Timeline
from cachetune.core.trace import write_chrome
from cachetune.simulator.executor import SimExecutor
from support import make_index, make_op, make_profile

PLAN = ReusePlan(rules=(RatioRule(ratios=(0.4, 0.2)),), n_io_workers=3, prefill_chunk_tokens=128)


def simulate(seed: int) -> Timeline:
    workload = rag_workload(
        "w",
        seed,
        n_requests=12,
        n_contents=9,
        chunk_tokens=(20, 80),
        chunks_per_request=4,
        suffix_tokens=8,
        output_tokens=(1, 6),
        rate_rps=20_000.0,
    )
    profile = make_profile()
    engine = Engine(workload, profile.model, PLAN, make_index(workload), BlockPool(60))
    return serve(workload, engine, SimExecutor(profile, seed=seed, noise=0.2))


def digest(folder: Path, seed: int) -> str:
    """Hash of everything a run leaves: spans, trace, summary."""
    timeline = simulate(seed)
    write_chrome(folder / "trace", timeline)
    workload = rag_workload("w", seed, n_requests=12, n_contents=9, chunks_per_request=4)
    found = canonical_json(summary(timeline, workload)).encode()
    data = repr(timeline).encode() + (folder / "trace").read_bytes() + found
    return hashlib.sha256(data).hexdigest()


def test_two_runs_leave_the_same_bytes(tmp_path: Path):
    assert digest(tmp_path, 5) == digest(tmp_path, 5)
    assert digest(tmp_path, 5) != digest(tmp_path, 6)


def test_the_hash_seed_does_not_matter(tmp_path: Path):
    code = (
        "import sys, pathlib, importlib.util as u\n"
        "spec = u.spec_from_file_location('t', sys.argv[1])\n"
        "t = u.module_from_spec(spec); spec.loader.exec_module(t)\n"
        "print(t.digest(pathlib.Path(sys.argv[2]), 5))"
    )
    found = set()
    for hash_seed in ("0", "4711"):
        env = {
            **os.environ,
            "PYTHONHASHSEED": hash_seed,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", code, __file__, str(tmp_path)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        found.add(done.stdout.strip())
    assert found == {digest(tmp_path, 5)}


def test_a_change_on_one_stream_moves_no_noise_on_another():
    profile = make_profile()
    ops = [make_op(i, "prefill", "a", layer_stop=4, n_tokens=9) for i in range(5)]
    more = [make_op(10 + i, "prefill", "b", layer_stop=4, n_tokens=9) for i in range(5)]
    alone = execute(Schedule.of(ops), SimExecutor(profile, seed=1, noise=0.5))
    mixed = execute(Schedule.of([*more, *ops]), SimExecutor(profile, seed=1, noise=0.5))
    durations = [s.duration_ns for s in alone.spans]
    assert [s.duration_ns for s in mixed.by_stream()["0:a"]] == durations
    assert [s.duration_ns for s in mixed.by_stream()["0:b"]] != durations


def test_noise_keeps_the_mean_and_has_the_asked_spread():
    profile = make_profile(coefficients_s={"head.op": 1e-3})
    ops = [make_op(i) for i in range(4000)]
    spans = execute(Schedule.of(ops), SimExecutor(profile, noise=0.2)).spans
    durations = [s.duration_ns / 1e6 for s in spans]
    mean = sum(durations) / len(durations)
    deviation = (sum((d - mean) ** 2 for d in durations) / len(durations)) ** 0.5
    assert abs(mean - 1) < 4 * 0.2 / 4000**0.5
    assert 0.19 < deviation < 0.22


def test_no_noise_draws_nothing():
    ops = [make_op(i) for i in range(5)]
    found = [execute(Schedule.of(ops), SimExecutor(make_profile(), seed=s)) for s in (1, 2)]
    assert found[0] == found[1]
