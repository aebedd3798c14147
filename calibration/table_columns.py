"""Reading columns of a Parquet or CSV table that somebody else made, with checks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..core.errors import CacheTuneError


def read_columns(
    path: Path,
    columns: Iterable[str],
    text: Iterable[str] = (),
    gaps: bool = False,
    extra: Iterable[str] = (),
) -> pd.DataFrame:
    """A Parquet or CSV file with these columns, checked: numbers are there, finite, not negative.

    `gaps` allows empty cells, which stay NaN: Vidur's tables leave out what was not measured.
    Columns in `extra` may be missing, and are NaN then.

    Raises:
        CacheTuneError: not readable, a column is missing, no row, a value breaks the rule; file,
            row, field.
    """
    columns, text = list(columns), list(text)
    try:
        parquet = path.suffix == ".parquet"
        frame = pd.read_parquet(path) if parquet else pd.read_csv(path, low_memory=False)
    except ImportError:
        raise CacheTuneError(
            "reading Parquet needs pyarrow",
            values=str(path),
            remedy="pip install 'cachetune[tables]'",
        ) from None
    except (OSError, ValueError) as e:  # pandas' and pyarrow's own parse errors are ValueErrors
        reason = " ".join(str(e).split())[:120]
        raise CacheTuneError(
            f"{path} must be a readable table",
            values=reason,
            remedy="check the path, copy it again",
        ) from None
    for name in (*columns, *text):
        if name not in frame:
            raise CacheTuneError(
                f"{path} must have the column '{name}'",
                values=", ".join(map(str, frame.columns[:8])),
                remedy="is it a table of another kind?",
            )
    if frame.empty:
        raise CacheTuneError(
            f"{path} must hold measured rows",
            values="none",
            remedy="the file may be cut short; copy it again",
        )
    for name in columns:
        numbers = pd.to_numeric(frame[name], errors="coerce").to_numpy(dtype=float)
        wrong = ~np.isfinite(numbers) | (numbers < 0)
        bad = np.flatnonzero(wrong & ~frame[name].isna().to_numpy() if gaps else wrong)
        if len(bad):
            row = int(bad[0])
            raise CacheTuneError(
                f"{path} row {row + 1}: {name} must be a number, zero or more",
                values=repr(frame[name].iloc[row]),
                remedy="the file may be cut short; copy it again",
            )
        frame[name] = numbers
    return frame.reindex(columns=[*columns, *text, *extra])


def positive(path: Path, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """The times of a table, all above zero.

    Raises:
        CacheTuneError: one is not; its row.
    """
    bad = np.flatnonzero(~(seconds > 0))  # what is no number is not above zero either
    if len(bad):
        raise CacheTuneError(
            f"{path} row {int(bad[0]) + 1}: the time must be above zero",
            values=str(seconds[bad[0]]),
            remedy="leave the row out, or measure it again",
        )
    return seconds
