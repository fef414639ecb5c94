"""Kernels and α in units in which no square is infinite or 0."""

import math
from typing import Any

import numpy as np

from tf_frobreg.backends import dtype_of, is_known, to_array

# Entries up to 2 to this power, or down to its inverse, are used as they are. Their fourth powers are finite.
ORDINARY = 16


def check_alpha_fits(alpha: float, kernel: Any) -> None:
    """Raises ValueError if α is too large for the dtype of the kernel."""
    numbers = np.finfo(dtype_of(kernel))
    if alpha > float(numbers.max):
        raise ValueError(
            f"alpha must be at most {numbers.max:.2g} for a kernel of {numbers.dtype}. "
            f"Received: alpha={alpha}"
        )


def in_units(kernel: Any, alpha: float) -> tuple[float, Any, float]:
    """Returns a power of two, the kernel divided by it, and α divided by its square.

    Squares of very large or small entries would be infinite or 0, and differences of them NaN. The unit is 1
    for ordinary kernels, and for one whose values are not known yet.

    Raises:
        ValueError: If α is too large for the dtype of the kernel.
    """
    check_alpha_fits(alpha, kernel)
    if not is_known(kernel):
        return 1.0, kernel, alpha
    largest = max(float(np.abs(to_array(kernel)).max(initial=0.0)), alpha**0.5)
    exponent = max(math.frexp(largest)[1] - 1, int(np.finfo(dtype_of(kernel)).minexp))
    if abs(exponent) <= ORDINARY:
        return 1.0, kernel, alpha
    unit = 2.0**exponent
    return unit, kernel / unit, max(alpha / unit / unit, math.ulp(0.0))


def times(tensor: Any, unit: float, power: int) -> Any:
    """Returns the tensor times a power of the unit. The power itself can be infinite, and 0·∞ is NaN."""
    for _ in range(0 if unit == 1.0 else power):
        tensor = tensor * unit
    return tensor
