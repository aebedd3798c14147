"""Probe and held-out schedules: prompts of random tokens, cut so that sizes vary independently.

A probe is one request under one plan with its chunks in one tier. The ladder isolates
coefficients; held-out draws mix everything and go to twice the probes' size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.chunk_index import content_id_of
from ..core.model_spec import ModelSpec
from ..core.plan import PolicyName, RatioRule, ReusePlan
from ..core.rng import rng
from ..core.workload import Content, Request, Workload

DECODE_STEPS = 4
SHELF = 100
LEAST_CHUNK_TOKENS = 24
SLOW_RHO = 2.0
"""Slower tiers get shorter held-out prompts: their loads only wait for a rate limiter."""


@dataclass(frozen=True)
class Probe:
    """One schedule to be run: all requests of `workload` at once, then some decode steps."""

    name: str
    workload: Workload
    plan: ReusePlan
    tier: str
    n_decode: int = 0

    @property
    def n_prompt(self) -> int:
        """Tokens of all prompts."""
        return sum(self.workload.prompt_tokens(r) for r in self.workload.requests)


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

    def workload(self, shape: Shape, batch: int = 1, n_decode: int = 0, shelf: int = 0) -> Workload:
        """`batch` requests of that shape over the same chunks, each rotated by one more.

        Workloads of different shelves share no chunk.
        """
        first = SHELF * shelf
        texts = [self.chunk(shape.chunk_tokens, first + i) for i in range(shape.n_chunks)]
        names = [content_id_of(t) for t in texts]
        contents = {
            name: Content(n_tokens=len(t), token_ids=t)
            for name, t in zip(names, texts, strict=True)
        }
        suffix = self.chunk(shape.suffix_tokens, 10_000)
        requests = tuple(
            Request(
                request_id=i,
                arrival_ns=0,
                chunks=tuple(names[i % len(names) :] + names[: i % len(names)]),
                suffix_tokens=len(suffix),
                suffix_ids=suffix,
                max_output_tokens=1 + n_decode,
                output_tokens=1 + n_decode,
            )
            for i in range(batch)
        )
        name = f"{shape.n_chunks}x{shape.chunk_tokens}+{shape.suffix_tokens}"
        return Workload(name=name, contents=contents, requests=requests, seed=self.seed)


def plan_with(policy: PolicyName, ratio: float, **knobs: object) -> ReusePlan:
    """A plan with one ratio for every tier and layer."""
    rules = (RatioRule(ratios=(ratio,)),)
    return ReusePlan.model_validate({"policy": policy, "rules": rules, **knobs})


def ladder(library: Library, tiers: Sequence[str], max_tokens: int) -> list[Probe]:
    """Probes up to `max_tokens` of prompt: lengths, ratios, tiers, groups, both restore streams."""
    size = max(32, max_tokens // 8)
    shapes = [
        Shape(1, size // 2, 16),
        Shape(2, 3 * size, 2 * size),
        Shape(4, size, 48),
        Shape(7, size, size),
        Shape(3, 2 * size, 2 * size),
        Shape(12, size // 3, 24),
        Shape(2, 4 * size - 16, 32),
    ]
    probes: list[Probe] = []
    for s, shape in enumerate(shapes):
        workload = library.workload(shape, shelf=s)

        def add(plan: ReusePlan, tier: str, *, of: Workload = workload, at: int = s) -> None:
            probes.append(Probe(f"{at}.{plan.policy}.{tier}.{len(probes)}", of, plan, tier))

        add(plan_with("full_recompute", 1.0, layer_group=1 + s), tiers[0])
        for i, ratio in enumerate((0.0, 0.05, 0.15, 0.4, 0.8)):
            tier = tiers[(s + i) % len(tiers)]
            knobs = {
                "restore_stream": "restore" if (s + i) % 3 else "compute",
                "layer_group": 1 + i % 3,
                "n_io_workers": 1 + (s + i) % 3,
                "look_ahead": 1 + i % 4,
            }
            add(plan_with("cachetune", ratio, **knobs), tier)
        add(plan_with("cachetune", 0.15, load_order="chunk", n_io_workers=2), tiers[s % len(tiers)])
        for i, ratio in enumerate((0.15, 0.4)):
            knobs = {"layer_group": 1 + (s + i) % 3, "look_ahead": 1 + (s + i) % 4}
            add(plan_with("cacheblend", ratio, **knobs), tiers[(s + 2 * i) % len(tiers)])
    probes += batch_ladder(library, tiers, shapes)
    probes += decode_ladder(library, tiers[0], max_tokens)
    # Probes of one shape behind one another would find its chunks and weights in the CPU's caches.
    order = rng(library.seed, "ladder").permutation(len(probes))
    return [probes[i] for i in order]


def batch_ladder(library: Library, tiers: Sequence[str], shapes: Sequence[Shape]) -> list[Probe]:
    """Several requests of a shape's tokens in all: one restores while another computes."""
    probes = []
    for s, shape in enumerate(shapes[2:], start=2):
        batch = 2 + s % 2
        small = Shape(shape.n_chunks, shape.chunk_tokens // batch, shape.suffix_tokens // batch)
        workload = library.workload(small, batch, shelf=s)
        for i, ratio in enumerate((0.0, 0.3)):
            knobs = {"layer_group": 1 + (s + i) % 4, "n_io_workers": 1 + (s + i) % 3}
            plan = plan_with("cachetune", ratio, **knobs)
            tier = tiers[(s + 2 * i) % len(tiers)]
            probes.append(Probe(f"batch.{batch}x{s}.{tier}.{i}", workload, plan, tier))
        tier = tiers[(s + 1) % len(tiers)]
        plan = plan_with("cacheblend", 0.3)
        probes.append(Probe(f"batch.{batch}x{s}.{tier}.blend", workload, plan, tier))
    return probes


def decode_ladder(library: Library, tier: str, max_tokens: int) -> list[Probe]:
    """Batches and contexts for decode steps; the longest contexts after all were computed, too.

    Steps behind a long prefill are faster by a fifth than those behind loads.
    """
    shapes = [(n, size) for n in (1, 2, 4, 8) for size in (max_tokens // 16, max_tokens // 4)]
    reuse, recompute = plan_with("full_reuse", 0.0), plan_with("full_recompute", 1.0)
    cases = [(reuse, n, size) for n, size in shapes]
    cases += [(plan, n, max_tokens - 16) for plan in (reuse, recompute) for n in (1, 2)]
    probes = []
    for plan, batch, size in cases:
        shape = Shape(1, max(16, size), 16)
        workload = library.workload(shape, batch, DECODE_STEPS)
        name = f"decode.{plan.policy}.{batch}x{size}"
        probes.append(Probe(name, workload, plan, tier, DECODE_STEPS))
    return probes


def held_out(
    library: Library, tiers: Mapping[str, float | None], max_tokens: int, n: int, seed: int
) -> list[Probe]:
    """Random schedules, up to twice `max_tokens`; sizes, ratios, batches and knobs not probed.

    Args:
        tiers: name to rho, None where the tier is not limited.
    """
    draw = rng(seed, "held_out")
    policies: list[PolicyName] = [
        "cachetune",
        "cachetune",
        "cachetune",
        "epic",
        "full_reuse",
        "full_recompute",
        "cacheblend",
        "cacheblend",
        "prefix_cache",
    ]
    names = list(tiers)
    # Every tier and every policy in their shares, in combinations that chance makes.
    order = draw.permutation(n)
    probes = []
    for i in range(n):
        tier = names[i % len(names)]
        longest = 2 * max_tokens / max(1.0, (tiers[tier] or 0.0) / SLOW_RHO)
        policy = policies[order[i] % len(policies)]
        probes.append(_draw(library, tier, longest, policy, draw, i))
    return probes


def _draw(
    library: Library,
    tier: str,
    longest: float,
    policy: PolicyName,
    draw: np.random.Generator,
    number: int,
) -> Probe:
    # A short prompt is not cut into crumbs.
    most = max(2, int(longest) // (2 * LEAST_CHUNK_TOKENS))
    n_chunks = min(int(draw.integers(2, 13)), most)
    batch = min(int(draw.choice([1, 1, 1, 2, 3])), max(1, most // 4))
    n_decode = int(draw.integers(0, 5))
    total = int(draw.uniform(0.12, 1.0) * longest / batch)
    n_suffix = int(draw.integers(8, 80))
    chunk_tokens = max(LEAST_CHUNK_TOKENS, (total - n_suffix) // n_chunks // 8 * 8)
    shape = Shape(n_chunks, chunk_tokens, n_suffix)
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
    workload = library.workload(shape, batch, n_decode, shelf=number)
    return Probe(f"held.{number}.{policy}.{tier}.x{batch}", workload, plan, tier, n_decode)
