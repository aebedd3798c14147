"""`cachetune validate bundles`: where it looks for operator profiles."""

from __future__ import annotations

from pathlib import Path

import pytest
from cachetune.cli.validate_end_to_end import _profiles_near


@pytest.mark.parametrize("tree", ["profiles", "profiler/perf"])
@pytest.mark.parametrize("below", ["", "bench", "bench/examples/GPU/model"])
def test_profiles_are_found_in_the_data_or_above(tmp_path: Path, tree: str, below: str) -> None:
    data = tmp_path / below
    data.mkdir(parents=True, exist_ok=True)
    assert _profiles_near(data) == data / "profiles", "to be named as what is missing"
    (tmp_path / tree).mkdir(parents=True)
    assert _profiles_near(data) == tmp_path.resolve() / tree
