"""`cachetune whatif` and `catalogue`: answers, files, the page in a browser, bad input."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cachetune.cli import main
from cachetune.cli.console import progress_bar
from cachetune.cli.whatif_run import _answer, _remarks
from cachetune.core.model_presets import model_preset
from cachetune.core.workload import Slo
from cachetune.tuner.question import Question
from cachetune.tuner.traffic import Traffic

from .file_cases import Run

SMALL = (
    "whatif", "--model", "Llama-3.1-8B", "--gpu", "H100-SXM", "--policy", "cachetune",
    "--traffic", "rag:rate=4,passages=200,tokens=512,chunks=8,output=16",
    "--slo", "ttft_ms=400,tpot_ms=50", "--seeds", "2", "--horizon", "10", "--max-requests", "160",
)  # fmt: skip
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(autouse=True)
def commands(monkeypatch: pytest.MonkeyPatch) -> None:
    both = (*main.COMMANDS, "whatif", "catalogue")
    monkeypatch.setattr(main, "COMMANDS", tuple(dict.fromkeys(both)))


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One answer for several tests: two policies, two formats, a what-if."""
    out = tmp_path_factory.mktemp("whatif")
    argv = [*SMALL, "--policy", "full_recompute,cachetune", "--format", "bf16,int4"]
    argv += ["--what-if", "shared=0.5,disk=hdd-7200", "--out", str(out)]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(main, "COMMANDS", (*main.COMMANDS, "whatif"))
        with pytest.raises(SystemExit) as stop:
            main.main(argv)
    assert stop.value.code == 0
    return out


def test_the_answer_is_a_sentence_a_table_and_files(answered: Path):
    answer = json.loads((answered / "whatif.json").read_text())
    made_by = json.loads((answered / "provenance.json").read_text())
    assert made_by["command"].startswith("cachetune") and made_by["commit"] and made_by["date"]
    assert re.match(r"Take 1 replica( \(\d to be sure\))? of H100-SXM", answer["sentence"])
    assert len(answer["rows"]) == 3  # full recompute has no stored format
    with open(answered / "whatif.csv") as f:
        table = list(csv.DictReader(f))
    assert [r["fingerprint"] for r in table] == [r["fingerprint"] for r in answer["rows"]]
    for row in answer["rows"]:
        assert row["capacity_low_rps"] <= row["capacity_rps"] <= row["capacity_high_rps"]
        assert row["kernels_low_rps"] <= row["capacity_rps"] * 1.1
        assert (row["replicas"] - 1) * row["capacity_low_rps"] < 4.0  # the rate that was asked for
        assert row["replicas"] * row["capacity_high_rps"] >= 4.0
        assert row["fleet_good_share"] >= 0.99
        assert row["seeds"] == [0, 1] and all(p["source"] for p in row["provenance"])
        for trial in row["trials"]:
            n, by_law = trial["metrics"]["littles_law"]
            assert n == pytest.approx(by_law, rel=1e-6)
    full, bf16, _ = answer["rows"]
    assert bf16["capacity_rps"] > full["capacity_rps"]
    shared, disk = answer["what_if"]
    assert shared["ratio"] < 1.0 and disk["ratio"] == pytest.approx(1.0, abs=0.05)
    costs = [p["usd_per_mtok"] for p in answer["pareto"]]
    assert costs == sorted(costs) and len(answer["pareto"]) >= 1


def test_a_second_run_takes_the_first_one_s_results(answered: Path, run: Run, tmp_path: Path):
    out = tmp_path / "again"
    shutil.copytree(answered, out)
    argv = [*SMALL, "--policy", "full_recompute,cachetune", "--format", "bf16,int4"]
    begin = time.process_time()
    status, _, _ = run(*argv, "--what-if", "shared=0.5,disk=hdd-7200", "--out", out)
    assert status == 0 and time.process_time() - begin < 2.0
    for name in ("whatif.json", "whatif.csv", "journal.jsonl"):
        assert (out / name).read_bytes() == (answered / name).read_bytes()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_page_answers_and_filters_in_a_browser(answered: Path):
    def dom(address: str, page: str = "whatif.html") -> str:
        done = subprocess.run(
            [
                str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu",
                "--virtual-time-budget=8000", "--host-resolver-rules=MAP * ~NOTFOUND",
                "--enable-logging=stderr", "--dump-dom", f"file://{answered}/{page}{address}",
            ],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert "Uncaught" not in done.stderr, done.stderr[-2000:]
        return done.stdout

    whole = dom("")
    sentence = json.loads((answered / "whatif.json").read_text())["sentence"]
    assert sentence in whole and 'data-ready="1"' in whole and 'data-shown="3"' in whole
    assert whole.count('class="plot js-plotly-plot"') == 4 and whole.count("data-fingerprint=") == 3
    assert 'id="says">4 req/s: replicas simulated together' in whole
    one = dom("#policy=cachetune&stored=int4&target=40")
    assert 'id="says">40 req/s: replicas by division' in one
    assert 'data-shown="1"' in one and one.count("data-fingerprint=") == 1
    text = (answered / "whatif.html").read_text()
    click = "document.querySelector('input[value=full_recompute]').click();"
    click += "document.querySelectorAll('#rows th')[0].click();"
    (answered / "clicked.html").write_text(text + f"<script>{click}</script>")
    clicked = dom("", "clicked.html")
    assert 'data-shown="2"' in clicked and clicked.count("data-fingerprint=") == 2
    assert "candidate ↑" in clicked
    assert "<script src" not in text and "<link" not in text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--gpu", "H100"), "did you mean H100-PCIe or H100-SXM"),
        (("--disk", "nvme"), "did you mean nvme-gen3"),
        (("--model", "Lama-8B"), "Llama-3.1-8B"),
        (("--slo", "ttft_ms=100"), "ttft_ms and tpot_ms"),
        (("--slo", "ttft_ms=0,tpot_ms=1"), "got 'ttft_ms=0'"),
        (("--slo", "ttft_ms=1,tpot_ms=1,share=2"), "at most 1"),
        (("--traffic", "rag:passage=3"), "got 'passage=3'"),
        (("--traffic", "nothing.jsonl"), "regular file"),
        (("--traffic", "rag:chunks=8,tokens=20000"), "positions of the model"),
        (("--traffic", "rag:chunks=2.5"), "chunks of the traffic must be a whole number"),
        (("--traffic", "rag:chunks=50,passages=10"), "a prompt holds different passages"),
        (("--traffic", "chat:think=1e30"), "a pause is from 0"),
        (("--ids", "hash"), "ids: Input should be 'prefix' or 'content'"),
        (("--dram-gib", "nan"), "DRAM must be above zero"),
        (("--dram-gib", "16"), "DRAM must be above the 32 GiB of the host"),
        (("--max-num-batched-tokens", "64"), "must not be below max_num_seqs, got 64 < 256"),
        (("--disk", ""), "name at least one of each"),
        (("--what-if", "shared=2"), "what if shared=2: shared"),
        (("--what-if", "dram_gib=nan"), "dram_gib must be above zero"),
        (("--what-if", "dram_gib=16"), "what if dram_gib=16: DRAM must be above"),
        (("--policy", "magic"), "the candidate: policy"),
        (("--format", "int5"), "the candidate: stored"),
        (("--weights", "int4"), "weights must be bfloat16 or fp8"),
        (("--price", "H100-SXM=-1"), "NAME=USD_PER_H"),
        (("--price", "H100=1"), "did you mean"),
        (("--what-if", "colour=red"), "a what-if must be one of"),
        (("--what-if", "stored=int4,stored=int5"), "what if stored=int5"),
        (("--what-if", "disk=nvme"), "did you mean nvme-gen3"),
        (("--what-if", "stages=1.5"), "1 to 64"),
        (("--target-rps", "-1"), "greater than 0"),
        (("--n-gpus", "0"), "1 to 64"),
        (("--n-gpus", "3"), "must divide"),
        (("--stages", "0"), "pipeline stages must be 1 to 64"),
        (("--stages", "64"), "every pipeline stage must have a layer"),
        (("--backend", "threads"), "processes, ray"),
        (("--router", "nearest"), "the candidate: router"),
        (("--eviction", "fifo"), "the candidate: eviction"),
        (("--model", "Llama-3.1-70B"), "would fit: fp8 weights; 2 x H100-SXM"),
        (("--model", "Llama-3.1-70B"), "2 stages of 1 x H100-SXM"),
        (("--slo", "ttft_ms=1,tpot_ms=1"), "closest"),
    ],
)
def test_bad_input_is_one_line(options: tuple[str, str], says: str, run: Run, tmp_path: Path):
    status, _, err = (
        run(*SMALL, *options, "--what-if", "", "--out", tmp_path)
        if "--what-if" not in options
        else run(*SMALL, *options, "--out", tmp_path)
    )
    last = err.strip().splitlines()[-1]
    assert status == 2 and last.startswith("cachetune: ") and says in last, err


def test_a_generator_needs_no_colon(run: Run, tmp_path: Path):
    answers = []
    for text in ("rag", "rag:"):
        out = tmp_path / str(len(text))
        argv = [*SMALL, "--traffic", text, "--seeds", "1", "--max-requests", "60"]
        assert run(*argv, "--what-if", "", "--out", out)[0] == 0
        answers.append((out / "whatif.json").read_bytes())
    assert answers[0] == answers[1]


def test_a_request_of_a_trace_beyond_the_context_is_told(run: Run, tmp_path: Path):
    """Wherever it stands, also behind what the runs would have shown."""
    row = {"input_length": 500, "output_length": 20, "hash_ids": [1]}
    rows = [{"timestamp": 100 * i, **row} for i in range(900)]
    rows[800]["input_length"] = 140_000
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(r) + "\n" for r in rows))
    status, _, err = run(*SMALL, "--seeds", "1", "--traffic", trace, "--out", tmp_path)
    assert status == 2 and "131072 positions of the model, got 140020 tokens" in err
    status, _, err = run("replay", trace)
    assert status == 2 and "131072 positions of the model, got 140020 tokens" in err


def test_what_costs_the_same_is_not_called_cheaper():
    row = {"why_not": "", "usd_per_h": 1.0, "low_rps": 9.0, "capacity_rps": 10.0, "replicas": 2,
           "kernels": "measured", "usd_per_mtok": 0.1, "fleet_usd_per_h": 2.0, "limit": "",
           "at_least": False, "high_rps": 11.0}  # fmt: skip
    sure = {**row, "name": "sure", "fingerprint": "a", "replicas_high": 2}
    same = {**row, "name": "same", "fingerprint": "b", "replicas_high": 3, "capacity_rps": 10.5}
    less = {**same, "name": "less", "replicas": 1, "fleet_usd_per_h": 1.0}
    traffic = Traffic(text="rag:rate=3")
    slo = Slo(ttft_ms=1, tpot_ms=1)
    question = Question(model=model_preset("Llama-3.1-8B"), slo=slo, traffic=traffic, target_rps=15)
    assert _answer(question, [sure, same], sure, [])["aside"] == ""
    assert _answer(question, [sure, less], sure, [])["aside"].startswith("Cheaper, if")


def test_what_is_true_of_every_candidate_is_said_once():
    rows = [
        {"name": "a", "why_not": "", "note": "of all; of a"},
        {"name": "b", "why_not": "", "note": "of all"},
        {"name": "c", "why_not": "does not fit; would fit: d", "note": ""},
    ]
    said = {"of all": ["a", "b"], "of a": ["a"], "does not fit; would fit: d": ["c"]}
    assert _remarks(rows) == said


def test_a_machine_without_a_price_is_answered_without_cost(run: Run, tmp_path: Path):
    argv = [*SMALL, "--gpu", "GH200", "--what-if", "", "--seeds", "1", "--out", tmp_path]
    status, out, err = run(*argv)
    assert status == 0 and "--price GH200=USD_PER_H" in err and "$" not in out
    status, out, err = run(*argv, "--price", "gh200=2.5")
    assert status == 0 and "--price" not in err and "$2.5 per hour" in out


def test_a_machine_of_one_s_own_in_pipeline_stages(run: Run, tmp_path: Path):
    """GPU, disk and network of a catalogue file, two stages, a packed format."""
    figures = {"memory_bytes": 9e10, "link": "pcie5-x16", "vendor": "ours", "price": 1.5}
    peaks = {"bf16_flops": 5e14, "memory_bytes_per_s": 2e12, "n_sms": 120, "link_bytes_per_s": 6e10}
    disk = {"read_bytes_per_s": 2e10, "write_bytes_per_s": 1e10, "read_latency_s": 1e-4}
    disk |= {"read_iops": 2e6, "capacity_bytes": 8e12, "queue_depth": 64, "price": 0.1}
    network = {"raw_bits_per_s": 5e10, "read_bytes_per_s": 5.5e9, "latency_s": 1e-5}
    ours = {"gpus": {"Ours": {**figures, "peaks": peaks}}, "disks": {"raid": disk}}
    path = tmp_path / "ours.json"
    path.write_text(json.dumps({**ours, "networks": {"lan": network}}))
    argv = [*SMALL, "--gpu", "ours", "--disk", "raid", "--network", "lan", "--catalogue", path]
    argv += ["--stages", "1,2", "--format", "int4", "--seeds", "1", "--max-requests", "60"]
    status, _, err = run(*argv, "--what-if", "stages=2,stored=bf16", "--out", tmp_path)
    assert status == 0, err
    answer = json.loads((tmp_path / "whatif.json").read_text())
    one, two = answer["rows"]
    assert two["name"] == "2xOurs pp2 · dram+raid+lan · cachetune · int4"
    assert (one["usd_per_h"], two["usd_per_h"]) == (1.6, 3.1)  # both GPUs, one disk
    assert two["kv_tokens"] > 2 * one["kv_tokens"] and "borrowed" in one["kernels"]
    assert {"raid", "lan"} <= {p["row"] for p in one["provenance"]}
    stages, stored = answer["what_if"]
    assert stages["ratio"] > 1 and 0.5 < stored["ratio"] <= 1.05


def test_ctrl_c_keeps_what_was_computed(tmp_path: Path):
    program = "from cachetune.cli import main as m; m.COMMANDS = (*m.COMMANDS, 'whatif')\n"
    # A shell's background job, and so what it starts, ignores it.
    program += "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "m.main(sys.argv[1:])"
    argv = [*SMALL, "--policy", "full_recompute,cachetune,epic,full_reuse,prefix_cache"]
    argv += ["--format", "bf16,int8,int4,int2", "--seeds", "4", "--out", str(tmp_path)]
    path = os.pathsep.join(p for p in sys.path if p)
    process = subprocess.Popen(
        [sys.executable, "-c", program, *argv],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    journal = tmp_path / "journal.jsonl"
    until = time.monotonic() + 60
    while not (journal.exists() and journal.read_text().count("\n")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "run again to go on" in err and "Traceback" not in err
    n = journal.read_text().count("\n")
    assert 1 <= n < 17
    assert len(json.loads((tmp_path / "whatif.json").read_text())["rows"]) == n


def test_ctrl_c_in_the_what_ifs_keeps_those_that_were_done(
    answered: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from cachetune.tuner import sweep as module

    whole, calls = module.sweep, []

    def stopped(*args: Any, **options: Any) -> list[dict[str, Any]]:
        calls.append(whole(*args, **options))
        if len(calls) == 2:
            raise module.Interrupted([calls[-1][0], None])
        return calls[-1]

    monkeypatch.setattr(module, "sweep", stopped)
    out = tmp_path / "again"
    shutil.copytree(answered, out)
    argv = [*SMALL, "--policy", "full_recompute,cachetune", "--format", "bf16,int4"]
    status, _, err = run(*argv, "--what-if", "shared=0.5,disk=hdd-7200", "--out", out)
    assert status == 130 and "1 of 2 what-ifs kept" in err
    assert [e["what"] for e in json.loads((out / "whatif.json").read_text())["what_if"]] == [
        "shared=0.5"
    ]


def test_the_answer_is_the_same_whatever_the_number_of_workers(run: Run, tmp_path: Path):
    argv = [*SMALL, "--policy", "full_recompute,cachetune", "--seeds", "1", "--what-if", ""]
    for n in ("1", "2"):
        status, _, _ = run(*argv, "--max-requests", "60", "--workers", n, "--out", tmp_path / n)
        assert status == 0
    for name in ("whatif.json", "whatif.csv", "whatif.html"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.parametrize(
    ("third", "says"),
    [
        ('{"timestamp": 2000, "input_le', "line 3"),
        ('{"timestamp": 500, "input_length": 9, "output_length": 1, "hash_ids": [1]}', "line 3"),
        ('{"timestamp": 2000, "input_length": 0, "output_length": 1, "hash_ids": []}', "input_"),
        ('{"timestamp": 2000, "input_length": 9, "output_length": -1, "hash_ids": [1]}', "-1"),
        (
            '{"timestamp": 2000, "input_length": 9, "output_length": 0, "hash_ids": [1]}',
            "--drop-empty",
        ),
    ],
)
def test_a_bad_trace_is_one_line_and_leaves_nothing(
    third: str, says: str, run: Run, tmp_path: Path
):
    row = {"input_length": 9, "output_length": 1, "hash_ids": [1]}
    lines = [json.dumps({"timestamp": t, **row}) for t in (0, 1000)]
    (tmp_path / "trace.jsonl").write_text("\n".join([*lines, third]) + "\n")
    out = tmp_path / "out"
    status, printed, err = run(*SMALL, "--traffic", tmp_path / "trace.jsonl", "--out", out)
    assert status == 2 and not printed and err.startswith("cachetune: ") and err.count("\n") == 1
    assert says in err and "line 3" in err and not out.exists()


def test_a_terminal_sees_how_far_it_is_and_the_time_left(monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with progress_bar() as tell:
        for done in range(3):
            time.sleep(0.02)
            tell("candidates", done, 4)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "candidates" in shown and "2/4" in shown and re.search(r"\d:\d\d:\d\d", shown), shown


def test_the_catalogue_is_listed_and_shown(run: Run, tmp_path: Path):
    status, out, _ = run("catalogue", "list")
    assert status == 0 and json.loads(out.splitlines()[-1])["rows"] > 30
    status, out, _ = run("catalogue", "show", "mi300x")
    assert status == 0 and "borrowed from" in out and "bf16_flops used" in out
    mine = tmp_path / "mine.json"
    mine.write_text('{"disks": {"hdd-7200": {"read_bytes_per_s": 2.5e8}}}')
    status, out, _ = run("catalogue", "show", "hdd-7200", "--catalogue", mine)
    assert status == 0 and "user" in out and json.loads(out.splitlines()[-1])["name"] == "hdd-7200"
    status, _, err = run("catalogue", "show", "hdd")
    assert status == 2 and "hdd-7200" in err
