"""What arguments have to be, and the errors that name the one that is not."""

import math
import operator
import os
import reprlib
from typing import Any

import numpy as np
import tensorflow as tf

__all__ = ["as_kernel", "check_accuracy", "check_flag", "check_integer", "check_memory", "check_number"]

LARGEST = 2**31 - 1  # of any size or count
SMALL = 1 << 24  # bytes that are always there: asking the system takes longer than small penalties


def check_number(name: str, value: Any, *, minimum: float = 0.0, exclusive: bool = False) -> float:
    """Returns `value` as a plain float, or raises naming the argument."""
    wanted = f"{'above' if exclusive else 'at least'} {minimum:g}"
    # NumPy booleans are not bools, and Python's are ints: neither is meant as a number here.
    try:
        if isinstance(value, (bool, np.bool_, str, bytes)):
            raise TypeError
        number = float(value)
    except OverflowError:  # an int beyond all floats
        number = math.inf
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number {wanted}. Received: {_received(name, value)}") from None
    if not math.isfinite(number) or number < minimum or (exclusive and number == minimum):
        raise ValueError(f"{name} must be a finite number {wanted}. Received: {_received(name, value)}")
    return number


def check_integer(name: str, value: Any, *, minimum: int = 1) -> int:
    """Returns `value` as a plain int, or raises naming the argument."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer. Received: {_received(name, value)}") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}. Received: {_received(name, value)}")
    if number > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST}. Received: {_received(name, value)}")
    return number


def check_accuracy(accuracy: Any) -> float:
    """Returns a relative accuracy as a plain float, or raises."""
    accuracy = check_number("accuracy", accuracy, exclusive=True)
    if accuracy >= 1:
        raise ValueError(f"accuracy must be below 1. Received: accuracy={accuracy}")
    return accuracy


def check_flag(name: str, value: Any) -> bool:
    """Returns `value`, or raises naming the argument where it is no bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False. Received: {_received(name, value)}")
    return bool(value)


def _received(name: str, value: Any) -> str:
    """name=value on one line, long values shortened."""
    return f"{name}={' '.join(reprlib.repr(value).split())}"


def as_kernel(kernel, *, check_finite: bool = True) -> tf.Tensor:
    """Returns `kernel` as a tensor, or raises if it is not of (finite) floats."""
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


def check_memory(needed: int, what: str, instead: str) -> None:
    """Raises ValueError if `needed` bytes are more than this machine has free now."""
    free = _free_memory() if needed > SMALL else needed  # no :=, which AutoGraph warns of
    if needed > free:
        raise ValueError(f"{what}: that needs {needed:,} bytes, {free:,} are free. Use {instead}.")


def _free_memory() -> int:
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (
        OSError,
        StopIteration,
    ):  # not Linux: half of what is installed, or of 8 GiB
        installed = 8 << 30
        if hasattr(os, "sysconf"):
            installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return installed // 2
