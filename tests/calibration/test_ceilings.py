"""Limits measured at tiny sizes: each is there, is a rate, and leaves nothing behind."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="limits are measured with torch")

from cachetune.calibration import ceilings
from cachetune.calibration.ceilings import Ceiling, Sizes
from cachetune.core.errors import StoreError
from cachetune.kernels.stopwatch import Spread

TINY = Sizes(
    1 << 16, 32, disk_file_bytes=2 << 20, disk_sample_bytes=1 << 20, loopback_bytes=1 << 16
)


def test_every_limit_of_a_cpu(tmp_path: Path) -> None:
    found = ceilings.measure("cpu", tmp_path, sizes=TINY)
    assert {"device_copy", "matmul", "loopback"} <= set(found)
    assert all(0 < c.low <= c.rate <= c.high and c.n >= 20 for c in found.values())
    assert not list(tmp_path.iterdir())
    assert [r["ceiling"] for r in ceilings.as_rows(found)] == list(found)
    assert ceilings.as_json(found)["matmul"]["how"].startswith("32 x 32")


def test_without_a_folder_the_disk_is_left_out() -> None:
    assert "disk" not in ceilings.measure("cpu", sizes=TINY)


def test_slow_times_are_low_rates() -> None:
    one = Ceiling.of("copy", 100.0, "B/s", Spread(2.0, 1.0, 4.0, 20), "by hand")
    assert (one.rate, one.low, one.high) == (50.0, 25.0, 100.0)


def test_a_peer_that_hangs_up_ends_the_fetch() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"some")
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionError, match="hung up"):
            ceilings._fetcher(ours, 100)()


def test_no_room_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="room for a file"):
        ceilings.disk_ceiling(tmp_path / "file" / "below", TINY)
