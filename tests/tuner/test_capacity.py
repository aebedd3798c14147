"""Capacity search on a queue whose answer is known, its intervals and its laws."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from cachetune.core.errors import CacheTuneError
from cachetune.core.rng import rng
from cachetune.tuner import known_queue
from cachetune.tuner.attainment import Attainment
from cachetune.tuner.capacity import find_capacity, ratio
from cachetune.tuner.trial import BATCHES, Trial, verdict

SERVICE_S = 0.1


def told(rate_rps: float, seed: int, good: np.ndarray, behind: float = 0.0) -> Trial:
    batches = np.array_split(good, BATCHES)
    each = tuple(int(b.sum()) for b in batches), tuple(len(b) for b in batches)
    return Trial(rate_rps, seed, float(good.mean()), behind, *each)


def mm1(
    slo_s: float,
    n: int = 4000,
    service_s: float = SERVICE_S,
    seen: list | None = None,
    n_whole: int | None = None,
) -> Callable[[float, int], Trial]:
    """Runs of a known queue; `seen` takes note of them."""
    run = known_queue.mm1(n, slo_s, service_s)

    def evaluate(rate_rps: float, seed: int) -> Trial:
        if seen is not None:
            seen.append((rate_rps, seed))
        return replace(run(rate_rps, seed), n_whole=n_whole)

    return evaluate


def known_rps(slo_s: float, share: float) -> float:
    return 1 / SERVICE_S - math.log(1 / (1 - share)) / slo_s


def test_the_interval_holds_the_rate_that_theory_gives():
    found = find_capacity(mm1(1.0), 0.9, range(8))
    assert found.rate is not None
    assert found.rate.low <= known_rps(1.0, 0.9) <= found.rate.high
    assert found.rate.high / found.rate.low < 1.2
    again = find_capacity(mm1(1.0), 0.9, range(8), start_rps=200.0)
    assert again.rate is not None
    assert again.rate.value == pytest.approx(found.rate.value, rel=0.03)


@pytest.mark.parametrize("n_seeds", [1, 2, 5])
def test_few_seeds_give_intervals_that_cover_and_can_be_used(n_seeds: int):
    """95 % are asked for; 40 questions of other seeds tell 80 % from it (p = 0.0004)."""
    held, widths = 0, []
    for first in range(0, 40 * n_seeds, n_seeds):
        rate = find_capacity(mm1(1.0), 0.9, range(first, first + n_seeds)).rate
        assert rate is not None
        held += rate.low <= known_rps(1.0, 0.9) <= rate.high
        widths.append(rate.high / rate.low - 1)
    assert held >= 33
    assert np.median(widths) < 0.35 / math.sqrt(n_seeds)


def test_pairs_are_compared_on_the_same_requests():
    """Twice as fast a server carries twice the rate; on the same requests almost exactly."""
    slow = find_capacity(mm1(1.0, 800), 0.9, range(4), tolerance=0.005)
    fast = find_capacity(mm1(0.5, 800, SERVICE_S / 2), 0.9, range(4), tolerance=0.005)
    found = ratio(fast, slow, 0.9)
    assert found is not None and slow.rate is not None
    assert found.value == pytest.approx(2.0, rel=0.01)
    assert found.high / found.low < 0.3 * (slow.rate.high / slow.rate.low - 1) + 1.02
    same = ratio(slow, slow, 0.9)
    assert same is not None and same.low == same.value == same.high == 1.0


def test_seeds_that_cannot_turn_a_rate_do_not_run():
    seen: list[tuple[float, int]] = []
    find_capacity(mm1(1.0, seen=seen), 0.9, range(5))
    assert len(set(seen)) == len(seen) < 60
    assert [seed for rate, seed in seen if rate == 2.0] == [0]  # far below: the first will do
    bad, good = (told(1.0, 0, np.full(100, g)) for g in (False, True))
    assert verdict([bad], 0.9, 5) is False and verdict([good], 0.9, 5) is None
    assert verdict([good, told(1.0, 1, np.full(100, True), behind=0.2)], 0.9, 2) is False
    assert verdict([good, told(1.0, 1, np.full(100, True), behind=0.09)], 0.5, 2) is True


def test_failures_that_are_spread_evenly_count_as_independent():
    """Every batch has the same share: still no more certain than independent requests are."""

    def evaluate(rate: float, seed: int) -> Trial:
        return told(rate, seed, np.arange(1000) % 100 >= round(rate))  # 1 % lost per req/s

    found = find_capacity(evaluate, 0.9, [0, 1], tolerance=0.002).rate
    assert found is not None and found.value == pytest.approx(10.5, rel=0.05)
    assert 8.0 < found.low < 9.6 and 10.9 < found.high < 12.5  # 2,000 at 10 %: 0.087 to 0.114


def test_windows_of_a_trace_that_overlap_say_it_once():
    free, whole = (find_capacity(mm1(1.0, n_whole=n), 0.9, range(5)).rate for n in (None, 4000))
    assert free is not None and whole is not None
    assert free.value == pytest.approx(whole.value, rel=0.02)
    assert whole.high / whole.low > 1.5 * (free.high / free.low - 1) + 1


def test_what_fails_without_load_does_not_blur_the_capacity():
    """Every eleventh request fails always; the rest are fine up to 20 req/s."""

    def evaluate(rate: float, seed: int) -> Trial:
        good = rng(seed, "always").random(2000) >= 1 / 11
        return told(rate, seed, good & (rate < 20))

    found = find_capacity(evaluate, 0.88, range(3)).rate
    assert found is not None and 19 < found.low <= found.value <= found.high < 21
    close = find_capacity(evaluate, 0.907, range(3)).rate
    assert close is None or close.low == 0.0  # too close to the level to be sure of any rate


def test_a_level_that_nothing_meets_says_what_is_closest():
    found = find_capacity(mm1(0.05), 0.9, [0])
    assert found.rate is None and ratio(found, found, 0.9) is None
    closest = found.closest()
    assert 0.3 < closest.good_share < 0.9
    assert closest.good_share == max(t.good_share for t in found.trials)


def test_where_no_request_is_good_the_closest_is_the_one_that_is_least_late():
    def hopeless(rate_rps: float, seed: int) -> Trial:
        late = {"in_ttft": 0.0, "in_tpot": 0.0, "ttft_ms_p99": 300 + 900 * rate_rps}
        return replace(told(rate_rps, seed, np.zeros(100, bool)), metrics=late)

    found = find_capacity(hopeless, 0.99, [0])
    assert found.rate is None
    assert found.closest().rate_rps == min(t.rate_rps for t in found.trials) < 0.1


def test_a_table_is_rebuilt_from_what_was_written_and_bad_arguments_are_refused():
    found = find_capacity(mm1(1.0, 500), 0.9, [3, 4])
    rows = [{**vars(t), "good": list(t.good), "judged": list(t.judged)} for t in found.trials]
    assert Attainment(map(Trial.of, rows), 0.9, [3, 4]).estimate() == found.rate
    for wrong in ({"attainment": 0.0}, {"attainment": 1.1}, {"seeds": []}, {"seeds": [1, 1]}):
        with pytest.raises(CacheTuneError):
            find_capacity(mm1(1.0), **{"attainment": 0.9, "seeds": [0], **wrong})
