"""Chunks kept as FP8 or as codes of a few bits: through the real store, reads and the restore."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cachetune.core.errors import ModelError, StoreError
from cachetune.core.invariants import check
from cachetune.core.layout import chunk_bytes, read_bytes
from cachetune.core.model_spec import PACKED_BITS, STORED_FORMATS, Dtype, ModelSpec, Stored
from cachetune.kernels.packing import pack, unpack
from cachetune.runtime.chunk_file import ChunkCorrupt, Geometry
from cachetune.runtime.device import CPU, open_device
from cachetune.runtime.encoded_kv import EncodedKv, EncodedPart
from cachetune.runtime.runner import Runner
from cachetune.runtime.write_back import WriteBack
from fake_cuda import FakeCuda

from . import store_cases as cases
from .model_cases import TIERS, make_twins, plan_with, prompt_workload, tokens

N = 77
FORMATS = tuple(PACKED_BITS)
PROMPTS = [[tokens(40), tokens(33), tokens(50), tokens(12)], [tokens(33), tokens(17, 2)]]


def packed_model(stored: Stored, dtype: Dtype = "float32") -> ModelSpec:
    return cases.make_model(dtype).replace(stored=stored, head_dim=16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", FORMATS)
def test_what_comes_back_is_what_packing_makes_of_it(
    tmp_path: Path, stored: Stored, dtype: Dtype
) -> None:
    """Bit for bit, from every medium, any prefix of the rows; and within half a step."""
    model = packed_model(stored, dtype)
    chunk, bits = cases.make_chunk(model, N), PACKED_BITS[stored]
    store = cases.open_store(tmp_path, model)
    key = cases.put(store, "a", chunk)
    header = cases.chunk_file(store, key).stat().st_size - chunk_bytes(model, N)
    assert 0 < header <= 8192
    for tier in ("disk", "dram", "hbm"):
        store.place(key, tier)
        for n in (1, 32, 40, N):
            rows = store.read(key, 0, 3, [n] * 3, cases.REQUEST, tier)
            assert rows.n_bytes == 3 * read_bytes(model, n)
            for layer in range(3):
                for half, per, source in ((rows.k, "channel", chunk.k), (rows.v, "token", chunk.v)):
                    ordered = source[layer, chunk.order]
                    whole = pack(ordered, bits, per)  # type: ignore[arg-type]
                    assert torch.equal(half(layer), unpack(whole, ordered.dtype)[:n])
                    step = float(whole.scale.max())
                    rounding = 2**-7 if dtype == "bfloat16" else 2**-10
                    worst = step / 2 + rounding * float(ordered.abs().max())
                    assert float((half(layer) - ordered[:n]).abs().max()) <= worst
    store.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fp8_keeps_four_digits_and_saturates(tmp_path: Path, dtype: Dtype) -> None:
    """From every medium, any prefix of the rows; what is beyond 448 is 448."""
    model = cases.make_model(dtype).replace(stored="fp8")
    chunk = cases.make_chunk(model, N)
    wide = chunk.k * torch.exp2(torch.arange(N) % 24 - 12.0)[:, None, None].to(chunk.k)
    store = cases.open_store(tmp_path, model)
    key = cases.put(store, "a", replace(chunk, k=wide))
    for tier in ("disk", "dram", "hbm"):
        store.place(key, tier)
        for n in (1, 32, 40, N):
            rows = store.read(key, 0, 3, [n] * 3, cases.REQUEST, tier)
            assert rows.n_bytes == 3 * read_bytes(model, n)
            for layer in range(3):
                for half, source in ((rows.k, wide), (rows.v, chunk.v)):
                    found = half(layer)
                    true = source[layer, chunk.order][:n].clamp(-448, 448).double()
                    # Half a step: of three bits behind the leading one, below 2**-6 of 2**-9.
                    step = true.abs().mul(2.0**-3).clamp_min(2.0**-9)
                    assert found.dtype == source.dtype
                    assert bool(((found.double() - true).abs() <= step / 2).all())
    assert float(wide.abs().max()) > 448
    store.close()


def test_fewer_bits_take_fewer_bytes() -> None:
    """Of bf16 at Llama-3.1-8B's shape: codes, and fp16 scales that cost a sixteenth or so."""
    spec = packed_model("int8", "bfloat16").replace(n_kv_heads=8, n_heads=32, head_dim=128)
    native = chunk_bytes(spec.replace(stored="native"), 512)
    shares = [chunk_bytes(spec.replace(stored=stored), 512) / native for stored in FORMATS]
    assert shares == pytest.approx([b / 16 + 1 / 16 for b in PACKED_BITS.values()], abs=0.003)
    assert chunk_bytes(spec.replace(stored="fp8"), 512) / native == pytest.approx(0.5, abs=0.003)


def test_a_flipped_bit_of_codes_or_scales_is_found(tmp_path: Path) -> None:
    store = cases.open_store(tmp_path, packed_model("int4"))
    key = cases.put(store, "a", cases.make_chunk(store.model, N))
    path, draw = cases.chunk_file(store, key), random.Random(1)
    good, blob = path.read_bytes(), read_bytes(store.model, N)
    group = read_bytes(store.model, 32)
    for _ in range(80):
        bad = bytearray(good)
        at = len(good) - 3 * blob + draw.randrange(3) * blob + draw.randrange(min(group, 1500))
        bad[at] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(ChunkCorrupt, match=key):
            cases.read_all(store, key)
    path.write_bytes(good)
    cases.read_all(store, key)
    store.close()


def test_a_folder_keeps_one_format(tmp_path: Path) -> None:
    """And the format is part of every key, so that remote tiers can hold several."""
    native = packed_model("native")
    stores = [cases.open_store(tmp_path / s, native.replace(stored=s)) for s in ("native", "int8")]
    keys = {cases.put(store, "a", cases.make_chunk(native, N)) for store in stores}
    assert len(keys) == 2
    for store in stores:
        store.close()
    with pytest.raises(StoreError, match="int8"):
        cases.open_store(tmp_path / "int8", native)


def test_a_head_that_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        cases.make_model().replace(stored="int4")
    loaded, _ = make_twins("llama")
    with pytest.raises(ModelError, match="int5, head dim 16"):
        loaded.stored_as("int5")  # type: ignore[arg-type]
    assert loaded.stored_as("int4").spec.fingerprint() == loaded.spec.fingerprint()


@pytest.fixture(scope="module")
def native_logits(tmp_path_factory: pytest.TempPathFactory) -> dict[int, torch.Tensor]:
    return logits_of("native", tmp_path_factory.mktemp("native"))


def logits_of(
    stored: Stored, folder: Path, device: str | FakeCuda = "cpu"
) -> dict[int, torch.Tensor]:
    loaded = make_twins("llama")[0].stored_as(stored)
    workload, plan = prompt_workload(PROMPTS, 2), plan_with("cachetune", 0.3, layer_group=2)
    with Runner(loaded, folder, TIERS, device=device, kv_capacity_tokens=1024) as runner:
        runner.prepare(workload, plan, "file")
        decisions, schedule = runner.batch_schedule(workload, plan, runner.index(plan))
        before = runner.store.counters.bytes_read
        result = runner.execute_schedule(
            workload, plan, decisions, schedule, keep_suffix_logits=True
        )
        check(result.timeline, schedule=schedule)
        loads = sum(op.n_bytes for op in schedule.ops if op.kind == "load")
        assert runner.store.counters.bytes_read - before == loads
        if isinstance(device, FakeCuda):  # a launch per layer, however many chunks an op has
            restores = [op for op in schedule.ops if op.kind == "restore"]
            assert any(len(op.chunks) > 1 for op in restores)
            assert device.n_kernels["restore"] == sum(op.n_layers for op in restores)
    return result.suffix_logits


def gap(found: dict[int, torch.Tensor], true: dict[int, torch.Tensor]) -> float:
    """Relative L2 error of the logits, the larger of the requests'."""
    return max(float((found[r] - true[r]).norm() / true[r].norm()) for r in true)


def test_the_answer_s_error_falls_with_the_bits(
    native_logits: dict[int, torch.Tensor], tmp_path: Path
) -> None:
    """Ops name the packed bytes and the reads fetch those; a bit more is about half the error."""
    formats: tuple[Stored, ...] = ("int8", "fp8", "int4", "int2")
    int8, fp8, int4, int2 = (gap(logits_of(s, tmp_path / s), native_logits) for s in formats)
    assert 0 < int8 < fp8 < int4 < int2 and int8 < 0.02 < int4 and int8 < int4 / 4


@pytest.mark.parametrize("stored", ["fp8", "int8", "int3"])
def test_a_gpu_restores_the_same(tmp_path: Path, stored: Stored) -> None:
    cpu = logits_of(stored, tmp_path / "cpu")
    gpu = logits_of(stored, tmp_path / "gpu", FakeCuda())
    assert gap(gpu, cpu) < 1e-4


@pytest.mark.parametrize("stored", ["fp8", "int8"])
@pytest.mark.parametrize("policy", ["cacheblend", "epic", "full_reuse", "cachetune"])
def test_every_policy_takes_lossy_chunks(tmp_path: Path, policy: str, stored: Stored) -> None:
    loaded = make_twins("qwen3")[0].stored_as(stored)
    workload, plan = prompt_workload(PROMPTS, 3), plan_with(policy, 0.3)
    made = []
    for name, device in (("cpu", "cpu"), ("gpu", FakeCuda())):
        with Runner(
            loaded, tmp_path / name, TIERS, device=device, kv_capacity_tokens=1024
        ) as runner:
            runner.prepare(workload, plan, "dram")
            result = runner.serve(workload, plan, runner.index(plan))
            check(result.timeline, workload)
            made.append(result.token_ids)
            assert sum(result.n_reused_tokens.values()) > 0
    assert made[0] == made[1]


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("device", ["fake", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", STORED_FORMATS)
def test_blobs_are_laid_out_the_same_on_every_device(
    stored: Stored, dtype: Dtype, device: str
) -> None:
    model = packed_model(stored, dtype)
    shape = Geometry.of(model)
    for n in (1, 32, N):
        chunk, found = cases.make_chunk(model, n), []
        for where in (CPU, FakeCuda() if device == "fake" else open_device(device)):
            part = EncodedPart(where, where.upload(chunk.k), where.upload(chunk.v))
            found.append(EncodedKv((part,)).blobs(shape, chunk.order))
        assert np.array_equal(*found) and found[0].nbytes == chunk_bytes(model, n)


CHUNK = tokens(70)
"""Two row groups and a part of one."""


def files(runner: Runner) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (runner.store.root / "chunks").iterdir()}


def ingest_all(runner: Runner) -> None:
    """A chunk in every order, then a chain of two in whose middle no row group begins."""
    for selector in ("chunk_start", "random", "low_pass", "spread_high_pass"):
        texts = [tokens(30, i) for i in range(3)]
        runner.ingestor.ingest(CHUNK, selector=selector, tier="file", neighbours=texts)
    runner.ingestor.ingest_prefix([tokens(41), CHUNK], selector="chunk_start", tier="dram")


@pytest.mark.parametrize("n_stages", [1, 3])
@pytest.mark.parametrize("stored", STORED_FORMATS)
def test_a_gpu_lays_out_the_same_files(
    tmp_path: Path, stored: Stored, n_stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte; each stage packs its own layers, and only its blobs come to the host unless
    the selector looks at values."""
    loaded = make_twins("llama")[0].stored_as(stored)
    spec, devices = loaded.spec, [FakeCuda(i) for i in range(n_stages)]
    monkeypatch.setattr(
        "cachetune.runtime.runner.stage_devices",
        lambda first, n: [first] if first.kind == "cpu" else devices,
    )
    with Runner(loaded, tmp_path / "cpu", TIERS) as cpu:
        ingest_all(cpu)
        want = files(cpu)
    with Runner(
        loaded, tmp_path / "gpu", TIERS, device=devices[0], kv_capacity_tokens=1024,
        pipeline_stages=n_stages,
    ) as gpu:  # fmt: skip
        came: list[int] = []
        for selector in ("chunk_start", "random", "low_pass", "high_pass"):
            before = sum(d.downloaded_bytes for d in devices)
            entry = gpu.ingestor.ingest(CHUNK, selector=selector, tier="file")
            came.append(sum(d.downloaded_bytes for d in devices) - before)
            assert entry.n_bytes == chunk_bytes(spec, len(CHUNK))
        laid_out, values = entry.n_bytes, len(CHUNK) * spec.kv_bytes_per_token
        assert came == [laid_out, laid_out, values + laid_out, values + laid_out]
        packs = [2 * n for n, _ in gpu.stages.places] if stored in PACKED_BITS else [0] * n_stages
        assert [d.n_kernels["pack"] for d in devices] == [4 * n for n in packs]
        gpu.store.discard(entry.key)  # the one that `ingest_all` does not make
        ingest_all(gpu)
        found = files(gpu)
    assert found == want and len(want) == 6


def test_what_waits_to_be_written_is_packed(tmp_path: Path) -> None:
    """On a GPU the queue holds the blobs, and no memory of the device; on the CPU the values."""
    loaded, held = make_twins("llama")[0].stored_as("int4"), {}
    for name, device in (("cpu", "cpu"), ("gpu", FakeCuda())):
        with Runner(
            loaded, tmp_path / name, TIERS, device=device, kv_capacity_tokens=1024
        ) as runner:
            queue, gate = WriteBack(), threading.Event()
            queue.add(lambda gate=gate: gate.wait(20), 1)
            for number in range(2):
                text = tokens(70, number)
                assert runner.ingestor.ingest_behind(queue, text, selector="random", tier="file")
            held[name] = queue.pending_bytes - 1
            assert not files(runner)
            gate.set()
            queue.close()
            held[name, "files"] = files(runner)
            assert queue.counters.written == 3 and runner.ingestor.ledger.n_chunks == 2
    assert held["cpu"] == 2 * 70 * loaded.spec.kv_bytes_per_token
    assert held["gpu"] == 2 * chunk_bytes(loaded.spec, 70) < held["cpu"]
    assert held["gpu", "files"] == held["cpu", "files"] and len(held["gpu", "files"]) == 2


def test_blobs_of_another_size_are_refused(tmp_path: Path) -> None:
    store = cases.open_store(tmp_path, packed_model("int4"))
    for n_bytes in (0, chunk_bytes(store.model, N) - 1, chunk_bytes(store.model, 9 * N)):
        with pytest.raises(StoreError, match=f"{n_bytes} bytes"):
            store.put_blobs(
                "a", torch.arange(N), lambda n=n_bytes: np.zeros(n, np.uint8), order_name="rank",
                tier="disk",
            )  # fmt: skip
    assert len(store.index("rank")) == 0 and store.tiers["disk"].used_bytes == 0
    store.close()
