"""Frozen, validated records and the JSON documents users write or keep.

A `Document` is a record with a schema version that is saved to disk: written whole or not at all,
read strictly (unknown keys, wrong types and old versions are refused with a remedy).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import CacheTuneError, SchemaError


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
            data = json.loads(text)
        except json.JSONDecodeError as e:
            raise cls.error(
                f"{source} must be JSON",
                values=f"line {e.lineno}: {e.msg}",
                remedy=f"write it again with the command that makes a {cls.document}",
            ) from None
        if not isinstance(data, dict):
            raise cls.error(f"{source} must hold one object", values=type(data).__name__)
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
        except UnicodeDecodeError:
            raise cls.error(f"{path} must be UTF-8 JSON", remedy="check the path") from None
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


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write beside `path`, fsync, rename over it.

    Raises:
        CacheTuneError: no permission, no space, no such folder.
    """
    path = Path(path)
    temp = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temp, path)
    except OSError as e:
        raise CacheTuneError(
            "the output file must be writable",
            values=f"{path}: {e.strerror}",
            remedy="free space, or choose another path",
        ) from None
    finally:
        if temp is not None and os.path.exists(temp):
            os.unlink(temp)


def _explain(cls: type[Document], e: ValidationError, source: str) -> CacheTuneError:
    first = e.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "(whole file)"
    if first["type"] == "extra_forbidden":
        known = _known_keys(cls)
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "remove it"
        return cls.error(f"{source} has the unknown key '{where}'", remedy=hint)
    got = repr(first.get("input"))
    if len(got) > 80:
        got = got[:77] + "..."
    more = f" (and {e.error_count() - 1} more)" if e.error_count() > 1 else ""
    return cls.error(
        f"{source}: {where}: {first['msg']}{more}", values=got, remedy="correct the value"
    )


def _known_keys(cls: type[BaseModel]) -> list[str]:
    schema = cls.model_json_schema()
    keys = set(schema.get("properties", {}))
    for definition in schema.get("$defs", {}).values():
        keys |= set(definition.get("properties", {}))
    return sorted(keys)
