"""The search for the outermost eigenvalues of the smaller Gram matrix G, which needs only products with G."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh, lobpcg

from tf_frobreg.convolution.apply import apply, apply_adjoint
from tf_frobreg.convolution.geometry import Convolution
from tf_frobreg.spectrum.gram_matrix import gram_matrix

SPARSE_ENTRIES = 1_000_000  # of G, up to which a sparse matrix is faster than two convolutions
LANCZOS_VECTORS = 20  # that ARPACK holds
# Products in float32 take half the time. Down to this accuracy their rounding does not show.
SINGLE_ACCURACY = 1e-5

Multiply = Callable[[np.ndarray], np.ndarray]  # from and to float64 arrays of shape (rows of G, 1)


class Product(NamedTuple):
    """A function that multiplies G with a column.

    Attributes:
        multiply: The function.
        accuracy: The smallest residual it can reach, relative to the largest eigenvalue. 0 in float64.
    """

    multiply: Multiply
    accuracy: float


class Eigenpair(NamedTuple):
    """An approximate eigenvalue of G and its vector.

    Attributes:
        value: θ = vᵀGv, in units of σ².
        residual: ‖Gv − θv‖. Some eigenvalue of G is at most this far from θ.
        vector: v, a unit vector of shape `(rows of G, 1)`.
    """

    value: float
    residual: float
    vector: np.ndarray


def gram_products(kernel: np.ndarray, conv: Convolution) -> list[Product]:
    """Returns the ways to multiply with G, the fastest first and the most accurate last."""
    gram = gram_matrix(conv)
    if gram.entries <= SPARSE_ENTRIES:
        return [Product(gram.sparse(kernel).dot, 0.0)]
    return [
        Product(functools.partial(_convolution_product(conv, dtype), tf.constant(kernel, dtype)), accuracy)
        for dtype, accuracy in ((tf.float32, SINGLE_ACCURACY), (tf.float64, 0.0))
    ]


def find_outermost(
    products: Sequence[Product],
    start: np.ndarray,
    accuracy: float,
    iterations: int,
    largest: float | None = None,
) -> Eigenpair:
    """Returns the largest eigenvalue of G or, if the largest is given, the smallest.

    Args:
        products: The ways to multiply with G that `gram_products` returns.
        start: The vector to begin with, of shape `(rows of G, 1)`.
        accuracy: The residual to reach, relative to the largest eigenvalue.
        iterations: Approximate limit on products with G, for each product and each solver.
        largest: The largest eigenvalue of G, to search for the smallest.

    Returns:
        The eigenpair that was reached. Its residual may be larger than requested, and a close neighbour can
        hide the outermost eigenvalue from the search.
    """
    # The lower end of G is the upper end of 2σmax² − G, whose eigenvalues lie between σmax² and 2σmax².
    # ARPACK's tolerance is relative to the eigenvalue. It could not reach one relative to a σmin² near 0.
    shift = 2 * largest if largest else 0.0
    exact = products[-1].multiply
    vector = start
    for product in products:
        multiply = functools.partial(_multiply_shifted, product.multiply, shift)
        reachable = max(accuracy, product.accuracy)
        vector = _lanczos(multiply, vector, 0.9 * reachable / (2 if shift else 1), iterations)
        found = rayleigh(exact, vector)
        scale = largest or found.value
        if found.residual > reachable * scale:
            found = rayleigh(exact, _lobpcg(multiply, found.vector, 0.9 * reachable * scale, iterations))
        vector = found.vector
        if found.residual <= accuracy * (largest or found.value):
            break
    return found


def rayleigh(multiply: Multiply, vector: np.ndarray) -> Eigenpair:
    """Returns the Rayleigh quotient of a vector, its residual, and the unit vector."""
    vector = vector / np.linalg.norm(vector)
    image = multiply(vector)
    value = float(np.vdot(vector, image))
    return Eigenpair(value, float(np.linalg.norm(image - value * vector)), vector)


def _multiply_shifted(multiply: Multiply, shift: float, column: np.ndarray) -> np.ndarray:
    """Returns G·column or, if the shift is not 0, (shift·I − G)·column."""
    return shift * column - multiply(column) if shift else multiply(column)


def _lanczos(multiply: Multiply, vector: np.ndarray, tolerance: float, iterations: int) -> np.ndarray:
    """Returns a vector of the largest eigenvalue by ARPACK, or the given vector if ARPACK fails."""

    def product(column: np.ndarray) -> np.ndarray:
        return multiply(column.reshape(-1, 1)).ravel()

    size = len(vector)
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    # ARPACK counts restarts. Each takes about ten products.
    options = {"which": "LA", "ncv": min(LANCZOS_VECTORS, size), "maxiter": max(iterations // 10, 1)}
    try:
        return eigsh(operator, k=1, v0=vector.ravel(), tol=tolerance, **options)[1]
    except ArpackError:
        return vector


def _lobpcg(multiply: Multiply, vector: np.ndarray, tolerance: float, iterations: int) -> np.ndarray:
    """Returns a vector of the largest eigenvalue by LOBPCG, or the best vector that it found."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the residual shows if the tolerance was not reached
        return lobpcg(multiply, vector, tol=tolerance, maxiter=iterations, largest=True)[1]


@functools.lru_cache(maxsize=64)  # tracing takes 0.1 s
def _convolution_product(conv: Convolution, dtype: tf.DType) -> Callable[[tf.Tensor, np.ndarray], np.ndarray]:
    """Returns a function that multiplies the G of a kernel with a column, by two convolutions."""
    shape = (1, *(conv.output_shape if conv.wide else conv.input_shape))
    ahead, back = (apply_adjoint, apply) if conv.wide else (apply, apply_adjoint)

    @tf.function(autograph=False)
    def product(kernel: tf.Tensor, column: tf.Tensor) -> tf.Tensor:
        image = ahead(kernel, tf.reshape(column, shape), conv)
        return tf.reshape(back(kernel, image, conv), [-1, 1])

    # The columns are float64 even if the products are float32: LOBPCG sometimes fails in float32.
    return lambda kernel, column: product(kernel, tf.constant(column, dtype)).numpy().astype(np.float64)
