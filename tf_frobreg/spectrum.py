"""Singular values of the transformation matrix M."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Unpack

import numpy as np
import scipy.linalg
import scipy.sparse
import tensorflow as tf
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from tf_frobreg.checks import as_kernel, check_memory, check_number
from tf_frobreg.convolution import Convolution, Geometry
from tf_frobreg.linear_map import apply, apply_adjoint, image_shapes
from tf_frobreg.toeplitz import ToeplitzIndices, toeplitz_indices

__all__ = ["ExtremeSingularValues", "extreme_singular_values", "extremes_of", "singular_values"]

SMALL = 300  # rows of a Gram matrix up to which LAPACK beats ARPACK (3.8 ms each, measured)
# Entries of M up to which its sparse Gram matrix finds σmax and σmin faster than convolutions do: measured 7
# times as fast at 60,000 entries, 2.5 times slower at 1,100,000.
SPARSE = 500_000
KRYLOV, RESTARTS = 20, 200  # vectors that ARPACK keeps, and how often it starts again from the best of them


class ExtremeSingularValues(NamedTuple):
    """The largest and the smallest of the min(rows, columns) singular values of M."""

    sigma_max: float
    sigma_min: float


def singular_values(
    kernel, input_size, *, accuracy: float = 1e-8, **geometry: Unpack[Geometry]
) -> np.ndarray:
    """Returns all singular values σ of M, in descending order.

    They are computed in float64, whatever the dtype of the kernel, in one of three ways. For "circular"
    padding at stride 1 a Fourier transform leaves one g×h matrix per frequency. Otherwise it is the
    eigenvalues of the smaller Gram matrix of each group, unless a σ is so small that their rounding, about
    n·1e-16·σmax²/σ on n rows, would be more than asked for: then it is the singular value decomposition of
    M, several times slower, whose errors are about 1e-15·σmax. It takes the memory of dense matrices of that
    size, and time that grows with the cube of the number of pixels and channels.

    Args:
        kernel: `(*kernel_size, in_channels, filters)`, float32 or float64; array, tensor or variable.
        input_size: Spatial size of the input image, an int or one int per axis.
        accuracy: Largest error of any σ, as a share of σmax. 1e-7 never needs the decomposition of M.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups`, `kind`, as in
            `tf_frobreg.convolution.Convolution`.

    Returns:
        `(min(rows, columns),)` float64, in units of σ.

    Raises:
        ValueError: Where an argument is invalid, or the matrices would not fit in memory.
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
    accuracy = check_number("accuracy", accuracy, exclusive=True)
    conv = Convolution.of(kernel.shape, input_size, geometry)
    scale = np.abs(kernel).max().astype(np.float64) or 1.0  # σ² of tiny or huge kernels has no float
    blocks = conv.by_group(kernel.astype(np.float64) / scale, np)
    if conv.padding == "circular" and conv.axes and max(conv.strides) == 1:
        found = _by_frequency(blocks, conv)
    else:
        kind = "transpose" if conv.transposed else "conv"
        group = dataclasses.replace(
            conv, kernel_shape=(*conv.kernel_size, *conv.blocks[1:]), groups=1, kind=kind
        )
        index = toeplitz_indices(group.kernel_shape, group.input_size, **group.geometry)
        rank = len(conv.kernel_size)
        found = [_of_matrix(block, index, accuracy) for block in np.moveaxis(blocks, rank, 0)]
    return scale * np.sort(np.concatenate(found, axis=None))[::-1]


def _by_frequency(blocks, conv):
    """The σ of an operator without border: those of one g×h matrix per frequency, half of them conjugates."""
    sizes = [axis.input_size for axis in conv.axes]
    # Taps of a kernel that is larger than the image fall onto each other.
    image = np.zeros((*sizes, *blocks.shape[-3:]))
    places = np.ix_(*(np.arange(a.kernel_size) * a.dilation % a.input_size for a in conv.axes))
    np.add.at(image, places, blocks)
    axes = tuple(range(len(sizes)))
    spectrum = np.fft.rfftn(image, axes=axes)
    sigma = np.linalg.svd(spectrum, compute_uv=False)
    # The last axis holds frequencies 0 … n/2; all others but 0 and n/2 stand for two.
    times = np.full(spectrum.shape[axes[-1]], 2)
    times[0] = 1
    if sizes[-1] % 2 == 0:
        times[-1] = 1
    return np.repeat(sigma, times, axis=axes[-1])


def _of_matrix(block, index, accuracy):
    """The σ of one group's M."""
    size = min(index.dense_shape)
    matrix = _sparse_matrix(block, index)
    if size > SMALL:
        _check_dense(index.dense_shape, 3 * size**2)
        gram = _smaller_gram(matrix).toarray()
        sigma = np.sqrt(np.maximum(scipy.linalg.eigvalsh(gram, overwrite_a=True), 0.0))
        # An error ε·n·σmax² of σ² is one of half of that, divided by σ, of σ.
        rounding = np.finfo(np.float64).eps * size * sigma[-1] ** 2
        if np.sqrt(rounding) <= accuracy * sigma[-1] or rounding <= 2 * sigma[0] * accuracy * sigma[-1]:
            return sigma
    _check_dense(index.dense_shape, 3 * math.prod(index.dense_shape))
    return scipy.linalg.svdvals(matrix.toarray(), overwrite_a=True)


def extreme_singular_values(
    kernel, input_size, *, accuracy: float = 1e-6, **geometry: Unpack[Geometry]
) -> ExtremeSingularValues:
    """Returns σmax and σmin of M, many times faster than all singular values.

    They come from the smaller Gram matrix, MᵀM or MMᵀ, by Lanczos iteration (ARPACK). It is kept as a sparse
    matrix or, of larger layers, applied by a convolution and its adjoint, without any matrix. Where the
    iteration does not converge, a dense eigenvalue decomposition takes over for up to 5000 rows. As σ² is
    what is computed, a σmin below 1e-7·σmax is noise; `singular_values` gets that right too.

    Args:
        kernel: As for `singular_values`.
        input_size: As for `singular_values`.
        accuracy: Of σ², about, relative to σmax²: 1e-6 tells a σmin down to a thousandth of σmax.
        **geometry: As for `singular_values`.

    Returns:
        A named tuple (sigma_max, sigma_min), plain floats. sigma_min is the smallest of the
        min(rows, columns) singular values.

    Raises:
        ValueError: As `singular_values`, and where `accuracy` is not reached: σmin of a large layer with
            many σ near 0 may need 1e-4.
        TypeError: As `singular_values`.

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
    dense_rows: int = 5000,
    **geometry: Unpack[Geometry],
) -> Callable[[np.ndarray], ExtremeSingularValues]:
    """Returns `extreme_singular_values` as a function of the kernel alone, its index of M made once.

    Where Lanczos fails on a Gram matrix of more than `dense_rows` rows, it raises ValueError.
    """
    accuracy = check_number("accuracy", accuracy, exclusive=True)
    conv = Convolution.of(kernel_shape, input_size, geometry)
    groups, g, h = conv.blocks
    if math.prod(axis.num_taps for axis in conv.axes) * groups * g * h > SPARSE:
        return _extremes_without_matrix(conv, accuracy)
    index = toeplitz_indices(kernel_shape, input_size, **geometry)

    def extremes(kernel):
        scale = np.abs(kernel).max().astype(np.float64) or 1.0  # σ² of tiny or huge kernels has no float
        gram = _smaller_gram(_sparse_matrix(kernel / scale, index))
        eigenvalues = _lanczos_ends(gram.dot, gram.shape[0], accuracy) if gram.shape[0] > SMALL else None
        if eigenvalues is None:
            if gram.shape[0] > dense_rows:
                raise ValueError(_not_converged(accuracy))
            _check_dense(gram.shape, 3 * gram.shape[0] ** 2)
            eigenvalues = scipy.linalg.eigvalsh(gram.toarray(), overwrite_a=True)
        return _roots(eigenvalues, scale)

    return extremes


def _extremes_without_matrix(conv, accuracy):
    """As `extremes_of`, by convolutions: M is too large even as a sparse matrix."""
    rows, columns = conv.shape
    check_memory(
        8 * (KRYLOV + 10) * min(rows, columns),
        f"Lanczos iteration on M of shape {rows} × {columns} needs {KRYLOV} vectors",
        "a smaller input_size",
    )
    shape = (1, *image_shapes(conv)[1 if rows < columns else 0])
    ahead, back = (apply_adjoint, apply) if rows < columns else (apply, apply_adjoint)

    @tf.function(autograph=False)
    def gram(kernel, vector):
        return back(kernel, ahead(kernel, tf.reshape(vector, shape), conv), conv)

    def extremes(kernel):
        scale = np.abs(kernel).max().astype(np.float64) or 1.0
        values = tf.constant(kernel / scale, tf.float64)
        eigenvalues = _lanczos_ends(
            lambda vector: gram(values, tf.constant(vector)).numpy().ravel(), min(rows, columns), accuracy
        )
        if eigenvalues is None:
            raise ValueError(_not_converged(accuracy))
        return _roots(eigenvalues, scale)

    return extremes


def _not_converged(accuracy):
    return f"accuracy is not reached by Lanczos iteration: ask for less. Received: accuracy={accuracy}"


def _roots(eigenvalues, scale):
    return ExtremeSingularValues(*(float(scale * np.sqrt(max(eigenvalues[i], 0.0))) for i in (-1, 0)))


def _lanczos_ends(product, size, accuracy):
    """The smallest and largest eigenvalue from ARPACK, or None where it does not find them."""
    start = np.random.RandomState(0).standard_normal(size)  # fixed: results can be repeated
    options = {"k": 1, "which": "LA", "v0": start, "ncv": KRYLOV, "maxiter": RESTARTS}

    def largest(multiply, tolerance):
        operator = LinearOperator((size, size), matvec=multiply, dtype=np.float64)
        return eigsh(operator, tol=tolerance, return_eigenvectors=False, **options)[0]

    try:
        high = largest(product, accuracy)
        # The smallest as the largest of a matrix between high and 2·high: ARPACK's accuracy is relative to
        # the eigenvalue, which is out of reach for a σmin near 0, and more than needed after a shift by high.
        low = 2 * high - largest(lambda vector: 2 * high * vector - product(vector), accuracy / 2)
        return low, high
    except ArpackError:  # the zero matrix is refused
        return None


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


def _smaller_gram(matrix):
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    return (matrix.T @ matrix).tocsr()


def _check_dense(shape, entries):
    check_memory(
        8 * entries,
        f"the singular values of M of shape {shape[0]} × {shape[1]} need a dense matrix",
        "a smaller input_size",
    )
