"""The fewest replicas, found with few tries."""

from __future__ import annotations

import pytest
from cachetune.tuner.fleet_size import fewest


@pytest.mark.parametrize(
    ("least", "guess", "most"), [(1, 1, 4), (7, 40, 90), (40, 7, 90), (9, 9, 9)]
)
def test_the_fewest_are_found_with_few_tries(least: int, guess: int, most: int):
    tried: list[int] = []

    def carries(count: int) -> bool:
        tried.append(count)
        return count >= least

    assert fewest(carries, guess, most) == least
    assert len(set(tried)) == len(tried) <= 12 and max(tried) <= most
    assert fewest(lambda count: False, guess, most) is None
