"""A server and URLs for the tests of remote tiers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from .redis_server import RedisServer, call


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for all tests that leave it alive."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def server(shared_server: RedisServer) -> RedisServer:
    """Empty."""
    call(shared_server, "FLUSHALL")
    return shared_server


@pytest.fixture(params=["redis", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of each kind of remote tier."""
    if request.param == "redis":
        return request.getfixturevalue("server").url
    if importlib.util.find_spec("obstore") is None:
        pytest.skip("obstore is not installed")
    return f"file://{tmp_path}/objects"
