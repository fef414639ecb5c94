"""Singular values of the transformation matrix M."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Unpack

import numpy as np
import scipy.linalg
import scipy.sparse
import tensorflow as tf
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from tf_frobreg.checks import as_kernel, check_memory, check_number
from tf_frobreg.convolution import Geometry
from tf_frobreg.toeplitz import ToeplitzIndices, toeplitz_indices

__all__ = ["ExtremeSingularValues", "extreme_singular_values", "extremes_of", "singular_values"]

SMALL = 300  # rows of a Gram matrix up to which LAPACK beats ARPACK (3.8 ms each, measured)


class ExtremeSingularValues(NamedTuple):
    """The largest and the smallest of the min(rows, columns) singular values of M."""

    sigma_max: float
    sigma_min: float


def singular_values(kernel, input_size, **geometry: Unpack[Geometry]) -> np.ndarray:
    """Returns all singular values σ of M, exact, in descending order.

    They come from a dense singular value decomposition in float64, whatever the dtype of the kernel: each
    is right to about 1e-15·σmax. It takes the memory of M as a dense matrix and time that grows with the cube
    of its smaller side.

    Args:
        kernel: `(*kernel_size, in_channels, filters)`, float32 or float64; array, tensor or variable.
        input_size: Spatial size of the input image, an int or one int per axis.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups`, `kind`, as in
            `tf_frobreg.convolution.Convolution`.

    Returns:
        `(min(rows, columns),)` float64, in units of σ.

    Raises:
        ValueError: Where an argument is invalid, or M would not fit in memory as a dense matrix.
        TypeError: Where an argument has the wrong type.

    Example:
        The centre tap alone is the identity; its neighbour is a shift, which loses one column at the border:

        >>> kernel = np.zeros((3, 3, 1, 1))
        >>> kernel[1, 1] = 1.0
        >>> print(singular_values(kernel, (1, 4)))
        [1. 1. 1. 1.]
        >>> print(singular_values(np.roll(kernel, 1, axis=1), (1, 4)))
        [1. 1. 1. 0.]
    """
    kernel = _values(kernel)
    index = toeplitz_indices(kernel.shape, input_size, **geometry)
    _check_dense(index.dense_shape, 3 * math.prod(index.dense_shape))
    return scipy.linalg.svdvals(_sparse_matrix(kernel, index).toarray(), overwrite_a=True)


def extreme_singular_values(
    kernel, input_size, *, accuracy: float = 1e-6, **geometry: Unpack[Geometry]
) -> ExtremeSingularValues:
    """Returns σmax and σmin of M, many times faster than all singular values.

    They come from the smaller Gram matrix, MᵀM or MMᵀ, kept sparse: by Lanczos iteration (ARPACK), or, where
    that does not converge, by a dense eigenvalue decomposition. As σ² is what is computed, a σmin below
    1e-7·σmax is noise; `singular_values` gets that right too.

    Args:
        kernel: As for `singular_values`.
        input_size: As for `singular_values`.
        accuracy: Of σ², relative.
        **geometry: As for `singular_values`.

    Returns:
        A named tuple (sigma_max, sigma_min), plain floats. sigma_min is the smallest of the
        min(rows, columns) singular values.

    Raises:
        ValueError, TypeError: As `singular_values`.

    Example:
        >>> extremes = extreme_singular_values(np.random.RandomState(1).randn(3, 3, 3, 6), 20)
        >>> print(f"{extremes.sigma_max:.3f} {extremes.sigma_min:.3f}")
        10.945 1.524
    """
    kernel = _values(kernel)
    return extremes_of(kernel.shape, input_size, accuracy=accuracy, **geometry)(kernel)


def extremes_of(
    kernel_shape: Sequence[int],
    input_size,
    *,
    accuracy: float,
    dense_rows: float = math.inf,
    **geometry: Unpack[Geometry],
) -> Callable[[np.ndarray], ExtremeSingularValues]:
    """Returns `extreme_singular_values` as a function of the kernel alone, its index of M made once.

    Where Lanczos fails on a Gram matrix of more than `dense_rows` rows, it returns NaN.
    """
    accuracy = check_number("accuracy", accuracy, exclusive=True)
    index = toeplitz_indices(kernel_shape, input_size, **geometry)

    def extremes(kernel):
        scale = np.abs(kernel).max().astype(np.float64) or 1.0  # σ² of tiny or huge kernels has no float
        matrix = _sparse_matrix(kernel / scale, index)
        if matrix.shape[0] < matrix.shape[1]:
            matrix = matrix.T
        gram = (matrix.T @ matrix).tocsr()
        eigenvalues = _lanczos_ends(gram, accuracy) if gram.shape[0] > SMALL else None
        if eigenvalues is None:
            if gram.shape[0] > dense_rows:
                return ExtremeSingularValues(math.nan, math.nan)
            _check_dense(gram.shape, 3 * gram.shape[0] ** 2)
            eigenvalues = scipy.linalg.eigvalsh(gram.toarray(), overwrite_a=True)
        return ExtremeSingularValues(*(float(scale * np.sqrt(max(eigenvalues[i], 0.0))) for i in (-1, 0)))

    return extremes


def _lanczos_ends(gram, accuracy):
    """The smallest and largest eigenvalue from ARPACK, or None where it cannot be trusted with them."""
    products = itertools.count()

    def multiply(vector):
        next(products)
        return gram @ vector

    operator = LinearOperator(gram.shape, matvec=multiply, dtype=gram.dtype)
    start = np.random.RandomState(0).standard_normal(gram.shape[0])  # fixed: results can be repeated
    size = 20  # of the Krylov space
    options = {"k": 2, "which": "BE", "return_eigenvectors": False}
    try:
        ends = eigsh(operator, tol=accuracy, v0=start, ncv=size, maxiter=100, **options)
    except ArpackError:  # a σmin far below σmax can take for ever; the zero matrix is refused
        return None
    # A spectrum of a few exact values exhausts the Krylov space at once, and ARPACK then misses some of them.
    return np.sort(ends) if next(products) > size + 2 else None


def _values(kernel) -> np.ndarray:
    """The kernel as an array, if its values are known."""
    if not tf.executing_eagerly():
        raise TypeError("kernel must have known values: singular values cannot be had inside a tf.function")
    return as_kernel(kernel).numpy()


def _sparse_matrix(kernel: np.ndarray, index: ToeplitzIndices) -> scipy.sparse.csr_array:
    """M in float64; positions that repeat add up. The index is in row-major order, as CSR is."""
    rows, columns = index.positions.T
    starts = np.searchsorted(rows, np.arange(index.dense_shape[0] + 1))
    values = kernel.astype(np.float64).ravel()[index.kernel_index]
    return scipy.sparse.csr_array((values, columns, starts), index.dense_shape)


def _check_dense(shape, entries):
    check_memory(
        8 * entries,
        f"the singular values of M of shape {shape[0]} × {shape[1]} need a dense matrix",
        "a smaller input_size",
    )
