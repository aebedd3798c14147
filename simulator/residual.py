"""What a physical form leaves unexplained: a sum of small symmetric trees, held as plain arrays.

Every level of a symmetric (oblivious) tree asks one question of all rows, so a tree of depth d is d
features, d thresholds and 2^d leaves, and predicting is one comparison and one look-up.
calibration/boosting.py fits them.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ProfileError
from ..core.record import Record

LEAF_UNIT = 1e-4
"""Leaves are stored as whole multiples of this, in ln(seconds)."""


class Residual(Record):
    """Trees over named features; they correct ln(seconds).

    The arrays are base64 of zlib of little-endian numbers, tree by tree: JSON lists of the same
    would be six times as long.
    """

    features: tuple[str, ...]
    """Names of the columns that `Trees.predict` is given, in order."""
    depth: int
    columns: str
    """uint8 (n_trees, depth): which feature a level asks about."""
    thresholds: str
    """float32 (n_trees, depth): a row goes right where its feature is above."""
    leaves: str
    """int16 (n_trees, 2^depth), in `LEAF_UNIT`."""

    def model_post_init(self, _context: object) -> None:
        """The arrays fit together.

        Raises:
            ProfileError: they do not, or cannot be read.
        """
        try:
            self._check()
        except ValueError as e:
            raise ProfileError(f"residual: {e}", remedy="fit the tables again") from None

    def _check(self) -> None:
        if not 1 <= self.depth <= 10:
            raise ValueError(f"depth must be 1 to 10, got {self.depth}")
        trees = self.trees()
        sizes = (trees.columns.size, trees.thresholds.size, trees.leaves.size)
        n = len(trees.columns)
        expected = (n * self.depth, n * self.depth, n << self.depth)
        if sizes != expected:
            raise ValueError(f"trees of depth {self.depth} must have sizes {expected}, got {sizes}")
        if trees.columns.size and trees.columns.max() >= len(self.features):
            raise ValueError(
                f"columns must be below {len(self.features)}, got {trees.columns.max()}"
            )

    @staticmethod
    def of(
        features: tuple[str, ...],
        columns: NDArray[np.int64],
        thresholds: NDArray[np.float64],
        leaves: NDArray[np.int64],
    ) -> Residual:
        """From arrays (n_trees, depth), (n_trees, depth), (n_trees, 2^depth)."""
        return Residual(
            features=features,
            depth=columns.shape[1],
            columns=_text(columns.astype("u1")),
            thresholds=_text(thresholds.astype("<f4")),
            leaves=_text(leaves.astype("<i2")),
        )

    def trees(self) -> Trees:
        """The arrays, for predicting."""
        try:
            return Trees(
                _array(self.columns, "u1", self.depth).astype(np.intp),
                _array(self.thresholds, "<f4", self.depth),
                _array(self.leaves, "<i2", 1 << self.depth) * LEAF_UNIT,
            )
        except (binascii.Error, zlib.error) as e:
            raise ValueError(f"trees must be base64 of zlib: {e}") from None


class Trees:
    """Arrays of a `Residual`."""

    def __init__(
        self,
        columns: NDArray[np.intp],
        thresholds: NDArray[np.float32],
        leaves: NDArray[np.float64],
    ) -> None:
        self.columns, self.thresholds, self.leaves = columns, thresholds, leaves
        self._bits = 1 << np.arange(columns.shape[1])
        self._rows = np.arange(len(columns))

    def predict(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Correction to ln(seconds) of each row of `x` (n_rows, n_features)."""
        x = x.astype(np.float32)
        out = np.empty(len(x))
        for start in range(0, len(x), 2048):
            part = x[start : start + 2048]
            leaf = (part[:, self.columns] > self.thresholds) @ self._bits
            out[start : start + len(part)] = self.leaves[self._rows, leaf].sum(axis=1)
        return out


def _text(array: NDArray[np.generic]) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 9)).decode()


def _array(text: str, dtype: str, width: int) -> NDArray[Any]:
    data = zlib.decompress(base64.b64decode(text, validate=True))
    return np.frombuffer(data, dtype=dtype).reshape(-1, width)
