"""What options about fleets say: candidates, service levels, prices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from ..core.errors import CacheTuneError
from ..core.units import GIB

if TYPE_CHECKING:
    from ..core.catalogue import Catalogue
    from ..core.workload import Slo
    from ..tuner.candidate import Candidate


def names(text: str) -> list[str]:
    """A list by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def level(text: str, *, share: bool = True) -> tuple[dict[str, float], float]:
    """(`ttft_ms` and `tpot_ms`, share) of `ttft_ms=500,tpot_ms=40,share=0.99`.

    Args:
        share: whether a share may be given; it is 0.99 if it is not.

    Raises:
        CacheTuneError: a name is unknown or missing, a value is not a positive number.
    """
    found: dict[str, float] = {}
    rule = "the SLO must give ttft_ms and tpot_ms" + (", and may give share" if share else " alone")
    remedy = "for example ttft_ms=500,tpot_ms=40" + (",share=0.99" if share else "")
    for part in names(text):
        name, _, value = part.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        allowed = ("ttft_ms", "tpot_ms", "share") if share else ("ttft_ms", "tpot_ms")
        if name not in allowed or name in found or not 0 < number < float("inf"):
            raise CacheTuneError(rule, values=repr(part), remedy=remedy)
        found[name] = number
    kept = found.pop("share", 0.99)
    if set(found) != {"ttft_ms", "tpot_ms"} or kept > 1:
        raise CacheTuneError(
            f"{rule}, a share of at most 1" if share else rule, values=repr(text), remedy=remedy
        )
    return found, kept


def of_classes(
    levels: Sequence[str], priority: str, known: Sequence[str]
) -> tuple[dict[str, Slo], tuple[str, ...]]:
    """Service levels (`NAME:ttft_ms=,tpot_ms=`) of classes, and those that go first.

    Raises:
        CacheTuneError: a class that the traffic has not, not a level.
    """
    from ..core.workload import Slo

    slo: dict[str, Slo] = {}
    for given in levels:
        name, colon, text = given.rpartition(":")
        if not colon or name in slo:
            raise CacheTuneError(
                "a class's level must be NAME:ttft_ms=,tpot_ms=, once for each class",
                values=repr(given),
                remedy="for example chat:ttft_ms=500,tpot_ms=40",
            )
        slo[name] = Slo(**level(text, share=False)[0])
    first = tuple(names(priority))
    for name in (*slo, *first):
        if name not in known:
            raise CacheTuneError(
                "a class must be one of the traffic",
                values=repr(name),
                remedy=f"its classes are {', '.join(map(repr, known))}",
            )
    return slo, first


def warn_of_ticks(tick_s: float | None) -> None:
    """Say of a trace with a coarse clock what becomes of its bursts."""
    from .console import warn

    if tick_s is not None:
        warn(
            f"the trace's clock ticks every {tick_s:.3g} s, and requests of a tick come at once at "
            "any rate; `cachetune trace convert --spread-ticks` spreads them"
        )


def with_prices(catalogue: Catalogue, prices: Sequence[str]) -> Catalogue:
    """The catalogue with `NAME=USD_PER_H` for GPUs, disks or networks.

    Raises:
        CacheTuneError: not of that form, or an unknown name.
    """
    from ..core.catalogue import Price, key_of

    for text in prices:
        name, _, value = text.rpartition("=")
        try:
            price = Price(usd_per_h=float(value), as_of="not said", source="--price", terms="given")
        except ValueError:
            raise CacheTuneError(
                "a price must be NAME=USD_PER_H, above zero",
                values=repr(text),
                remedy="for example --price H100-SXM=2.49",
            ) from None
        priced = {k: dict(getattr(catalogue, k)) for k in ("gpus", "disks", "networks")}
        for rows in priced.values():
            known = {key_of(n): n for n in rows}.get(key_of(name))
            if known is not None:
                rows[known] = rows[known].replace(price=price)
                break
        else:
            catalogue.gpu(name)
        catalogue = catalogue.replace(**priced)
    return catalogue


def candidates(
    catalogue: Catalogue,
    *,
    gpus: str,
    n_gpus: str,
    disks: str,
    networks: str,
    policies: str,
    formats: str,
    weights: str,
    routers: str,
    evictions: str,
    dram_gib: float | None,
    ratio: float,
    engine: dict[str, Any],
    overhead_ms: float,
    stages: str = "1",
) -> list[Candidate]:
    """All combinations; what a policy does not use does not multiply it.

    Raises:
        CacheTuneError: an unknown name, with the nearest; a value out of range.
    """
    from ..core.machine_spec import compose
    from ..core.memory_sum import EngineMemory
    from ..core.record import made
    from ..tuner.candidate import Candidate

    found: dict[str, Candidate] = {}
    every = (gpus, n_gpus, stages, disks, networks, policies, formats, weights, routers, evictions)
    for chosen in product(*map(names, every)):
        gpu, per_stage, stage, disk, network, policy, stored, weight, router, eviction = chosen
        count = _count(per_stage, "GPUs"), _count(stage, "pipeline stages")
        machine = compose(
            catalogue,
            gpu,
            n_gpus=count[0] * count[1],
            dram_limit_bytes=None if dram_gib is None else _bytes(dram_gib),
            disk=None if disk == "none" else disk,
            network=None if network == "none" else network,
        )
        candidate = made(
            Candidate,
            "the candidate",
            machine=machine,
            stages=count[1],
            policy=policy,
            stored=stored,
            recompute_ratio=ratio,
            engine=made(EngineMemory, "the engine", **{**engine, "weights": weight}),
            overhead_s=overhead_ms / 1e3,
            router=router,
            eviction=eviction,
        )
        if not candidate.reuses:
            key = f"{machine.gpu.name} {count} {weight} {policy} {router}"
        else:
            key = candidate.fingerprint()
        found.setdefault(key, candidate)
    if not found:
        raise CacheTuneError(
            "a question needs a candidate",
            values="an empty list",
            remedy="name at least one of each; none stands for no disk, no network",
        )
    return list(found.values())


def _bytes(gib: float) -> int:
    if not 0 < gib < 1e9:
        raise CacheTuneError("DRAM must be above zero, GiB", values=f"{gib:g}")
    return int(gib * GIB)


def _count(text: str, what: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if not 1 <= count <= 64:
        raise CacheTuneError(f"the number of {what} must be 1 to 64", values=repr(text))
    return count
