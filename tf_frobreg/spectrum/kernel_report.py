"""Reports on spectra: σmax, σmin and R_α of each kernel, or the reason why it was not measured."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_frobreg.checks import check_accuracy, check_integer, check_number
from tf_frobreg.convolution.geometry import Convolution
from tf_frobreg.penalties.frobenius import FrobeniusPenalty
from tf_frobreg.spectrum.extremes import ExtremesFinder, ExtremeSingularValues, ratio
from tf_frobreg.tables import (
    UNKNOWN,
    Report,
    Row,
    count,
    digits,
    known_columns,
    names_by_reason,
)

__all__ = ["KernelSpectrum", "ModelSpectrum"]

LEFT_COLUMNS = ("layer",)
# Columns that a narrow terminal lacks, the first one first.
OPTIONAL_COLUMNS = ("floor", "R", "σmax/σmin", "kernel", "image", "R/column", "α")


@dataclasses.dataclass(frozen=True, repr=False)
class KernelSpectrum:
    """σmax, σmin and R_α of one kernel, or the reason why they were not measured.

    In a row with a reason, all attributes after `kernel_shape` are None. `kernel_shape` is known if a kernel
    was found, but its values are not finite or its measurement needs too much memory.

    Attributes:
        name: Name of the layer, as `model_spectrum` gives it.
        reason: Why the kernel was not measured. None if it was measured.
        kernel_shape: Shape of the kernel. None if no kernel was found.
        input_size: Spatial size of the layer's input.
        extremes: σmax and σmin with their error estimates, an `ExtremeSingularValues`. The errors are not
            bounds, because a search can miss the outermost σ.
        penalty: R_α(K) = ‖MᵀM − αI‖²_F, in units of σ⁴. inf if it is larger than any float.
        penalty_per_column: R_α(K) divided by the number of columns of M.
        penalty_floor: Lower bound on R_α for every kernel of this shape.
        convolution: The geometry.
        alpha: α of R_α, the target of σ².
        remark: What the row does not show, such as other images that the layer is applied to.

    Example:
        >>> print(KernelSpectrum("conv", "its kernel holds NaN or infinity", kernel_shape=(3, 3, 1, 4)))
        conv  - its kernel holds NaN or infinity
    """

    name: str
    reason: str | None = None
    kernel_shape: tuple[int, ...] | None = None
    input_size: tuple[int, ...] | None = None
    extremes: ExtremeSingularValues | None = None
    penalty: float | None = None
    penalty_per_column: float | None = None
    penalty_floor: float | None = None
    convolution: Convolution | None = None
    alpha: float | None = None
    remark: str | None = None

    def __repr__(self) -> str:
        """Returns one line without the geometry and the vectors of the search."""
        ends = self.extremes
        if ends is None:
            return f"KernelSpectrum(name={self.name!r}, reason={self.reason!r})"
        sigma = f"sigma_max={ends.sigma_max:.4g}, sigma_min={ends.sigma_min_bound:.4g}"
        return f"KernelSpectrum(name={self.name!r}, {sigma})"

    def __str__(self) -> str:
        if self.extremes is None or self.penalty is None:
            return f"{self.name}  - {self.reason or 'not measured'}"
        ends = self.extremes
        return f"{self.name}  σ {_sigma_min(ends)} … {digits(ends.sigma_max)}, R {digits(self.penalty)}"

    @property
    def condition_number(self) -> float | None:
        """σmax / σmin of `extremes`, which may be only a lower bound of the condition number of M.

        The true value can be far larger, even infinite, if `extremes.converged` is False or if
        `extremes.sigma_min_error` is at least `extremes.sigma_min`. σmin then cannot be distinguished from 0,
        and its upper bound `extremes.sigma_min_bound` is the divisor. The function `condition_number`
        computes the number more accurately. None if the kernel was not measured, NaN if σmin was not
        requested.
        """
        ends = self.extremes
        return None if ends is None else ratio(ends.sigma_max, ends.sigma_min_bound)

    def to_dict(self) -> dict[str, Any]:
        """Returns the row as flat plain values, as `pandas.DataFrame` takes them.

        Returns:
            Values by name, without `convolution` and the vectors of the search. What was not measured is
            None. "sigma_min_is_upper_bound" says that σmin cannot be distinguished from 0 or is not accurate.
            "sigma_min" is its upper bound then, and "condition_number" a lower bound.
        """
        ends = self.extremes
        no_sigma_min = ends is None or math.isnan(ends.sigma_min)
        record = {
            "layer": self.name,
            "kernel_shape": self.kernel_shape,
            "input_size": self.input_size,
            "sigma_max": ends and ends.sigma_max,
            "sigma_min": ends and ends.sigma_min_bound,
            "sigma_max_error": ends and ends.sigma_max_error,
            "sigma_min_error": ends and ends.sigma_min_error,
            "sigma_max_converged": ends and ends.sigma_max_converged,
            "sigma_min_converged": None if no_sigma_min else ends and ends.sigma_min_converged,
            "sigma_min_is_upper_bound": None if no_sigma_min else ends and ends.sigma_min_is_bound,
            "condition_number": self.condition_number,
            "alpha": self.alpha,
            "penalty": self.penalty,
            "penalty_per_column": self.penalty_per_column,
            "penalty_floor": self.penalty_floor,
            "reason": self.reason,
            "remark": self.remark,
        }
        return {name: None if _is_nan(value) else value for name, value in record.items()}


def _sigma_min(ends: ExtremeSingularValues) -> str:
    """Returns σmin as text, or its upper bound."""
    return ("≤ " if ends.sigma_min_is_bound else "") + digits(ends.sigma_min_bound)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


class ModelSpectrum(Report, list[KernelSpectrum]):
    """The rows of a model, a list of `KernelSpectrum`. `print(spectrum)` shows a table.

    "≤" and "≥" mark bounds: σmin cannot be distinguished from 0, or a search did not reach the accuracy.
    Lines below the table give the `remark` of rows, and why other layers were not measured.
    A terminal that is too narrow lacks some columns. A slice is a plain list.

    Example:
        >>> import keras
        >>> from tf_frobreg import model_spectrum
        >>> model = keras.Sequential([
        ...     keras.Input((8, 8, 1)),
        ...     keras.layers.Conv2D(4, 1, kernel_initializer="ones", name="ones"),
        ...     keras.layers.Conv2D(1, 1, kernel_initializer="ones", name="sum")])
        >>> spectrum = model_spectrum(model)
        >>> print(spectrum)
        2 kernels, σ 2 … 2, α = 1
        <BLANKLINE>
        layer   kernel  image  σmax  σmin  σmax/σmin    R  R/column  floor
        ──────────────────────────────────────────────────────────────────
        ones   1×1×1×4    8×8     2     2          1  576         9      0
        sum    1×1×4×1    8×8     2     2          1  768         3    192
        >>> spectrum
        ModelSpectrum of 2 kernels, σ 2 … 2
        >>> [record["input_size"] for record in spectrum.records()]
        [(8, 8), (8, 8)]
    """

    _left_columns = LEFT_COLUMNS
    _optional_columns = OPTIONAL_COLUMNS

    def records(self) -> list[dict[str, Any]]:
        """Returns the `to_dict()` of each row: `pandas.DataFrame(spectrum.records())` is a table."""
        return [row.to_dict() for row in self]

    def __repr__(self) -> str:
        return f"ModelSpectrum of {spectrum_summary(self, with_alpha=False)}"

    def _parts(self) -> tuple[str, list[Row], list[str]]:
        return spectrum_summary(self), spectrum_rows(self), spectrum_remarks(self)


def spectrum_summary(rows: Sequence[KernelSpectrum], *, with_alpha: bool = True) -> str:
    """Returns how many kernels there are, the range of σ, α if it is the same, and what is missing."""
    measured = [row.extremes for row in rows if row.extremes is not None]
    parts = [count(len(measured), "kernel")]
    if measured:
        known = [ends for ends in measured if not math.isnan(ends.sigma_min)]
        low = _sigma_min(min(known, key=lambda ends: ends.sigma_min_bound)) if known else None
        high = digits(max(ends.sigma_max for ends in measured))
        parts.append(f"σ {low} … {high}" if low else f"σ up to {high}")
    if with_alpha and (alpha := common_alpha(rows)) is not None:
        parts.append(f"α = {alpha:g}")
    if missing := len(rows) - len(measured):
        parts.append(f"{missing} not measured")
    return ", ".join(parts)


def spectrum_rows(rows: Sequence[KernelSpectrum]) -> list[Row]:
    """Returns the table of a report, for the rows with a measurement. α is a column if it differs."""
    measured = [(row, row.extremes) for row in rows if row.extremes is not None]
    one_alpha = common_alpha(rows) is not None
    return known_columns(
        [
            {
                "layer": row.name,
                "kernel": _times(row.kernel_shape),
                "image": _times(row.input_size),
                "σmax": ("" if ends.sigma_max_converged else "≥ ") + digits(ends.sigma_max),
                "σmin": _sigma_min(ends),
                "σmax/σmin": ("≥ " if ends.sigma_min_is_bound else "") + digits(row.condition_number),
                "α": UNKNOWN if one_alpha or row.alpha is None else f"{row.alpha:g}",
                "R": digits(row.penalty),
                "R/column": digits(row.penalty_per_column),
                "floor": digits(row.penalty_floor),
            }
            for row, ends in measured
        ]
    )


def spectrum_remarks(rows: Sequence[KernelSpectrum]) -> list[str]:
    """Returns lines on what the table does not show, and on what was not measured."""
    remarks = {row.name: row.remark for row in rows if row.extremes is not None and row.remark}
    reasons = {row.name: row.reason or "not measured" for row in rows if row.extremes is None}
    return [
        *(f"{names}: {remark}" for remark, names in names_by_reason(remarks).items()),
        *(f"Not measured: {names}: {reason}" for reason, names in names_by_reason(reasons).items()),
    ]


def common_alpha(rows: Sequence[KernelSpectrum]) -> float | None:
    """Returns α if it is the same in all rows with a measurement, otherwise None."""
    found = {row.alpha for row in rows if row.extremes is not None}
    return found.pop() if len(found) == 1 else None


def _times(size: Sequence[int] | None) -> str:
    return "×".join(map(str, size)) if size else UNKNOWN


def report_kernel(
    name: str,
    kernel: np.ndarray,
    conv: Convolution,
    alpha: float,
    *,
    accuracy: float,
    max_iterations: int = 1000,
    sigma_min: bool = True,
    start: KernelSpectrum | None = None,
    remark: str | None = None,
) -> KernelSpectrum:
    """Returns the row of one kernel.

    Args:
        name: Name of the row.
        kernel: The values of the kernel, of shape `conv.kernel_shape`.
        conv: The geometry.
        alpha: α of R_α, the target of σ². Positive.
        accuracy: Below 1. The error estimate of σmax to reach, relative to σmax.
        max_iterations: Approximate limit on products with the Gram matrix, for each singular value and each
            solver.
        sigma_min: Whether to search for σmin.
        start: An earlier row of this kernel. The searches begin there if the geometry is the same.
        remark: What the row does not show.

    Returns:
        A row with the measurement, or with a reason if the kernel is not finite or needs too much memory.

    Raises:
        ValueError: If an argument is invalid.
        TypeError: If an argument has the wrong type.
    """
    alpha = check_number("alpha", alpha, exclusive=True)
    accuracy = check_accuracy(accuracy)
    max_iterations = check_integer("max_iterations", max_iterations)
    if not np.isfinite(kernel).all():
        return KernelSpectrum(name, "its kernel holds NaN or infinity", kernel_shape=conv.kernel_shape)
    before = start.extremes if start is not None and start.convolution == conv else None
    try:  # the arguments are valid, so that a refusal means too little memory
        frobenius = FrobeniusPenalty(conv, alpha)
        finder = ExtremesFinder(conv, accuracy, max_iterations=max_iterations, sigma_min=sigma_min)
        found = finder(kernel, before)
        penalty = float(frobenius.value(tf.constant(kernel, tf.float64)))
    except ValueError as error:
        return KernelSpectrum(name, str(error), kernel_shape=conv.kernel_shape)
    if math.isnan(penalty):  # the difference of two numbers that are larger than any float
        penalty = math.inf
    return KernelSpectrum(
        name=name,
        kernel_shape=conv.kernel_shape,
        input_size=conv.input_size,
        extremes=found,
        penalty=penalty,
        penalty_per_column=penalty / conv.shape[1],
        penalty_floor=frobenius.floor,
        convolution=conv,
        alpha=alpha,
        remark=remark,
    )
