"""`KernelCost`: seconds of GPU kernels, from fitted forms that ship with the package.

    cost = KernelCost.load("H100-SXM")
    cost.gemm_s(4096, 6144, 4096)
    cost.prefill_attention_s(512, 8192, n_heads=32, n_kv_heads=8, head_dim=128)
    cost.decode_attention_s(16, 16 * 4096, n_heads=32, n_kv_heads=8, head_dim=128)

The `..._s` methods give seconds; `predict` gives the same with a 90 % interval. A kind that was not
measured on the GPU is borrowed from the nearest GPU that has it, with this GPU's data sheet and a
wider interval. calibration/kernel_fit.py makes the documents in `gpus/`.
"""

from __future__ import annotations

import math
from functools import cache, cached_property
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.errors import CacheTuneError, ProfileError
from ..core.hardware import Coefficient, Provenance
from ..core.record import Document, Record
from .gpu_sheet import FOLDER, GpuSheet, gpu_sheet, gpu_sheets, key_of
from .kernel_forms import FORMS, Sizes, operand
from .residual import Residual, Trees

Array = NDArray[np.float64]


class Band(Record):
    """Half width of the 90 % interval, in ln(seconds), for predictions up to `to_s`."""

    to_s: float
    half_width: float


class KernelFit(Record):
    """One kind of kernel on one GPU: coefficients of its form, residual, interval."""

    coefficients: dict[str, Coefficient]
    residual: Residual | None
    bands: tuple[Band, ...]
    """By predicted time, upwards, from rows of shapes that the fit had not seen."""
    borrowed_half_width: float
    """The same for another GPU that borrows this fit; from whole GPUs held out."""
    cached_half_width: float | None = None
    """The same for cached prefixes where the table has none; from a GPU that has both."""
    measured: dict[str, tuple[float, float]]
    """Smallest and largest of each size in the table."""
    n_rows: int
    source: str
    """Where the table is from, and its licence."""


class KernelDocument(Document):
    """All fitted kinds of one GPU."""

    document: ClassVar[str] = "kernels"
    version: ClassVar[int] = 1
    error: ClassVar[type[CacheTuneError]] = ProfileError

    gpu: str
    fits: dict[str, KernelFit]
    provenance: Provenance

    def model_post_init(self, _context: object) -> None:
        """Kinds and coefficients are those of the forms.

        Raises:
            ProfileError: they are not.
        """
        for kind, fit in self.fits.items():
            expected = set(FORMS[kind].coefficients) if kind in FORMS else set()
            if not expected or set(fit.coefficients) != expected:
                raise ProfileError(
                    f"kernels of {self.gpu}: {kind!r} must have the coefficients of its form",
                    values=", ".join(sorted(fit.coefficients)),
                    remedy=f"kinds are {', '.join(FORMS)}; fit the tables again",
                )


class Prediction(NamedTuple):
    """Seconds with their 90 % interval."""

    seconds: float
    low_s: float
    high_s: float
    borrowed_from: str | None = None
    """The GPU whose measurements stand in, where this one has none."""


class Predictor:
    """One fit on one data sheet, ready to predict."""

    def __init__(self, kind: str, fit: KernelFit, sheet: GpuSheet) -> None:
        self.form, self.fit, self.sheet = FORMS[kind], fit, sheet
        self._peak = sheet.peak_flops(operand(kind)[0])
        self._values = {name: c.value for name, c in fit.coefficients.items()}
        self._trees: Trees | None = fit.residual.trees() if fit.residual is not None else None

    def seconds(self, sizes: Sizes) -> Array:
        """Predicted seconds, element by element."""
        physical = self.form.seconds(sizes, self._values, self._peak, self.sheet)
        if self._trees is None or self.fit.residual is None:
            return physical
        columns = {**self.form.features(sizes, self.sheet), "physical": np.log2(physical)}
        x = np.stack([columns[name] for name in self.fit.residual.features], axis=1)
        return np.asarray(physical * np.exp(self._trees.predict(x)))

    def extra_keys_s(self, sizes: Sizes) -> Array:
        """What `n_cached` keys add by the physical form alone."""
        form, none = self.form.seconds, {**sizes, "n_cached": np.zeros_like(sizes["n_cached"])}
        both = [form(s, self._values, self._peak, self.sheet) for s in (sizes, none)]
        return np.asarray(both[0] - both[1])

    def half_widths(self, seconds: Array, sizes: Sizes, borrowed: bool) -> Array:
        """Half widths of the 90 % interval in ln(seconds).

        Calls outside the measured sizes are no surer than another GPU's.
        """
        ends = np.array([band.to_s for band in self.fit.bands[:-1]])
        own = np.array([b.half_width for b in self.fit.bands])[np.searchsorted(ends, seconds)]
        outside = np.full(len(seconds), borrowed)
        for name, (low, high) in self.fit.measured.items():
            outside |= (sizes[name] < low) | (sizes[name] > high)
        return np.where(outside, np.maximum(own, self.fit.borrowed_half_width), own)


class KernelCost:
    """Kernel times of one GPU. Sizes must be one or more; results are cached."""

    def __init__(self, sheet: GpuSheet) -> None:
        self.sheet = sheet
        self._predictors: dict[str, tuple[Predictor, str | None]] = {}
        self._seen: dict[tuple[object, ...], Prediction] = {}

    @staticmethod
    def load(gpu: str | GpuSheet) -> KernelCost:
        """Kernels of a GPU by name, or of a data sheet of your own.

        Raises:
            ProfileError: no such GPU; names the nearest.
        """
        return KernelCost(gpu if isinstance(gpu, GpuSheet) else gpu_sheet(gpu))

    def gemm_s(self, m: int, n: int, k: int, dtype: str = "bfloat16") -> float:
        """Matrix product (m, k) x (k, n); operands of `dtype` (bfloat16, float16 or fp8)."""
        return self.predict_gemm(m, n, k, dtype).seconds

    def prefill_attention_s(
        self,
        n_query: int,
        n_cached: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        batch: int = 1,
    ) -> float:
        """Causal attention of `n_query` new rows behind `n_cached` cached ones, per sequence."""
        shape = (n_heads, n_kv_heads, head_dim)
        return self.predict_prefill_attention(n_query, n_cached, *shape, batch=batch).seconds

    def decode_attention_s(
        self,
        batch: int,
        context_tokens_total: float,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        kv_dtype: str = "bfloat16",
    ) -> float:
        """One new row of each of `batch` sequences over their KV, all contexts summed."""
        shape = (n_heads, n_kv_heads, head_dim, kv_dtype)
        return self.predict_decode_attention(batch, context_tokens_total, *shape).seconds

    def elementwise_s(self, n_bytes: float) -> float:
        """Norm, rotation or activation that reads and writes `n_bytes` together."""
        return self.predict("elementwise", n_bytes=n_bytes).seconds

    def predict_gemm(self, m: int, n: int, k: int, dtype: str = "bfloat16") -> Prediction:
        """`gemm_s` with its interval."""
        kind = "gemm.bfloat16" if dtype == "float16" else f"gemm.{dtype}"
        if kind not in FORMS:
            raise ProfileError(
                "the matmul dtype must be bfloat16, float16 or fp8", values=repr(dtype)
            )
        return self.predict(kind, m=m, n=n, k=k, operand_bytes=operand(kind)[1])

    def predict_prefill_attention(
        self,
        n_query: int,
        n_cached: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        batch: int = 1,
    ) -> Prediction:
        """`prefill_attention_s` with its interval.

        Few tables hold cached prefixes. Where only prefill from position 0 was measured, the cached
        keys add what its physical form says; the interval is from a GPU that has both.
        """
        sizes = {"batch": batch, "n_query": n_query, "n_cached": n_cached, "n_heads": n_heads}
        sizes |= {"n_kv_heads": n_kv_heads, "head_dim": head_dim}
        if self._prefill_kind == "prefix" or not n_cached:
            return self.predict(self._prefill_kind, **sizes)
        first = self.predict("prefill", **{**sizes, "n_cached": 0})
        predictor, donor = self._predictor("prefill")
        arrays = {name: np.array([float(value)]) for name, value in sizes.items()}
        seconds = first.seconds + float(predictor.extra_keys_s(arrays)[0])
        fitted = predictor.fit.cached_half_width or 0.0
        width = max(first.high_s / first.seconds, math.exp(fitted))
        return Prediction(seconds, seconds / width, seconds * width, donor)

    def predict_decode_attention(
        self,
        batch: int,
        context_tokens_total: float,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        kv_dtype: str = "bfloat16",
    ) -> Prediction:
        """`decode_attention_s` with its interval."""
        kinds = {"bfloat16": "decode", "float16": "decode", "fp8": "decode.fp8"}
        if kv_dtype not in kinds:
            raise ProfileError(
                "the dtype of K and V must be bfloat16, float16 or fp8", values=repr(kv_dtype)
            )
        return self.predict(
            kinds[kv_dtype],
            batch=batch,
            context=context_tokens_total / batch,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
        )

    def predict(self, kind: str, **sizes: float) -> Prediction:
        """One call of a kind, sizes by the names of `kernel_forms.FORMS`.

        Raises:
            ProfileError: a size is not positive, or the GPU lacks the dtype.
        """
        key = (kind, *sizes.values())
        found = self._seen.get(key)
        if found is None:
            for name, value in sizes.items():
                if not (value > 0 or (name == "n_cached" and value == 0)) or math.isinf(value):
                    raise ProfileError(f"{kind}: {name} must be above zero", values=str(value))
            predictor, donor = self._predictor(kind)
            arrays = {name: np.array([float(value)]) for name, value in sizes.items()}
            seconds = predictor.seconds(arrays)
            width = math.exp(float(predictor.half_widths(seconds, arrays, donor is not None)[0]))
            s = float(seconds[0])
            found = self._seen[key] = Prediction(s, s / width, s * width, donor)
        return found

    @cached_property
    def _prefill_kind(self) -> str:
        """Which kind answers for prefill: the one of the nearest GPU, prefill from 0 first."""
        for other in _by_distance(self.sheet):
            document = kernel_document(other.name)
            for kind in ("prefill", "prefix"):
                if document is not None and kind in document.fits:
                    return kind
        raise ProfileError("a GPU must have a fit of prefill", remedy="fit the tables again")

    def _predictor(self, kind: str) -> tuple[Predictor, str | None]:
        found = self._predictors.get(kind)
        if found is None:
            fit, donor = nearest_fit(kind, self.sheet)
            found = self._predictors[kind] = (Predictor(kind, fit, self.sheet), donor)
        return found


def _by_distance(sheet: GpuSheet) -> list[GpuSheet]:
    return sorted(gpu_sheets().values(), key=lambda s: (sheet.distance(s), s.name))


def nearest_fit(kind: str, sheet: GpuSheet) -> tuple[KernelFit, str | None]:
    """The fit of a kind for a GPU, and whose it is when borrowed.

    Raises:
        ProfileError: no shipped GPU has the kind.
    """
    for other in _by_distance(sheet):
        document = kernel_document(other.name)
        if document is not None and kind in document.fits:
            own = key_of(other.name) == key_of(sheet.name)
            return document.fits[kind], None if own else other.name
    raise ProfileError(f"a GPU must have a fit of {kind}", remedy="fit the tables again")


@cache
def kernel_document(gpu: str) -> KernelDocument | None:
    """The shipped document of a GPU, or None; read once."""
    file = FOLDER.joinpath(f"{key_of(gpu)}.json")
    if not file.is_file():
        return None
    return KernelDocument.parse(file.read_text(encoding="utf-8"), f"kernels of {gpu}")
