"""Probe and held-out schedules: prompts of random tokens, cut so that sizes vary independently.

A probe is one request under one plan with its chunks in one tier. The ladder isolates
coefficients; held-out draws mix everything and go to twice the probes' size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..core.chunk_index import content_id_of
from ..core.model_spec import ModelSpec
from ..core.plan import PolicyName, RatioRule, ReusePlan
from ..core.rng import rng
from ..core.workload import Content, Request, Workload


@dataclass(frozen=True)
class Probe:
    """One schedule to be run: request 0 of `workload`."""

    name: str
    workload: Workload
    plan: ReusePlan
    tier: str

    @property
    def request(self) -> Request:
        """The only request."""
        return self.workload.requests[0]

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return self.workload.prompt_tokens(self.request)


@dataclass(frozen=True)
class Shape:
    """Sizes of a prompt, tokens."""

    n_chunks: int
    chunk_tokens: int
    suffix_tokens: int


class Library:
    """Random-token chunks by size, so that probes share what was ingested."""

    def __init__(self, model: ModelSpec, seed: int) -> None:
        self.model = model
        self.seed = seed

    def chunk(self, n_tokens: int, number: int) -> tuple[int, ...]:
        """Chunk `number` of that size."""
        draw = rng(self.seed, "library", n_tokens, number)
        return tuple(int(t) for t in draw.integers(0, self.model.vocab_size, n_tokens))

    def workload(self, shape: Shape) -> Workload:
        """One request of that shape, one token of output."""
        texts = [self.chunk(shape.chunk_tokens, i) for i in range(shape.n_chunks)]
        names = [content_id_of(t) for t in texts]
        contents = {
            name: Content(n_tokens=len(t), token_ids=t)
            for name, t in zip(names, texts, strict=True)
        }
        suffix = self.chunk(shape.suffix_tokens, 10_000)
        request = Request(
            request_id=0,
            arrival_ns=0,
            chunks=tuple(names),
            suffix_tokens=len(suffix),
            suffix_ids=suffix,
            max_output_tokens=1,
            output_tokens=1,
        )
        return Workload(name=f"{shape}", contents=contents, requests=(request,), seed=self.seed)


def plan_with(policy: PolicyName, ratio: float, **knobs: object) -> ReusePlan:
    """A plan with one ratio for every tier and layer."""
    rules = (RatioRule(ratios=(ratio,)),)
    return ReusePlan.model_validate({"policy": policy, "rules": rules, **knobs})


def ladder(library: Library, tiers: Sequence[str], max_tokens: int) -> list[Probe]:
    """Probes up to `max_tokens` of prompt: lengths, ratios, tiers, groups, both restore streams."""
    size = max(32, max_tokens // 8)
    shapes = [
        Shape(1, size // 2, 16),
        Shape(2, size, 16),
        Shape(4, size, 48),
        Shape(7, size, 32),
        Shape(7, size // 2, 96),
    ]
    probes = []
    for s, shape in enumerate(shapes):
        workload = library.workload(shape)

        def add(plan: ReusePlan, tier: str, *, of: Workload = workload, at: int = s) -> None:
            probes.append(Probe(f"{at}.{plan.policy}.{tier}.{len(probes)}", of, plan, tier))

        add(plan_with("full_recompute", 1.0, layer_group=1 + s), tiers[0])
        for i, ratio in enumerate((0.0, 0.05, 0.15, 0.4, 0.8)):
            tier = tiers[(s + i) % len(tiers)]
            stream = "restore" if (s + i) % 2 else "compute"
            add(plan_with("cachetune", ratio, restore_stream=stream, layer_group=1 + i % 3), tier)
        add(plan_with("cachetune", 0.15, load_order="chunk", n_io_workers=2), tiers[s % len(tiers)])
        add(plan_with("cacheblend", 0.15), tiers[s % len(tiers)])
    return probes


def held_out(
    library: Library, tiers: Sequence[str], max_tokens: int, n: int, seed: int
) -> list[Probe]:
    """Random schedules, up to twice `max_tokens`; sizes, ratios and knobs the ladder lacks."""
    draw = rng(seed, "held_out")
    policies: list[PolicyName] = [
        "cachetune",
        "cachetune",
        "cachetune",
        "epic",
        "full_reuse",
        "full_recompute",
        "cacheblend",
        "prefix_cache",
    ]
    probes = []
    for i in range(n):
        probes.append(_draw(library, tiers, max_tokens, policies[i % len(policies)], draw, i))
    return probes


def _draw(
    library: Library,
    tiers: Sequence[str],
    max_tokens: int,
    policy: PolicyName,
    draw: np.random.Generator,
    number: int,
) -> Probe:
    n_chunks = int(draw.integers(2, 13))
    total = int(draw.uniform(0.25, 2.0) * max_tokens)
    chunk_tokens = max(24, total // n_chunks // 8 * 8)
    shape = Shape(n_chunks, chunk_tokens, int(draw.integers(8, 80)))
    plan = plan_with(
        policy,
        round(float(draw.uniform(0.02, 0.95)), 3),
        epic_tokens=int(draw.integers(2, 33)),
        layer_group=int(draw.integers(1, 5)),
        look_ahead=int(draw.integers(1, 5)),
        load_order=str(draw.choice(["layer", "chunk"])),
        restore_stream=str(draw.choice(["restore", "compute"])),
        n_io_workers=int(draw.integers(1, 4)),
        request_bytes=int(draw.choice([1 << 16, 1 << 18, 1 << 20])),
    )
    tier = tiers[number % len(tiers)]
    return Probe(f"held.{number}.{policy}.{tier}", library.workload(shape), plan, tier)
