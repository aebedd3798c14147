"""Cake (ICML'25, arXiv:2410.03065): compute from the front while loading from the back.

Compute is `overhead + factor x kernels` per engine step, from `ModelCost`; loading is a delay of
bytes over bandwidth plus a copy into the cache. Overhead, copy, and one factor per model and GPUs
are fitted on the rows at 100 % share; other shares, lengths, precisions and the line of Figure 4
are predicted, and so are both models on one A100, whose factor is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import exp, log

import numpy as np
from scipy.optimize import minimize, minimize_scalar

from ..core.units import GIB, ceil_div, s_to_ns
from ..simulator.two_pointer import cut, meeting
from .published import Point, Scalar, Study
from .published_models import cost_of, model_of
from .published_numbers import PublishedNumbers, published

STEP_TOKENS = 512
LOAD_TOKENS = 128
GBPS = 1 << 27
GPUS = {"2xA100": ("A100-SXM-80GB", 2), "A100": ("A100-SXM-80GB", 1), "H100": ("H100-PCIe", 1)}
UNIT_FACTOR = ("A100",)
"""GPUs whose kernels are taken as they were measured."""
FITTED_TOKENS = 16384
FACTORS = (log(0.5), log(2.0))
"""Where the fit looks for factors on kernels, as logarithms."""
FINE = {"xatol": 1e-3}
ROW_ERROR, FACTOR_SPREAD = 0.03, 0.1
"""Relative: of a published ratio, and of a factor about one, as kernels are tables of that GPU."""
METRICS = ("over_loading", "over_computing")

ASSUMED = (
    "H100 is the PCIe card; the paper does not say",
    "what a step's budget holds beside the share costs what the request's own tokens would",
    "after the meeting the last token goes through the layers, in a step of the same budget",
    "loading only has no share: its last token goes alone (read off Table 3, not stated)",
    "a step takes only tokens that are not loaded yet (chosen over whole steps by the fitted rows)",
    "loaded chunks are copied into the cache at one rate, whatever the bits they travelled in",
)

REASONS = {
    "length: A100 LongAlpaca-13B 1.0 32.0 16 over_loading": "published 2.06, 2.15, 2.00, 2.00 at "
    "4K to 16K: the peak at 8K is predicted, the others lie within 3 % and one of them is fitted",
}


@dataclass(frozen=True)
class Case:
    """Settings of one pair of speed-ups."""

    gpu: str
    model: str = "LongAlpaca-13B"
    share: float = 1.0
    gbps: float = 32.0
    n_tokens: int = FITTED_TOKENS
    kv_bits: int = 16

    @property
    def name(self) -> str:
        """Unique, readable."""
        return (
            f"{self.model} {self.gpu} {100 * self.share:g} % {self.gbps:g} Gbps "
            f"{self.n_tokens // 1024}K {self.kv_bits} bit"
        )

    @property
    def is_fitted(self) -> bool:
        """Whether its row is one that scalars are fitted on."""
        usual = (self.share, self.n_tokens, self.kv_bits) == (1.0, FITTED_TOKENS, 16)
        return usual and (self.model == "LongAlpaca-13B" or self.gpu == "2xA100")


@dataclass(frozen=True)
class Scalars:
    """What is fitted: seconds per engine step, seconds per byte copied, factors on kernels."""

    overhead_s: float
    copy_s_per_byte: float
    factors: Mapping[tuple[str, str], float]

    def factor(self, gpu: str, model: str) -> float:
        """Factor on kernel times of a model on these GPUs."""
        return 1.0 if gpu in UNIT_FACTOR else self.factors[gpu, model]


def predict(case: Case, scalars: Scalars) -> tuple[float, float]:
    """Speed-up of two pointers over loading only and over computing only."""
    budget = round(STEP_TOKENS * case.share)

    def step_ns(offset: int, n: int) -> int:
        # In a shared step others' tokens take the place of those that have been loaded.
        rows = STEP_TOKENS if case.share < 1 else n
        return s_to_ns(step_s(case, scalars, rows, offset))

    rate = model_of(case.model).kv_bytes_per_token * (
        case.kv_bits / 16 / (case.gbps * GBPS) + scalars.copy_s_per_byte
    )
    loads = cut(case.n_tokens, LOAD_TOKENS)[::-1]
    loads_ns = [s_to_ns(rate * n) for n in loads]
    met = meeting(case.n_tokens, budget, step_ns, loads, loads_ns)
    alone_ns = s_to_ns(step_s(case, scalars, 1, case.n_tokens - 1))
    last_ns = step_ns(case.n_tokens - 1, 1) if met.n_computed < case.n_tokens else 0
    computing_ns = sum(step_ns(budget * i, n) for i, n in enumerate(cut(case.n_tokens, budget)))
    both_ns = met.end_ns + last_ns
    return (sum(loads_ns) + alone_ns) / both_ns, computing_ns / both_ns


def step_s(case: Case, scalars: Scalars, n_rows: int, offset: int) -> float:
    """An engine step of `n_rows` behind `offset` tokens; linear between multiples of 512."""
    rows = 1 if n_rows == 1 else ceil_div(n_rows, LOAD_TOKENS) * LOAD_TOKENS
    n_before, beyond = divmod(offset, STEP_TOKENS)
    low, high = (_kernels_s(case.gpu, case.model, rows, n_before + i) for i in (0, 1))
    kernels = low + (high - low) * beyond / STEP_TOKENS
    return scalars.overhead_s + scalars.factor(case.gpu, case.model) * kernels


@cache
def _kernels_s(gpu: str, model: str, n_rows: int, n_before: int) -> float:
    """Kernels of `n_rows` behind `n_before` full steps, all layers."""
    return cost_of(model, *GPUS[gpu]).prefill_s(n_rows, STEP_TOKENS * n_before, head=False)


def fit(rows: Iterable[tuple[Case, tuple[float, float]]]) -> Scalars:
    """Least squares of the log ratios of the speed-ups on `rows`, factors held near one.

    A meeting moves in jumps, so gradients lie. Given the overhead and the copy each factor stands
    alone with its own rows: a search over two scalars, and within it over one at a time.
    """
    groups: dict[tuple[str, str], list[tuple[Case, tuple[float, float]]]] = {}
    for case, pair in rows:
        groups.setdefault((case.gpu, case.model), []).append((case, pair))

    def loss(key: tuple[str, str], scalars: Scalars) -> float:
        pairs = [(predict(case, scalars), pair) for case, pair in groups[key]]
        return sum(log(p / q) ** 2 for a, b in pairs for p, q in zip(a, b, strict=True))

    def best_factors(x: Sequence[float]) -> tuple[float, Scalars]:
        overhead_s, copy_s_per_byte = (exp(v) for v in x)
        total, factors = 0.0, {}
        for key in sorted(groups):

            def with_factor(at: float, key: tuple[str, str] = key) -> float:
                far = (at * ROW_ERROR / FACTOR_SPREAD) ** 2
                return far + loss(key, Scalars(overhead_s, copy_s_per_byte, {key: exp(at)}))

            if key[0] in UNIT_FACTOR:
                total += with_factor(0.0)
                continue
            found = minimize_scalar(with_factor, bounds=FACTORS, method="bounded", options=FINE)
            factors[key] = exp(found.x)
            total += found.fun
        return total, Scalars(overhead_s, copy_s_per_byte, factors)

    start = np.log([5e-3, 1e-11])
    corners = [start, start + np.array([0.3, 0.0]), start + np.array([0.0, 0.5])]
    options = {"initial_simplex": corners, "xatol": 5e-3, "fatol": 1e-5}
    found = minimize(lambda x: best_factors(x)[0], start, method="Nelder-Mead", options=options)
    return best_factors(found.x)[1]


def cases(data: PublishedNumbers) -> list[tuple[str, Case, tuple[float, float]]]:
    """(where, settings, pair) of every published pair; repeated settings come once."""
    found: dict[str, tuple[str, Case, tuple[float, float]]] = {}
    for name in ("shares", "lengths", "models", "precisions", "one_gpu"):
        table = data.table(name)
        for row in table.records():
            case = Case(
                gpu=row.get("gpu", "A100" if name == "one_gpu" else "2xA100"),
                model=row.get("model", "LongAlpaca-13B"),
                share=row.get("share_percent", 100) / 100,
                gbps=row.get("gbps", 32),
                n_tokens=int(row.get("n_tokens", FITTED_TOKENS)),
                kv_bits=int(row.get("kv_bits", 16)),
            )
            pair = (row["over_loading"], row["over_computing"])
            found.setdefault(case.name, (table.where, case, pair))
    return list(found.values())


def cake(data: PublishedNumbers | None = None) -> Study:
    """Every pair of speed-ups and the line of Figure 4."""
    data = data or published("cake")
    rows = cases(data)
    fitted = [(case, pair) for _, case, pair in rows if case.is_fitted]
    scalars = fit(fitted)
    points = []
    for where, case, pair in rows:
        for metric, value, predicted in zip(METRICS, pair, predict(case, scalars), strict=True):
            points.append(
                Point(
                    name=f"{case.name} {metric}",
                    where=where,
                    unit="x",
                    published=value,
                    predicted=predicted,
                    resolution=0.005,
                    lines=tuple(f"{line} {metric}" for line in _lines(case)),
                )
            )
    return Study(
        name="cake",
        paper=f"{data.paper}, {data.reference}",
        points=(*points, *_line_points(data, scalars)),
        scalars=_scalars(scalars, [case for case, _ in fitted]),
        assumed=ASSUMED,
        reasons=REASONS,
        unmatched=(
            (
                "Table 4, LongAlpaca-13B (2.03 and 1.91)",
                "the settings of a row of Table 3 (2.00 and 1.91), which is fitted",
            ),
            (
                "Figure 5: pointers meet at 9.5K tokens after 1.2 s",
                "bandwidth and budget vary along traces that are drawn, not given",
            ),
            ("2.6x in the mean", "which cells and which of the two speed-ups is not stated"),
            ("adaptive scheduling, 1.5 to 1.19 s", "the requests and their rate are not stated"),
        ),
    )


def _line_points(data: PublishedNumbers, scalars: Scalars) -> list[Point]:
    """The line of compute, the line of the SSD, and KV computed per second at 32K."""
    model = model_of("LongAlpaca-7B")
    chunk_bytes = STEP_TOKENS * model.kv_bytes_per_token

    def chunk_s(gpu: str, chunk: int) -> float:
        # No row of the 7B model on one GPU is fitted: an H100 has the factor of the 13B model.
        kernels = _kernels_s(gpu, "LongAlpaca-7B", STEP_TOKENS, chunk)
        return scalars.overhead_s + scalars.factor(gpu, "LongAlpaca-13B") * kernels

    points = []
    table = data.table("chunk_line")
    for row in table.records():
        gpu, chunk = str(row["gpu"]), int(row["chunk"])
        name, lines = f"LongAlpaca-7B {gpu} chunk {chunk}", (f"line {gpu}", f"chunk {chunk}")
        predicted = 1e3 * chunk_s(gpu, chunk)
        points.append(Point(name, table.where, "ms", row["chunk_ms"], predicted, 0.05, True, lines))
    table = data.table("ssd_line")
    for row in table.records():
        predicted = 1e3 * chunk_bytes / (row["gbps"] * GBPS)
        name = f"LongAlpaca-7B SSD {row['gbps']:g} Gbps chunk"
        points.append(Point(name, table.where, "ms", row["chunk_ms"], predicted, 0.05))
    table = data.table("kv_throughput")
    for row in table.records():
        gpu = str(row["gpu"])
        predicted = 64 * chunk_bytes / sum(chunk_s(gpu, j) for j in range(64)) / 1e9
        name, unit, value = f"LongAlpaca-7B {gpu} KV per second", "GB/s", row["kv_gb_per_s"]
        points.append(Point(name, table.where, unit, value, predicted, 0.2, True, ("KV/s",)))
    return points


def _scalars(found: Scalars, fitted: list[Case]) -> tuple[Scalar, ...]:
    def names(keep: Iterable[Case]) -> tuple[str, ...]:
        return tuple(f"{case.name} {metric}" for case in keep for metric in METRICS)

    everything = names(fitted)
    factors = [
        Scalar(f"factor on kernels, {model} on {gpu}", value, "1",
               names(c for c in fitted if (c.gpu, c.model) == (gpu, model)))
        for (gpu, model), value in found.factors.items()
    ]  # fmt: skip
    return (
        Scalar("host overhead per engine step", found.overhead_s * 1e3, "ms", everything),
        Scalar("copy of loaded chunks", 1 / found.copy_s_per_byte / GIB, "GiB/s", everything),
        *factors,
    )


def _lines(case: Case) -> tuple[str, ...]:
    """Lines of a table that the case lies on: all settings but one, by what varies."""
    values = {
        "gpu": case.gpu, "model": case.model, "share": case.share, "gbps": case.gbps,
        "length": case.n_tokens, "bits": case.kv_bits,
    }  # fmt: skip
    return tuple(
        f"{varied}: {' '.join(str(v) for k, v in values.items() if k != varied)}"
        for varied in values
    )
