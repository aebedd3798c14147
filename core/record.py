"""Frozen, validated records and the JSON documents users write or keep.

A `Document` is a record with a schema version that is saved to disk: written whole or not at all,
read strictly (unknown keys, wrong types and old versions are refused with a remedy).
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import CacheTuneError, SchemaError

Made = TypeVar("Made")

TEMP_PREFIX = ".cachetune-"


class Record(BaseModel):
    """Frozen fields, unknown keys rejected, no silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def fingerprint(self) -> str:
        """16 hex digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json")).encode()).hexdigest()[
            :16
        ]

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed."""
        return type(self).model_validate({**dict(self), **changes})


class Document(Record):
    """A record that lives in a file. Subclasses set `document` and `version`."""

    document: ClassVar[str]
    version: ClassVar[int]
    error: ClassVar[type[CacheTuneError]] = SchemaError

    @classmethod
    def parse(cls, text: str, source: str) -> Self:
        """The document in `text`; `source` names it in errors.

        Raises:
            CacheTuneError: not JSON, another version, unknown key, wrong type, broken rule.
        """
        try:
            data = parse_json(text)
        except ValueError as e:
            raise cls.error(
                f"{source} must be JSON",
                values=str(e),
                remedy=f"make the {cls.document} again, or correct it: it may be cut short",
            ) from None
        if not isinstance(data, dict):
            raise cls.error(
                f"{source} must hold one object",
                values=type(data).__name__,
                remedy=f"`cachetune schema {cls.document}` prints what it may hold",
            )
        found = data.pop("schema_version", None)
        if found != cls.version:
            raise cls.error(
                f"{source} must be a {cls.document} of schema version {cls.version}",
                values=f"schema_version={found}",
                remedy=f"make the {cls.document} again with this version of cachetune",
            )
        try:
            return cls.model_validate_json(json.dumps(data))
        except ValidationError as e:
            raise _explain(cls, e, source) from None

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The document at `path`, checked."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as e:
            raise cls.error(
                f"the {cls.document} file must be readable",
                values=f"{path}: {e.strerror}",
                remedy="check the path",
            ) from None
        except UnicodeDecodeError as e:
            raise cls.error(
                f"{path} must be UTF-8 JSON",
                values=f"byte 0x{e.object[e.start]:02x} at {e.start}",
                remedy="check the path, or convert the file",
            ) from None
        return cls.parse(text, str(path))

    def to_json(self) -> str:
        """Indented JSON with the schema version first."""
        data = {"schema_version": self.version, **self.model_dump(mode="json")}
        return json.dumps(data, indent=2) + "\n"

    def write(self, path: str | Path) -> None:
        """Save; a crash leaves the old file or the new one, never half of one."""
        write_atomic(path, self.to_json().encode())

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON Schema of the file, for editors and other tools."""
        schema = cls.model_json_schema()
        schema["properties"] = {
            "schema_version": {"const": cls.version},
            **schema.get("properties", {}),
        }
        schema["required"] = ["schema_version", *schema.get("required", [])]
        return schema


def canonical_json(data: Any) -> str:
    """One spelling per value: sorted keys, no spaces."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def parse_json(text: str) -> Any:
    """What `text` holds.

    Raises:
        ValueError: not JSON; where and why, on one line.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"line {e.lineno}: {e.msg}") from None
    except RecursionError:
        raise ValueError("lists in lists without end") from None


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write beside `path`, fsync, rename over it; a link's target is written.

    A device or a pipe is written in place: it must not be replaced by a file.

    Raises:
        CacheTuneError: no permission, no space, no such folder.
    """
    target = Path(os.path.realpath(path))
    try:
        if _is_special(target):
            target.write_bytes(data)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=TEMP_PREFIX) as folder:
            temp = Path(folder, target.name)
            with open(temp, "xb") as f:  # not mkstemp, whose files only the owner can read
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temp, target)
    except OSError as e:
        raise _not_writable(path, e) from None


def write_json(path: str | Path, data: object) -> None:
    """JSON for people to read, as `write_atomic`; raises as that does."""
    write_atomic(path, (json.dumps(data, indent=1) + "\n").encode())


def append_line(path: str | Path, line: str) -> None:
    """One more line of a file that grows while something is measured; what is there stays.

    Raises:
        CacheTuneError: no permission, no space.
    """
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(line + "\n")
    except OSError as e:
        raise CacheTuneError(
            "the output file must be writable",
            values=f"{path}: {e.strerror}",
            remedy="free space and run again: what is written is kept",
        ) from None


def check_writable(*paths: str | Path | None, inputs: Sequence[str | Path | None] = ()) -> None:
    """Refuse outputs that cannot be written before the work for them is done; None is skipped.

    Raises:
        CacheTuneError: no permission, no space, not a file, or one of the inputs.
    """
    sources = {os.path.realpath(source) for source in inputs if source is not None}
    for path in paths:
        if path is None:
            continue
        target = Path(os.path.realpath(path))
        if str(target) in sources:
            raise CacheTuneError(
                "an output is not written over an input",
                values=str(path),
                remedy="name another file",
            )
        try:
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if _is_special(target):
                continue
            there = next(p for p in target.parents if p.exists())
            with tempfile.TemporaryDirectory(dir=there, prefix=TEMP_PREFIX) as folder:
                Path(folder, target.name).write_bytes(bytes(4096))
        except OSError as e:
            raise _not_writable(path, e) from None


def made(
    kind: Callable[..., Made],
    what: str,
    /,
    *,
    error: type[CacheTuneError] = CacheTuneError,
    **fields: Any,
) -> Made:
    """A record of what a user gave.

    Raises:
        CacheTuneError (or `error`): what is wrong with which field, begun with `what`.
    """
    try:
        return kind(**fields)
    except ValidationError as e:
        text, got = first_problem(e)
        raise error(f"{what}: {text}", values=got, remedy="correct the option") from None


def first_problem(e: ValidationError) -> tuple[str, str]:
    """(what is wrong and where, the value) of the first error, for a line of text."""
    first = e.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    text = f"{where}: {message}" if where else message
    if first["type"] == "value_error":  # a rule of the record names its values itself
        return text, ""
    got = repr(first.get("input"))
    return text, got if len(got) <= 80 else got[:77] + "..."


def _is_special(target: Path) -> bool:
    return target.exists() and not target.is_file() and not target.is_dir()


def _not_writable(path: str | Path, e: OSError) -> CacheTuneError:
    return CacheTuneError(
        "the output file must be writable",
        values=f"{path}: {e.strerror}",
        remedy="free space, or choose another path",
    )


def _explain(cls: type[Document], e: ValidationError, source: str) -> CacheTuneError:
    first = e.errors()[0]
    if first["type"] == "extra_forbidden":
        where = ".".join(str(part) for part in first["loc"])
        near = difflib.get_close_matches(str(first["loc"][-1]), _known_keys(cls), n=1)
        hint = f"did you mean '{near[0]}'?" if near else "remove it"
        return cls.error(f"{source} has the unknown key '{where}'", remedy=hint)
    text, got = first_problem(e)
    more = f" (and {e.error_count() - 1} more)" if e.error_count() > 1 else ""
    return cls.error(f"{source}: {text}{more}", values=got, remedy="correct the value")


def _known_keys(cls: type[BaseModel]) -> list[str]:
    schema = cls.model_json_schema()
    keys = set(schema.get("properties", {}))
    for definition in schema.get("$defs", {}).values():
        keys |= set(definition.get("properties", {}))
    return sorted(keys)
