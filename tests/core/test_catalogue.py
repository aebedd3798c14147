"""The catalogue, machines composed of it, the memory sum, model presets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cachetune.core.catalogue import KINDS, Catalogue, Figure, load_catalogue, nearest
from cachetune.core.errors import CapacityError, ModelError, ProfileError
from cachetune.core.machine_spec import MachineSpec, compose
from cachetune.core.memory_sum import EngineMemory, check_fits, measured_blocks, memory_sum
from cachetune.core.model_presets import PRESETS, model_of, model_preset
from cachetune.simulator.gpu_sheet import gpu_sheet


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return load_catalogue()


def test_shipped_rows_are_what_people_ask_for(catalogue: Catalogue):
    assert len(catalogue.gpus) >= 14
    for kind in KINDS:
        for name, row in getattr(catalogue, kind).items():
            assert row.name == name
            for field in type(row).model_fields:
                value = getattr(row, field)
                assert not isinstance(value, Figure) or (value.source and value.kind != "user")
    kinds = {f.kind for _, row in catalogue.rows() for f in dict(row).values() if is_figure(f)}
    assert kinds == {"measured", "spec", "assumed"}
    for row in catalogue.gpus.values():
        assert gpu_sheet(row.name).name == row.name
        assert catalogue.link(row.link).name == row.link
        assert row.price is None or (row.price.as_of and row.price.source)


def is_figure(value: object) -> bool:
    return isinstance(value, Figure)


def test_an_unknown_name_names_the_nearest(catalogue: Catalogue):
    assert catalogue.gpu("h100 sxm").name == "H100-SXM"
    with pytest.raises(ProfileError, match=r"did you mean H100-PCIe or H100-SXM"):
        catalogue.gpu("H100")
    with pytest.raises(ProfileError, match="nvme-gen4"):
        catalogue.disk("NVMe Gen 44")
    with pytest.raises(ProfileError, match="known are"):
        catalogue.network("???")
    with pytest.raises(ModelError, match=r"Llama-3\.1-8B"):
        model_preset("llama-8b")
    assert nearest("qwen", PRESETS)[0].startswith("Qwen")


def test_a_user_s_file_is_laid_over_the_shipped_rows(tmp_path: Path, catalogue: Catalogue):
    path = tmp_path / "ours.json"
    peaks = {"bf16_flops": 1e15, "memory_bytes_per_s": 4e12, "n_sms": 150, "link_bytes_per_s": 5e11}
    ours = {"vendor": "us", "memory_bytes": 1e11, "link": "pcie5-x16", "peaks": peaks, "price": 2}
    given = {"gpus": {"h100-sxm": {"price": 2.1}, "Ours": ours}, "disks": {"HDD-7200": {}}}
    path.write_text(json.dumps(given))
    found = load_catalogue(path)
    price = found.gpu("H100-SXM").price
    assert price is not None and (price.usd_per_h, price.terms) == (2.1, "user")
    assert found.gpu("H100-SXM").memory_bytes == catalogue.gpu("H100-SXM").memory_bytes
    mine = found.gpu("ours")
    assert mine.memory_bytes.kind == "user" and mine.memory_bytes.source == str(path)
    assert found.disks == catalogue.disks


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "readable JSON"),
        ("[]", "objects by kind"),
        ('{"gpus": {"L4": 3}}', "each row of gpus"),
        ('{"gpus": {"L4": {"prices": {}}}}', "unknown key 'gpus.L4.prices'"),
        ('{"gpus": {"L4": {"price": -1}}}', "greater than 0"),
        ('{"gpu": {}}', "unknown key 'gpu'"),
        ('{"gpus": {"Mine": {}}}', "Field required"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str, says: str):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ProfileError, match=says) as e:
        load_catalogue(path)
    assert "\n" not in str(e.value)


def test_a_machine_is_composed_and_priced(catalogue: Catalogue):
    machine = compose(catalogue, "h100 sxm", n_gpus=2, disk="hdd-7200", network="25g-rdma")
    assert machine.name == "2 x H100-SXM, pcie5-x16, ddr5-4800, hdd-7200, 25g-rdma"
    assert machine.usd_per_h == pytest.approx(2 * 2.69)
    assert {"row", "figure", "value", "kind", "source"} <= set(machine.provenance()[0])
    assert MachineSpec.model_validate_json(machine.model_dump_json()) == machine
    with pytest.raises(ProfileError, match="--price GH200=USD_PER_H"):
        _ = compose(catalogue, "GH200").usd_per_h


def test_the_memory_sum_meets_what_engines_reported(catalogue: Catalogue):
    """vLLM's own block counts; the row that LOGIT_BYTES is from is not judged."""
    errors = {}
    for row in measured_blocks():
        engine = EngineMemory(
            utilization=row.utilization,
            max_num_batched_tokens=row.max_num_batched_tokens,
            max_num_seqs=row.max_num_seqs,
            graphs=False,
        )
        model = model_preset(row.model)
        found = memory_sum(model, catalogue.gpu(row.gpu), 1, engine)
        assert found.n_blocks == row.n_blocks and row.source in found.measured
        summed = found.kv_bytes // (row.block_tokens * model.kv_bytes_per_token)
        errors[row.gpu, row.max_num_batched_tokens] = summed / row.n_blocks - 1
    errors.pop(("RTX-4090", 2048))
    assert len(errors) == 4 and all(abs(e) < 0.04 for e in errors.values()), errors


def test_the_sum_is_itemised_and_adds_up(catalogue: Catalogue):
    model, gpu = model_preset("Llama-3.1-70B"), catalogue.gpu("A100-SXM-80GB")
    one, four = memory_sum(model, gpu), memory_sum(model, gpu, 4)
    assert one.n_blocks < 0 < four.n_blocks
    assert {"memory", "driver", "left free", "weights", "activations"} <= {
        i.what for i in four.items
    }
    assert sum(i.n_bytes for i in four.items) == four.kv_bytes
    assert all(i.source for i in four.items)
    halved = memory_sum(model, gpu, 4, EngineMemory(weights="fp8"))
    assert halved.kv_bytes - four.kv_bytes == pytest.approx(model.n_params // 4, abs=4)


def test_what_does_not_fit_says_by_how_much_and_what_would(catalogue: Catalogue):
    model, engine = model_preset("Llama-3.1-70B"), EngineMemory()
    with pytest.raises(CapacityError) as e:
        check_fits(model, catalogue.gpu("H100-SXM"), 1, engine, catalogue, 4096)
    assert "GiB short per GPU" in str(e.value)
    assert "2 x H100-SXM" in str(e.value) and "B200-SXM" in str(e.value)
    assert check_fits(model, catalogue.gpu("H100-SXM"), 2, engine, catalogue, 4096).n_blocks > 0


def test_presets_and_config_files_are_the_same_models(tmp_path: Path):
    billions = {"Llama-3.1-8B": 8.03, "Llama-3.1-70B": 70.6, "Qwen2.5-72B": 72.7, "Qwen3-32B": 32.8}
    for name, expected in billions.items():
        assert model_preset(name).n_params / 1e9 == pytest.approx(expected, rel=2e-3)
    config = {
        "model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 4096, "head_dim": 128,
        "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 151936, "max_position_embeddings": 40960, "dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_of(str(tmp_path)).replace(name="Qwen3-8B") == model_preset("qwen3 8b")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="must be JSON"):
        model_of(str(tmp_path / "config.json"))
