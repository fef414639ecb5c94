"""Closed forms that kernels of many shapes share: one tap, and blocks that are single numbers.

Most kernels of many networks are such kernels. TensorFlow traces their penalties a few times in all.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from tf_frobreg.backends import Operations, operations_of
from tf_frobreg.convolution.geometry import Side
from tf_frobreg.penalties.penalty_function import PenaltyFunction


@lru_cache(maxsize=64)
def one_tap_penalty(side: Side, alpha: float) -> PenaltyFunction:
    """Returns ‖Gram − αI‖²_F of kernels of one tap on one pixel, (..., g, h) of any size."""

    def value_and_slope(blocks: Any) -> tuple[Any, Callable[[Any], Any]]:
        ops = operations_of(blocks)
        matrices = blocks if side == "input" else ops.swap_last_axes(blocks)
        target = ops.constant(np.array([alpha]), blocks)
        residual = ops.subtract_from_diagonal(ops.matmul_transposed(matrices, matrices), target)

        def slope(weight: Any) -> Any:
            scaled = 4.0 * weight * residual  # smaller than the kernel
            return ops.matmul(scaled, blocks) if side == "input" else ops.matmul(blocks, scaled)

        return 2.0 * ops.half_square(residual), slope

    return PenaltyFunction(value_and_slope, fixed_axes=0)


@lru_cache(maxsize=64)
def penalty_of_numbers(first: int) -> PenaltyFunction:
    """Returns `value_and_slope_of_numbers` for a number of taps on the first axis."""

    def value_and_slope(taps: Any, *tables: Any) -> tuple[Any, Callable[[Any], Any]]:
        return value_and_slope_of_numbers(taps, first, *tables)

    return PenaltyFunction(value_and_slope, fixed_axes=1)


def value_and_slope_of_numbers(
    taps: Any, first: int, target: Any, *members: Any
) -> tuple[Any, Callable[[Any], Any]]:
    """Returns ‖Gram − αI‖²_F if the blocks of Gram are single numbers, and its slope times a weight.

    Few operations do that, and no product of blocks. All pairs of taps and all classes are in one table, so
    the factors of the gradient are symmetric, and half of the products suffice.

    Args:
        taps: `(taps, groups)`, or `(taps, groups, h)` where each number of Gram is a sum of h products.
        first: Number of taps on the first axis.
        target: α√(2n) for the classes on the diagonal and 0 for others, `(classes, 1)`, or
            `(classes of the first axis, classes of the others, 1)` if there are two tables.
        *members: √(2n) for the pairs of each class and 0 for others. One table `(classes, pairs of taps)`, or
            one for the first axis and one for the others. Their Kronecker product is the table.
    """
    ops = operations_of(taps)
    count = taps.shape[0]
    rest = count // first
    right = ops.expand_dims(taps, 0)
    products = ops.expand_dims(taps, 1) * right  # (taps, taps, groups, ...)
    if len(taps.shape) == 3:
        products = ops.sum(products, axis=-1)
    if len(members) > 1:
        products = ops.transpose(ops.reshape(products, (first, rest, first, rest, -1)), (0, 2, 1, 3, 4))
    residual = apply_kronecker(members, products, ops) - target

    def slope(weight: Any) -> Any:
        transposed = [ops.swap_last_axes(table) for table in members]
        factors = apply_kronecker(transposed, residual, ops)
        if len(members) > 1:
            factors = ops.transpose(ops.reshape(factors, (first, first, rest, rest, -1)), (0, 2, 1, 3, 4))
        factors = ops.reshape(factors, (count, count, -1))
        if len(taps.shape) == 3:
            factors = ops.expand_dims(factors, -1)
        return 2.0 * weight * ops.sum(factors * right, axis=1)

    return ops.half_square(residual), slope


def apply_kronecker(matrices: Sequence[Any], blocks: Any, ops: Operations) -> Any:
    """Applies the Kronecker product of one or two matrices to the leading axes of `blocks`."""
    for number, matrix in enumerate(matrices):
        done = math.prod(m.shape[0] for m in matrices[:number])
        blocks = ops.reshape(blocks, (done, matrix.shape[1], -1) if number else (matrix.shape[1], -1))
        blocks = ops.matmul(matrix, blocks)
    return blocks
