"""`python -m cachetune`: Ctrl-C is one line even while the command line is being imported."""

from __future__ import annotations

import sys


def main() -> None:
    """Run a command line and exit; see `cli.main.main`."""
    try:
        from .cli.main import main as run
    except KeyboardInterrupt:
        print("cachetune: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
