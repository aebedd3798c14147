"""Options of the soak tests; here, because pytest reads options of no deeper folder."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("soak")
    group.addoption("--rounds", type=int, help="most rounds of each soak test, for a quick look")
    group.addoption("--replay", type=int, help="run this round of a soak test, log nothing")
