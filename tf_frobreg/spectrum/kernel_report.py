"""One row of a report: σmax, σmin and R_α of one kernel, or why it was not measured."""

import dataclasses
import math
from typing import Any

import numpy as np
import tensorflow as tf

from tf_frobreg.convolution.geometry import Convolution
from tf_frobreg.penalties.frobenius import FrobeniusPenalty
from tf_frobreg.spectrum.extremes import ExtremesFinder, ExtremeSingularValues, ratio

__all__ = ["KernelSpectrum"]


@dataclasses.dataclass(frozen=True)
class KernelSpectrum:
    """What was measured of one kernel, or why nothing was.

    Attributes:
        name: Of the layer; see `model_spectrum`.
        reason: Why it was not measured; None where it was. All that follows is None where it was not.
        kernel_shape: Shape of the kernel.
        input_size: Spatial size of the layer's input.
        extremes: σmax and σmin with their bounds, an `ExtremeSingularValues`.
        penalty: R_α(K) = ‖MᵀM − αI‖²_F, inf where it is beyond all floats.
        penalty_per_column: R_α(K) divided by the columns of M.
        penalty_floor: What R_α cannot go below for a kernel of this shape.
        convolution: The geometry.
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
        if self.reason:
            return f"{self.name}  - {self.reason}"
        sigma_max, sigma_min, *_ = self.extremes
        return f"{self.name}  σ {sigma_min:.4g} … {sigma_max:.4g}, R {self.penalty:.4g}"

    @property
    def condition_number(self) -> float | None:
        """σmax / σmin as measured: where `extremes` cannot tell σmin from 0, only a lower bound."""
        return self.extremes and ratio(self.extremes.sigma_max, self.extremes.sigma_min)


def report_kernel(
    name: str,
    kernel: np.ndarray,
    conv: Convolution,
    alpha: float,
    *,
    start: KernelSpectrum | None = None,
    **options: Any,
) -> KernelSpectrum:
    """Returns the row of one kernel. `options` are those of `ExtremesFinder`."""
    if not np.isfinite(kernel).all():
        return KernelSpectrum(name, "its kernel holds NaN or infinity", kernel_shape=conv.kernel_shape)
    frobenius = FrobeniusPenalty(conv, alpha)
    extremes = ExtremesFinder(conv, **options)
    same = start is not None and start.convolution == conv
    try:
        found = extremes(kernel, start.extremes if same else None)
        penalty = float(frobenius.value(tf.constant(kernel, tf.float64)))
        penalty = math.inf if math.isnan(penalty) else penalty  # the difference of what is beyond all floats
    except ValueError as error:  # of the memory it would take
        return KernelSpectrum(name, str(error), kernel_shape=conv.kernel_shape)
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
