"""Argument checks whose errors name the argument. This module does not import TensorFlow."""

import contextlib
import difflib
import math
import operator
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np

from tf_frobreg.text import one_line

# What tensors raise that have no values, or not the wanted ones.
UNUSABLE = (TypeError, ValueError, AttributeError, NotImplementedError)
LARGEST_INTEGER = 2**31 - 1
# A line lists up to MOST_NAMES names. If there are more, it lists FEWER_NAMES and counts the others.
MOST_NAMES, FEWER_NAMES = 10, 8
# Similarity of two names, from 0 to 1. Two exchanged letters of three leave 2/3.
SIMILAR = 0.65
ALWAYS_FREE = 1 << 24  # bytes. Reading the free memory takes longer than computing a small penalty
# The folder of a container's files, its limit and what it uses: versions 2 and 1 of Linux' control groups.
CONTAINERS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def check_number(name: str, value: Any, *, minimum: float = 0.0, exclusive: bool = False) -> float:
    """Returns `value` as a plain float, or raises an error that names the argument."""
    wanted = f"{'above' if exclusive else 'at least'} {minimum:g}"
    # A bool is an int, and float() accepts strings and arrays of them. None of them is meant as a number.
    try:
        if isinstance(value, (bool, str, bytes)) or not holds_numbers(value):
            raise TypeError
        number = float(value)
    except OverflowError:  # an int that is too large for a float
        number = math.inf
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number {wanted}. Received: {received(name, value)}") from None
    if not math.isfinite(number) or number < minimum or (exclusive and number == minimum):
        raise ValueError(f"{name} must be a finite number {wanted}. Received: {received(name, value)}")
    return number


def check_integer(name: str, value: Any, *, minimum: int = 1) -> int:
    """Returns `value` as a plain int, or raises an error that names the argument."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except UNUSABLE:
        raise TypeError(f"{name} must be an integer. Received: {received(name, value)}") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}. Received: {received(name, value)}")
    if number > LARGEST_INTEGER:
        raise ValueError(f"{name} must be at most {LARGEST_INTEGER}. Received: {received(name, value)}")
    return number


def check_accuracy(accuracy: Any) -> float:
    """Returns a relative accuracy as a plain float, or raises an error."""
    number = check_number("accuracy", accuracy, exclusive=True)
    if number >= 1:
        raise ValueError(f"accuracy must be below 1. Received: accuracy={number}")
    return number


def entries_of(value: Any) -> tuple[Any, ...] | None:
    """Returns the entries of a list, tuple, array, tensor or TensorShape. None if it is none of them."""
    try:
        is_sequence = not isinstance(value, (str, bytes, Mapping, Set)) and len(value) >= 0
        return tuple(value) if is_sequence else None
    except UNUSABLE:  # the length of an array without axes raises TypeError
        return None


def check_flag(name: str, value: Any) -> bool:
    """Returns `value` as a plain bool, or raises an error that names the argument."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False. Received: {received(name, value)}")
    return bool(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Returns `value` if it is one of the choices, or raises an error that names the argument."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{name} must be one of {tuple(choices)}. Received: {received(name, value)}"
            f"{did_you_mean(value, choices)}"
        )
    return value


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """Returns a hint at the known name that is most like `name`, or an empty text."""
    by_lower = {other.lower(): other for other in known}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=SIMILAR)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def enumeration(names: Sequence[str]) -> str:
    """Returns names as text. Long lists are shortened: "a, b, c, d, e, f, g, h and 92 others"."""
    if len(names) <= MOST_NAMES:
        return ", ".join(names)
    return f"{', '.join(names[:FEWER_NAMES])} and {len(names) - FEWER_NAMES} others"


def check_memory(needed: int, what: str, instead: str) -> None:
    """Raises ValueError if `needed` bytes are more than this process can take now.

    Args:
        needed: Number of bytes.
        what: Start of the message, a clause that says what needs the memory.
        instead: End of the message, what the user can use instead.

    Raises:
        ValueError: If the memory is not free.
    """
    free = free_memory() if needed > ALWAYS_FREE else needed  # not :=, which AutoGraph warns about
    if needed > free:
        raise ValueError(f"{what}: this needs {needed:,} bytes, but {free:,} are free. Use {instead}.")


def holds_numbers(value: Any) -> bool:
    """Returns whether an array or tensor is of a real number type. Anything else without a dtype may be."""
    dtype = getattr(value, "dtype", None)
    name = str(getattr(dtype, "name", dtype)).removeprefix("torch.")
    return dtype is None or name.startswith(("float", "bfloat", "int", "uint"))


def received(name: str, value: Any) -> str:
    """Returns "name=value" on one line, with long values shortened."""
    return one_line(f"{name}={reprlib.repr(value)}")


def free_memory() -> int:
    """Returns the number of bytes that this process can still take."""
    return min([_free_of_machine(), *_free_of_limits()])


def _free_of_machine() -> int:
    try:
        lines = _read("/proc/meminfo").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: half of the installed memory, or of 8 GiB
        installed = 8 << 30
        if hasattr(os, "sysconf"):
            installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return installed // 2


def _free_of_limits() -> Iterator[int]:
    """Yields what is left of the limits of a container and of the process (`ulimit -v`), where they exist."""
    for folder, limit, used in CONTAINERS:
        with contextlib.suppress(OSError, ValueError):  # there is none: no such file, or "max"
            cached = re.search(r"^inactive_file (\d+)", _read(f"{folder}/memory.stat"), re.MULTILINE)
            left = int(_read(f"{folder}/{limit}")) - int(_read(f"{folder}/{used}"))
            yield left + (int(cached[1]) if cached else 0)
    with contextlib.suppress(ImportError, OSError):  # not Linux
        import resource

        allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
        if allowed != resource.RLIM_INFINITY:
            yield allowed - int(_read("/proc/self/statm").split()[0]) * resource.getpagesize()


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()
