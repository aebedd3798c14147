"""When requests arrive: Poisson, Gamma, bursts, even spacing; all vectorised, from named streams.

Only the gaps are drawn here; what a request holds is drawn from streams of its own, so another
rate asks the same prompts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from .errors import WorkloadError
from .record import Record
from .request_table import RequestTable
from .rng import rng
from .units import NS_PER_S

DURATION_S_MAX = float(1 << 62) / NS_PER_S


def check_duration(times_s: NDArray[np.float64], rate_rps: float) -> None:
    """Whether ascending times fit into nanoseconds.

    Raises:
        WorkloadError: they are longer than 146 years.
    """
    if not times_s[-1] < DURATION_S_MAX:
        raise WorkloadError(
            "arrivals lie within 146 years",
            values=f"{len(times_s)} at {rate_rps} requests/s",
            remedy="raise the rate",
        )


class Arrivals(Record):
    """An arrival process of `rate_rps` requests per second on average.

    `gamma` draws gaps with the coefficient of variation `cv` (1 is Poisson, above it is burstier).
    `bursts` is a Poisson process whose rate switches between two states of exponential length
    (MMPP-2): on for `on_s` and off for `off_s` seconds on average, with `quiet` times the rate of
    the on state while off.
    """

    kind: Literal["poisson", "gamma", "bursts", "even"] = "poisson"
    rate_rps: float = Field(gt=0)
    cv: float = Field(default=1.0, gt=0)
    on_s: float = Field(default=10.0, gt=0)
    off_s: float = Field(default=30.0, gt=0)
    quiet: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind != "gamma" and self.cv != 1.0:
            raise ValueError(f"cv belongs to gamma arrivals, got {self.cv} with {self.kind}")
        return self

    def times_ns(self, n: int, seed: int) -> NDArray[np.int64]:
        """`n` times from 0 on, ascending; the first comes after the first gap.

        Raises:
            WorkloadError: no request, or times beyond 146 years.
        """
        if n < 1:
            raise WorkloadError("a workload holds at least one request", values=str(n))
        stream = rng(seed, "arrivals", self.kind)
        if self.kind == "even":
            times_s = np.arange(n) / self.rate_rps
        elif self.kind == "gamma":
            shape = self.cv**-2
            times_s = np.cumsum(stream.gamma(shape, self.cv**2, size=n)) / self.rate_rps
        else:
            times_s = np.cumsum(stream.exponential(size=n)) / self.rate_rps
            if self.kind == "bursts":
                times_s = self._modulated(times_s, rng(seed, "arrivals", "states"))
        check_duration(times_s, self.rate_rps)
        return np.rint(times_s * NS_PER_S).astype(np.int64)

    def _modulated(
        self, times_s: NDArray[np.float64], stream: np.random.Generator
    ) -> NDArray[np.float64]:
        """Times of a steady process, moved so that the rate switches (time change by its integral).

        Mean rate: `rate_on * (on_s + quiet * off_s) / (on_s + off_s)`.
        """
        busy_share = (self.on_s + self.quiet * self.off_s) / (self.on_s + self.off_s)
        clock: list[NDArray[np.float64]] = [np.zeros(1)]
        work: list[NDArray[np.float64]] = [np.zeros(1)]
        speeds = np.array([1.0, self.quiet]) / busy_share
        n_cycles = 64
        while work[-1][-1] <= times_s[-1]:
            lengths = stream.exponential(size=(n_cycles, 2)) * (self.on_s, self.off_s)
            clock.append(clock[-1][-1] + np.cumsum(lengths))
            work.append(work[-1][-1] + np.cumsum(lengths * speeds))
            n_cycles = min(2 * n_cycles, 1 << 16)
        return np.interp(times_s, np.concatenate(work), np.concatenate(clock))


def with_arrivals(table: RequestTable, arrivals: Arrivals, seed: int) -> RequestTable:
    """The requests of a table, in their order, at new times; those that follow one keep to that."""
    free = table.after < 0
    times = table.arrival_ns.copy()
    times[free] = arrivals.times_ns(int(free.sum()), seed)
    said = {"arrivals": arrivals.kind, "rate_rps": f"{arrivals.rate_rps:g}", "seed": str(seed)}
    return replace(table, arrival_ns=times, provenance={**table.provenance, **said})


def closed_loop(
    table: RequestTable, n_users: int, think_s: float, seed: int, *, spread: bool = True
) -> RequestTable:
    """The requests of a table asked by `n_users`, each waiting for its answer and then thinking.

    Request i is asked by user `i % n_users` after that user's request before it.

    Args:
        table: requests; their times and what they follow are forgotten.
        n_users: users; the first request of each is at time 0, or spread over one think time.
        think_s: mean of the exponential pause between an answer and the next request.
        seed: root of the stream `think`.
        spread: users begin one by one.

    Raises:
        WorkloadError: no user, a negative pause.
    """
    if n_users < 1 or not 0 <= think_s < DURATION_S_MAX / 64:
        raise WorkloadError(
            "a closed loop has users who think for a while",
            values=f"n_users={n_users}, think_s={think_s}",
            remedy="at least one user, a pause of 0 or more seconds",
        )
    n = len(table)
    after = np.arange(n, dtype=np.int32) - np.int32(n_users)
    pauses = np.rint(rng(seed, "think").exponential(think_s, size=n) * NS_PER_S).astype(np.int64)
    n_first = min(n, n_users)
    step_ns = round(think_s * NS_PER_S / n_users) if spread else 0
    pauses[:n_first] = np.arange(n_first) * step_ns
    return replace(
        table,
        arrival_ns=pauses,
        after=np.where(after < 0, np.int32(-1), after).astype(np.int32),
        provenance={
            **{k: v for k, v in table.provenance.items() if k != "rate_rps"},
            "arrivals": "closed loop",
            "n_users": str(n_users),
            "think_s": f"{think_s:g}",
            "seed": str(seed),
        },
    )
