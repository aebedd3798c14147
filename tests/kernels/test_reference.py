"""The references against float64 mathematics, on random shapes, positions and bit widths."""

import math

import pytest
import torch
from cachetune.kernels import packing, reference
from cachetune.kernels.key_bitmap import KeyBitmap
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

torch.set_num_threads(1)
FEW = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**20)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """float64 attention of every query over every key that ``seen`` ``[n_q, n]`` allows."""
    group = q.shape[1] // k.shape[0]
    k, v = (x.double().repeat_interleave(group, 0) for x in (k, v))
    score = torch.einsum("qhd,hkd->hqk", q.double(), k) * scale
    weight = score.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqk,hkd->qhd", weight, v)


@st.composite
def attention_problem(draw_from: st.DrawFn) -> dict:
    n = draw_from(st.integers(1, 300))
    chosen = draw_from(st.integers(1, n))
    return {
        "seed": draw_from(seeds),
        "n": n,
        "n_q": chosen,
        "kv_heads": draw_from(st.integers(1, 3)),
        "group": draw_from(st.integers(1, 5)),
        "head_dim": draw_from(st.sampled_from([16, 64, 80])),
        "window": draw_from(st.none() | st.integers(1, 2 * n)),
        "n_keys": draw_from(st.integers(0, n)),
        "contiguous": draw_from(st.booleans()),
        "holes": draw_from(st.booleans()),
    }


@FEW
@given(attention_problem())
def test_sparse_attention_is_causal_by_position(p: dict) -> None:
    seed, n, hk, d = p["seed"], p["n"], p["kv_heads"], p["head_dim"]
    q = draw(seed, p["n_q"], hk * p["group"], d)
    k, v = draw(seed + 1, hk, n + 3, d), draw(seed + 2, hk, n + 3, d)
    k[:, p["n_keys"] :] = v[:, p["n_keys"] :] = math.nan
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    pos = torch.arange(n - p["n_q"], n) if p["contiguous"] else order[: p["n_q"]].sort().values
    key = torch.arange(p["n_keys"])
    seen = key <= pos[:, None]
    if p["window"]:
        seen &= key > pos[:, None] - p["window"]
    keep = draw(seed + 3, n + 3) > -0.5 if p["holes"] else None
    if keep is not None:
        seen &= keep[: p["n_keys"]]
        clean_k, clean_v = k, v
        k, v = k.clone(), v.clone()
        k[:, ~keep] = v[:, ~keep] = math.nan
    holes = None if keep is None else KeyBitmap.of(keep)
    got = reference.sparse_attention(q, k, v, pos, p["n_keys"], d**-0.5, p["window"], holes)
    if keep is not None:
        k, v = clean_k, clean_v
    want = dense(q, k[:, : p["n_keys"]], v[:, : p["n_keys"]], seen, d**-0.5)
    torch.testing.assert_close(got.double(), want, atol=3e-6, rtol=1e-5)
    assert not got[~seen.any(1)].any()


def test_bottom_right_alignment_is_caught() -> None:
    """Query i of m as if it stood at n - m + i: the usual causal flag, wrong for scattered rows."""
    q, k, v = draw(0, 20, 4, 64), draw(1, 2, 200, 64), draw(2, 2, 200, 64)
    pos = torch.arange(0, 200, 10)
    right = dense(q, k, v, torch.arange(200) <= pos[:, None], 0.125)
    aligned = torch.arange(200) <= torch.arange(180, 200)[:, None]
    wrong = dense(q, k, v, aligned, 0.125)
    got = reference.sparse_attention(q, k, v, pos, 200, 0.125).double()
    assert (got - right).abs().max() < 1e-5
    assert (wrong - right).abs().max() > 0.1
    k[:, 195:], v[:, 195:] = 50.0, 50.0
    leaked = reference.sparse_attention(q, k, v, pos, 200, 0.125).double()
    assert torch.equal(leaked, got), "a query saw a key of its future"


def test_sparse_attention_in_bf16_is_as_exact_as_bf16() -> None:
    q, k, v = draw(0, 90, 8, 64), draw(1, 2, 400, 64), draw(2, 2, 400, 64)
    pos = torch.arange(5, 365, 4)
    low = [x.bfloat16() for x in (q, k, v)]
    want = dense(*low, torch.arange(400) <= pos[:, None], 0.125)
    got = reference.sparse_attention(*low, pos, 400, 0.125)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, atol=8e-3, rtol=8e-3)


@pytest.mark.parametrize("window", [None, 40])
def test_layers_may_share_what_rows_see(window: int | None) -> None:
    """Also for rows that see no key, and blocks in which all do."""
    positions = torch.arange(0, 600, 3)
    q, k, v = draw(1, 200, 4, 16), draw(2, 2, 600, 16), draw(3, 2, 600, 16)
    for n_keys in (150, 600):
        seen = list(reference.seen_blocks(positions, torch.arange(n_keys), 2, window))
        shared = reference.sparse_attention(q, k, v, positions, n_keys, 0.25, window, seen=seen)
        alone = reference.sparse_attention(q, k, v, positions, n_keys, 0.25, window)
        assert torch.equal(shared, alone)
        if window and n_keys == 150:
            assert not shared[-1].any()
            assert len(seen) == 1


def test_sparse_attention_refuses_unsorted_positions() -> None:
    q, kv = draw(0, 2, 2, 16), draw(1, 1, 8, 16)
    with pytest.raises(ValueError, match="ascending"):
        reference.sparse_attention(q, kv, kv, torch.tensor([3, 1]), 8, 0.25)
    with pytest.raises(ValueError, match="n_keys"):
        reference.sparse_attention(q, kv, kv, torch.tensor([1, 3]), 9, 0.25)


@FEW
@given(seeds, st.integers(1, 40), st.sampled_from([(64, 64), (80, 32), (16, 16)]), st.booleans())
def test_rope_turns_pairs(seed: int, n: int, dims: tuple[int, int], interleaved: bool) -> None:
    d, r = dims
    x, pos = draw(seed, n, 2, d), torch.arange(n) * 37
    inv_freq = 1e4 ** -(torch.arange(r // 2) * 2.0 / r)
    cos, sin = reference.rope_tables(inv_freq, pos, 1.5)
    got = reference.apply_rope(x, cos, sin, interleaved)
    pairs = x[..., :r].double()
    pairs = pairs.unflatten(-1, (-1, 2)) if interleaved else pairs.unflatten(-1, (2, -1)).mT
    turned = torch.view_as_complex(pairs.contiguous())
    turned = turned * (torch.complex(cos, sin).to(torch.complex128))[:, None]
    back = torch.view_as_real(turned)
    want = back.flatten(-2) if interleaved else back.mT.flatten(-2)
    torch.testing.assert_close(got[..., :r].double(), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(got[..., r:], x[..., r:])


def test_rope_score_depends_on_distance_only() -> None:
    inv_freq = 1e4 ** -(torch.arange(32) / 32.0)
    q, k = draw(0, 1, 1, 64), draw(1, 1, 1, 64)

    def score(at_q: int, at_k: int) -> float:
        turned = [
            reference.apply_rope(x, *reference.rope_tables(inv_freq, torch.tensor([p])))
            for x, p in ((q, at_q), (k, at_k))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(70, 20) == pytest.approx(score(1070, 1020), abs=2e-3)


@FEW
@given(seeds, st.integers(1, 70), st.sampled_from([16, 4, 3]), st.booleans(), st.booleans())
def test_restore_scatters(seed: int, n: int, bits: int, partial: bool, by_frequency: bool) -> None:
    d, slots = 32, 90
    k, v = draw(seed, n, 2, d), draw(seed + 1, n, 2, d)
    pos = torch.randperm(slots, generator=torch.Generator().manual_seed(seed))[:n]
    inv_freq = 1e4 ** -(torch.arange(8 if partial else 16) / 16.0)
    cos, sin = reference.rope_tables(inv_freq, torch.arange(slots))
    rope = {"inv_freq": inv_freq} if by_frequency else {"cos_table": cos, "sin_table": sin}
    k_out, v_out = torch.full((2, slots, d), 7.0), torch.full((2, slots, d), 7.0)
    if bits == 16:
        reference.restore(k, v, pos, k_out, v_out, **rope)
    else:
        packed = packing.pack(k, bits, "channel"), packing.pack(v, bits, "token")
        reference.restore_quantised(*packed, pos, k_out, v_out, **rope)
        k, v = (packing.unpack(p) for p in packed)
    want = reference.apply_rope(k, cos[pos], sin[pos])
    torch.testing.assert_close(k_out[:, pos].transpose(0, 1), want)
    assert torch.equal(v_out[:, pos].transpose(0, 1), v)
    rest = torch.ones(slots, dtype=torch.bool).index_fill_(0, pos, False)
    assert (k_out[:, rest] == 7.0).all()
    assert (v_out[:, rest] == 7.0).all()


@FEW
@given(seeds, st.lists(st.sampled_from([500.0, 1e4, 1e6]), min_size=2, max_size=4, unique=True))
def test_restore_turns_each_layer_by_its_own_base(seed: int, bases: list[float]) -> None:
    """The keys of one chunk, layer by layer, against complex numbers of float64."""
    n, d = 20, 32
    k, v = draw(seed, n, 2, d), draw(seed + 1, n, 2, d)
    pos = torch.randperm(200, generator=torch.Generator().manual_seed(seed))[:n]
    pairs = torch.complex(k[..., : d // 2].double(), k[..., d // 2 :].double())
    found = []
    for base in bases:
        k_out, v_out = torch.zeros(2, 200, d), torch.zeros(2, 200, d)
        inv_freq = 1.0 / base ** (torch.arange(0, d, 2) / d)
        reference.restore(k, v, pos, k_out, v_out, inv_freq=inv_freq)
        angle = pos[:, None].double() * base ** -(torch.arange(d // 2).double() * 2 / d)
        turned = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
        want = torch.cat([turned.real, turned.imag], -1)
        found.append(k_out[:, pos].transpose(0, 1))
        torch.testing.assert_close(found[-1].double(), want, atol=2e-4, rtol=2e-4)
    assert (found[0] - found[1]).abs().max() > 0.1


def test_restore_of_many_odd_rows_and_strided_buffers() -> None:
    """More tokens than one step takes; rows that do not fill 16-byte words; views of a pool."""
    n, d = 2 * reference.RESTORE_BLOCK + 5, 10
    k, v = draw(0, n, 3, d), draw(1, n, 3, d)
    pos = torch.randperm(n + 4, generator=torch.Generator().manual_seed(2))[:n]
    rope = {"inv_freq": 1e4 ** -(torch.arange(5) / 5.0)}
    pool = torch.zeros(2, 3, n + 4, d + 7)
    k_out, v_out = pool[0, ..., 3 : 3 + d], pool[1, ..., 3 : 3 + d]
    reference.restore(k, v, pos, k_out, v_out, **rope)
    want = reference.apply_rope(k, *reference.rope_tables(rope["inv_freq"], pos))
    torch.testing.assert_close(k_out[:, pos].transpose(0, 1), want)
    assert torch.equal(v_out[:, pos].transpose(0, 1), v)
    assert not pool[..., :3].any() and not pool[..., 3 + d :].any()


@FEW
@given(
    seeds,
    st.integers(1, 100),
    st.sampled_from([16, 64, 80, 96]),
    st.sampled_from(packing.BITS),
    st.sampled_from(["channel", "token"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_packing_is_within_half_a_step(
    seed: int, n: int, d: int, bits: int, per: packing.Per, dtype: torch.dtype
) -> None:
    x = (draw(seed, n, 2, d) * 3 + 1).to(dtype)
    packed = packing.pack(x, bits, per)
    assert packed.codes.shape == (n, 2, d * bits // 8)
    error = (packing.unpack(packed) - x.float()).abs()
    dim, size = (0, n) if per == "channel" else (2, d)
    step = packed.scale.float().repeat_interleave(32, dim).narrow(dim, 0, size)
    # Half a step, plus what rounding zero and scale to fp16 moves the ends of the range.
    slack = 2**bits * step * 2**-11 + x.abs().amax() * 2**-10
    assert (error <= 0.5 * step + slack).all()


@FEW
@given(seeds, st.integers(0, 50), st.sampled_from(packing.BITS))
def test_codes_survive_their_bytes(seed: int, n: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, 3, 80), dtype=torch.uint8, generator=generator)
    assert torch.equal(packing._from_bytes(packing._to_bytes(codes, bits), bits, 80), codes)


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize("per", ["channel", "token"])
def test_packing_edge_values(bits: int, per: packing.Per) -> None:
    constant = torch.full((5, 1, 16), 2.5)
    assert torch.equal(packing.unpack(packing.pack(constant, bits, per)), constant)
    huge = torch.tensor([-1e9, 1e9]).repeat(5, 1, 8)
    assert packing.unpack(packing.pack(huge, bits, per)).isfinite().all()
    first, second = draw(0, 32, 1, 16), draw(1, 7, 1, 16) * 100
    alone, joined = (
        packing.pack(first, bits, per),
        packing.pack(torch.cat([first, second]), bits, per),
    )
    assert torch.equal(joined.codes[:32], alone.codes), "a group leaked into its neighbour"
    assert packing.pack(first[:0], bits, per).codes.shape[0] == 0
    with pytest.raises(ValueError, match="multiple of 16"):
        packing.pack(draw(0, 2, 1, 24), bits, per)
    with pytest.raises(ValueError, match="bits"):
        packing.pack(first, 5, per)


@FEW
@given(seeds, st.integers(1, 50))
def test_deviation_is_squared_distance(seed: int, n: int) -> None:
    new, old = draw(seed, n, 2, 16).bfloat16(), draw(seed + 1, n, 2, 16).bfloat16()
    want = (new.double() - old.double()).pow(2).sum((1, 2))
    torch.testing.assert_close(reference.deviation(new, old).double(), want, atol=0, rtol=1e-6)


@FEW
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.data())
def test_top_indices_prefers_lower_index_on_ties(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(values)))
    want = sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])
    assert reference.top_indices(torch.tensor(values, dtype=torch.float32), count).tolist() == want


def test_top_indices_refuses_too_many() -> None:
    with pytest.raises(ValueError, match="count"):
        reference.top_indices(torch.zeros(3), 4)
