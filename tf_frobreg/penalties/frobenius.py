"""The penalty R_α(K) = ‖MᵀM − αI‖²_F, its gradient and its floor."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Unpack

import tensorflow as tf

from tf_frobreg.checks import check_choice, check_number
from tf_frobreg.convolution.geometry import Convolution, Geometry, Size
from tf_frobreg.convolution.kernel import as_kernel
from tf_frobreg.penalties import explicit_form
from tf_frobreg.penalties.closed_form import ClosedForm, closed_form

__all__ = ["frobenius_gradient", "frobenius_penalty", "penalty_excess", "penalty_floor"]

METHODS = ("closed_form", "sparse")


@dataclasses.dataclass(frozen=True)
class FrobeniusPenalty:
    """R_α of one geometry, as a function of the kernel.

    The kernels passed to its methods are tensors that `as_kernel` has checked.

    Attributes:
        conv: The geometry.
        alpha: α, the target of σ².
        method: "closed_form" or "sparse".
    """

    conv: Convolution
    alpha: float
    method: str = "closed_form"

    def __post_init__(self):
        object.__setattr__(self, "alpha", check_number("alpha", self.alpha, exclusive=True))
        check_choice("method", self.method, METHODS)

    @cached_property
    def _closed_form(self) -> ClosedForm:
        return closed_form(self.conv)

    @property
    def num_singular_values(self) -> int:
        """Maximal rank of M. The excess is a sum over that many singular values."""
        return self._closed_form.gram_size

    @property
    def floor(self) -> float:
        """`penalty_floor`: each column beyond the maximal rank costs α²."""
        missing = self.conv.shape[1] - self.num_singular_values
        return (
            missing * self.alpha * self.alpha if missing else 0.0
        )  # an α² beyond all floats must not become NaN

    def value(self, kernel: tf.Tensor) -> tf.Tensor:
        """Returns R_α."""
        if self.method == "sparse":
            return explicit_form.penalty(kernel, self.conv, self.alpha)
        return self.excess(kernel) + self.floor

    def excess(self, kernel: tf.Tensor) -> tf.Tensor:
        """Returns R_α − floor."""
        if self.method == "sparse":
            return self.value(kernel) - self.floor
        return self._closed_form.value(kernel, self.alpha)

    def excess_and_gradient(self, kernel: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns (R_α − floor, ∂R_α/∂K), computed without a tape."""
        if self.method == "sparse":
            penalty, gradient = explicit_form.penalty_and_gradient(kernel, self.conv, self.alpha)
            return penalty - self.floor, gradient
        return self._closed_form.value_and_gradient(kernel, self.alpha)

    def line(self, kernel: tf.Tensor, direction: tf.Tensor) -> list[tf.Tensor]:
        """Returns c1 … c4 of R_α(K + tD) = R_α(K) + c1 t + c2 t² + c3 t³ + c4 t⁴, by the closed form."""
        return self._closed_form.line(kernel, direction, self.alpha)


def frobenius_penalty(
    kernel: Any,
    input_size: Size,
    *,
    alpha: float = 1.0,
    method: str = "closed_form",
    **geometry: Unpack[Geometry],
) -> tf.Tensor:
    """Returns the paper's penalty R_α(K) = ‖MᵀM − αI‖²_F, M the transformation matrix of (2.1) and (3.1).

    With σ the singular values of M, R_α = Σ (σ² − α)², summed over the columns of M (σ = 0 where M has
    more columns than singular values). It is never below `penalty_floor`, but for rounding.

    Args:
        kernel: `(*kernel_size, in_channels, filters)`, float32 or float64; array, tensor or variable.
        input_size: Spatial size of the input image, an int or one int per axis.
        alpha: α, the target of σ². Positive.
        method: "closed_form" costs the same for every image size; "sparse" forms M and takes memory for
            it as a dense matrix. Both are exact.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups`, `kind`, as in
            `tf_frobreg.Convolution`.

    Returns:
        A scalar tensor of the kernel's dtype, in units of σ⁴, differentiable in `kernel`, twice if need be.

    Raises:
        ValueError, TypeError: Where an argument is invalid; the message names it.

    Example:
        A 3×3 kernel with only its centre tap is the identity, and σ = 1 throughout; no kernel makes 3
        channels out of 1 filter orthogonal:

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
    kernel = as_kernel(kernel)
    conv = Convolution.of(kernel.shape, input_size, geometry)
    return FrobeniusPenalty(conv, alpha, method).value(kernel)


def frobenius_gradient(
    kernel: Any,
    input_size: Size,
    *,
    alpha: float = 1.0,
    method: str = "closed_form",
    **geometry: Unpack[Geometry],
) -> tf.Tensor:
    r"""Returns ∂R_α/∂K, twice what the paper's equation (3.2) calls G.

    With `method="sparse"` it is Theorem 3.1 as written, over explicit M and Ω:

        ½ ∂R_α/∂k_pqzy = Σ_{(i,j)∈Ω} ( Σ_t (MᵀM − αI)_{jt} m_it + Σ_s (MᵀM − αI)_{sj} m_is )

    Args:
        kernel: As for `frobenius_penalty`.
        input_size: As for `frobenius_penalty`.
        alpha: As for `frobenius_penalty`.
        method: As for `frobenius_penalty`.
        **geometry: As for `frobenius_penalty`.

    Returns:
        A tensor of the kernel's shape and dtype, in units of σ³.

    Raises:
        ValueError, TypeError: Where an argument is invalid; the message names it.

    Example:
        Along the identity R_1(c·K) = 400 (c² − 1)², whose slope at c = 2 is 400·2·3·4:

        >>> import numpy as np
        >>> kernel = np.zeros((3, 3, 1, 1))
        >>> kernel[1, 1] = 2.0
        >>> frobenius_gradient(kernel, 20).numpy()[1, 1].round(9)
        array([[9600.]])
    """
    kernel = as_kernel(kernel)
    conv = Convolution.of(kernel.shape, input_size, geometry)
    return FrobeniusPenalty(conv, alpha, method).excess_and_gradient(kernel)[1]


def penalty_floor(
    kernel_shape: Sequence[int], input_size: Size, *, alpha: float = 1.0, **geometry: Unpack[Geometry]
) -> float:
    """Returns α² · (columns of M − largest rank of M), below which R_α is for no kernel of this shape.

    The columns beyond the rank have σ = 0 and cost α² each. The rank is at most the number of rows and of
    columns that some tap reaches, which is all of them unless strides jump over inputs; so the floor is
    α² · max(0, columns − rows) for most layers. Whether a kernel attains it is another question: under
    zero padding, only kernels without any tap but one can.

    Args:
        kernel_shape: Shape of the kernel.
        input_size: As for `frobenius_penalty`.
        alpha: As for `frobenius_penalty`.
        **geometry: As for `frobenius_penalty`.

    Returns:
        The floor, in units of σ⁴.

    Raises:
        ValueError, TypeError: Where an argument is invalid; the message names it.

    Example:
        >>> penalty_floor((3, 3, 3, 1), 20), penalty_floor((3, 3, 6, 3), 20), penalty_floor((3, 3, 3, 6), 20)
        (800.0, 1200.0, 0.0)
    """
    return FrobeniusPenalty(Convolution.of(kernel_shape, input_size, geometry), alpha).floor


def penalty_excess(
    kernel: Any, input_size: Size, *, alpha: float = 1.0, **geometry: Unpack[Geometry]
) -> tf.Tensor:
    """Returns R_α(K) − `penalty_floor`, the part that a better kernel could do without.

    It is computed without the floor, by the closed form, and so keeps its digits where R_α would lose them
    in the difference: it is Σ (σ² − α)² over as many singular values as M can have.

    Args:
        kernel: As for `frobenius_penalty`.
        input_size: As for `frobenius_penalty`.
        alpha: As for `frobenius_penalty`.
        **geometry: As for `frobenius_penalty`.

    Returns:
        A scalar tensor of the kernel's dtype, in units of σ⁴, at least 0.

    Raises:
        ValueError, TypeError: Where an argument is invalid; the message names it.

    Example:
        >>> import numpy as np
        >>> kernel = np.zeros((3, 3, 3, 1), "float32")
        >>> kernel[1, 1, 0] = 1.00001
        >>> print(frobenius_penalty(kernel, 20).numpy(), f"{penalty_excess(kernel, 20).numpy():.1e}")
        800.0 1.6e-07
    """
    kernel = as_kernel(kernel)
    return FrobeniusPenalty(Convolution.of(kernel.shape, input_size, geometry), alpha).excess(kernel)
