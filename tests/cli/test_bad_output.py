"""Outputs that cannot be written: found early, one line, the old file stays whole."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from cachetune.core import record
from cachetune.core.errors import CacheTuneError
from cachetune.core.record import check_writable, write_atomic

from .file_cases import Case, snapshot

BENCHES = [("bench", name) for name in ("ttft", "quality", "grid", "serve")]
OUTPUTS = {"simulate": "trace", "tune": "out"}
SMALL = {"simulate": {}, "tune": {"trials": 2}}


def command(case: Case, name: str, out: Path | str) -> list[object]:
    return case.command(name, **SMALL[name], **{OUTPUTS[name]: out})


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize(
    ("out", "why"),
    [
        ("plan.json/out.json", "Not a directory"),
        ("plan.json/new/out.json", "Not a directory"),
        ("folder", "Is a directory"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_path_that_cannot_be_written(case: Case, name: str, out: str, why: str) -> None:
    (case.folder / "folder").mkdir()
    line = case.refused(*command(case, name, case.folder / out))
    assert "the output file must be writable, got" in line
    assert f"{why}; free space, or choose another path" in line


@pytest.mark.parametrize("args", [("calibrate", "--model", "llama-tiny"), *BENCHES])
def test_it_is_refused_before_anything_is_measured(case: Case, args: tuple[str, ...]) -> None:
    line = case.refused(*args, "--out", case.folder / "plan.json" / "out.json")
    assert "the output file must be writable" in line


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_full_device(case: Case, name: str) -> None:
    before = snapshot(case.folder)
    status, out, err = case.run(*command(case, name, "/dev/full"))
    last = err.splitlines()[-1]
    assert (status, out) == (2, "") and "Traceback" not in err
    assert "got /dev/full: No space left on device; free space" in last
    assert snapshot(case.folder) == before
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def raising(error: BaseException) -> Callable[..., Any]:
    def go(*_: object, **__: object) -> None:
        raise error

    return go


class HalfFull:
    """A file that takes half of what is written, then fails."""

    def __init__(self, file: FileIO, error: BaseException) -> None:
        self.file = file
        self.error = error

    def __enter__(self) -> HalfFull:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        self.file.write(data[: len(data) // 2])
        raise self.error


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
DENIED = PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.mark.parametrize("at", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("error", [FULL, DENIED, KeyboardInterrupt()])
def test_a_write_that_fails_midway(
    case: Case, monkeypatch: pytest.MonkeyPatch, at: str, error: BaseException
) -> None:
    """The old file stays, and nothing is left beside it."""
    out = case.folder / "trace.json"
    out.write_bytes(b"old")
    before = snapshot(case.folder)
    if at in ("fsync", "replace"):
        monkeypatch.setattr(record.os, at, raising(error))
    elif at == "open":
        monkeypatch.setattr(record, "open", raising(error), raising=False)
    else:
        monkeypatch.setattr(
            record, "open", lambda path, _: HalfFull(FileIO(path, "x"), error), raising=False
        )
    status, printed, err = case.run(*command(case, "simulate", out))
    monkeypatch.undo()
    interrupted = isinstance(error, KeyboardInterrupt)
    assert (status, printed, err.count("\n")) == (130 if interrupted else 2, "", 1)
    says = "interrupted" if interrupted else f"{getattr(error, 'strerror', '')}; free space, or"
    assert says in err
    assert snapshot(case.folder) == before


@pytest.mark.parametrize("error", [FULL, DENIED])
def test_a_full_disk_is_found_before_the_work(
    case: Case, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    """Not at the end of a search or a calibration."""
    monkeypatch.setattr(record.Path, "write_bytes", raising(error))
    line = case.refused(*case.command("tune", trials=10**9, out=case.folder / "new.json"))
    assert f"must be writable, got {case.folder / 'new.json'}: {error.strerror}" in line


def test_a_link_is_followed_and_a_device_stays(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("link", "null"):
        check_writable(tmp_path / name)
        write_atomic(tmp_path / name, b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "null").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_an_output_has_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_atomic(tmp_path / "out", b"")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_the_check_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a", tmp_path / "new" / "folder" / "a", None)
    assert not snapshot(tmp_path)
    with pytest.raises(CacheTuneError, match="must be writable"):
        check_writable(tmp_path / "a", tmp_path)
