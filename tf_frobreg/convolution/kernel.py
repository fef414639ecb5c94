"""Kernels as users pass them: arrays, tensors and variables."""

from typing import Any

import numpy as np
import tensorflow as tf


def as_kernel(kernel: Any, *, check_finite: bool = True) -> tf.Tensor:
    """Returns `kernel` as a float tensor, or raises an error that says what is wrong with it.

    Args:
        kernel: Array, tensor or variable.
        check_finite: Whether to refuse NaN and infinity. Values are not known while a function is traced and
            are not checked then.

    Returns:
        A tensor of dtype float32 or float64.

    Raises:
        TypeError: If `kernel` is not a dense array of float32 or float64.
        ValueError: If `kernel` contains NaN or infinity.
    """
    try:
        tensor = tf.convert_to_tensor(kernel)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"kernel must be an array of float32 or float64. Received: a {type(kernel).__name__}"
            + (f" of dtype {kernel.dtype}" if isinstance(kernel, np.ndarray) else "")
        ) from error
    if not isinstance(tensor, tf.Tensor):
        raise TypeError(f"kernel must be a dense array. Received: a {type(kernel).__name__}")
    if tensor.dtype not in (tf.float32, tf.float64):
        raise TypeError(f"kernel must be float32 or float64. Received: kernel.dtype={tensor.dtype.name}")
    if check_finite and tf.executing_eagerly() and not np.isfinite(tensor.numpy()).all():
        raise ValueError(
            f"kernel must be finite. Received: NaN or infinity in a kernel of shape {tensor.shape}"
        )
    return tensor


def known_values(kernel: Any) -> np.ndarray:
    """Returns the values of a kernel as an array, or raises an error if they are not known yet."""
    if not tf.executing_eagerly():
        raise TypeError(
            "kernel must have known values: singular values cannot be computed inside a tf.function. Call "
            f"this function eagerly. Received: a {type(kernel).__name__}"
        )
    return as_kernel(kernel).numpy()
