"""Numbers that papers published, with their source, as they ship in `published_data/`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar

from pydantic import model_validator

from ..core.errors import CacheTuneError, SchemaError
from ..core.record import Document, Record

FOLDER = files(__package__).joinpath("published_data")
NAMES = ("cake", "cachetune", "kv_repair_h200", "cacheblend", "py_kvcache")


class PublishedTable(Record):
    """One table or figure: columns with units last, rows in the paper's order."""

    name: str
    where: str
    """Table, figure or section, and what it holds."""
    unit: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float, ...], ...]

    @model_validator(mode="after")
    def _check(self) -> PublishedTable:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"each row must have {len(self.columns)} columns, got {row}")
        return self

    def records(self) -> Iterator[dict[str, Any]]:
        """Rows by the names of the columns."""
        for row in self.rows:
            yield dict(zip(self.columns, row, strict=True))


class PublishedNumbers(Document):
    """What one paper says: where it stands, the settings, the tables."""

    document: ClassVar[str] = "published"
    version: ClassVar[int] = 1
    error: ClassVar[type[CacheTuneError]] = SchemaError

    paper: str
    reference: str
    read_from: str
    """The text of the paper, or notes of others on it."""
    settings: dict[str, str | float]
    tables: tuple[PublishedTable, ...]

    def table(self, name: str) -> PublishedTable:
        """The table called `name`.

        Raises:
            SchemaError: no such table; lists those there are.
        """
        for table in self.tables:
            if table.name == name:
                return table
        raise SchemaError(
            f"{self.paper} must have the table",
            values=repr(name),
            remedy=f"tables are {', '.join(t.name for t in self.tables)}",
        )

    def number(self, setting: str) -> float:
        """A setting that is a number.

        Raises:
            SchemaError: not there, or words.
        """
        found = self.settings.get(setting)
        if isinstance(found, str) or found is None:
            raise SchemaError(f"{self.paper} must give the number {setting}", values=repr(found))
        return float(found)


@cache
def published(name: str) -> PublishedNumbers:
    """The shipped numbers called `name`; read once."""
    text = FOLDER.joinpath(f"{name}.json").read_text(encoding="utf-8")
    return PublishedNumbers.parse(text, f"published_data/{name}.json")
