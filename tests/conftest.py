"""How tests are collected; options of the soak tests, which pytest reads in no deeper folder."""

from __future__ import annotations

from pathlib import Path

import pytest


class RootIsAFolder:
    """The root is the package, which pytest would import under the name of its folder: a checkout
    in `cache-tune` has none that can be imported. Tests import `cachetune` alone."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Dir | None:
        root = path == parent.config.rootpath
        return pytest.Dir.from_parent(parent, path=path) if root else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(RootIsAFolder())


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("soak")
    group.addoption("--rounds", type=int, help="most rounds of each soak test, for a quick look")
    group.addoption("--replay", type=int, help="run this round of a soak test, log nothing")
