"""Checks of arguments, with errors that name the argument. Free of TensorFlow."""

import math
import operator
import os
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

LARGEST_INTEGER = 2**31 - 1
ALWAYS_FREE = 1 << 24  # bytes. Asking the system takes longer than computing a small penalty


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
    if number > LARGEST_INTEGER:
        raise ValueError(f"{name} must be at most {LARGEST_INTEGER}. Received: {_received(name, value)}")
    return number


def check_accuracy(accuracy: Any) -> float:
    """Returns a relative accuracy as a plain float, or raises."""
    number = check_number("accuracy", accuracy, exclusive=True)
    if number >= 1:
        raise ValueError(f"accuracy must be below 1. Received: accuracy={number}")
    return number


def check_flag(name: str, value: Any) -> bool:
    """Returns `value` as a plain bool, or raises naming the argument."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False. Received: {_received(name, value)}")
    return bool(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Returns `value` if it is one of the choices, or raises naming the argument."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}. Received: {_received(name, value)}")
    return value


def _received(name: str, value: Any) -> str:
    """name=value on one line. Long values are shortened."""
    return f"{name}={' '.join(reprlib.repr(value).split())}"


def check_memory(needed: int, what: str, instead: str) -> None:
    """Raises ValueError if `needed` bytes are more than this machine has free now."""
    free = _free_memory() if needed > ALWAYS_FREE else needed  # AutoGraph warns of :=
    if needed > free:
        raise ValueError(f"{what}: that needs {needed:,} bytes, {free:,} are free. Use {instead}.")


def _free_memory() -> int:
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: half of the installed memory, or of 8 GiB
        installed = 8 << 30
        if hasattr(os, "sysconf"):
            installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return installed // 2
