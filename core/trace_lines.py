"""`TraceSource`: a trace file line by line; a complaint names the line, the field, the value.

A file that begins as gzip does is read through it, whatever its name.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from .errors import WorkloadError
from .units import NS_PER_S

LINE_BYTES_MAX = 1 << 28
"""A longer line is not one of a trace."""

NS_MAX = 1 << 62
"""Times fit into int64 with room for sums."""

GZIP = b"\x1f\x8b"

_SHOWN_MAX = 60


class TraceSource:
    """Lines of one file, and the errors of what they hold.

    Raises:
        WorkloadError: no such file, not a regular one, not readable.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise WorkloadError(
                "a trace is a regular file", values=str(path), remedy="check the path"
            )

    def sha256(self) -> str:
        """Of all bytes, hexadecimal."""
        try:
            with open(self.path, "rb") as f:
                return hashlib.file_digest(f, "sha256").hexdigest()
        except OSError as e:
            raise self._unreadable(e) from None

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Lines that are not blank, numbered from 1."""
        try:
            with self._opened() as f:
                number = 0
                while line := f.readline(LINE_BYTES_MAX):
                    number += 1
                    if len(line) == LINE_BYTES_MAX:
                        raise self.error(
                            number, "a line is shorter than 256 MiB", f"{len(line)} bytes"
                        )
                    if not line.isspace():
                        yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise WorkloadError(
                "a compressed trace is whole",
                values=f"{self.path}, after line {number}: {e}",
                remedy="fetch it again: it may be cut short or damaged",
            ) from None
        except OSError as e:
            raise self._unreadable(e) from None

    def _opened(self) -> IO[bytes]:
        file = open(self.path, "rb")  # noqa: SIM115, the caller closes it
        if file.read(len(GZIP)) != GZIP:
            file.seek(0)
            return file
        file.close()
        return gzip.open(self.path)  # type: ignore[return-value]

    def objects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """JSON objects, one per line."""
        for number, line in self.lines():
            yield number, self.parsed(number, line)

    def parsed(self, number: int, line: bytes) -> dict[str, Any]:
        """The JSON object of one line."""
        try:
            found = json.loads(line)
        except json.JSONDecodeError as e:
            what = f"{e.msg} at column {e.colno}"
        except UnicodeDecodeError as e:
            what = f"byte 0x{e.object[e.start]:02x} is not UTF-8"
        except (ValueError, RecursionError) as e:  # a number or a nesting beyond all measure
            what = str(e).split(";")[0]
        else:
            if isinstance(found, dict):
                return found
            what = type(found).__name__
        raise self.error(
            number, "each line is one JSON object", what, "the file may be cut short or damaged"
        )

    def records(self, columns: Mapping[str, str]) -> Iterator[tuple[int, dict[str, str]]]:
        """Rows of a CSV file with a header, as text by our names; `columns` maps ours to theirs."""
        lines = self.lines()
        _, header = next(lines, (0, b""))
        names = _cells(header)
        for theirs in columns.values():
            if names is None or theirs not in names:
                raise self.error(
                    1, f"the header names the column '{theirs}'", short(names or header)
                )
        assert names is not None
        places = {ours: names.index(theirs) for ours, theirs in columns.items()}
        for number, line in lines:
            cells = _cells(line)
            if cells is None or len(cells) != len(names):
                raise self.error(
                    number,
                    f"each row has {len(names)} columns",
                    short(line) if cells is None else str(len(cells)),
                    "the file may be cut short or damaged",
                )
            yield number, {ours: cells[place] for ours, place in places.items()}

    def error(
        self, line: int, rule: str, values: str, remedy: str = "correct or drop this line"
    ) -> WorkloadError:
        """What is wrong with a line."""
        return WorkloadError(
            rule, values=f"{values} in line {line} of {self.path.name}", remedy=remedy
        )

    def bad(self, line: int, field: str, value: object, rule: str) -> WorkloadError:
        """What is wrong with a field."""
        return self.error(line, f"{field} {rule}", f"{field}={short(value)}")

    def field(self, line: int, row: Mapping[str, Any], name: str) -> Any:
        """A field that must be there."""
        try:
            return row[name]
        except KeyError:
            raise self.error(line, f"each line has the field '{name}'", short(list(row))) from None

    def text_count(self, line: int, name: str, cell: str) -> int:
        """A count in a CSV cell."""
        try:
            return int(_plain(cell))
        except ValueError:
            raise self.bad(line, name, cell, "is a whole number") from None

    def time_ns(self, line: int, name: str, value: object, unit_ns: int = NS_PER_S) -> int:
        """A number of `unit_ns` as nanoseconds; whole numbers are exact."""
        if type(value) is int and abs(value) < NS_MAX // unit_ns:
            return value * unit_ns
        if type(value) is float and math.isfinite(value) and abs(value) < NS_MAX / unit_ns:
            return round(value * unit_ns)
        raise self.bad(line, name, value, "is a finite number, within 146 years of 0")

    def text_time_ns(self, line: int, name: str, cell: str) -> int:
        """Seconds in a CSV cell, as nanoseconds."""
        try:
            value = float(_plain(cell))
        except ValueError:
            raise self.bad(line, name, cell, "is a number of seconds") from None
        return self.time_ns(line, name, value)

    def _unreadable(self, e: OSError) -> WorkloadError:
        return WorkloadError(
            "a trace is readable", values=f"{self.path}: {e.strerror}", remedy="check the path"
        )


def short(value: object) -> str:
    """The value in ASCII, cut where it is long."""
    text = ascii(value)
    return text if len(text) <= _SHOWN_MAX else text[: _SHOWN_MAX - 3] + "..."


def _plain(cell: str) -> str:
    """The cell, unless Python would read a number where others see none."""
    return cell if cell.isascii() and "_" not in cell else ""


def _cells(line: bytes) -> list[str] | None:
    try:
        text = line.decode("utf-8-sig").rstrip("\r\n")
        return next(csv.reader([text]), None) if '"' in text else text.split(",")
    except (UnicodeDecodeError, csv.Error):
        return None
