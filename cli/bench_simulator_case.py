"""One case of `cachetune bench simulator`, in a process of its own; the study beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..core.request_table import RequestTable

MODEL, GPU, DISK, NETWORK = "Llama-3.1-8B", "H100-SXM", "nvme-gen4", "25g-rdma"
SLO = {"ttft_ms": 2000.0, "tpot_ms": 50.0}
TRACE_REQUESTS, TRACE_RPS = 12_031, 3.4
SHORT_RPS = 40.0


def made_trace(n: int | None, seed: int) -> RequestTable:
    """Lengths and rate of the Mooncake conversation trace; passages are shared by Zipf's law."""
    from ..core.arrivals import Arrivals
    from ..core.trace_make import Lengths, rag_table

    return rag_table(
        n or TRACE_REQUESTS,
        Arrivals(rate_rps=TRACE_RPS),
        passages=100_000,
        per_request=23,
        question=Lengths(mean=259, cv=0.3, high=512),
        output=Lengths(mean=343, cv=0.8, high=2000),
        seed=seed,
    )


def measured(case: Mapping[str, Any]) -> dict[str, Any]:
    """A row: the case in a fresh interpreter.

    Raises:
        CacheTuneError: it failed; the last line that it said.
    """
    from ..core.errors import CacheTuneError

    package = __name__.partition(".")[0]
    code = f"from {__name__} import child; child()"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(case)], env=env, capture_output=True, text=True
    )
    if run.returncode:
        said = run.stderr.strip().splitlines()[-1:]
        raise CacheTuneError(f"a case of {package} must run to its end", values=" ".join(said))
    row: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return row


def child() -> None:
    """What the fresh interpreter does; its row is the last line of stdout."""
    from statistics import median
    from time import process_time

    from ..core.catalogue import load_catalogue
    from ..core.machine_spec import compose
    from ..core.model_presets import model_of
    from ..core.trace_files import read_trace
    from ..core.workload import Slo
    from ..simulator.serving import serve_trace
    from ..tuner.candidate import Candidate

    case = json.loads(sys.argv[1])
    chosen = Candidate(machine=compose(load_catalogue(), GPU, disk=DISK, network=NETWORK))
    model = model_of(MODEL)
    cost = chosen.cost(model)
    fleet = chosen.fleet(model, Slo(**SLO), case.get("replicas", 1))
    ready_s = process_time()  # of the interpreter, from its start
    if "short" in case:
        table = _short(case["short"], case["seed"])
    else:
        table = read_trace(case["trace"], first=case["first"])
    read_s = process_time() - ready_s
    times = []
    summary: dict[str, Any] = {}
    for _ in range(1 + case["repeats"]):
        began = process_time()
        summary = serve_trace(table, fleet, cost).summary()
        times.append(process_time() - began)
        if len(times) == 1:
            peak_mib = _peak_mib()
    cpu_s = median(times[1:] or times)
    row = {
        "case": "short" if "short" in case else _words(case["replicas"]),
        "n_requests": len(table),
        "cpu_s": cpu_s,
        "requests_per_cpu_s": len(table) / cpu_s,
        "cold_start_cpu_s": ready_s + max(0.0, times[0] - cpu_s),
        "read_cpu_s": read_s,
        "peak_mib": peak_mib,
        "peak_mib_at_end": _peak_mib(),
        "run_cpu_s": times,
        "fleet": chosen.name,
        **{k: summary[k] for k in ("n_events", "n_steps", "ttft_ms_p99", "utilisation")},
    }
    print(json.dumps(row))


def study(
    path: Path,
    table: RequestTable,
    n_trials: int,
    workers: int,
    seed: int,
    tell: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Fleets for the trace by Optuna: how long it takes, and its front."""
    from time import perf_counter

    from ..core.model_presets import model_of
    from ..core.workload import Slo
    from ..tuner.trace_study import StudyQuestion, front, trace_study
    from ..tuner.traffic import rate_of, traffic_of

    question = StudyQuestion(
        model=model_of(MODEL),
        traffic=traffic_of(str(path)),
        slo=Slo(**SLO),
        n_requests=len(table),
        rate_rps=rate_of(table),
        n_trials=n_trials,
        seed=seed,
    )
    began = perf_counter()
    _, rows = trace_study(
        question, workers=workers, on_done=lambda done, of: tell("trials", done, of)
    )
    wall_s = perf_counter() - began
    return {
        "n_trials": n_trials,
        "workers": workers,
        "wall_s": wall_s,
        "n_failed": sum(bool(r["why_not"]) for r in rows),
        "front": front(rows),
    }


def _short(n: int, seed: int) -> RequestTable:
    from ..core.arrivals import Arrivals
    from ..core.trace_make import Lengths, plain_table

    prompt, output = Lengths(mean=200, cv=0.5), Lengths(mean=20, cv=0.5)
    return plain_table(n, Arrivals(rate_rps=SHORT_RPS), prompt, output, seed)


def _words(n_replicas: int) -> str:
    return f"{n_replicas} replica" + ("s" if n_replicas > 1 else "")


def _peak_mib() -> float:
    """Most memory this process ever had; the kernel's count of it is not inherited."""
    import resource

    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
