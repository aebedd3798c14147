"""`cachetune trace`: what a trace holds, traces in our format, traces from a seed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import WorkloadError
from . import fleet_options as options

if TYPE_CHECKING:
    from ..core.arrivals import Arrivals
    from ..core.request_table import RequestTable
    from ..core.trace_make import Lengths

command = typer.Typer(help="Requests over time: look into traces, convert them, make them.")
make = typer.Typer(help="Make a trace from a seed. Lengths are MEAN or MEAN:CV, in tokens.")
command.add_typer(make, name="make")
app = command

_File = Annotated[Path, typer.Argument(help="Mooncake, Bailian, Azure, BurstGPT, AIPerf, ours …")]
_Format = Annotated[str, typer.Option("--format", help="Of the file; auto looks at it.")]
_Between = Annotated[str, typer.Option(help="Arrivals from BEGIN:END seconds only.")]
_Zero = Annotated[str, typer.Option(help="Requests without output: refuse or drop.")]
_Block = Annotated[int | None, typer.Option(help="Tokens of a hashed block, if not the usual.")]
_Rate = Annotated[float | None, typer.Option(help="Poisson arrivals for a file without times.")]
_Ticks = Annotated[bool, typer.Option(help="Spread requests of one time until the next one.")]
_Out = Annotated[Path, typer.Option(help="Where the trace is written, JSON lines.")]
_Seed = Annotated[int, typer.Option(min=0, help="Root of every random stream.")]
_Rps = Annotated[float, typer.Option(help="Requests (or conversations) per second.")]
_Kind = Annotated[str, typer.Option(help="poisson, gamma, bursts or even.")]
_Cv = Annotated[float, typer.Option(help="Gamma: coefficient of variation of the gaps.")]
_OnOff = Annotated[str, typer.Option(help="Bursts: mean seconds ON:OFF:QUIET share of the rate.")]
_Users = Annotated[int | None, typer.Option(help="A closed loop of so many users instead.")]
_Think = Annotated[float, typer.Option(help="Mean pause of a user, seconds.")]
_Length = Annotated[str, typer.Option(help="MEAN or MEAN:CV, tokens.")]
_N = Annotated[int, typer.Option("--requests", help="Requests.")]


@command.command()
def stats(
    file: _File,
    format: _Format = "auto",
    first: options.First = None,
    between_s: _Between = "",
    scale_rate: options.Scale = 1.0,
    zero_output: _Zero = "refuse",
    block_tokens: _Block = None,
    ids: options.Ids = "prefix",
    rate_rps: _Rate = None,
    seed: _Seed = 0,
) -> None:
    """Rates, lengths, and how much of the prompts caches of each size could reuse."""
    from ..core.trace_stats import trace_stats
    from .console import print_json_line, print_table

    table = _read(
        file, format, first, between_s, scale_rate, zero_output, block_tokens, ids, rate_rps, seed
    )
    found = trace_stats(table)
    data = found.model_dump(mode="json")
    print_table(_facts(data), ("what", "value"), found.name)
    spreads = [{"tokens of": k, **data[k]} for k in _SPREADS if data[k] is not None]
    print_table(spreads, ("tokens of", "mean", "p50", "p90", "p99", "max"))
    if data["lru"]:
        print_table(data["lru"], ("capacity_tokens", "hit_share"), "LRU cache")
    print_json_line({**data, "provenance": table.provenance})


@command.command()
def convert(
    file: _File,
    out: _Out,
    format: _Format = "auto",
    first: options.First = None,
    between_s: _Between = "",
    scale_rate: options.Scale = 1.0,
    zero_output: _Zero = "refuse",
    block_tokens: _Block = None,
    ids: options.Ids = "prefix",
    rate_rps: _Rate = None,
    spread_ticks: _Ticks = False,
    seed: _Seed = 0,
) -> None:
    """Read a trace of any format, filter it, write it in ours."""
    from ..core.record import check_writable
    from ..core.trace_ticks import without_ticks

    check_writable(out, inputs=[file])
    table = _read(
        file, format, first, between_s, scale_rate, zero_output, block_tokens, ids, rate_rps, seed
    )
    _write(without_ticks(table, seed) if spread_ticks else table, out)


@make.command()
def plain(
    out: _Out,
    requests: _N = 1000,
    rate_rps: _Rps = 1.0,
    arrivals: _Kind = "poisson",
    cv: _Cv = 1.0,
    bursts: _OnOff = "10:30:0",
    users: _Users = None,
    think_s: _Think = 10.0,
    prompt: _Length = "1000",
    output: _Length = "200",
    seed: _Seed = 0,
) -> None:
    """Requests that share nothing."""
    from ..core.trace_make import plain_table

    process = _arrivals(arrivals, rate_rps, cv, bursts)
    table = plain_table(requests, process, _length(prompt), _length(output), seed)
    _write(_looped(table, users, think_s, seed), out)


@make.command()
def rag(
    out: _Out,
    requests: _N = 1000,
    rate_rps: _Rps = 1.0,
    arrivals: _Kind = "poisson",
    cv: _Cv = 1.0,
    bursts: _OnOff = "10:30:0",
    users: _Users = None,
    think_s: _Think = 10.0,
    passages: Annotated[int, typer.Option(help="Of the common pool.")] = 10_000,
    per_request: Annotated[int, typer.Option(help="Passages of one prompt.")] = 8,
    passage: _Length = "512",
    question: _Length = "64",
    output: _Length = "128",
    zipf_a: Annotated[float, typer.Option(help="Passage k has weight k ** -a.")] = 0.9,
    sharing: Annotated[float, typer.Option(help="Share of passages from the pool.")] = 1.0,
    seed: _Seed = 0,
) -> None:
    """Questions over shared passages in random order."""
    from ..core.trace_make import rag_table

    table = rag_table(
        requests,
        _arrivals(arrivals, rate_rps, cv, bursts),
        passages=passages,
        per_request=per_request,
        passage=_length(passage),
        question=_length(question),
        output=_length(output),
        zipf_a=zipf_a,
        sharing=sharing,
        seed=seed,
    )
    _write(_looped(table, users, think_s, seed), out)


@make.command()
def chat(
    out: _Out,
    sessions: Annotated[int, typer.Option(help="Conversations.")] = 200,
    rate_rps: _Rps = 0.2,
    arrivals: _Kind = "poisson",
    cv: _Cv = 1.0,
    bursts: _OnOff = "10:30:0",
    turns: Annotated[str, typer.Option(help="MEAN or MEAN:CV of a conversation.")] = "5",
    think_s: _Think = 30.0,
    system: _Length = "1000",
    systems: Annotated[int, typer.Option(help="Different system prompts.")] = 1,
    message: _Length = "100",
    answer: _Length = "300",
    seed: _Seed = 0,
) -> None:
    """Conversations whose prompt grows with every turn."""
    from ..core.trace_make import chat_table

    table = chat_table(
        sessions,
        _arrivals(arrivals, rate_rps, cv, bursts),
        turns=_length(turns),
        system=_length(system),
        systems=systems,
        message=_length(message),
        answer=_length(answer),
        think_s=think_s,
        seed=seed,
    )
    _write(table, out)


_SPREADS = ("prompt_tokens", "output_tokens", "chunk_tokens", "reuse_distance_tokens")


def _facts(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Numbers of the statistics, one per line; times between uses by their median."""
    gap = data["reuse_gap_s"]
    facts = {k: v for k, v in data.items() if isinstance(v, int | float) or v is None}
    facts |= {"reuse_gap_s p50": gap["p50"] if gap else None}
    return [
        {"what": k, "value": v} for k, v in facts.items() if k not in (*_SPREADS, "reuse_gap_s")
    ]


def _read(
    file: Path,
    format: str,
    first: int | None,
    between_s: str,
    scale_rate: float,
    zero_output: Any,
    block_tokens: int | None,
    ids: Any,
    rate_rps: float | None,
    seed: int,
) -> RequestTable:
    from ..core.trace_files import read_trace

    between = None if not between_s else _numbers("between-s", between_s, 2)
    return read_trace(
        file,
        format,
        first=first,
        between_s=None if between is None else (between[0], between[1]),
        scale_rate=scale_rate,
        zero_output=zero_output,
        block_tokens=block_tokens,
        ids=ids,
        rate_rps=rate_rps,
        seed=seed,
    )


def _arrivals(kind: str, rate_rps: float, cv: float, bursts: str) -> Arrivals:
    from ..core.arrivals import Arrivals
    from ..core.record import made

    on_s, off_s, quiet = _numbers("bursts", bursts, 3)
    return made(
        Arrivals, "an option", error=WorkloadError,
        kind=kind, rate_rps=rate_rps, cv=cv, on_s=on_s, off_s=off_s, quiet=quiet,
    )  # fmt: skip


def _length(text: str) -> Lengths:
    from ..core.record import made
    from ..core.trace_make import Lengths

    mean, cv = _numbers("a length", text if ":" in text else f"{text}:0", 2)
    return made(Lengths, "an option", error=WorkloadError, mean=mean, cv=cv)


def _numbers(what: str, text: str, n: int) -> list[float]:
    try:
        found = [float(part) for part in text.split(":")]
    except ValueError:
        found = []
    if len(found) != n:
        raise WorkloadError(f"{what} is {n} numbers with ':' between", values=repr(text))
    return found


def _looped(table: RequestTable, users: int | None, think_s: float, seed: int) -> RequestTable:
    from ..core.arrivals import closed_loop

    return table if users is None else closed_loop(table, users, think_s, seed)


def _write(table: RequestTable, out: Path) -> None:
    from ..core.trace_files import write_trace
    from .console import note, print_json_line

    table.check()
    write_trace(table, out)
    note(f"{len(table)} requests over {table.duration_s():.1f} s written to {out}")
    print_json_line({"out": str(out), "rows": len(table), "provenance": table.provenance})
