"""KV repair measured on H200 by an independent study: recompute, prefix caching, EPIC, CacheBlend.

Kernels are borrowed (the GPU has no tables here); two scalars are fitted on Qwen3-32B and Qwen3-8B
is predicted with them. TTFT is published as a median but tokens as means. Where only a small, very
unequal part of a prompt is computed the two belong to different prompts: those rows are predicted
from one fitted median and count as partly assumed.
"""

from __future__ import annotations

from collections.abc import Mapping

from scipy.optimize import brentq

from .published import Point, Scalar, Study
from .published_models import cost_of
from .published_numbers import PublishedNumbers, published

GPU = "H200-SXM"
MODELS = {"qwen3_32b": "Qwen3-32B", "qwen3_8b": "Qwen3-8B"}
FITTED = "qwen3_32b"
REQUEST_TOKENS = 16
SPREAD = ("shift", "epic_32", "epic_128", "cacheblend_5", "cacheblend_15")
"""Methods that compute a part of the prompt that differs widely between requests."""

ASSUMED = (
    "recompute and prefix caching: the median request has the mean lengths",
    "time of a request beside its kernels: that of 16 tokens, published by the study, less kernels",
    "shift, EPIC and CacheBlend: median computed tokens lie below the mean by the same number",
    "CacheBlend passes all tokens through one layer before it selects",
    "loading and re-rotating is in line with compute, at the middle of the published range",
)


class Costs:
    """Times in seconds of one model in the study."""

    def __init__(self, key: str, data: PublishedNumbers, factor: float) -> None:
        self.model = MODELS[key]
        self._prefill_s = cost_of(self.model, GPU).prefill_s
        self._n_layers = cost_of(self.model, GPU).model.n_layers
        self._factor = factor
        self._prompt = round(data.number("prompt_tokens_mean"))
        parts = {str(r["part"]): r for r in data.table("parts").records()}

        def part_s(name: str) -> float:
            return float(parts[name][f"{key}_ms_low"] + parts[name][f"{key}_ms_high"]) / 2e3

        self._request_s = part_s("request_of_16_tokens") - self._prefill_s(REQUEST_TOKENS, 0)
        self._select_s = part_s("selection")
        self._load_s = part_s("load_and_rotate")

    def kernels_s(self, n_computed: int) -> float:
        """Kernels of `n_computed` rows behind the rest of the prompt."""
        return self._factor * self._prefill_s(n_computed, self._prompt - n_computed)

    def ttft_s(self, method: str, n_computed: int) -> float:
        """TTFT when `n_computed` tokens pass through the layers."""
        seconds = self._request_s + self.kernels_s(n_computed)
        if method in SPREAD:
            seconds += self._load_s
        if method.startswith("cacheblend"):
            seconds += self._select_s + self.kernels_s(self._prompt) / self._n_layers
        return seconds


def h200(data: PublishedNumbers | None = None) -> Study:
    """Every method on the two dense models."""
    data = data or published("kv_repair_h200")
    table = data.table("ttft")
    rows = {str(row["method"]): row for row in table.records()}
    factor = _factor(data, rows)
    below = _below_mean(data, rows, factor)
    points = []
    for key, model in MODELS.items():
        costs = Costs(key, data, factor)
        for method, row in rows.items():
            n = round(row["computed_tokens"]) - (below if method in SPREAD else 0)
            points.append(
                Point(
                    name=f"{model} {method}",
                    where=table.where,
                    unit="ms",
                    published=row[f"{key}_ms"],
                    predicted=1e3 * costs.ttft_s(method, n),
                    resolution=0.5,
                    stated=False,
                    lines=(model, method),
                )
            )
    points.append(_slope(data, factor))
    fitted = MODELS[FITTED]
    return Study(
        name="h200",
        paper=f"{data.paper}: {data.reference}",
        points=tuple(points),
        scalars=(
            Scalar("factor on borrowed kernels, eager vLLM", factor, "1", (f"{fitted} recompute",)),
            Scalar("median below mean computed tokens", below, "tokens", (f"{fitted} shift",)),
        ),
        assumed=ASSUMED,
        unmatched=(
            (
                "GLM-4.7-Flash, 7 rows",
                "experts and latent attention: the cost model knows dense decoders with GQA",
            ),
        ),
    )


def _factor(data: PublishedNumbers, rows: Mapping[str, Mapping[str, float]]) -> float:
    """Makes the recomputed prompt of the fitted model take what it took."""
    costs = Costs(FITTED, data, 1.0)
    n = round(rows["recompute"]["computed_tokens"])
    target_s = rows["recompute"][f"{FITTED}_ms"] / 1e3
    kernels_s = costs.kernels_s(n)
    return (target_s - (costs.ttft_s("recompute", n) - kernels_s)) / kernels_s


def _below_mean(
    data: PublishedNumbers, rows: Mapping[str, Mapping[str, float]], factor: float
) -> int:
    """Tokens by which the median request computes less than the mean, from the row `shift`."""
    costs = Costs(FITTED, data, factor)
    n = round(rows["shift"]["computed_tokens"])
    target_s = rows["shift"][f"{FITTED}_ms"] / 1e3

    def excess(below: float) -> float:
        return costs.ttft_s("shift", n - round(below)) - target_s

    return round(float(brentq(excess, 0, n - REQUEST_TOKENS, xtol=1)))


def _slope(data: PublishedNumbers, factor: float) -> Point:
    """Time per extra recomputed token between the two CacheBlend budgets."""
    table = data.table("per_token")
    (row,) = table.records()
    rows = {str(r["method"]): r for r in data.table("ttft").records()}
    few, many = (round(rows[m]["computed_tokens"]) for m in ("cacheblend_5", "cacheblend_15"))
    costs = Costs(FITTED, data, factor)
    slope = (costs.kernels_s(many) - costs.kernels_s(few)) / (many - few)
    middle, half = (row["low"] + row["high"]) / 2, (row["high"] - row["low"]) / 2
    name = f"{MODELS[FITTED]} per recomputed token"
    return Point(name, table.where, "ms/token", middle, 1e3 * slope, half)
