"""Singular values of the transformation matrix M."""

import contextlib
from typing import NamedTuple, Unpack

import numpy as np
import scipy.linalg
import scipy.sparse
from scipy.sparse.linalg import ArpackNoConvergence, eigsh

from tf_frobreg.convolution import Geometry
from tf_frobreg.toeplitz import as_kernel, check_memory, toeplitz_indices

__all__ = ["Extremes", "gram_extremes", "singular_values"]

SMALL = 200  # rows of a Gram matrix up to which LAPACK beats ARPACK (measured: about equal at 150)


class Extremes(NamedTuple):
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
    matrix = _sparse_matrix(kernel, input_size, geometry)
    _check_dense(matrix.shape, 3 * matrix.shape[0] * matrix.shape[1])
    return scipy.linalg.svdvals(matrix.toarray(), overwrite_a=True)


def gram_extremes(kernel, input_size, *, accuracy: float = 1e-6, **geometry: Unpack[Geometry]) -> Extremes:
    """Returns σmax and σmin from the smaller Gram matrix, to a relative accuracy of σ².

    Fast enough to follow a descent, where `singular_values` would take longer than the steps. A σmin below
    1e-7·σmax is noise: σ² is what is computed.
    """
    matrix = _sparse_matrix(kernel, input_size, geometry)
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    gram = (matrix.T @ matrix).tocsr()
    eigenvalues = None
    if gram.shape[0] > SMALL:
        start = np.random.RandomState(0).standard_normal(gram.shape[0])  # fixed: results can be repeated
        # ARPACK gives up on a σmin far below σmax; the dense solver below does not.
        with contextlib.suppress(ArpackNoConvergence):
            eigenvalues = np.sort(
                eigsh(gram, k=2, which="BE", tol=accuracy, v0=start, maxiter=200, return_eigenvectors=False)
            )
    if eigenvalues is None:
        eigenvalues = scipy.linalg.eigvalsh(gram.toarray(), overwrite_a=True)
    return Extremes(*(float(np.sqrt(max(eigenvalues[i], 0.0))) for i in (-1, 0)))


def _sparse_matrix(kernel, input_size, geometry):
    kernel = as_kernel(kernel).numpy().astype(np.float64)
    index = toeplitz_indices(kernel.shape, input_size, **geometry)
    rows, columns = index.positions.T
    return scipy.sparse.csr_array((kernel.ravel()[index.kernel_index], (rows, columns)), index.dense_shape)


def _check_dense(shape, entries):
    check_memory(
        8 * entries,
        f"the singular values of M of shape {shape[0]} × {shape[1]} need a dense matrix",
        "a smaller input_size",
    )
