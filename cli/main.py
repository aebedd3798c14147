"""`cachetune`: one command per module of this folder, one boundary where errors become a line.

A command module holds `command`: a function with typer annotations, or a `typer.Typer` that has
sub-commands. Its own imports at the top are light (typer, core); torch, pandas, simpy and the
like are imported inside the function.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated

import typer

from ..core.errors import CacheTuneError
from .console import fail

COMMANDS = (
    "demo",
    "calibrate",
    "tune",
    "run",
    "simulate",
    "replay",
    "whatif",
    "catalogue",
    "trace",
    "bench",
    "validate",
    "schema",
)
"""In the order of `--help`."""

EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "safetensors", "xxhash", "tokenizers"), "runtime"),
    "triton": "kernels",
}
"""Packages that the base install leaves out, and the extra that brings each."""

DEFAULT_ARGS = ["--help"]
INPUT_ERROR = 2
INTERRUPTED = 130

# Typer's click may be the public package or a vendored copy: take the classes from what it exports.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line and exit: 0, 2 for bad input, 130 for Ctrl-C.

    Other exceptions are our bugs and keep their traceback.
    """
    args = list(sys.argv[1:] if argv is None else argv) or DEFAULT_ARGS
    try:
        status = app(_asked_for(args))(args, prog_name="cachetune", standalone_mode=False)
        if status == INTERRUPTED:  # some versions of typer catch Ctrl-C themselves
            raise KeyboardInterrupt
    except CacheTuneError as e:
        status = fail(str(e), INPUT_ERROR)
    except _UsageError as e:
        status = fail(f"{_message(e, args)}; see cachetune {_first_word(args)}--help", INPUT_ERROR)
    except ModuleNotFoundError as e:
        package = (e.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        extra = f"pip install 'cachetune[{EXTRAS[package]}]'"
        status = fail(f"this command needs {package}, got an install without; {extra}", INPUT_ERROR)
    except (KeyboardInterrupt, typer.Abort):
        status = fail("interrupted", INTERRUPTED)
    raise SystemExit(status if isinstance(status, int) else 0)


def app(names: Iterable[str]) -> typer.Typer:
    """A typer app with these commands; only their modules are imported."""
    root = typer.Typer(callback=_root, add_completion=False, pretty_exceptions_enable=False)
    for name in names:
        command = importlib.import_module(f".{name}", __package__).command
        if isinstance(command, typer.Typer):
            root.add_typer(command, name=name)
        else:
            root.command(name)(command)
    return root


def _print_version(asked: bool) -> None:
    if asked:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Its version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Reuse KV cache that is not a prefix, tuned per machine on a calibrated simulator."""


def _asked_for(args: Sequence[str]) -> tuple[str, ...]:
    """The command that `args` begin with, or all of them for help and for typing errors."""
    return (args[0],) if args and args[0] in COMMANDS else COMMANDS


def _first_word(args: Sequence[str]) -> str:
    return f"{args[0]} " if args and args[0] in COMMANDS else ""


def _message(error: Exception, args: Sequence[str]) -> str:
    """Click's own words on one line, and the value where they leave it out."""
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    text = " ".join(text.split()).rstrip(".")
    names = getattr(getattr(error, "param", None), "opts", ())
    for arg, after in zip(args, [*args[1:], None], strict=True):
        name, equals, value = arg.partition("=")
        given = value if equals else after
        if name in names and given is not None and repr(given) not in text:
            return f"{text}, got {given!r}"
    return text
