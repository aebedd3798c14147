"""Readers of each format: what they read, how they refuse, what they say of it."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cachetune.core.arrivals import Arrivals
from cachetune.core.errors import WorkloadError
from cachetune.core.request_table import RequestTable
from cachetune.core.trace_csv import date_ns
from cachetune.core.trace_files import FORMATS, read_trace, write_trace
from cachetune.core.trace_make import chat_table

from . import trace_samples as samples

DROP: dict[str, Any] = {"zero_output": "drop"}


def read(folder: Path, format: str, text: str | None = None, **options: Any) -> RequestTable:
    return read_trace(samples.write_sample(format, folder, text), **options)


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def ms(table: RequestTable) -> list[float]:
    return (table.arrival_ns / 1e6).tolist()


def assert_same(a: RequestTable, b: RequestTable) -> None:
    for what in ("arrival_ns", "prompt_tokens", "output_tokens", "chunk_start", "after"):
        np.testing.assert_array_equal(getattr(a, what), getattr(b, what))
    assert a.chained == b.chained
    for row in range(len(a)):
        named = [[t.chunk_name(int(c)) for c in t.chunks_of(row)] for t in (a, b)]
        assert named[0] == named[1]
        assert a.tenants[a.tenant[row]] == b.tenants[b.tenant[row]]
        assert a.classes[a.slo_class[row]] == b.classes[b.slo_class[row]]
    np.testing.assert_array_equal(a.chunk_tokens[a.chunk_ids], b.chunk_tokens[b.chunk_ids])


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_is_seen_and_said(tmp_path: Path, format: str):
    path = samples.write_sample(format, tmp_path)
    table = read_trace(path, **DROP)
    table.check()
    said = table.provenance
    assert said["format"] == format and said["file"] == path.name
    assert said["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert said["rows"] == str(len(table))
    assert_same(table, read_trace(path, format, **DROP))


@pytest.mark.parametrize("format", FORMATS)
def test_our_format_keeps_everything(tmp_path: Path, format: str):
    table = read(tmp_path, format, **DROP)
    out = tmp_path / "out.jsonl"
    write_trace(table, out)
    back = read_trace(out)
    assert back.provenance["source_sha256"] == table.provenance["sha256"]
    assert_same(table, back)
    first = out.read_bytes()
    write_trace(table, out)
    assert out.read_bytes() == first


def test_our_format_keeps_every_nanosecond(tmp_path: Path):
    table = chat_table(20, Arrivals(rate_rps=1e-6), think_s=7.7, seed=1)  # months
    write_trace(table, tmp_path / "t")
    assert table.arrival_ns[0] > 0
    np.testing.assert_array_equal(read_trace(tmp_path / "t").arrival_ns, table.arrival_ns)


def test_mooncake(tmp_path: Path):
    table = read(tmp_path, "mooncake")
    assert ms(table) == [0, 1500, 1500.5, 9000]
    assert table.chained and table.provenance["ids"] == "prefix"
    one, _, three, four = (table.chunks_of(row).tolist() for row in range(4))
    assert one == three, "the short block returns with the same prompt"
    assert one[:2] == four[:2] and one[2] != four[2], "short and whole are told apart"
    assert table.chunk_tokens[one].tolist() == [512, 512, 76]
    assert table.chunk_tokens[four].tolist() == [512, 512, 512]


def test_blocks_hashed_alone_become_chains(tmp_path: Path):
    row = {"timestamp": 0, "input_length": 1024, "output_length": 1}
    text = lines(*({**row, "hash_ids": ids} for ids in ([1, 2], [2, 1], [1, 2], [2, 3])))
    table = read(tmp_path, "mooncake", text)
    assert table.provenance["ids"] == "prefix, chained here" and table.chained
    assert [table.chunks_of(r).tolist() for r in range(4)] == [[0, 1], [2, 3], [0, 1], [2, 4]]
    assert table.chunk_names == ("1", "2", "2/2", "1/2", "3")
    content = read(tmp_path, "mooncake", text, ids="content")
    assert not content.chained and content.chunk_names == ("1", "2", "3")


def test_bailian(tmp_path: Path):
    table = read(tmp_path, "bailian")
    assert ms(table) == [0, 1386] and (table.after == -1).all()
    assert table.classes == ("text", "search")
    assert table.chunk_tokens[table.chunks_of(0)].tolist() == [16, 16, 1]
    assert table.chunk_tokens[table.chunks_of(1)].tolist() == [16, 16, 16], "4 tokens in no block"


def test_aiperf_sessions_grow(tmp_path: Path):
    table = read(tmp_path, "aiperf")
    assert table.prompt_tokens.tolist() == [600, 30, 54, 690], "in order of the earliest arrival"
    assert table.after.tolist() == [-1, -1, -1, 0]
    assert ms(table) == [0, 100, 200, 2500], "the last is a pause"
    tokens = table.chunk_tokens[table.chunks_of(3)].tolist()
    assert tokens == [512, 88, 40, 50] and table.chunks_of(0).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "gap_ns"), [(samples.AZURE, 52_000_100), (samples.AZURE_2024, 990_070_000)]
)
def test_azure(tmp_path: Path, text: str, gap_ns: int):
    table = read(tmp_path, "azure", text)
    assert table.arrival_ns.tolist() == [0, gap_ns] and not len(table.chunk_ids)


def test_dates():
    assert date_ns("1970-01-01 00:00:01.123456789") == 1_123_456_789
    assert date_ns("1970-01-01T01:00:00.5+01:00") == 500_000_000
    assert date_ns("1969-12-31 23:59:59.75") == -250_000_000
    assert date_ns("1970-01-01 00:00:02Z") == 2_000_000_000
    for bad in ("", "1970-01-01", "1970-01-01 00:00:01.", "1970-01-01 00:00:01.1234567890", "x.5"):
        assert date_ns(bad) is None, bad


def test_burstgpt(tmp_path: Path):
    table = read(tmp_path, "burstgpt", **DROP)
    assert ms(table) == [0, 113_500] and table.provenance["dropped_zero_output"] == "1"
    assert table.tenants == ("ChatGPT", "GPT-4")
    assert table.classes == ("Conversation log", "API log")
    assert len(read(tmp_path, "burstgpt", samples.BURSTGPT_3)) == 1


def test_logs_are_sorted_and_failures_dropped(tmp_path: Path):
    table = read(tmp_path, "vllm_bench", **DROP)
    assert ms(table) == [0, 250] and table.prompt_tokens.tolist() == [10, 30]
    table = read(tmp_path, "request_log")
    assert ms(table) == [0, 1500] and table.provenance["rows_moved_by_sorting"] == "2"
    table = read(tmp_path, "aiperf_export", **DROP)
    assert table.prompt_tokens.tolist() == [550]


def test_a_file_without_times_needs_a_rate(tmp_path: Path):
    row = {k: v for k, v in samples.VLLM_BENCH[0].items() if k != "start_times"}
    with pytest.raises(WorkloadError, match="--rate-rps"):
        read(tmp_path, "vllm_bench", lines(row), **DROP)
    table = read(tmp_path, "vllm_bench", lines(row), rate_rps=2.0, **DROP)
    assert table.provenance["rate_rps"] == "2" and (np.diff(table.arrival_ns) > 0).all()


def test_ragpulse_shares_passages_at_any_place(tmp_path: Path):
    table = read(tmp_path, "ragpulse")
    assert not table.chained and ms(table) == [0, 11_000]
    named = [[table.chunk_name(int(c)) for c in table.chunks_of(r)] for r in range(2)]
    assert named == [["900", "1", "3"], ["900", "3", "1"]], "the question is no chunk"
    (tmp_path / "2_passages.jsonl").unlink()
    with pytest.raises(WorkloadError, match="stand beside it"):
        read_trace(tmp_path / "ragpulse.trace")


def test_filters(tmp_path: Path):
    assert ms(read(tmp_path, "mooncake", first=2)) == [0, 1500]
    later = read(tmp_path, "mooncake", between_s=(1.0, 9.0))
    assert ms(later) == [500, 500.5], "the begin becomes time 0"
    assert later.provenance["between_s"] == "1 to 9"
    assert ms(read(tmp_path, "mooncake", between_s=(1.0, 9.0), first=1)) == [500]
    assert ms(read(tmp_path, "mooncake", scale_rate=2.0)) == [0, 750, 750.25, 4500]
    followed = read(tmp_path, "aiperf", between_s=(0, 0.05))
    assert followed.after.tolist() == [-1, 0], "a turn goes where its conversation goes"
    assert ms(read(tmp_path, "aiperf", scale_rate=2.0))[-1] == 2500, "pauses stay"


@pytest.mark.parametrize(
    ("format", "text", "message"),
    [
        ("mooncake", '{"timestamp": 0, "input_le', "one JSON object"),
        ("mooncake", "[1]\n", "goes over several, or a list.*jq -c"),
        ("vllm_bench", '{\n "input_lens": [1]\n}\n', "goes over several, or a list.*jq -c"),
        ("mooncake", "", "at least one request, got 0 in"),
        ("azure", "a,b\n", "first line shows the format"),
        ("azure", samples.AZURE + "2023-11-16 18:17:05,5\n", "3 columns, got 2 in line 4"),
        ("azure", samples.AZURE + "2023-11-16 18:17:03,5,5\n", "backwards"),
        ("azure", samples.AZURE + "yesterday,5,5\n", "TIMESTAMP is a date"),
        ("azure", samples.AZURE + "2023-11-16 18:17:05,5,-5\n", "GeneratedTokens=-5 in line 4"),
        ("azure", samples.AZURE + "2023-11-16 18:17:05,1_0,5\n", "ContextTokens='1_0' in line 4"),
        ("burstgpt", samples.BURSTGPT, "zero_output='drop'"),
        ("burstgpt", samples.BURSTGPT + "nan,ChatGPT,1,1,2,x\n", "got Response tokens=0"),
        ("vllm_bench", lines({"input_lens": [1]}), "--save-detailed"),
        ("vllm_bench", lines({"input_lens": [1], "output_lens": []}), "equal lengths"),
        ("aiperf", lines({"session_id": "a", "text_input": "hi"}), "tokenizer"),
        (
            "aiperf",
            lines(
                *(
                    {"session_id": "a", "input_length": 1, "output_length": 1, "timestamp": t}
                    for t in (5, 4)
                )
            ),
            "session's last one.*in line 2",
        ),
        ("aiperf", lines({"session_id": "a", "input_length": 1, "output_length": 1}), "a rate"),
    ],
)
def test_refused_files(tmp_path: Path, format: str, text: str, message: str):
    with pytest.raises(WorkloadError, match=message) as caught:
        read(tmp_path, format, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestamp": 1499}, "arrivals do not run backwards.*line 5 of mooncake.trace"),
        ({"timestamp": None}, "timestamp=None in line 5"),
        ({"timestamp": float("nan")}, "timestamp=nan in line 5"),
        ({"timestamp": 1 << 70}, "timestamp=1180591620717411303424 in line 5"),
        ({"input_length": 0}, "input_length=0 in line 5"),
        ({"input_length": -3}, "input_length=-3 in line 5"),
        ({"input_length": 512.0}, "input_length=512.0 in line 5"),
        ({"input_length": 1 << 31}, "input_length=2147483648 in line 5"),
        ({"output_length": True}, "output_length=True in line 5"),
        ({"output_length": 0}, "drop such rows"),
        ({"input_length": 513}, "3 hash_ids for 513 tokens in line 5"),
        ({"hash_ids": [1, "2", 3]}, "hash_ids="),
        ({"hash_ids": [[1], [2], [3]]}, "hash_ids="),
        ({"hash_ids": 5}, "hash_ids=5 in line 5"),
    ],
)
def test_refused_lines_name_line_field_and_value(tmp_path: Path, change: Any, message: str):
    bad = {**samples.MOONCAKE[3], **change}
    with pytest.raises(WorkloadError, match=message):
        read(tmp_path, "mooncake", lines(*samples.MOONCAKE, bad))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"after": 3, "arrival_s": None}, "with after has think_s"),
        ({"after": 9, "think_s": 1}, "after=9"),
        ({"after": 0, "think_s": -1}, "think_s=-1"),
        ({"think_s": 1}, "without after has arrival_s"),
        ({"chunks": [{"id": "a", "tokens": 511}]}, "chunk 'a' has 512 tokens"),
        ({"chunks": ["new"]}, "has its tokens where it is first named"),
        ({"chunks": [{"id": "c", "tokens": 800}]}, "800 tokens of chunks, prompt_tokens=700"),
        ({"chunks": [{"id": "c", "tokens": 0}]}, "at least 1 token"),
        ({"chunk": []}, "no unknown fields"),
        ({"tenant": 5}, "tenant=5"),
    ],
)
def test_refused_lines_of_ours(tmp_path: Path, change: dict[str, Any], message: str):
    row = {"arrival_s": 2, "prompt_tokens": 700, "output_tokens": 1, **change}
    if change.keys() & {"after", "think_s"}:
        del row["arrival_s"]
    with pytest.raises(WorkloadError, match=f"{message}.* in line 5"):
        read(tmp_path, "cachetune", lines(*samples.OWN, row))


def test_a_follower_of_a_dropped_request_is_refused(tmp_path: Path):
    rows = [
        {"arrival_s": 0, "prompt_tokens": 5, "output_tokens": 0},
        {"after": 0, "think_s": 1, "prompt_tokens": 5, "output_tokens": 1},
    ]
    with pytest.raises(WorkloadError, match="was not dropped"):
        read(tmp_path, "cachetune", lines(*rows), **DROP)


@pytest.mark.parametrize(
    "options",
    [
        {"format": "x"},
        {"first": 0},
        {"between_s": (3, 2)},
        {"between_s": (100, 200)},
        {"scale_rate": 0},
        {"scale_rate": float("nan")},
        {"block_tokens": 0},
        {"ids": "x"},
        {"zero_output": "x"},
    ],
)
def test_refused_options(tmp_path: Path, options: dict[str, Any]):
    with pytest.raises(WorkloadError):
        read_trace(samples.write_sample("mooncake", tmp_path), **options)


@pytest.mark.parametrize("format", FORMATS)
def test_a_compressed_trace_is_the_same(tmp_path: Path, format: str):
    path = samples.write_sample(format, tmp_path)
    plain = read_trace(path, **DROP)
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert_same(read_trace(path, **DROP), plain)


@pytest.mark.parametrize(
    ("damage", "message"), [("cut", "whole"), ("flip", "whole|JSON|trace|must"), ("end", "whole")]
)
def test_a_damaged_compressed_trace_is_refused(tmp_path: Path, damage: str, message: str):
    path = tmp_path / "trace.jsonl.gz"
    row = {"input_length": 10, "output_length": 1, "hash_ids": [1]}
    text = lines(*({"timestamp": 7 * i, **row} for i in range(3000)))
    packed = bytearray(gzip.compress(text.encode()))
    if damage == "flip":
        packed[len(packed) // 2] ^= 0xFF
    path.write_bytes(packed[: {"cut": len(packed) // 2, "end": -4}.get(damage, len(packed))])
    with pytest.raises(WorkloadError, match=message):
        read_trace(path)


def test_no_file(tmp_path: Path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(WorkloadError, match="regular file"):
            read_trace(path)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path):
    path = samples.write_sample("mooncake", tmp_path)
    plain = read_trace(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert (read_trace(path).arrival_ns == plain.arrival_ns).all()


def test_a_rate_is_for_traces_without_times(tmp_path: Path):
    with pytest.raises(WorkloadError, match="has times; leave it out"):
        read(tmp_path, "mooncake", rate_rps=2.0)
    row = {"input_lens": [1, 2], "output_lens": [1, 2]}
    for rate in (0.0, float("nan"), -1.0):
        with pytest.raises(WorkloadError, match="a rate of"):
            read(tmp_path, "vllm_bench", lines(row), rate_rps=rate)


def test_contents_are_not_to_be_had_from_prefixes(tmp_path: Path):
    write_trace(read(tmp_path, "mooncake"), tmp_path / "ours")
    assert read_trace(tmp_path / "ours").chained
    with pytest.raises(WorkloadError, match=r"ids of contents.*ours are chained"):
        read_trace(tmp_path / "ours", ids="content")
    write_trace(read(tmp_path, "mooncake", ids="content"), tmp_path / "contents")
    assert not read_trace(tmp_path / "contents", ids="content").chained
