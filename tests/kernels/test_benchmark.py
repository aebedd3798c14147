"""The kernel benchmark without a GPU: arithmetic, peers, and that wrong ones get no speed."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="triton is not installed; there is nothing to time")

import torch
from cachetune.kernels import benchmark, peers
from cachetune.kernels.benchmark import Ceilings, Timing, Trouble
from cachetune.kernels.registry import KernelCase, all_cases, representatives
from cachetune.kernels.stopwatch import Spread, seconds_of

CEILINGS = Ceilings(memory=1e12, matmul=1e12, host_link=1e9)
FULL = [c for c in all_cases() if not c.tiny]
ONE_EACH = [benchmark.smaller(c, 512) for c in representatives()]


def test_limit_is_the_longer_of_bytes_and_flops() -> None:
    case = replace(representatives()[0], bytes=4_000_000, flops=8_000_000)
    assert CEILINGS.seconds(case) == pytest.approx(8e-6)
    timing = benchmark.timing(case, Spread(16e-6, 15e-6, 17e-6, 20), CEILINGS)
    assert timing.fraction_of_limit == pytest.approx(0.5)
    assert timing.bytes_per_second == pytest.approx(0.25e12)
    assert CEILINGS.seconds(replace(case, kernel="gather_host")) == pytest.approx(2e-3)
    by_sm = replace(CEILINGS, sm_link=2e9)
    assert by_sm.seconds(replace(case, kernel="gather_host")) == pytest.approx(1e-3)


def test_a_wrong_kernel_is_noticed() -> None:
    case = next(c for c in all_cases() if c.tiny and c.kernel == "deviation")
    want = case.reference(case.make_inputs(0, "cpu"))
    assert benchmark.matches(case, case.reference(case.make_inputs(0, "cpu")), want)
    assert not benchmark.matches(case, [1.01 * y for y in want], want)
    assert not benchmark.matches(case, [], want)


def test_attention_flops_count_visible_keys() -> None:
    case = next(c for c in all_cases() if c.name == "sparse_attention/d64_one_tiny")
    position = int(case.make_inputs(0, "cpu")["positions"][0])
    assert case.flops == 4 * 64 * 6 * (position + 1)


def test_spread_is_of_the_runs_after_the_warm_up() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 5.0, 4.0]) == Spread(3.0, 2.0, 4.0, 5)
    calls: list[str] = []
    took = seconds_of([lambda: calls.append("a"), lambda: calls.append("b")], "cpu", 4, 1)
    assert took.n == 4 and calls == ["a", "b", "a", "b", "a"]


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda c: c.kernel)
def test_peers_compute_the_case(case: KernelCase) -> None:
    """Otherwise the reference would get no speed here."""
    found = list(benchmark.time_case(case, "cpu", CEILINGS, peers=False, n=2))
    assert isinstance(found[0], Timing), found[0]
    assert found[0].contender.startswith(benchmark.REFERENCE)
    assert not [f for f in found if isinstance(f, Trouble)]
    others = {f.contender: f for f in found[1:]}
    assert others["copy of as many bytes"].fraction_of_limit is None
    assert (len(others) == 1) == found[0].contender.endswith("no peer to check it")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [benchmark.smaller(c, 128) for c in representatives()[:4]], ids=lambda c: c.kernel
)
def test_compiled_peers_compute_the_case(case: KernelCase) -> None:
    """Here too, where a C++ compiler is; it takes its time."""
    found = {f.contender: f for f in benchmark.time_case(case, "cpu", CEILINGS, peers=True, n=2)}
    compiled = {name for name, p in peers.peers_of(case, "cpu").items() if p.compiled}
    assert compiled and not [f for f in found.values() if isinstance(f, Trouble)]
    assert compiled <= set(found)


@pytest.mark.parametrize(
    "case", [c for c in ONE_EACH if c.kernel != "pack"], ids=lambda c: c.kernel
)
def test_a_red_reference_gets_no_speed(case: KernelCase) -> None:
    def broken(x: dict[str, object]) -> tuple[torch.Tensor, ...]:
        first, *rest = case.reference(x)
        return (first + 1, *rest)

    found = list(benchmark.time_case(replace(case, reference=broken), "cpu", CEILINGS, peers=False))
    assert isinstance(found[0], Trouble) and "DISAGREES" in found[0].why
    wrong = [f for f in found[1:] if isinstance(f, Trouble)]
    assert wrong and all("WRONG RESULT" in f.why for f in wrong)


def test_a_peer_that_cannot_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(x: object) -> object:
        raise RuntimeError("no kernel image")

    broken = {"other": peers.Peer(explode)}  # type: ignore[arg-type]
    monkeypatch.setattr(benchmark, "peers_of", lambda case, device, compiled: broken)
    (*_, told) = benchmark.time_case(ONE_EACH[0], "cpu", CEILINGS, peers=True, n=2)
    assert isinstance(told, Trouble) and "no kernel image" in told.why


def test_a_kernel_that_the_gpu_refuses_is_told() -> None:
    """The other cases go on."""

    def refused(x: object) -> tuple[torch.Tensor, ...]:
        raise RuntimeError("out of resource: shared memory, Required: 262144\nmore")

    case = next(c for c in all_cases() if c.tiny and c.kernel == "deviation")
    want = case.reference(case.make_inputs(0, "cpu"))

    def told(launch: object) -> object:
        broken = replace(case, launch=launch)  # type: ignore[arg-type]
        return benchmark._time_ours(broken, want, "cpu", CEILINGS, 3)

    trouble = told(refused)
    assert isinstance(trouble, Trouble) and trouble.contender == "ours"
    assert "shared memory" in trouble.why and "more" not in trouble.why
    assert told(lambda x: tuple(y + 1 for y in want)) == Trouble(
        case.name, "ours", "WRONG RESULT, not timed"
    )
    assert isinstance(told(case.reference), Timing)


def test_every_kernel_has_peers_and_fits_when_smaller() -> None:
    assert {c.kernel for c in FULL} == set(peers.BY_KERNEL)
    for case in FULL:
        small = benchmark.smaller(case, 64)
        assert small.bytes < case.bytes and small.name.startswith(case.name)


def test_goals_are_those_of_the_shape() -> None:
    by_name = {c.name: benchmark.goals(c) for c in FULL}
    assert by_name["sparse_attention/d128_g4"] == (0.45, 0.6)
    assert by_name["sparse_attention/d128_g4_one"] == (0.6, 0.8)
    assert by_name["restore/k4_v4"] == by_name["pack/channel4"] == (0.6, 0.8)
    assert by_name["deviation/d128"] == (None, None)
    many = next(c for c in FULL if c.name == "sparse_attention/d128_g4")
    one = next(c for c in FULL if c.name == "sparse_attention/d128_g4_one")
    # Its limit would be a matmul in half precision.
    assert by_name["sparse_attention/d128_g4_fp32"] == (None, None)
    assert benchmark.goals(many, peers.FLEX) == (1.0, 1.2)
    assert benchmark.goals(one, peers.FLEX) == benchmark.goals(many, "ours?") == (None, None)
