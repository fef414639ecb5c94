"""The penalty R_α(K) = ‖MᵀM − αI‖²_F, its gradient and its floor."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Unpack

import tensorflow as tf

from tf_frobreg.backends import check_tensorflow
from tf_frobreg.checks import check_choice, check_number
from tf_frobreg.convolution.geometry import Convolution, Geometry, Size
from tf_frobreg.convolution.kernel import convolution_of, kernel_and_convolution
from tf_frobreg.penalties import explicit_form
from tf_frobreg.penalties.closed_form import ClosedForm, closed_form
from tf_frobreg.penalties.penalty_function import ONE, Weight, weighted
from tf_frobreg.penalties.units import in_units, times

__all__ = ["frobenius_gradient", "frobenius_penalty", "penalty_excess", "penalty_floor"]

METHODS = ("closed_form", "sparse")


@dataclasses.dataclass(frozen=True)
class FrobeniusPenalty:
    """R_α of one geometry, as a function of the kernel.

    Its methods take kernels that `as_kernel` has checked.

    Attributes:
        conv: The geometry.
        alpha: α, the target of σ².
        method: "closed_form" or "sparse".
    """

    conv: Convolution
    alpha: float
    method: str = "closed_form"

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", check_number("alpha", self.alpha, exclusive=True))
        check_choice("method", self.method, METHODS)

    @cached_property
    def _closed_form(self) -> ClosedForm:
        return closed_form(self.conv)

    @property
    def num_singular_values(self) -> int:
        """Number of singular values in the excess. The rank of M is at most this number, for every kernel."""
        return self._closed_form.gram_size

    @property
    def floor(self) -> float:
        """`penalty_floor`: each column beyond `num_singular_values` costs α²."""
        missing = self.conv.shape[1] - self.num_singular_values
        # α² can be infinite, and 0·∞ is NaN.
        return missing * self.alpha * self.alpha if missing else 0.0

    def value(self, kernel: Any) -> Any:
        """Returns R_α."""
        if self.method == "sparse":
            check_tensorflow('method="sparse"', kernel)
            return explicit_form.penalty(kernel, self.conv, self.alpha)
        return self.weighted(kernel, ONE)

    def weighted(self, kernel: Any, weight: Weight) -> Any:
        """Returns weight·R_α, or 0 without computing it if the weight is 0."""
        if self.method == "sparse":
            return weighted(self.value, kernel, weight)
        return self._closed_form.weighted(kernel, self.alpha, weight, self.floor)

    def excess(self, kernel: Any) -> Any:
        """Returns R_α − floor."""
        if self.method == "sparse":
            return self.value(kernel) - self.floor
        return self._closed_form.value(kernel, self.alpha)

    def excess_by_group(self, kernel: tf.Tensor) -> tf.Tensor:
        """Returns the part of R_α − floor that each group adds, `(groups,)`, by the closed form."""
        return self._closed_form.value_by_group(kernel, self.alpha)

    def deviation_bound(self, kernel: tf.Tensor) -> tf.Tensor:
        """Returns an upper bound on |σ² − α| for all σ that count in the excess, by the closed form."""
        return self._closed_form.deviation_bound(kernel, self.alpha)

    def excess_and_gradient(self, kernel: Any) -> tuple[Any, Any]:
        """Returns (R_α − floor, ∂R_α/∂K), computed without a tape."""
        if self.method == "sparse":
            check_tensorflow('method="sparse"', kernel)
            penalty, gradient = explicit_form.penalty_and_gradient(kernel, self.conv, self.alpha)
            return penalty - self.floor, gradient
        return self._closed_form.value_and_gradient(kernel, self.alpha)

    def line(self, kernel: tf.Tensor, direction: tf.Tensor) -> list[tf.Tensor]:
        """Returns c1 … c4 of R_α(K + tD) = R_α(K) + c1 t + c2 t² + c3 t³ + c4 t⁴, by the closed form."""
        return self._closed_form.line(kernel, direction, self.alpha)


def frobenius_penalty(
    kernel: Any,
    input_size: Size | None = None,
    *,
    alpha: float = 1.0,
    method: str = "closed_form",
    **geometry: Unpack[Geometry],
) -> Any:
    """Returns the paper's penalty R_α(K) = ‖MᵀM − αI‖²_F, with M the matrix of equations (2.1) and (3.1).

    In terms of the singular values σ of M, R_α = Σ (σ² − α)². The sum has one term per column of M, with
    σ = 0 for the columns beyond the number of singular values. Up to rounding, R_α is at least
    `penalty_floor`.

    Args:
        kernel: `(*kernel_size, in_channels, filters)`, float32 or float64; array, tensor or variable,
            or a built Keras layer.
        input_size: Spatial size of the input image, an int or one int per axis. A layer may know its own.
        alpha: α, the target of σ². Positive.
        method: "closed_form" costs the same for every image size. "sparse" forms M, with TensorFlow as the
            backend of Keras, and needs memory for it as a dense matrix. Both are exact.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups` and `kind`, as for
            `tf_frobreg.Convolution`.

    Returns:
        A scalar tensor of Keras' backend with the kernel's dtype, in units of σ⁴. It is twice differentiable
        in `kernel`. Under JAX that holds for `jax.grad` and `jax.hessian`, not for `jax.jvp`.
        JAX computes in float64 only with `jax_enable_x64`.

    Raises:
        ValueError: If an argument is invalid, or if the computation does not fit in memory. The message
            names the argument.
        TypeError: If an argument has the wrong type.

    Example:
        A 3×3 kernel with a 1 at its centre tap is the identity, and every σ is 1. A kernel with 3 channels
        and 1 filter leaves σ = 0 in two thirds of the columns:

        >>> import numpy as np
        >>> kernel = np.zeros((3, 3, 1, 1))
        >>> kernel[1, 1] = 1.0
        >>> print(frobenius_penalty(kernel, 20).numpy())
        0.0
        >>> print(frobenius_penalty(2 * kernel, 20).numpy().round(9))  # Σ (2² − 1)² over 400 columns
        3600.0
        >>> print(penalty_floor((3, 3, 3, 1), 20))
        800.0
    """
    kernel, conv = kernel_and_convolution(kernel, input_size, geometry)
    unit, kernel, penalty = _in_units(kernel, FrobeniusPenalty(conv, alpha, method))
    return times(penalty.value(kernel), unit, 4)


def frobenius_gradient(
    kernel: Any,
    input_size: Size | None = None,
    *,
    alpha: float = 1.0,
    method: str = "closed_form",
    **geometry: Unpack[Geometry],
) -> Any:
    r"""Returns the gradient ∂R_α/∂K, which is twice the G of the paper's equation (3.2).

    With `method="sparse"` it is computed as Theorem 3.1 states it, from explicit M and Ω:

        ½ ∂R_α/∂k_pqzy = Σ_{(i,j)∈Ω} ( Σ_t (MᵀM − αI)_{jt} m_it + Σ_s (MᵀM − αI)_{sj} m_is )

    Args:
        kernel: `(*kernel_size, in_channels, filters)`, float32 or float64; array, tensor or variable,
            or a built Keras layer.
        input_size: Spatial size of the input image, an int or one int per axis. A layer may know its own.
        alpha: α, the target of σ². Positive.
        method: "closed_form" costs the same for every image size. "sparse" forms M as a dense matrix, with
            TensorFlow as the backend of Keras.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups` and `kind`, as for
            `tf_frobreg.Convolution`.

    Returns:
        A tensor of the kernel's shape and dtype, in units of σ³.

    Raises:
        ValueError: If an argument is invalid, or if the computation does not fit in memory. The message
            names the argument.
        TypeError: If an argument has the wrong type.

    Example:
        The identity K on a 20×20 image has R_1(c·K) = 400 (c² − 1)², with slope 400·2·3·4 at c = 2:

        >>> import numpy as np
        >>> kernel = np.zeros((3, 3, 1, 1))
        >>> kernel[1, 1] = 2.0
        >>> frobenius_gradient(kernel, 20).numpy()[1, 1].round(9)
        array([[9600.]])
    """
    kernel, conv = kernel_and_convolution(kernel, input_size, geometry)
    unit, kernel, penalty = _in_units(kernel, FrobeniusPenalty(conv, alpha, method))
    return times(penalty.excess_and_gradient(kernel)[1], unit, 3)


def penalty_floor(
    kernel_shape: Sequence[int] | Any,
    input_size: Size | None = None,
    *,
    alpha: float = 1.0,
    **geometry: Unpack[Geometry],
) -> float:
    """Returns a lower bound on R_α for every kernel of this shape: α²·(columns of M − bound on its rank).

    The columns of M beyond its rank have σ = 0 and cost α² each. The rank is at most the number of rows, and
    at most the number of columns, that some tap reaches. Unless strides skip inputs, the bound is
    α²·max(0, columns − rows).

    Not every layer attains the bound. With padding "same" and strides 1, only a kernel whose one nonzero tap
    is the centre tap can attain it. (An image smaller than the dilated kernel is an exception.) With "valid"
    or "circular" padding, and with strides above 1, kernels of several taps can attain it.

    Args:
        kernel_shape: Shape of the kernel, or a built Keras layer.
        input_size: Spatial size of the input image, an int or one int per axis. A layer may know its own.
        alpha: α, the target of σ². Positive.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups` and `kind`, as for
            `tf_frobreg.Convolution`.

    Returns:
        The bound, in units of σ⁴.

    Raises:
        ValueError: If an argument is invalid. The message names the argument.
        TypeError: If an argument has the wrong type.

    Example:
        >>> penalty_floor((3, 3, 3, 1), 20), penalty_floor((3, 3, 6, 3), 20), penalty_floor((3, 3, 3, 6), 20)
        (800.0, 1200.0, 0.0)

        Two taps attain the bound with "valid" padding, but not with "same":

        >>> import numpy as np
        >>> kernel = np.zeros((2, 1, 2, 2))
        >>> kernel[0, 0], kernel[1, 0] = np.diag([1, 0]), np.diag([0, 1])
        >>> print(*(penalty_excess(kernel, (5, 4), padding=p).numpy().round(9) for p in ("valid", "same")))
        0.0 4.0
    """
    return FrobeniusPenalty(convolution_of(kernel_shape, input_size, geometry), alpha).floor


def penalty_excess(
    kernel: Any, input_size: Size | None = None, *, alpha: float = 1.0, **geometry: Unpack[Geometry]
) -> Any:
    """Returns R_α(K) − `penalty_floor`, the part of the penalty that depends on the kernel.

    This is Σ (σ² − α)² over the largest σ only, as many as the bound on the rank of M allows. The closed form
    computes it directly. Subtracting the floor from R_α would lose digits.

    Args:
        kernel: `(*kernel_size, in_channels, filters)`, float32 or float64; array, tensor or variable,
            or a built Keras layer.
        input_size: Spatial size of the input image, an int or one int per axis. A layer may know its own.
        alpha: α, the target of σ². Positive.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups` and `kind`, as for
            `tf_frobreg.Convolution`.

    Returns:
        A scalar tensor of the kernel's dtype, in units of σ⁴, at least 0. It is twice differentiable in
        `kernel`.

    Raises:
        ValueError: If an argument is invalid, or if the computation does not fit in memory. The message
            names the argument.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import numpy as np
        >>> kernel = np.zeros((3, 3, 3, 1), "float32")
        >>> kernel[1, 1, 0] = 1.00001
        >>> print(frobenius_penalty(kernel, 20).numpy(), f"{penalty_excess(kernel, 20).numpy():.1e}")
        800.0 1.6e-07
    """
    kernel, conv = kernel_and_convolution(kernel, input_size, geometry)
    unit, kernel, penalty = _in_units(kernel, FrobeniusPenalty(conv, alpha))
    return times(penalty.excess(kernel), unit, 4)


def _in_units(kernel: Any, penalty: FrobeniusPenalty) -> tuple[float, Any, FrobeniusPenalty]:
    unit, kernel, alpha = in_units(kernel, penalty.alpha)
    return unit, kernel, penalty if unit == 1.0 else dataclasses.replace(penalty, alpha=alpha)
