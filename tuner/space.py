"""The search space: every knob once, as data, with its range and the reason for it.

`suggest` turns a trial into a `ReusePlan`, the class that the runtime loads. Knobs without an
effect under the chosen policy get their plain value, so that equal plans look equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..core.layout import GROUP_TOKENS
from ..core.plan import RatioRule, ReusePlan
from ..core.units import KIB, MIB

if TYPE_CHECKING:
    import optuna

Mode = Literal["dag", "serve"]
MODES: tuple[Mode, ...] = get_args(Mode)
Params = dict[str, Any]
RATIO_DIGITS = 3
"""Ratios are rounded to this: a finer step moves less than one token of a usual chunk."""
FLOAT_STEPS = (-0.1, -0.03, -0.01, 0.01, 0.03, 0.1)

POLICIES = ("cachetune", "full_recompute", "prefix_cache", "cacheblend", "epic", "full_reuse")


@dataclass(frozen=True)
class Knob:
    """One dimension. `bound` names the field of `Bounds` that replaces `choices` or a limit."""

    name: str
    kind: Literal["choice", "int", "float"]
    why: str
    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False
    bound: str = ""
    per_tier: bool = False
    """One parameter for each tier that holds chunks, called `name.tier`."""
    modes: tuple[Mode, ...] = MODES


KNOBS: tuple[Knob, ...] = (
    Knob("policy", "choice", "what is recomputed at all", POLICIES, bound="policies"),
    Knob("selector", "choice", "which tokens: moves quality, not time", bound="selectors"),
    Knob("n_bands", "choice", "deep layers may need fewer fresh rows", (1, 2)),
    Knob(
        "ratio", "float", "compute against transfer; 1 is a tier that cannot pay",
        low=0.0, high=1.0, bound="ratio_min", per_tier=True,
    ),
    Knob(
        "second_band", "float", "ratio of the deep band between its floor (0) and the first's (1)",
        low=0.0, high=1.0, per_tier=True,
    ),
    Knob(
        "load_exact", "choice", "loading an exact chunk may cost more than computing it",
        (True, False), per_tier=True,
    ),
    Knob(
        "load_what_pays", "choice", "a slow tier's loads may hold up prompts that wait",
        (False, True), per_tier=True, modes=("serve",),
    ),
    Knob("epic_tokens", "int", "EPIC's own ratio: tokens of each chunk's start", low=1, high=256,
         log=True, bound="chunk_tokens"),
    Knob("layer_group", "int", "few large ops save overhead, many small ones overlap better",
         low=1, high=64, log=True, bound="n_layers"),
    Knob("look_ahead", "int", "staging memory against stalls of the compute stream",
         low=1, high=8, bound="n_layers"),
    Knob("load_order", "choice", "by layer starts compute early, by chunk reads longer runs",
         ("layer", "chunk")),
    Knob("restore_stream", "choice", "its own stream overlaps, compute saves hand-overs",
         ("restore", "compute")),
    Knob("n_io_workers", "choice", "one may not fill the link; each costs a core", (1, 2, 4)),
    Knob("request_bytes", "choice", "latency per read against waiting for the first bytes",
         (64 * KIB, 256 * KIB, MIB, 4 * MIB)),
    Knob("prefill_chunk_tokens", "choice", "long pieces stall others' decode steps",
         (512, 1024, 2048, 4096, 8192), modes=("serve",)),
    Knob("max_num_seqs", "choice", "prompts admitted at once", (8, 16, 32, 64), modes=("serve",)),
)  # fmt: skip


@dataclass(frozen=True)
class Bounds:
    """What narrows the space: the model, the workload, where chunks lie, the quality floor."""

    tiers: tuple[str, ...]
    n_layers: int
    chunk_tokens: int
    """Longest chunk of the workload, tokens."""
    policies: tuple[str, ...] = POLICIES
    selectors: tuple[str, ...] = ("low_pass",)
    ratio_min: float = 0.0
    mode: Mode = "dag"
    rhos: Mapping[str, float] = field(default_factory=dict)
    """By tier: seconds to load a token over seconds to compute it (`RatioRule.rho`)."""


def dimensions(bounds: Bounds) -> Iterator[tuple[str, Knob]]:
    """(parameter name, knob with its limits narrowed) of every dimension."""
    for knob in KNOBS:
        if bounds.mode in knob.modes:
            narrowed = _narrow(knob, bounds)
            names = [f"{knob.name}.{t}" for t in bounds.tiers] if knob.per_tier else [knob.name]
            yield from ((name, narrowed) for name in names)


def suggest(trial: optuna.trial.BaseTrial, bounds: Bounds) -> ReusePlan:
    """The plan a trial asks for."""
    return plan_of(suggest_params(trial, bounds), bounds)


def suggest_params(trial: optuna.trial.BaseTrial, bounds: Bounds) -> Params:
    """One value per dimension, always the same ones, so that the sampler sees one flat space."""
    params: Params = {}
    for name, knob in dimensions(bounds):
        if knob.kind == "choice":
            params[name] = trial.suggest_categorical(name, knob.choices)
        elif knob.kind == "int":
            params[name] = trial.suggest_int(name, int(knob.low), int(knob.high), log=knob.log)
        else:
            params[name] = trial.suggest_float(name, knob.low, knob.high)
    return params


def plan_of(params: Mapping[str, Any], bounds: Bounds) -> ReusePlan:
    """The valid plan that a full set of parameters stands for."""
    plain = ReusePlan()
    policy = _plain_policy(params, bounds)
    schedule = {
        name: params.get(name, getattr(plain, name))
        for name in ("layer_group", "prefill_chunk_tokens", "max_num_seqs")
    }
    if policy != "full_recompute":
        loading = ("look_ahead", "load_order", "restore_stream", "n_io_workers", "request_bytes")
        schedule |= {name: params[name] for name in loading}
        if schedule["load_order"] == "chunk":  # every load is submitted at once
            schedule["look_ahead"] = plain.look_ahead
    rules = [_rule(params, policy, tier, bounds) for tier in bounds.tiers]
    rules.append(rules[0].replace(tier="*"))
    if policy == "cachetune":
        schedule["selector"] = params["selector"]
    if policy == "epic":
        schedule["epic_tokens"] = params["epic_tokens"]
    return ReusePlan.model_validate({"policy": policy, "rules": tuple(rules), **schedule})


def params_with(bounds: Bounds, **changes: Any) -> Params:
    """Parameters of the default schedule with some changed; per-tier ones change in every tier.

    Values outside the bounds are moved to the nearest limit.
    """
    plain = ReusePlan()
    defaults: Params = {
        "n_bands": 1, "ratio": 0.15, "second_band": 1.0, "load_exact": True,
        "load_what_pays": False,
    }  # fmt: skip
    params: Params = {}
    for name, knob in dimensions(bounds):
        value = changes.get(knob.name, defaults.get(knob.name, getattr(plain, knob.name, None)))
        if knob.kind == "choice":
            params[name] = value if value in knob.choices else knob.choices[-1]
        else:
            assert value is not None
            kept = min(max(value, knob.low), knob.high)
            params[name] = int(kept) if knob.kind == "int" else kept
    return params


def neighbours(params: Params, bounds: Bounds) -> Iterator[Params]:
    """Parameters one step away in one dimension: what a local search tries."""
    for name, knob in dimensions(bounds):
        value = params[name]
        steps: Sequence[Any]
        if knob.kind == "choice":
            steps = knob.choices
        elif knob.kind == "int":
            steps = (value - 1, value + 1, value // 2, value * 2)
        else:
            steps = (knob.low, knob.high, *(value + by for by in FLOAT_STEPS))
            if knob.name == "ratio":
                steps = (*steps, *_edges_around(value, bounds))
        for step in steps:
            inside = knob.kind == "choice" or knob.low <= step <= knob.high
            if step != value and inside:
                yield {**params, name: step}


def group_edges(bounds: Bounds) -> list[float]:
    """Ratios at which whole row groups of the longest chunk are loaded, ascending.

    Reads round up to a group, so between two edges a larger ratio computes more and loads no
    less: where loading binds, the best ratio lies on an edge.
    """
    n = bounds.chunk_tokens
    rows = range(n // GROUP_TOKENS * GROUP_TOKENS, 0, -GROUP_TOKENS)
    scale = 10**RATIO_DIGITS
    edges = [math.ceil((1 - loaded / n) * scale - 1e-9) / scale for loaded in rows]
    return [edge for edge in edges if edge >= bounds.ratio_min]


def _edges_around(ratio: float, bounds: Bounds) -> list[float]:
    """The edges next to `ratio`, below and above."""
    edges = group_edges(bounds)
    below, above = [e for e in edges if e < ratio], [e for e in edges if e > ratio]
    return below[-1:] + above[:1]


def _narrow(knob: Knob, bounds: Bounds) -> Knob:
    if not knob.bound:
        return knob
    limit = getattr(bounds, knob.bound)
    changed = dict(vars(knob))
    if knob.kind == "choice":
        changed["choices"] = tuple(limit)
    elif knob.kind == "int":
        changed["high"] = max(int(knob.low), min(int(knob.high), limit))
    else:
        changed["low"] = max(knob.low, limit)
    return Knob(**changed)


def _plain_policy(params: Mapping[str, Any], bounds: Bounds) -> str:
    """The policy by its plain name: a ratio of 1 everywhere is recompute, or prefix reuse."""
    policy: str = params["policy"]
    if policy not in ("cachetune", "prefix_cache"):
        return policy
    partial = any(_ratios(params, tier, bounds) != (1.0,) for tier in bounds.tiers)
    if policy == "cachetune" and partial:
        return policy
    any_exact = any(params[f"load_exact.{tier}"] for tier in bounds.tiers)
    return "prefix_cache" if any_exact else "full_recompute"


def _rule(params: Mapping[str, Any], policy: str, tier: str, bounds: Bounds) -> RatioRule:
    """Exact policies recompute what they do not load; blind reuse recomputes nothing."""
    fixed = {"full_reuse": 0.0, "full_recompute": 1.0, "prefix_cache": 1.0}
    ratios: tuple[float, ...]
    if policy in fixed:
        ratios = (fixed[policy],)
    elif policy == "epic":  # not read; its ratio is `epic_tokens`
        ratios = RatioRule().ratios
    else:
        ratios = _ratios(params, tier, bounds)
        if policy == "cacheblend":  # one check layer, one count for all layers behind it
            ratios = ratios[:1]
    load_exact = policy != "full_recompute" and params[f"load_exact.{tier}"]
    rho = bounds.rhos.get(tier, 0.0)
    limited = policy != "full_recompute" and rho > 1 and params[f"load_what_pays.{tier}"]
    return RatioRule(tier=tier, ratios=ratios, load_exact=load_exact, rho=rho if limited else None)


def _ratios(params: Mapping[str, Any], tier: str, bounds: Bounds) -> tuple[float, ...]:
    first = round(params[f"ratio.{tier}"], RATIO_DIGITS)
    if params["n_bands"] == 1:
        return (first,)
    share = params[f"second_band.{tier}"]
    second = round(bounds.ratio_min + share * (first - bounds.ratio_min), RATIO_DIGITS)
    return (first, second) if second < first else (first,)
