"""Whole models: the spectrum of each layer."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tf_frobreg.checks import check_number
from tf_frobreg.convolution import Convolution
from tf_frobreg.extremes import Extremes, ExtremeSingularValues, ratio
from tf_frobreg.layers import read_kernels
from tf_frobreg.penalty import evaluate, floor

__all__ = ["KernelSpectrum", "measure", "model_spectrum"]


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

    @property
    def condition_number(self) -> float | None:
        """σmax / σmin as measured: where `extremes` cannot tell σmin from 0, only a lower bound."""
        return self.extremes and ratio(self.extremes.sigma_max, self.extremes.sigma_min)


def model_spectrum(
    model,
    *,
    alpha: float = 1.0,
    accuracy: float = 1e-4,
    input_size=None,
    sigma_min: bool = True,
    max_iterations: int = 1000,
    start: Sequence[KernelSpectrum] | None = None,
) -> list[KernelSpectrum]:
    """Returns σmax, σmin and the penalty of each kernel of a model.

    Each layer's geometry (image size, strides, padding, dilation, groups, data format, kind) is read from the
    layer. Bias and activation do not enter: what is measured is the linear map M. A `Dense` layer's M is its
    kernel. Layers that are shared between images of different sizes are measured for the first.

    Args:
        model: A built Keras model or layer; nested models and layers are measured too.
        alpha: α of R_α, the target of σ². Positive.
        accuracy: As for `extreme_singular_values`.
        input_size: The size of the input images, an int or one int per axis, where the model leaves it open.
            The model is then called once, on zeros.
        sigma_min: Whether σmin is wanted. σmax alone takes much less time.
        max_iterations: As for `extreme_singular_values`.
        start: What this function gave before: the searches begin there, as after each epoch of a training.

    Returns:
        One `KernelSpectrum` per kernel, in the order of the layers. Layers that have a matrix but are neither
        convolution nor Dense, or are not known well enough, come last, with the reason. A layer goes by its
        name, or by its path where the name is not unique; the two kernels of a separable convolution by
        "<layer>/depthwise" and "<layer>/pointwise".

    Raises:
        ValueError, TypeError: Where an argument is invalid, or the model has not been built.

    Example:
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((8, 8, 1)),
        ...     tf.keras.layers.Conv2D(1, 3, padding="same", kernel_initializer="ones", name="sum"),
        ...     tf.keras.layers.Flatten(),
        ...     tf.keras.layers.Dense(10, kernel_initializer="orthogonal", name="output")])
        >>> for row in model_spectrum(model):
        ...     print(row.name, f"{row.extremes.sigma_max:.2f} {row.extremes.sigma_min:.2f}")
        sum 8.29 0.00
        output 1.00 1.00
    """
    alpha = check_number("alpha", alpha, exclusive=True)
    found = read_kernels(model, input_size)
    options = {"accuracy": accuracy, "max_iterations": max_iterations, "low": sigma_min}
    before = {row.name: row for row in start or ()}
    rows = [
        measure(kernel.name, kernel.value, kernel.conv, alpha, start=before.get(kernel.name), **options)
        for kernel in found.kernels
    ]
    return rows + [KernelSpectrum(name, reason) for name, _, reason in found.untreated]


def measure(
    name: str, kernel: np.ndarray, conv: Convolution, alpha: float, *, start=None, **options
) -> KernelSpectrum:
    """The row of one kernel; `options` are those of `Extremes`."""
    if not np.isfinite(kernel).all():
        return KernelSpectrum(name, "its kernel holds NaN or infinity", kernel_shape=conv.kernel_shape)
    extremes = Extremes(conv, **options)
    same = start is not None and start.convolution == conv
    try:
        found = extremes(kernel, start.extremes if same else None)
        penalty = float(evaluate(tf.constant(kernel, tf.float64), conv, alpha, "closed_form"))
    except ValueError as error:  # of the memory it would take
        return KernelSpectrum(name, str(error), kernel_shape=conv.kernel_shape)
    return KernelSpectrum(
        name=name,
        kernel_shape=conv.kernel_shape,
        input_size=conv.input_size,
        extremes=found,
        penalty=math.inf if math.isnan(penalty) else penalty,
        penalty_per_column=penalty / conv.shape[1],
        penalty_floor=floor(conv, alpha),
        convolution=conv,
    )
