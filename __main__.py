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
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] == __package__:
            raise
        print(f"cachetune: the package {e.name} must be installed: see README.md", file=sys.stderr)
        raise SystemExit(2) from None
    run()


if __name__ == "__main__":
    main()
