"""Request tables and step costs made for hand checks of the serving simulator."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cachetune.core.request_table import RequestTable
from cachetune.core.workload import Workload
from cachetune.simulator.serving_fleet import (
    Fleet,
    ReplicaSpec,
    ReusePolicy,
    ServingLimits,
    TierSpec,
)


class LinearCost:
    """Every term exact: a step costs `step`, its tokens, its pairs, its decodes, their contexts."""

    def __init__(
        self,
        step: float = 0.0,
        token: float = 0.0,
        pair: float = 0.0,
        decode: float = 0.0,
        context: float = 0.0,
    ) -> None:
        self.terms = step, token, pair, decode, context

    def step_s(
        self,
        pieces: Sequence[tuple[int, int]],
        n_decode: int,
        kv_decode_tokens: int,
        kv_decode_max: int | None = None,
    ) -> float:
        step, token, pair, decode, context = self.terms
        seconds = step + n_decode * decode + kv_decode_tokens * context
        return seconds + sum(q * token + q * (c + q / 2) * pair for q, c in pieces)

    def decode_run_s(self, n_decode: int, kv_decode_tokens: int, n_steps: int) -> float:
        step, _, _, decode, context = self.terms
        grown = n_steps * kv_decode_tokens + n_decode * (n_steps * (n_steps - 1) // 2)
        return n_steps * (step + n_decode * decode) + grown * context


def make_table(
    prompts: Sequence[int],
    outputs: Sequence[int],
    arrivals_s: Sequence[float],
    chunks: Sequence[Sequence[int]] | None = None,
    *,
    chunk_tokens: int = 16,
    **fields: Any,
) -> RequestTable:
    """One row per prompt length; chunks of equal length."""
    n = len(prompts)
    rows = [list(c) for c in chunks] if chunks is not None else [[]] * n
    flat = [c for row in rows for c in row]
    zeros = np.zeros(n, np.int16)
    values: dict[str, Any] = dict(
        name="table",
        arrival_ns=np.array([round(t * 1e9) for t in arrivals_s], np.int64),
        prompt_tokens=np.array(prompts, np.int32),
        output_tokens=np.array(outputs, np.int32),
        chunk_start=np.cumsum([0, *(len(row) for row in rows)]),
        chunk_ids=np.array(flat, np.int32),
        chunk_tokens=np.full(max(flat, default=0) + 1, chunk_tokens, np.int32),
        after=np.full(n, -1, np.int32),
        tenant=zeros,
        slo_class=zeros,
    )
    return RequestTable(**{**values, **fields})


def table_of(workload: Workload) -> RequestTable:
    """The same requests as columns; their ids count from 0 in order of arrival."""
    names = {name: i for i, name in enumerate(sorted(workload.contents))}
    requests = sorted(workload.requests, key=lambda r: (r.arrival_ns, r.request_id))
    assert [r.request_id for r in requests] == list(range(len(requests)))
    table = make_table(
        [workload.prompt_tokens(r) for r in requests],
        [r.output_tokens for r in requests],
        [r.arrival_ns / 1e9 for r in requests],
        [[names[c] for c in r.chunks] for r in requests],
    )
    lengths = [workload.contents[name].n_tokens for name in names]
    fields = {**vars(table), "chunk_tokens": np.array(lengths, np.int32)}
    return RequestTable(**fields)


def random_table(draw: random.Random, *, chained: bool, chunk_tokens: int = 16) -> RequestTable:
    """Prompts that share prefixes (`chained`) or chunks anywhere; Poisson arrivals."""
    n = draw.choice([20, 100])
    rate, longest, output = draw.choice([2, 10, 50]), draw.choice([5, 100]), draw.choice([5, 60])
    known: dict[tuple[int, ...], int] = {}
    at, arrivals, rows = 0.0, [], []
    for _ in range(n):
        at += draw.expovariate(rate)
        arrivals.append(at)
        path: tuple[int, ...] = ()
        row = []
        for _ in range(draw.randint(0, 6)):
            choice = draw.randrange(2 if not path else 5)
            path = (*path, choice)
            name = path if chained else (draw.randrange(12),)
            row.append(known.setdefault(name, len(known)))
        rows.append(row)
    prompts = [len(row) * chunk_tokens + draw.randint(1, longest) for row in rows]
    outputs = [draw.randint(1, output) for _ in rows]
    table = make_table(prompts, outputs, arrivals, rows, chunk_tokens=chunk_tokens)
    fields = {**vars(table), "chained": chained}
    return RequestTable(**fields)


def make_fleet(
    *,
    policy: str = "full_recompute",
    tiers: Sequence[TierSpec] = (),
    limits: ServingLimits | None = None,
    host_link: float | None = None,
    duplex: float = 1.0,
    gpu_memory: float | None = None,
    reuse: dict[str, Any] | None = None,
    **fields: Any,
) -> Fleet:
    """One replica; KV of a token is 1000 bytes over 10 layers."""
    options: dict[str, Any] = dict(name=policy, kv_bytes_per_token=1000, n_layers=10)
    replica = ReplicaSpec(
        limits=limits or ServingLimits(prefix_caching=False),
        tiers=tuple(tiers),
        host_link_bytes_per_s=host_link,
        host_link_duplex=duplex,
        gpu_bytes_per_s=gpu_memory,
    )
    return Fleet(policy=ReusePolicy(**{**options, **(reuse or {})}), replica=replica, **fields)


def make_tier(name: str = "dram", rate: float = 1e6, **fields: Any) -> TierSpec:
    """Equal rates both ways."""
    return TierSpec(name=name, read_bytes_per_s=rate, write_bytes_per_s=rate, **fields)


def alone(cost: Any) -> Any:
    """Seconds of a step, as `StepLoop` asks, of a cost that knows one engine's."""
    return lambda steps: cost.step_s(*steps[0])


def write_profile(folder: Path) -> Path:
    """A small operator profile with one hole."""
    folder.mkdir(parents=True, exist_ok=True)
    dense = ["layer,tokens,time_us"]
    for name in ("qkv_proj", "o_proj", "layernorm", "embedding"):
        dense += [f"{name},{t},{t}" for t in (1, 64, 2048)]
    (folder / "dense.csv").write_text("\n".join(dense))
    (folder / "per_sequence.csv").write_text("layer,sequences,time_us\nlm_head,1,7\nlm_head,64,7")
    rows = ["prefill_chunk,kv_prefill,n_decode,kv_decode,time_us"]
    for q in (0, 16, 32, 2048):
        for c in (0, 64, 1024) if q else (0,):
            for n in (0, 1, 64):
                for kv in (16, 64, 4096) if n else (0,):
                    if (q or n) and (q, c, n, kv) != (32, 64, 1, 64):  # one hole
                        rows.append(f"{q},{c},{n},{kv},{q * c / 64 + q * q / 128 + n * kv / 8}")
    (folder / "attention.csv").write_text("\n".join(rows))
    return folder
