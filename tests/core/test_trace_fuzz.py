"""Damaged trace files are refused with one line, or read; nothing else happens."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from cachetune.core.errors import WorkloadError
from cachetune.core.trace_files import FORMATS, read_trace, write_trace
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from . import trace_samples as samples

JUNK = st.sampled_from(
    [
        "", "0", "-1", "1e999", "NaN", "null", "true", "[]", "{}", '""', '"\\ud800"', "[[1]]",
        "9" * 5000, "1.5", "{" * 40, "[" * 3000, '"', "\\", "\x00", "\n", "\r\n", ",", "é", "１",
        '{"a":1}', "[1,2", "1_0", "\ufeff", "[1,true]", '["1",2]', "99999999999999999999",
    ]
)  # fmt: skip


@st.composite
def damaged(draw: Any) -> tuple[str, str]:
    """A format and its sample with some pieces cut out, doubled, moved or replaced by junk."""
    format = draw(st.sampled_from(FORMATS))
    text = samples.sample_text(format)
    for _ in range(draw(st.integers(1, 3))):
        a, b = sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        b = min(b, a + draw(st.sampled_from([0, 1, 3, 8, 1000])))
        what = draw(st.one_of(JUNK, st.just(text[a:b] * 2), st.text(max_size=3)))
        text = text[:a] + what + text[b:]
    return format, text


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "zero_output": st.just("drop"),
        "first": st.integers(1, 3),
        "between_s": st.sampled_from([(0.0, 1.0), (0.5, 1e12)]),
        "ids": st.just("content"),
        "rate_rps": st.just(1.0),
        "format": st.sampled_from(FORMATS),
    },
)


def one_line(message: str) -> None:
    assert message.isprintable() and len(message) < 1000


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(damaged(), OPTIONS)
def test_damaged_files(case: tuple[str, str], options: dict[str, Any]):
    format, text = case
    with tempfile.TemporaryDirectory() as folder:
        path = samples.write_sample(format, Path(folder), text)
        try:
            table = read_trace(path, **options)
        except WorkloadError as e:
            one_line(str(e))
            return
        table.check()
        write_trace(table, Path(folder, "out"))
        assert len(read_trace(Path(folder, "out"))) == len(table)


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_that_are_no_text(tmp_path: Path, format: str):
    path = samples.write_sample(format, tmp_path)
    data = path.read_bytes()
    for cut in range(0, len(data), max(1, len(data) // 40)):
        path.write_bytes(data[:cut] + b"\xff\xfe" + data[cut + 1 :])
        with pytest.raises(WorkloadError) as caught:
            read_trace(path, format)
        one_line(str(caught.value))
