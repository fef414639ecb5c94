"""One row of a report: σmax, σmin and R_α of one kernel, or the reason why it was not measured."""

import dataclasses
import math

import numpy as np
import tensorflow as tf

from tf_frobreg.convolution.geometry import Convolution
from tf_frobreg.penalties.frobenius import FrobeniusPenalty
from tf_frobreg.spectrum.extremes import ExtremesFinder, ExtremeSingularValues, ratio

__all__ = ["KernelSpectrum"]


@dataclasses.dataclass(frozen=True)
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
    convolution: Convolution | None = dataclasses.field(default=None, repr=False)

    def __str__(self) -> str:
        if self.extremes is None or self.penalty is None:
            return f"{self.name}  - {self.reason or 'not measured'}"
        sigma_max, sigma_min = self.extremes.sigma_max, self.extremes.sigma_min
        return f"{self.name}  σ {sigma_min:.4g} … {sigma_max:.4g}, R {self.penalty:.4g}"

    @property
    def condition_number(self) -> float | None:
        """σmax / σmin of `extremes`, which may be only a lower bound of the condition number of M.

        The true value can be far larger, even infinite, if `extremes.converged` is False or if
        `extremes.sigma_min_error` is at least `extremes.sigma_min`: σmin then cannot be distinguished from 0.
        The function `condition_number` computes it more accurately. None if the kernel was not measured, NaN
        if σmin was not requested.
        """
        return None if self.extremes is None else ratio(self.extremes.sigma_max, self.extremes.sigma_min)


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

    Returns:
        A row with the measurement, or with a reason if the kernel is not finite or needs too much memory.
    """
    if not np.isfinite(kernel).all():
        return KernelSpectrum(name, "its kernel holds NaN or infinity", kernel_shape=conv.kernel_shape)
    frobenius = FrobeniusPenalty(conv, alpha)
    finder = ExtremesFinder(conv, accuracy, max_iterations=max_iterations, sigma_min=sigma_min)
    before = start.extremes if start is not None and start.convolution == conv else None
    try:
        found = finder(kernel, before)
        penalty = float(frobenius.value(tf.constant(kernel, tf.float64)))
    except ValueError as error:  # too little memory
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
    )
