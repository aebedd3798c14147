"""`Owners`: the processes that have one store folder open. Each locks one byte of a file.

A lock ends with its process, however that ends, so what a dead owner left behind can be told.
Open-file-description locks: they belong to the open file, so two stores in one process differ.
"""

from __future__ import annotations

import fcntl
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core.errors import StoreError

MAX_OWNERS = 1024
NOBODY = MAX_OWNERS + 1
"""Never alive: owns claims whose work has ended but for what could not be removed yet."""
_GATE = 0
_FLOCK = "hhqqi4x"


class Owners:
    """This process's place among those that have the folder open.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab+")
        self.number = 0
        self.alone = False
        """True when nobody else had the folder open as this one joined: it may repair."""

    @contextmanager
    def joining(self) -> Iterator[None]:
        """Take a number; who else opens the folder waits until the body ends.

        Raises:
            StoreError: too many processes.
        """
        self._set(fcntl.F_WRLCK, _GATE, wait=True)
        try:
            self._keep_out_version_1()
            self.alone = not self._is_locked(1, MAX_OWNERS)
            free = (i for i in range(1, MAX_OWNERS + 1) if self._set(fcntl.F_WRLCK, i))
            self.number = next(free, 0)
            if not self.number:
                raise StoreError(
                    f"a store folder can be open {MAX_OWNERS} times at once",
                    values=str(self._file.name),
                    remedy="close some of them",
                )
            yield
        finally:
            self._set(fcntl.F_UNLCK, _GATE)

    def is_alive(self, number: int) -> bool:
        """Whether the owner of that number still has the folder open."""
        return number == self.number or self._is_locked(number, 1)

    def close(self) -> None:
        """Leave; every lock ends with the file."""
        self._file.close()

    def _keep_out_version_1(self) -> None:
        """Programs that allowed one process per folder locked the whole file, by flock."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                "a store folder must not be open in an older version of this program",
                values=str(self._file.name),
                remedy="close that one, or choose another folder",
            ) from None

    def _set(self, kind: int, byte: int, *, wait: bool = False) -> bool:
        command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
        try:
            fcntl.fcntl(self._file, command, struct.pack(_FLOCK, kind, 0, byte, 1, 0))
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _is_locked(self, byte: int, n: int) -> bool:
        """By another open file."""
        ask = struct.pack(_FLOCK, fcntl.F_WRLCK, 0, byte, n, 0)
        kind: int = struct.unpack(_FLOCK, fcntl.fcntl(self._file, fcntl.F_OFD_GETLK, ask))[0]
        return kind != fcntl.F_UNLCK
