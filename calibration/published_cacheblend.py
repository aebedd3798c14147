"""CacheBlend's pipelining example: recomputing and loading one layer of a 4K prompt.

Nothing is fitted. Recomputing takes the paper's own estimate, ratio x prefill.
"""

from __future__ import annotations

from .published import Point, Study
from .published_models import cost_of, model_of
from .published_numbers import PublishedNumbers, published

GPUS = {"Llama-7B": ("A40", 1), "Llama-70B": ("A40", 2)}

ASSUMED = (
    "recomputing a ratio of the tokens takes that ratio of a full prefill, the paper's estimate",
    "the disk gives its nominal bandwidth",
    "70B: 8-bit weights are expanded and multiplied in 16 bit; KV is 16 bit",
)


def cacheblend(data: PublishedNumbers | None = None) -> Study:
    """Both times of both models."""
    data = data or published("cacheblend")
    table = data.table("per_layer")
    n_tokens, ratio = round(data.number("n_tokens")), data.number("ratio")
    points = []
    for row in table.records():
        name = str(row["model"])
        model, cost = model_of(name), cost_of(name, *GPUS[name])
        layer_s = cost.prefill_s(n_tokens, 0, head=False) / model.n_layers
        load_s = n_tokens * model.kv_bytes_per_token_layer / data.number("nvme_bytes_per_s")
        for what, seconds in (("recompute", ratio * layer_s), ("load", load_s)):
            points.append(
                Point(
                    name=f"{name} {what}",
                    where=table.where,
                    unit="ms",
                    published=row[f"{what}_ms"],
                    predicted=1e3 * seconds,
                    resolution=0.5,
                    lines=(name, what),
                )
            )
    return Study(
        name="cacheblend",
        paper=f"{data.paper}, {data.reference}",
        points=tuple(points),
        scalars=(),
        assumed=ASSUMED,
        unmatched=(
            (
                "TTFT 2.2 to 3.3x, throughput 2.8 to 5x",
                "ranges over models and data sets whose prompt lengths are drawn, not given",
            ),
        ),
    )
