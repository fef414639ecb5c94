"""The penalty R_α(K) = ‖MᵀM − αI‖²_F, its gradient and its floor."""

from collections.abc import Sequence
from typing import Unpack

import tensorflow as tf

from tf_frobreg.checks import as_kernel, check_memory, check_number
from tf_frobreg.closed_form import closed_form
from tf_frobreg.convolution import Convolution, Geometry
from tf_frobreg.toeplitz import toeplitz_indices, transformation_matrix

__all__ = [
    "check_method",
    "evaluate",
    "evaluate_excess",
    "evaluate_gradient",
    "floor",
    "frobenius_gradient",
    "frobenius_penalty",
    "penalty_excess",
    "penalty_floor",
]

METHODS = ("closed_form", "sparse")


def frobenius_penalty(
    kernel, input_size, *, alpha: float = 1.0, method: str = "closed_form", **geometry: Unpack[Geometry]
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
            `tf_frobreg.convolution.Convolution`.

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
    alpha = check_number("alpha", alpha, exclusive=True)
    kernel = as_kernel(kernel)
    conv = Convolution.of(kernel.shape, input_size, geometry)
    return evaluate(kernel, conv, alpha, check_method(method))


def frobenius_gradient(
    kernel, input_size, *, alpha: float = 1.0, method: str = "closed_form", **geometry: Unpack[Geometry]
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
    alpha = check_number("alpha", alpha, exclusive=True)
    kernel = as_kernel(kernel)
    conv = Convolution.of(kernel.shape, input_size, geometry)
    return evaluate_gradient(kernel, conv, alpha, check_method(method))[1]


def penalty_floor(
    kernel_shape: Sequence[int], input_size, *, alpha: float = 1.0, **geometry: Unpack[Geometry]
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
    alpha = check_number("alpha", alpha, exclusive=True)
    return floor(Convolution.of(kernel_shape, input_size, geometry), alpha)


def penalty_excess(kernel, input_size, *, alpha: float = 1.0, **geometry: Unpack[Geometry]) -> tf.Tensor:
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
    alpha = check_number("alpha", alpha, exclusive=True)
    kernel = as_kernel(kernel)
    return evaluate_excess(kernel, Convolution.of(kernel.shape, input_size, geometry), alpha, "closed_form")


def evaluate(kernel: tf.Tensor, conv: Convolution, alpha: float, method: str) -> tf.Tensor:
    """R_α of a tensor whose arguments have been checked."""
    if method == "closed_form":
        return closed_form(conv).value(kernel, alpha) + floor(conv, alpha)
    rows, columns = conv.shape
    matrix = _dense_matrix(kernel, conv)
    wide = rows < columns
    gram = tf.matmul(matrix, matrix, transpose_a=not wide, transpose_b=wide)
    residual = gram - alpha * tf.eye(min(rows, columns), dtype=kernel.dtype)
    # ‖MᵀM − αI‖² and ‖MMᵀ − αI‖² differ by the zero eigenvalues that only the larger Gram has.
    return tf.reduce_sum(residual**2) + _zeros(max(0, columns - rows), alpha)


def evaluate_excess(kernel: tf.Tensor, conv: Convolution, alpha: float, method: str) -> tf.Tensor:
    """R_α − floor of a tensor whose arguments have been checked."""
    if method == "closed_form":
        return closed_form(conv).value(kernel, alpha)
    return evaluate(kernel, conv, alpha, method) - floor(conv, alpha)


def evaluate_gradient(
    kernel: tf.Tensor, conv: Convolution, alpha: float, method: str
) -> tuple[tf.Tensor, tf.Tensor]:
    """(R_α − floor, ∂R_α/∂K) of a tensor whose arguments have been checked, without a tape."""
    if method == "closed_form":
        return closed_form(conv).value_and_gradient(kernel, alpha)
    penalty, gradient = _theorem_3_1(kernel, conv, alpha)
    return penalty - floor(conv, alpha), gradient


def check_method(method: str) -> str:
    """Returns `method` if there is one of that name."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}. Received: method={method!r}")
    return method


def floor(conv: Convolution, alpha: float) -> float:
    """`penalty_floor` of arguments that have been checked."""
    return _zeros(conv.shape[1] - closed_form(conv).gram_size, alpha)


def _zeros(count: int, alpha: float) -> float:
    """What `count` zero eigenvalues cost; nothing, where there are none, even if α² is beyond all floats."""
    return count * alpha * alpha if count else 0.0


def _dense_matrix(kernel, conv):
    rows, columns = conv.shape
    check_memory(
        4 * max(rows, columns) * (rows + columns) * kernel.dtype.size,
        f'method="sparse" needs M of shape {rows} × {columns} and its Gram matrix as dense matrices',
        'method="closed_form" instead',
    )
    return tf.sparse.to_dense(transformation_matrix(kernel, conv.input_size, **conv.geometry))


def _theorem_3_1(kernel, conv, alpha):
    """(3.2): for each (i, j) of Ω the two sums are the entries of M Eᵀ and M E, with E = MᵀM − αI."""
    matrix = _dense_matrix(kernel, conv)
    residual = tf.matmul(matrix, matrix, transpose_a=True) - alpha * tf.eye(conv.shape[1], dtype=kernel.dtype)
    sums = tf.matmul(matrix, residual, transpose_b=True) + tf.matmul(matrix, residual)
    index = toeplitz_indices(kernel.shape, conv.input_size, **conv.geometry)
    half = tf.math.unsorted_segment_sum(
        tf.gather_nd(sums, index.positions), index.kernel_index, kernel.shape.num_elements()
    )
    return tf.reduce_sum(residual**2), 2.0 * tf.reshape(half, kernel.shape)
