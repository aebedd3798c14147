"""Time registry cases on the present device, beside peers and what the device can do at most.

A case, and every peer that computes the same thing, is first compared with the reference; a wrong
one gets no speed. The limits come from the same run (`Ceilings`), and a case's own limit is the
longer of its bytes and its flops at those rates. On a CPU the torch reference is what runs, at
smaller sizes, and the peers are what it is checked against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .cases import FAMILIES
from .peers import FLEX, Peer, peers_of
from .registry import TOLERANCE, Inputs, KernelCase
from .stopwatch import REPEATS, Spread, seconds_of

TOKEN_SHAPES = ("n", "n_q", "n_keys", "pages")
ROTATED_BYTES = 128 << 20
INPUT_SETS_MAX = 16
FEW_QUERIES = 64
REFERENCE = "ours (torch reference)"

GOALS = {"restore": (0.6, 0.8), "pack": (0.6, 0.8), "gather_host": (0.7, 0.85)}
FLEX_GOALS = (1.0, 1.2)
"""How many times as long the same attention by PyTorch's own compiler must and should take."""
SPARSE_GOALS = {"many": (0.45, 0.6), "few": (0.6, 0.8)}


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of this machine: bytes/s, flop/s (of the cases' dtype), bytes/s of the link.

    `sm_link` is the link's rate when the GPU's own processors read; None without a GPU.
    """

    memory: float
    matmul: float
    host_link: float
    sm_link: float | None = None

    def seconds(self, case: KernelCase) -> float:
        """The least time ``case`` can take; a gather is bound by the link it reads through."""
        if case.kernel == "gather_host":
            return case.bytes / 2 / (self.sm_link or self.host_link)
        return max(case.bytes / self.memory, case.flops / self.matmul)


@dataclass(frozen=True)
class Timing:
    """One contender on one case: median and quartiles in seconds, and limit over median.

    `fraction_of_limit` is None for work that is not the case's own.
    """

    name: str
    contender: str
    median: float
    low: float
    high: float
    n: int
    fraction_of_limit: float | None
    bytes_per_second: float
    flops_per_second: float


@dataclass(frozen=True)
class Trouble:
    """A contender without a speed, and why."""

    name: str
    contender: str
    why: str


def matches(case: KernelCase, got: Sequence[Tensor], want: Sequence[Tensor]) -> bool:
    """Whether every tensor is within the case's tolerance."""
    absolute, relative = case.tolerance
    return len(got) == len(want) and all(
        a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=absolute, rtol=relative)
        for a, b in zip(got, want, strict=True)
    )


def timing(
    case: KernelCase,
    took: Spread,
    ceilings: Ceilings,
    contender: str = "ours",
    work: tuple[int, int] | None = None,
) -> Timing:
    """Times to the figures that are printed; `work` in bytes and flops if it is not the case's."""
    moved, flops = work or (case.bytes, case.flops)
    return Timing(
        case.name,
        contender,
        took.median,
        took.low,
        took.high,
        took.n,
        None if work else ceilings.seconds(case) / took.median,
        moved / took.median,
        flops / took.median,
    )


def goals(case: KernelCase, contender: str = "ours") -> tuple[float, float] | tuple[None, None]:
    """What share of its limit a kernel must and should reach on a GPU; of a peer, how many times
    our time it must and should take."""
    if contender != "ours":
        many = case.kernel == "sparse_attention" and case.shapes["n_q"] > FEW_QUERIES
        return FLEX_GOALS if many and contender == FLEX else (None, None)
    if case.kernel == "sparse_attention":
        if case.dtype == "float32":  # the limit is the matmul's in half precision
            return None, None
        return SPARSE_GOALS["few" if case.shapes["n_q"] <= FEW_QUERIES else "many"]
    return GOALS.get(case.kernel, (None, None))


def smaller(case: KernelCase, by: int, dtype: str = "float32") -> KernelCase:
    """The same case with `by` times fewer tokens, in a dtype that a CPU computes in."""
    shapes = {
        k: max(4, v // by) if k in TOKEN_SHAPES and v > FEW_QUERIES else v
        for k, v in case.shapes.items()
    }
    kind = case.dtype if case.dtype == "uint8" else dtype
    family = FAMILIES[case.kernel]
    moved, flops = family.work(dtype=kind, **shapes)
    return replace(
        case,
        name=f"{case.name}_by{by}",
        shapes=shapes,
        dtype=kind,
        tolerance=TOLERANCE[kind] if family.rounds else (0.0, 0.0),
        bytes=moved,
        flops=flops,
        make_inputs=partial(family.make, dtype=kind, **shapes),
    )


def time_case(
    case: KernelCase, device: str, ceilings: Ceilings, *, peers: bool, n: int = REPEATS
) -> Iterator[Timing | Trouble]:
    """Ours first, then the peers; what is wrong or cannot run is told and gets no speed."""
    on_gpu = device.startswith("cuda")
    want = case.reference(case.make_inputs(0, device))
    if on_gpu:
        mine = _time_ours(case, want, device, ceilings, n)
        yield mine
        if isinstance(mine, Trouble):
            return
    rivals = peers_of(case, device, compiled=peers) if peers or not on_gpu else {}
    found = {
        name: _time_peer(case, name, peer, want, device, ceilings, n)
        for name, peer in rivals.items()
    }
    if not on_gpu:
        checks = [name for name, peer in rivals.items() if peer.same and not peer.compiled]
        same = [isinstance(found[name], Timing) for name in checks]
        name = REFERENCE if same else f"{REFERENCE}, no peer to check it"
        if all(same):
            yield timing(case, _seconds(case, case.reference, device, n), ceilings, name)
        else:
            yield Trouble(case.name, name, "a peer DISAGREES, not timed")
    yield from found.values()


def _time_ours(
    case: KernelCase, want: Sequence[Tensor], device: str, ceilings: Ceilings, n: int
) -> Timing | Trouble:
    """A kernel that this GPU refuses is told; the other cases go on."""
    try:
        if not matches(case, case.launch(case.make_inputs(0, device)), want):
            return Trouble(case.name, "ours", "WRONG RESULT, not timed")
        return timing(case, _seconds(case, case.launch, device, n), ceilings)
    except Exception as e:
        return Trouble(case.name, "ours", _refusal(e))


def _refusal(e: Exception) -> str:
    line = (str(e).strip() or type(e).__name__).splitlines()[0][:120]
    return f"did not run: {type(e).__name__}: {line}"


def _seconds(case: KernelCase, run: Callable[[Inputs], object], device: str, n: int) -> Spread:
    return seconds_of([partial(run, x) for x in _input_sets(case, device)], device, n)


def _input_sets(case: KernelCase, device: str, most: int = INPUT_SETS_MAX) -> list[Inputs]:
    """Enough inputs to be taken in turn that none is still in a CPU's cache; a GPU's is flushed."""
    n = 1 if device.startswith("cuda") else -(-ROTATED_BYTES // max(1, case.bytes))
    return [case.make_inputs(seed, device) for seed in range(min(most, n + 1))]


def _time_peer(
    case: KernelCase,
    name: str,
    peer: Peer,
    want: Sequence[Tensor],
    device: str,
    ceilings: Ceilings,
    n: int,
) -> Timing | Trouble:
    """A peer may lack an operator, a compiler or memory here: that is told, not hidden."""
    try:
        # The compiler gives up on a function that it has to compile for many closures.
        most = 2 if peer.compiled else INPUT_SETS_MAX
        actions = [peer.prepare(x) for x in _input_sets(case, device, most)]
        if peer.same and not matches(case, actions[0](), want):
            return Trouble(case.name, name, "WRONG RESULT, not timed")
        took = seconds_of(actions, device, n)
    except Exception as e:
        return Trouble(case.name, name, _refusal(e))
    return timing(case, took, ceilings, name, peer.work)
