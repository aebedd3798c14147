"""`cachetune run` and the models it loads: what does not fit is refused before it is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cachetune.core.chunk_index import content_id_of
from cachetune.core.hardware import HardwareProfile
from cachetune.core.workload import Content, Workload
from cachetune.runtime.loaded_model import LoadedModel, load_model
from cachetune.runtime.machine import device_here
from safetensors.torch import save_file
from support import make_profile, make_workload

from .file_cases import Case, Run

A, B = tuple(range(64)), tuple(range(64, 128))
SUFFIX = tuple(range(8))


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("llama-tiny")


@pytest.fixture(scope="module")
def machine(tiny: LoadedModel) -> HardwareProfile:
    """A profile that says it is of this machine and the tiny model."""
    profile = make_profile(model=tiny.spec)
    return profile.replace(device=device_here(1), model_fingerprint=tiny.fingerprint)


def real_workload(**names: tuple[int, ...]) -> Workload:
    """Two requests over two contents with these names and token ids."""
    work = make_workload([tuple(names), tuple(reversed(names))])
    contents = {name: Content(n_tokens=len(ids), token_ids=ids) for name, ids in names.items()}
    requests = tuple(r.replace(suffix_ids=SUFFIX) for r in work.requests)
    return work.replace(contents=contents, requests=requests)


@pytest.fixture
def real(run: Run, tmp_path: Path, machine: HardwareProfile) -> Case:
    return Case.write(run, tmp_path, machine, real_workload(a=A, b=B))


def serve(case: Case, **options: object) -> list[object]:
    return case.command("run", **{"model": "llama-tiny", **options})


def test_contents_with_names_of_their_own_are_reused(real: Case, tmp_path: Path) -> None:
    """And counted as those that are named by their hash, by every command."""
    real_workload(**{content_id_of(A): A, content_id_of(B): B}).write(tmp_path / "hashed.json")
    results = []
    for name in ("run", "simulate"):
        for path in (real.path("workload"), tmp_path / "hashed.json"):
            options: dict[str, Any] = {"model": "llama-tiny"} if name == "run" else {}
            status, out, err = real.run(*real.command(name, workload=path, **options))
            assert (status, err) == (0, "")
            results.append(json.loads(out.splitlines()[-1]))
    assert len({r["workload_fingerprint"] for r in results}) == 1
    assert len({r["reuse_ratio"] for r in results}) == 1 and results[0]["reuse_ratio"] > 0.5


def test_two_names_of_one_text_are_one_content() -> None:
    work = real_workload(a=A, b=A).by_content()
    assert list(work.contents) == [content_id_of(A)]
    assert work.requests[0].chunks == (content_id_of(A),) * 2
    assert work.by_content() is work


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        ("contents.a.token_ids", None, "needs token ids, got content 'a' has no token_ids; add"),
        ("requests.1.suffix_ids", None, "token ids, got request 1 has no suffix_ids; add"),
        ("requests.1.suffix_ids", [512] * 8, "must lie in 0..511, the vocabulary of llama-tiny"),
        ("contents.b.token_ids", [*B[1:], 600], "got 600 in content '"),
        ("contents.b.token_ids", [*B[1:], -7], "greater than or equal to 0, got -7"),
        ("requests.0.max_output_tokens", 40000, "context, got request 0: 40136 tokens, llama-"),
    ],
)
def test_a_workload_that_cannot_be_run(real: Case, at: str, value: object, says: str) -> None:
    real.change("workload", at, value)
    line = real.refused(*serve(real))
    assert says in line, line


@pytest.mark.parametrize("what", ["machine", "model"])
def test_a_plan_for_another(real: Case, what: str) -> None:
    key = {"machine": "hardware_fingerprint", "model": "model_fingerprint"}[what]
    real.change("plan", key, "0123")
    line = real.refused(*serve(real))
    assert f"must be made for this {what}, got the plan's {what} is 0123, this one is" in line
    assert line.endswith("; tune again here, or pass --allow-mismatch\n")
    status, out, err = real.run(*serve(real), "--allow-mismatch")
    assert status == 0 and json.loads(out.splitlines()[-1])["n_ended"] == 2
    assert err.startswith(f"warning: the plan's {what} is 0123") and err.count("\n") == 1


def test_a_profile_of_another_machine(real: Case, machine: HardwareProfile) -> None:
    real.change("profile", "device.n_cores", machine.device.n_cores + 1)
    line = real.refused(*serve(real))
    assert "the profile must be of this machine, got" in line and "calibrate here, or" in line
    status, _, err = real.run(*serve(real), "--allow-mismatch")
    assert status == 0 and err.startswith("warning: the profile's machine is ")


def test_a_profile_of_another_model(real: Case) -> None:
    real.change("profile", "model_fingerprint", "0123")
    line = real.refused(*serve(real))
    assert "the profile must be of this model, got profile 0123" in line and "calibrate" in line


def test_a_tier_that_is_not_there(real: Case) -> None:
    line = real.refused(*serve(real, tier="tape"))
    assert "the tier must be one of disk, dram, got 'tape'; name one of them" in line


def test_a_store_that_cannot_be_made(real: Case) -> None:
    line = real.refused(*serve(real, store=real.path("plan") / "store"))
    assert "store" in line and "directory" in line


GOOD: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
MROPE = {"rope_type": "default", "mrope_section": [1, 2, 1]}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "must be a folder with config.json or a known shape, got "),
        (json.dumps(GOOD)[:40], "config.json must hold one JSON object, got "),
        (b"\xff{}", "config.json must hold one JSON object, got "),
        ("[]", "config.json must hold one JSON object, got "),
        ({"model_type": "gpt2"}, "must be one of llama, mistral, qwen2, qwen3, got model_type='gp"),
        ({"rope_scaling": {"type": "dynamic"}}, "llama3, yarn, got rope_type='dynamic'; it"),
        ({"rope_parameters": MROPE}, "llama3, yarn, got rope_type='mrope'; it depends"),
        ({"rope_parameters": "yarn"}, "config.json must give the shapes of a decoder, got "),
        ({"num_hidden_layers": None}, "config.json must give the shapes of a decoder, got "),
        ({"num_attention_heads": 3}, "multiple of n_kv_heads, got 3 and 2; use the file"),
        ({"num_attention_heads": 0}, "config.json must give the shapes of a decoder, got "),
        ({"dtype": "int8"}, "'float32', 'bfloat16' or 'float16', got 'int8'; use the"),
        ({}, "the model's weights must be readable and fit its config.json, got "),
    ],
)
def test_a_model_that_cannot_be_loaded(real: Case, config: object, says: str) -> None:
    folder = real.folder / "model"
    if config is not None:
        folder.mkdir()
        text = json.dumps({**GOOD, **config}) if isinstance(config, dict) else config
        data = text if isinstance(text, bytes) else str(text).encode()
        (folder / "config.json").write_bytes(data)
    line = real.refused(*serve(real, model=folder))
    assert says in line, line


def test_weights_that_are_cut_short(real: Case) -> None:
    folder = real.folder / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(GOOD))
    (folder / "model.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    assert "weights must be readable" in real.refused(*serve(real, model=folder))


def test_weights_that_are_missing(real: Case, tiny: LoadedModel) -> None:
    """The library would replace them by random ones and go on."""
    folder = real.folder / "model"
    tiny.hf.config.save_pretrained(folder)
    weights = tiny.hf.state_dict()
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        del weights[name]  # the head is the embedding's
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    line = real.refused(*serve(real, model=folder))
    assert "must all be there, got" in line and "up_proj.weight (and 1 more); download" in line


def test_a_dtype_that_is_not_known(case: Case) -> None:
    line = case.refused("calibrate", "--model", "llama-tiny", "--dtype", "int8")
    assert "the dtype must be one of float32, bfloat16, float16, got 'int8'; name" in line
