"""The penalty that others put on the kernel as a plain matrix, which is not the layer's."""

import math
from typing import Any

import tensorflow as tf

from tf_frobreg.checks import check_number
from tf_frobreg.convolution.kernel import as_kernel

__all__ = ["reshaped_penalty"]


def reshaped_penalty(kernel: Any, *, alpha: float = 1.0) -> tf.Tensor:
    """Returns ‖WᵀW − αI‖²_F, W the h × (g·k·k) matrix reshaped from the kernel.

    It is what references [1, 3, 11, 17] of the paper do for convolutions ("soft orthogonality"), up to the
    scale. W has one row per filter and knows neither image nor border; its singular values are not the
    layer's: an orthogonal W still lets σ(M) be anything from 0 to √(k·k).

    Args:
        kernel: `(*kernel_size, in_channels, filters)`, float32 or float64; array, tensor or variable.
        alpha: α, the target of W's squared singular values. Positive.

    Returns:
        A scalar tensor of the kernel's dtype, differentiable in `kernel`, at least
        α²·max(0, g·k·k − h).

    Raises:
        ValueError, TypeError: Where an argument is invalid; the message names it.

    Example:
        A mean of nine pixels is a unit row W, and the layer's σmax is 3:

        >>> import numpy as np
        >>> from tf_frobreg import singular_values
        >>> kernel = np.full((3, 3, 1, 1), 1 / 3)
        >>> print(reshaped_penalty(kernel).numpy().round(9), singular_values(kernel, 32).max().round(2))
        8.0 2.98
    """
    alpha = check_number("alpha", alpha, exclusive=True)
    return evaluate_reshaped(as_kernel(kernel), alpha)


def evaluate_reshaped(kernel: tf.Tensor, alpha: float) -> tf.Tensor:
    """`reshaped_penalty` of arguments that have been checked, but for the kernel's shape."""
    if kernel.shape.rank is None or kernel.shape.rank < 2 or None in kernel.shape:
        raise ValueError(
            "kernel must have a known shape, (*kernel_size, in_channels, filters). "
            f"Received: kernel.shape={kernel.shape}"
        )
    filters, rest = kernel.shape[-1], math.prod(kernel.shape[:-1])
    matrix = tf.reshape(kernel, (rest, filters))  # Wᵀ
    gram = tf.matmul(matrix, matrix, transpose_a=filters <= rest, transpose_b=filters > rest)
    residual = tf.linalg.set_diag(gram, tf.linalg.diag_part(gram) - alpha)
    # WᵀW has rest − filters eigenvalues 0 that the smaller WWᵀ lacks.
    return tf.reduce_sum(residual**2) + alpha * alpha * max(0, rest - filters)
