"""Bad files and flags: one line, exit code 2, and nothing on disk changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from cachetune.cli import main

from .file_cases import KINDS, Case

ASSETS = Path(__file__).parent.parent / "assets"
NO_FILE = "file must be readable"


def test_the_files_are_good(case: Case) -> None:
    status, _, err = case.run(*case.command())
    assert (status, err) == (0, "")


IDS = list(range(64))


@pytest.mark.parametrize(
    ("kind", "at", "value", "says"),
    [
        # unknown keys
        ("workload", "requets", [], "unknown key 'requets'; did you mean 'requests'?"),
        ("workload", "requests.1.chunk", [], "'requests.1.chunk'; did you mean 'chunks'?"),
        ("plan", "plan.look_ahed", 2, "'plan.look_ahed'; did you mean 'look_ahead'?"),
        ("plan", "plan.rules.0.ratio", 0.1, "'plan.rules.0.ratio'; did you mean 'ratios'?"),
        ("profile", "device.n_core", 4, "'device.n_core'; did you mean 'n_cores'?"),
        ("profile", "xyzzy", 1, "unknown key 'xyzzy'; remove it"),
        # wrong types
        ("workload", "name", 3, "name: Input should be a valid string, got 3; correct"),
        ("workload", "requests.0.suffix_tokens", "8", "a valid integer, got '8'; correct"),
        ("workload", "contents", [], "contents: Input should be an object, got []; correct"),
        ("plan", "plan.look_ahead", 2.5, "plan.look_ahead: Input should be a valid integer"),
        ("plan", "plan.policy", "best", "'full_recompute', "),
        ("profile", "tiers.dram.link_bytes_per_s", "fast", "a valid number, got 'fast'; correct"),
        ("profile", "tiers.dram.link_bytes_per_s", float("nan"), "finite number"),
        # rules of a plan
        ("plan", "plan.rules.0.ratios", [1.5], "must lie in [0, 1], got (1.5,); correct"),
        ("plan", "plan.rules.0.ratios", [-0.1], "must lie in [0, 1], got (-0.1,); correct"),
        ("plan", "plan.rules.0.ratios", [0.1, 0.3], "must not increase with depth, got (0.1, 0.3)"),
        ("plan", "plan.rules.0.ratios", [], "at least one number, got none"),
        ("plan", "plan.rules.0.tier", "dram", "must have the tier '*', so"),
        ("plan", "plan.rules", [], "got no rule; correct"),
        ("plan", "plan.request_bytes", 5000, "multiple of 4096, got 5000; try 4096 or 8192"),
        ("plan", "plan.request_bytes", 0, "greater than or equal to 4096, got 0; correct"),
        ("plan", "plan.n_io_workers", 99, "less than or equal to 16, got 99; correct"),
        # rules of a workload
        ("workload", "requests", [], "at least one request, got 0; correct"),
        ("workload", "requests.1.request_id", 0, "request ids must be unique, got 0 twice"),
        ("workload", "requests.1.chunks", ["c"], "request 1 names the content 'c'"),
        ("workload", "requests.0.output_tokens", 9, "must not exceed max_output_tokens, got 9 > 3"),
        ("workload", "contents.a.n_tokens", 0, "greater than 0, got 0; correct"),
        ("workload", "contents.a.n_tokens", 4096, "context, got request 0: 4171 tokens, tiny has"),
        ("workload", "contents.a.token_ids", IDS[:5], "number of token_ids, got 64 and 5; correct"),
        ("workload", "contents.a.token_ids", [-1, *IDS[1:]], "or equal to 0, got -1; correct"),
        ("workload", "contents.a.token_ids", [64, *IDS[1:]], "must lie in 0..63, the vocabulary"),
        ("workload", "requests.0.suffix_ids", [99] * 8, "got 99 in request 0; make the workload"),
        # a profile that lacks something
        ("profile", "tiers", {}, "profile must have a tier, got none; calibrate again"),
        ("profile", "coefficients", {}, "dispatch.gap"),
        ("profile", "model.family", "gpt2", "'llama', 'mistral', 'qwen2' or 'qwen3', got 'gpt2'"),
        ("profile", "model.n_kv_heads", 3, "multiple of n_kv_heads, got 4 and 3; correct"),
        ("profile", "device.memory_bytes", 46000, "KV"),
    ],
)
def test_a_file_that_breaks_a_rule(
    case: Case, kind: str, at: str, value: object, says: str
) -> None:
    case.change(kind, at, value)
    plan = None if kind == "profile" else case.path("plan")  # else it were for another machine
    line = case.refused(*case.command(plan=plan))
    assert says in line, line


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"schema_version": 1, "na', "must be JSON, got line 1: "),
        (b"", "must be JSON, got line 1: "),
        (b"\xff\xfe{}", "must be UTF-8 JSON, got byte 0xff at 0; "),
        (b"[]", "must hold one object, got list; "),
        (b"[" * 200_000, "must be JSON, got "),
        (b'{"schema_version": ' + b"1" * 5000 + b"}", "must be JSON, got "),
        (b"{}", "schema version 1, got schema_version=None; make the "),
        (b'{"schema_version": "1"}', "schema version 1, got schema_version=1; make the "),
    ],
)
def test_a_file_of_something_else(case: Case, kind: str, data: bytes, says: str) -> None:
    case.path(kind).write_bytes(data)
    line = case.refused()
    assert says in line and case.path(kind).name in line


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_an_older_version(case: Case, kind: str) -> None:
    line = case.refused(*case.command(**{kind: ASSETS / f"{kind}.version0.json"}))
    assert f"{kind} of schema version 1, got schema_version=0; make the {kind} again" in line


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "says"), [("none.json", "No such file"), ("folder", "Is a directory")]
)
def test_a_path_that_is_no_file(case: Case, kind: str, name: str, says: str) -> None:
    (case.folder / "folder").mkdir()
    line = case.refused(*case.command(**{kind: case.folder / name}))
    assert f"the {kind} {NO_FILE}" in line and says in line and "check the path" in line


@pytest.mark.parametrize("what", ["hardware", "model"])
def test_a_plan_for_another(case: Case, what: str) -> None:
    case.change("plan", f"{what}_fingerprint", "0123")
    name = {"hardware": "machine", "model": "model"}[what]
    line = case.refused()
    assert f"for this {name}, got the plan's {name} is 0123" in line
    assert line.endswith("tune again here, or pass --allow-mismatch\n")
    status, _, err = case.run(*case.command(), "--allow-mismatch")
    assert status == 0 and err.startswith(f"warning: the plan's {name} is 0123, this one is")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("simulate", {"tier": "tape"}, "the tier must be one of disk, dram, got 'tape'; name"),
        ("tune", {"tier": "dram,tape"}, "the tier must be one of disk, dram, got 'tape'; name"),
        ("simulate", {"set": "look_ahed=2"}, "got 'look_ahed'; did you mean 'look_ahead'?"),
        ("simulate", {"set": "xyzzy=1"}, "got 'xyzzy'; knobs here: policy, "),
        ("simulate", {"set": "look_ahead"}, "--set takes key=value, got 'look_ahead'; add"),
        ("simulate", {"set": "look_ahead=two"}, "a valid integer, got 'two'; correct"),
        ("simulate", {"set": "ratio=2"}, "must lie in [0, 1], got (2.0,); correct"),
        ("simulate", {"set": "rules=[]"}, "must have the tier '*'"),
        ("simulate", {"set": "pipeline_stages=999"}, "must not exceed the model's layers"),
        ("simulate", {"workload": None, "rate": "1e-300"}, "arrivals lie within 146 years"),
        ("tune", {"model": "tiny"}, "--model is what --confirm runs"),
        ("tune", {"mode": "best"}, "--mode must be one of dag, serve"),
        ("simulate", {"seed": "-1"}, "Invalid value for '--seed': "),
        ("simulate", {"seed": "x"}, "Invalid value for '--seed': "),
        ("simulate", {"noise": "nan"}, "noise"),
        ("simulate", {"noise": "inf"}, "noise"),
        ("simulate", {"noise": "-1"}, "Invalid value for '--noise': "),
        ("simulate", {"workload": None, "rate": "nan"}, "rate"),
        ("simulate", {"workload": None, "rate": "-1"}, "rate_rps must be positive, got -1"),
        ("simulate", {"workload": None, "requests": "0"}, "Invalid value for '--requests': "),
        ("simulate", {"workload": None, "chunk_tokens": "9999"}, "must fit the model's context"),
        ("simulate", {"profile": None}, "Missing option '--profile'"),
        ("simulate", {"sed": "1"}, "No such option"),
        ("tune", {"seed": "-1"}, "Invalid value for '--seed': "),
        ("tune", {"ratio_min": "2"}, "Invalid value for '--ratio-min': "),
        ("tune", {"quality_floor": "nan"}, "Invalid value for '--quality-floor': "),
        ("tune", {"workload": None, "confirm": "2"}, "confirmation runs the model"),
        ("tune", {"quality": "none.json"}, NO_FILE),
        ("calibrate", {"workload": "x"}, "No such option"),
    ],
)
def test_a_flag_that_breaks_a_rule(
    case: Case, name: str, options: dict[str, str | None], says: str
) -> None:
    if name == "tune":
        options = {"out": str(case.folder / "out.json"), **options}
    line = case.refused(*case.command(name, **options))
    assert says in line, line
    if says.startswith("Invalid value"):  # the words after it are the option parser's
        (value,) = (v for k, v in options.items() if v and k != "out")
        assert value in line and f"see cachetune {name} --help" in line


@pytest.mark.parametrize("args", [("nope",), ("--nope",), ("simulate", "--nope"), ("bench", "x")])
def test_a_word_that_is_not_known(case: Case, args: tuple[str, ...]) -> None:
    line = case.refused(*args)
    assert "No such" in line and "; see cachetune " in line and "--help" in line


@pytest.mark.parametrize("name", [c for c in main.COMMANDS if c != "bench"])
def test_every_command_refuses_an_unknown_option(case: Case, name: str) -> None:
    assert "No such option: --nope" in case.refused(name, "--nope")
