"""The penalty on the reshaped kernel. That matrix is not the transformation matrix of the layer."""

import math
from typing import Any

import tensorflow as tf

from tf_frobreg.checks import check_number
from tf_frobreg.convolution.kernel import kernel_of

__all__ = ["reshaped_penalty"]


def reshaped_penalty(kernel: Any, *, alpha: float = 1.0) -> tf.Tensor:
    """Returns ‖WᵀW − αI‖²_F, with W the h × (g·k·k) matrix reshaped from the kernel.

    The papers cited as [1, 3, 11, 17] in Guo's paper constrain a convolution through W ("soft
    orthogonality"). This is their penalty up to a factor. W has one row per filter and does not depend on
    the image size, strides or padding, so this function takes no geometry. The singular values of W are not
    those of the layer. If W is orthogonal, those of M can be anything from 0 to √(k·k).

    Args:
        kernel: `(*kernel_size, in_channels, filters)`, float32 or float64; array, tensor or variable,
            or a built Keras layer.
        alpha: α, the target of the squared singular values of W. Positive.

    Returns:
        A scalar tensor of the kernel's dtype, in units of σ⁴, differentiable in `kernel`. It is at least
        α²·max(0, g·k·k − h).

    Raises:
        ValueError: If an argument is invalid. The message names the argument.
        TypeError: If an argument has the wrong type.

    Example:
        For a mean of nine pixels W is a unit row, but σmax of the layer is almost 3:

        >>> import numpy as np
        >>> from tf_frobreg import singular_values
        >>> kernel = np.full((3, 3, 1, 1), 1 / 3)
        >>> print(reshaped_penalty(kernel).numpy().round(9), singular_values(kernel, 32).max().round(2))
        8.0 2.98
    """
    alpha = check_number("alpha", alpha, exclusive=True)
    return evaluate_reshaped(kernel_of(kernel), alpha)


def evaluate_reshaped(kernel: tf.Tensor, alpha: float) -> tf.Tensor:
    """Returns `reshaped_penalty` of checked arguments, except that it checks the kernel's shape."""
    if kernel.shape.rank is None or kernel.shape.rank < 2 or None in kernel.shape:
        raise ValueError(
            "kernel must have a known shape, (*kernel_size, in_channels, filters). "
            f"Received: kernel.shape={kernel.shape}"
        )
    filters, rest = kernel.shape[-1], math.prod(kernel.shape[:-1])
    matrix = tf.reshape(kernel, (rest, filters))  # Wᵀ
    gram = tf.matmul(matrix, matrix, transpose_a=filters <= rest, transpose_b=filters > rest)
    residual = tf.linalg.set_diag(gram, tf.linalg.diag_part(gram) - alpha)
    # WᵀW has rest − filters zero eigenvalues that the smaller WWᵀ lacks.
    return tf.reduce_sum(residual**2) + alpha * alpha * max(0, rest - filters)
