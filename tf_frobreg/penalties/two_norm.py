"""Guo's earlier penalty, the 2-norm ‖MᵀM − αI‖₂, by power steps that never form M."""

import functools
from typing import Any, Unpack

import tensorflow as tf

from tf_frobreg.checks import check_choice, check_integer, check_number
from tf_frobreg.convolution.apply import apply, apply_adjoint
from tf_frobreg.convolution.geometry import Convolution, Geometry, Size
from tf_frobreg.convolution.kernel import as_kernel

__all__ = ["spectral_penalty"]

GRAMS = ("columns", "smaller")


def spectral_penalty(
    kernel: Any,
    input_size: Size,
    *,
    alpha: float = 1.0,
    gram: str = "columns",
    power_steps: int = 200,
    **geometry: Unpack[Geometry],
) -> tf.Tensor:
    """Returns ‖MᵀM − αI‖₂ = max |σ² − α|, over the columns of M, from below.

    It is the penalty of P.-C. Guo and Q. Ye (arXiv:1906.04866), reference [7] of the paper. Only the σ that
    is farthest from √α enters, and its gradient is that of one pair of singular vectors u, v:
    ∂(uᵀMᵀMv)/∂K. They come from power steps, from a fixed random start; each takes one convolution and one
    transposed convolution. `SpectralRegularizer` keeps the vectors and so needs two steps at a time.

    Where M has more columns than rows, some σ are 0 whatever the kernel is, and the penalty is at least α:
    its gradient then ends where σmax² ≤ 2α. gram="smaller" leaves those σ out.

    Args:
        kernel: `(*kernel_size, in_channels, filters)`, float32 or float64; array, tensor or variable.
        input_size: Spatial size of the input image, an int or one int per axis.
        alpha: α, the target of σ². Positive.
        gram: "columns" for MᵀM as above; "smaller" for MMᵀ in its place where M has more columns than rows.
        power_steps: Products with the Gram matrix. Too few give too small a value: the error falls as the
            ratio of the two largest |σ² − α|, to the power of twice the steps.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups`, `kind`, as in
            `tf_frobreg.Convolution`.

    Returns:
        A scalar tensor of the kernel's dtype, in units of σ², differentiable once in `kernel`.

    Raises:
        ValueError, TypeError: Where an argument is invalid; the message names it.

    Example:
        The identity times 2 has σ² = 4 throughout; one filter of three channels leaves two σ in three at 0:

        >>> import numpy as np
        >>> kernel = np.zeros((3, 3, 1, 1))
        >>> kernel[1, 1] = 2.0
        >>> print(spectral_penalty(kernel, 8).numpy())
        3.0
        >>> wide = np.ones((1, 1, 3, 1)) / 3**0.5
        >>> for gram in ("columns", "smaller"):
        ...     print(gram, abs(spectral_penalty(wide, 8, gram=gram).numpy().round(9)))
        columns 1.0
        smaller 0.0
    """
    alpha = check_number("alpha", alpha, exclusive=True)
    steps = check_integer("power_steps", power_steps)
    kernel = as_kernel(kernel)
    conv = Convolution.of(kernel.shape, input_size, geometry)
    start = start_vector(conv, check_gram(gram), kernel.dtype)
    return _traced(conv, alpha, gram, steps)(kernel, start)[0]


def power_iteration(
    kernel: tf.Tensor, vector: tf.Tensor, conv: Convolution, alpha: float, gram: str, steps: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """(the penalty as it is known after some power steps from `vector`, the vector they led to)."""
    ahead, back = (apply_adjoint, apply) if _uses_mmt(conv, gram) else (apply, apply_adjoint)
    # Squares of large kernels overflow long before the penalty does.
    scale = tf.maximum(tf.stop_gradient(tf.reduce_max(tf.abs(kernel))), 1.0)
    kernel, target = kernel / scale, alpha / scale**2
    fixed = tf.stop_gradient(kernel)

    def step(number, left, right):
        image = back(fixed, ahead(fixed, right, conv), conv) - target * right
        norm = tf.norm(image)
        # Where σ² = α throughout, the vector has nowhere to go and stays.
        return number + 1, right, tf.where(norm > 0, tf.math.divide_no_nan(image, norm), right)

    # u and v differ where σ² − α of both signs are equally far: v alone would tell too small a value then.
    _, left, right = tf.while_loop(lambda number, *_: number < steps, step, [0, vector, vector])
    left, right = tf.stop_gradient(left), tf.stop_gradient(right)
    both = ahead(kernel, tf.concat([left, right], axis=0), conv)
    value = tf.reduce_sum(both[0] * both[1]) - target * tf.reduce_sum(left * right)
    return scale * (scale * tf.abs(value)), right


@functools.lru_cache(maxsize=8)  # many power steps one by one would be slow
def _traced(conv, alpha, gram, steps):
    return tf.function(
        lambda kernel, start: power_iteration(kernel, start, conv, alpha, gram, steps), autograph=False
    )


def start_vector(conv: Convolution, gram: str, dtype: tf.DType) -> tf.Tensor:
    """A random unit vector, the same each time: `(1, *size, channels)`."""
    shape = (1, *(conv.output_shape if _uses_mmt(conv, gram) else conv.input_shape))
    vector = tf.random.stateless_normal(shape, seed=(0, 0), dtype=dtype)
    return vector / tf.norm(vector)


def check_gram(gram: Any) -> str:
    """Returns `gram` if it names a Gram matrix, or raises."""
    return check_choice("gram", gram, GRAMS)


def _uses_mmt(conv: Convolution, gram: str) -> bool:
    return gram == "smaller" and conv.wide
