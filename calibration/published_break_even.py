"""py-kvcache (arXiv:2609.11744): from which bandwidth, and which reuse, loading KV wins.

Loading wins when bytes / bandwidth is below what computing the prefix takes, less what a hit costs
beside the copy. That cost is fitted at the shortest prefix, the path's bandwidth at the shorter
prompt; the longer ones are predicted from kernels.
"""

from __future__ import annotations

from functools import cache

from scipy.optimize import brentq

from .published import Point, Scalar, Study
from .published_models import cost_of
from .published_numbers import PublishedNumbers, published

MODEL, GPU = "Llama-3.2-3B", "H100-SXM"
GRID_TOKENS = 1024

ASSUMED = (
    "H100 is the SXM card; the notes do not say",
    "1k, 8k and 80k are 1024, 8192 and 81920 tokens",
    "what a hit costs beside the copy does not depend on the length",
)


@cache
def _prefill_s(n_grid: int) -> float:
    """Prefill of `n_grid` times 1024 tokens; between them kernels jump by whole tiles."""
    return cost_of(MODEL, GPU).prefill_s(GRID_TOKENS * n_grid, 0) if n_grid else 0.0


def break_even(data: PublishedNumbers | None = None) -> Study:
    """Bandwidths by prefix length, and shares of reuse by prompt length."""
    data = data or published("py_kvcache")
    token_bytes = data.number("kv_bytes_per_token")

    def saved_s(n_tokens: float, hit_s: float) -> float:
        """What a hit of `n_tokens` leaves for copying; the rest of the prompt is the same."""
        low, beyond = divmod(n_tokens, GRID_TOKENS)
        at, after = (_prefill_s(int(low) + i) for i in (0, 1))
        return at + (after - at) * beyond / GRID_TOKENS - hit_s

    table = data.table("break_even")
    rows = [(round(r["n_tokens"]), r["gb_per_s"]) for r in table.records()]
    shortest, rate = min(rows)
    hit_s = saved_s(shortest, 0.0) - shortest * token_bytes / (rate * 1e9)
    points = [
        Point(
            name=f"{n} tokens bandwidth",
            where=table.where,
            unit="GB/s",
            published=value,
            predicted=n * token_bytes / saved_s(n, hit_s) / 1e9,
            resolution=0.05,
            stated=False,
            lines=("bandwidth",),
        )
        for n, value in rows
    ]
    table = data.table("reuse")
    reuse = [(round(r["n_tokens"]), r["percent"]) for r in table.records()]
    shorter, percent = min(reuse)
    reused = shorter * percent / 100
    path = float(reused * token_bytes / saved_s(reused, hit_s))

    def loses_s(n_tokens: float) -> float:
        return n_tokens * token_bytes / path - saved_s(n_tokens, hit_s)

    for n, value in reuse:
        points.append(
            Point(
                name=f"{n} tokens reuse",
                where=table.where,
                unit="%",
                published=value,
                predicted=100 * brentq(loses_s, GRID_TOKENS, n) / n,
                resolution=0.05,
                stated=False,
                lines=("reuse",),
            )
        )
    return Study(
        name="break_even",
        paper=f"{data.paper}, {data.reference}",
        points=tuple(points),
        scalars=(
            Scalar("hit beside the copy", hit_s * 1e3, "ms", (f"{shortest} tokens bandwidth",)),
            Scalar("bandwidth of the path", path / 1e9, "GB/s", (f"{shorter} tokens reuse",)),
        ),
        assumed=ASSUMED,
        unmatched=(("preload 1.5 to 2.5x against LMCache", "the workload is not in the notes"),),
    )
