"""The penalty on the reshaped kernel. That matrix is not the transformation matrix of the layer."""

import math
from typing import Any

import keras

from tf_frobreg.backends import dtype_of, in_full_precision
from tf_frobreg.checks import check_number
from tf_frobreg.convolution.kernel import kernel_of
from tf_frobreg.penalties.units import in_units, times

__all__ = ["reshaped_penalty"]


def reshaped_penalty(kernel: Any, *, alpha: float = 1.0) -> Any:
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
    unit, kernel, alpha = in_units(kernel_of(kernel), alpha)
    return times(evaluate_reshaped(kernel, alpha), unit, 4)


@in_full_precision
def evaluate_reshaped(kernel: Any, alpha: float) -> Any:
    """Returns `reshaped_penalty` of checked arguments, except that it checks the kernel's shape."""
    rank_is_known = getattr(kernel.shape, "rank", 0) is not None
    if not rank_is_known or len(kernel.shape) < 2 or None in tuple(kernel.shape):
        raise ValueError(
            "kernel must have a known shape, (*kernel_size, in_channels, filters). "
            f"Received: kernel.shape={kernel.shape}"
        )
    filters, rest = kernel.shape[-1], math.prod(kernel.shape[:-1])
    matrix = keras.ops.reshape(kernel, (rest, filters))  # Wᵀ
    transposed = keras.ops.transpose(matrix)
    gram = transposed @ matrix if filters <= rest else matrix @ transposed
    residual = gram - alpha * keras.ops.eye(gram.shape[0], dtype=dtype_of(kernel))
    # WᵀW has rest − filters zero eigenvalues that the smaller WWᵀ lacks.
    return keras.ops.sum(residual**2) + alpha * alpha * max(0, rest - filters)
