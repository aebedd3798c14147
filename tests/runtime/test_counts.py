"""Only what a policy names is computed and read: counted on the runtime, not assumed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cachetune.core.layout import n_reads, read_bytes
from cachetune.core.plan import ReusePlan
from cachetune.runtime.runner import RunResult

from .model_cases import Bench, plan_with, prompt_workload, tokens

A, B, C, SUFFIX = tokens(40), tokens(33), tokens(50), tokens(12)
PARTS = (A, B, C, SUFFIX)
N_PROMPT = 135
N_LAYERS = 4


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    torch.set_num_threads(1)
    bench = Bench.make("llama", tmp_path_factory.mktemp("counts"))
    with bench.runner:
        yield bench


class Rows:
    """Which prompt positions passed through which layer."""

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by_layer: list[set[int]] = [set() for _ in range(N_LAYERS)]
        run_layers = bench.runner.transformer.run_layers

        def spy(hidden: Any, rows: Any, start: int, stop: int) -> Any:
            for layer in range(start, stop):
                found = set(rows[0].positions.tolist())
                assert not found & self.by_layer[layer], "a row was computed twice"
                self.by_layer[layer] |= found
            return run_layers(hidden, rows, start, stop)

        monkeypatch.setattr(bench.runner.transformer, "run_layers", spy)


@pytest.fixture
def rows(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Rows:
    return Rows(bench, monkeypatch)


def prepared(bench: Bench, plan: ReusePlan, tier: str = "file") -> RunResult:
    """Run once to have all chunks, then once more to be counted."""
    bench.run(PARTS, plan, tier)
    bench.runner.transformer.reset_counts()
    return bench.run(PARTS, plan, tier)


POLICIES = [
    (plan_with("full_recompute"), [135, 135, 135, 135], 0),
    (plan_with("prefix_cache"), [95, 95, 95, 95], 0),
    (plan_with("full_reuse"), [12, 12, 12, 12], 0),
    (plan_with("epic", epic_tokens=16), [44, 44, 44, 44], 0),
    (plan_with("epic", epic_tokens=40), [85, 85, 85, 85], 0),  # B has only 33
    (plan_with("cachetune", 0.0), [12, 12, 12, 12], 0),
    (plan_with("cachetune", 0.3), [36, 36, 36, 36], 0),  # 9 of B, 15 of C
    (plan_with("cachetune", 0.5, 0.2), [53, 53, 28, 28], 0),
    (plan_with("cachetune", 1.0, 0.3, 0.0), [95, 95, 36, 12], 0),
    (plan_with("cachetune", 1.0), [95, 95, 95, 95], 0),
    (plan_with("cacheblend", 0.3), [135, 36, 36, 36], 135),
    (plan_with("cacheblend", 0.0), [135, 12, 12, 12], 135),
]


@pytest.mark.parametrize(
    "knobs",
    [{}, {"layer_group": 1, "prefill_chunk_tokens": 16}, {"load_order": "chunk", "layer_group": 4}],
    ids=["default", "small", "chunk"],
)
@pytest.mark.parametrize(
    ("plan", "expected", "projected"),
    POLICIES,
    ids=lambda x: f"{x.policy}-{x.rules[0].ratios}" if isinstance(x, ReusePlan) else "",
)
def test_rows_per_layer(
    bench: Bench, plan: ReusePlan, expected: list[int], projected: int, knobs: dict[str, Any]
) -> None:
    prepared(bench, plan.replace(**knobs))
    transformer = bench.runner.transformer
    assert transformer.rows_by_layer == expected
    assert transformer.projected_rows == projected


@pytest.mark.parametrize(("plan", "expected", "projected"), POLICIES, ids=str)
def test_the_first_chunk_is_loaded_whole_and_the_suffix_computed(
    bench: Bench, rows: Rows, plan: ReusePlan, expected: list[int], projected: int
) -> None:
    bench.run(PARTS, plan)
    suffix = set(range(N_PROMPT - len(SUFFIX), N_PROMPT))
    first = set(range(len(A)))
    for layer, found in enumerate(rows.by_layer):
        assert suffix <= found
        if plan.policy == "full_recompute" or (plan.policy == "cacheblend" and layer == 0):
            assert first <= found
        else:
            assert not first & found


@torch.inference_mode()
def keys_and_values(bench: Bench, ids: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """K before RoPE and V of a text by the unmodified twin, float64 `[L, N, HK, D]` each."""
    taken: dict[str, list[np.ndarray]] = {"k_proj": [], "v_proj": []}
    hooks = []
    for layer in bench.twin.model.layers:
        for name, found in taken.items():

            def keep(_: Any, __: Any, out: torch.Tensor, to: list = found) -> None:
                to.append(out[0].view(len(ids), 2, 16).double().numpy().copy())

            hooks.append(getattr(layer.self_attn, name).register_forward_hook(keep))
    bench.twin(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return np.stack(taken["k_proj"]), np.stack(taken["v_proj"])


def critical(k: np.ndarray, v: np.ndarray, count: int) -> set[int]:
    """CacheTune section 4.1 by an explicit DFT: the `count` tokens of largest low-pass energy."""
    n = k.shape[1]
    keep = int(0.5 * (n // 2 + 1))
    t = np.arange(n)
    dft = np.exp(-2j * np.pi * np.outer(t, t) / n)
    low = (np.conj(dft).T @ np.diag(np.minimum(t, n - t) < keep) @ dft).real / n
    energy = sum(
        0.5 * np.linalg.norm(np.einsum("st,ltx->lsx", low, x.reshape(len(x), n, -1)), axis=2)
        for x in (k, v)
    )
    score = (energy / energy.sum(axis=1, keepdims=True)).mean(axis=0)
    return set(sorted(range(n), key=lambda i: (-score[i], i))[:count])


@pytest.mark.parametrize("ratio", [0.05, 0.15, 0.3, 0.77])
def test_cachetune_computes_the_tokens_of_the_paper(bench: Bench, rows: Rows, ratio: float) -> None:
    bench.run(PARTS, plan_with("cachetune", ratio))
    expected = set(range(N_PROMPT - len(SUFFIX), N_PROMPT))
    for chunk, offset in ((B, len(A)), (C, len(A) + len(B))):
        top = critical(*keys_and_values(bench, chunk), int(ratio * len(chunk)))
        expected |= {offset + i for i in top}
    assert rows.by_layer == [expected] * N_LAYERS


def test_cacheblend_computes_the_tokens_that_deviate_most(bench: Bench, rows: Rows) -> None:
    result = bench.run(PARTS, plan_with("cacheblend", 0.3))
    true_k, _ = keys_and_values(bench, tuple(t for part in PARTS for t in part))
    alone = np.concatenate([keys_and_values(bench, part)[0] for part in (A, B, C)], axis=1)
    score = ((true_k[1, : len(alone[1])] - alone[1]) ** 2).sum(axis=(1, 2))
    candidates = range(len(A), N_PROMPT - len(SUFFIX))
    expected = set(sorted(candidates, key=lambda i: (-score[i], i))[:24])
    (selected,) = [s.outcome.selected for s in result.timeline.spans if s.op.kind == "select"]
    assert set(selected) == expected
    suffix = set(range(N_PROMPT - len(SUFFIX), N_PROMPT))
    assert rows.by_layer == [set(range(N_PROMPT)), *[expected | suffix] * 3]


LOADED_ROWS = {
    "full_recompute": [(0, 0, 0)] * 4,
    "prefix_cache": [(40, 0, 0)] * 4,
    "full_reuse": [(40, 33, 50)] * 4,
    "cachetune": [(40, 17, 25)] * 2 + [(40, 27, 40)] * 2,
    "cacheblend": [(0, 0, 0)] + [(40, 33, 50)] * 3,
    "epic": [(40, 17, 34)] * 4,
}


@pytest.mark.parametrize("tier", ["dram", "file"])
@pytest.mark.parametrize("policy", LOADED_ROWS)
@pytest.mark.parametrize("request_bytes", [4096, 1 << 20])
def test_bytes_read_are_those_of_the_rows_loaded(
    bench: Bench, policy: str, tier: str, request_bytes: int
) -> None:
    plan = plan_with(policy, 0.5, 0.2, request_bytes=request_bytes)
    bench.run(PARTS, plan, tier)
    counters = bench.runner.store.counters
    before = counters.bytes_read, counters.requests
    result = bench.run(PARTS, plan, tier)
    sizes = [read_bytes(bench.runner.spec, n) for layer in LOADED_ROWS[policy] for n in layer if n]
    assert counters.bytes_read - before[0] == sum(sizes)
    assert counters.requests - before[1] == sum(n_reads(size, request_bytes) for size in sizes)
    assert sum(s.op.n_bytes for s in result.timeline.spans if s.op.kind == "load") == sum(sizes)
    overwritten = 16 + 25 if policy == "cacheblend" else 0  # loaded, then computed all the same
    assert result.n_reused_tokens[0] == sum(LOADED_ROWS[policy][-1]) - overwritten


def test_a_chunk_that_is_not_kept_is_computed(bench: Bench, rows: Rows) -> None:
    """Only the chunks the store has are reused, wherever they stand."""
    plan = plan_with("cachetune", 0.0)
    bench.run(PARTS, plan)
    stranger = tokens(20, 99)
    workload = prompt_workload([(A, stranger, C, SUFFIX)])
    for found in rows.by_layer:
        found.clear()
    index = bench.runner.index(plan)
    bench.runner.execute(workload, workload.requests[0], plan, index)
    new = set(range(len(A), len(A) + len(stranger)))
    end = len(A) + len(stranger) + len(C)
    assert rows.by_layer == [new | set(range(end, end + len(SUFFIX)))] * N_LAYERS
