"""Documents: strict reading, atomic writing, one-line errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cachetune.core.errors import CacheTuneError, WorkloadError
from cachetune.core.record import canonical_json, write_atomic
from cachetune.core.workload import Workload
from support import make_profile, make_workload


def edited(**changes: object) -> str:
    data = json.loads(make_workload().to_json())
    return json.dumps({**data, **changes})


def test_round_trip_is_exact(tmp_path: Path):
    for document in (make_workload(), make_profile()):
        path = tmp_path / document.document
        document.write(path)
        assert type(document).read(path) == document
        first = path.read_bytes()
        document.write(path)
        assert path.read_bytes() == first


def test_fingerprint_changes_with_the_content():
    one = make_workload()
    assert one.fingerprint() == make_workload().fingerprint()
    assert one.fingerprint() != make_workload(suffix_tokens=9).fingerprint()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("[]", "must hold one object, got list"),
        (edited(schema_version=0), "schema version 1, got schema_version=0"),
        (edited(requets=[]), "unknown key 'requets'; did you mean 'requests'?"),
        (edited(name=3), "w.json: name: .* got 3; correct the value"),
        (edited(requests=[]), "at least one request"),
    ],
)
def test_errors_are_one_line_with_rule_values_remedy(text: str, message: str):
    with pytest.raises(WorkloadError, match=message) as caught:
        Workload.parse(text, "w.json")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_an_error_of_its_kind(tmp_path: Path):
    with pytest.raises(WorkloadError, match="check the path"):
        Workload.read(tmp_path / "none.json")


def test_replace_validates():
    request = make_workload().requests[0]
    assert request.replace(suffix_tokens=9).suffix_tokens == 9
    with pytest.raises(ValueError, match="must not exceed"):
        request.replace(output_tokens=request.max_output_tokens + 1)


def test_schema_names_every_key():
    schema = Workload.json_schema()
    assert schema["properties"]["schema_version"] == {"const": 1}
    assert {"schema_version", "name", "contents", "requests"} <= set(schema["required"])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "a" / "file"
    write_atomic(path, b"old")
    (tmp_path / "b").write_bytes(b"")
    with pytest.raises(CacheTuneError, match="must be writable"):
        write_atomic(tmp_path / "b" / "file", b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_canonical_json_has_one_spelling():
    assert canonical_json({"b": 1, "a": [1.0, True]}) == '{"a":[1.0,true],"b":1}'
