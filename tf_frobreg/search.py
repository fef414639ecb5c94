"""The search for the outermost singular values of M by products with its Gram matrix alone."""

import functools
import math
import reprlib
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh, lobpcg

from tf_frobreg.checks import check_accuracy, check_integer, check_memory
from tf_frobreg.convolution import Convolution
from tf_frobreg.gram import gram
from tf_frobreg.linear_map import apply, apply_adjoint, image_shapes
from tf_frobreg.spectrum import SMALL, all_singular_values, has_frequencies, largest_entry

__all__ = ["ExtremeSingularValues", "Extremes"]

DENSE_ROWS = 1500  # of the smaller Gram matrix up to which all singular values are computed: 0.25 s
RESCUE_ROWS = 2000  # up to which all singular values are computed where the search fails: about 1 s
FREQUENCY_WORK = 3e8  # of a borderless operator, frequencies·g·h·min(g, h): 0.3 s for all its singular values
SPARSE_ENTRIES = 1_000_000  # of the Gram matrix up to which it is faster than two convolutions
VECTORS = 20  # that ARPACK holds
# Products in float32 take half the time; to this accuracy their rounding does not show.
SINGLE = 1e-5
# A σ next to the outermost one can hide it from a search. Asking for a smaller residual of σmax costs a tenth
# more products and lets that happen in 1 of 60 kernels where it was 3; σmin would cost four times as many.
CAUTION = 4
NOISE = 0.1  # share of a random vector in a warm start, for a σ that has become the outermost meanwhile


class Start:
    """The vectors a search ended at. Opaque, so that printing or comparing results does not touch them."""

    def __init__(self, high: np.ndarray, low: np.ndarray | None):
        self.high, self.low = high, low

    def __repr__(self):
        return f"<vectors of {self.high.size} entries>"


class ExtremeSingularValues(NamedTuple):
    """The largest and the smallest of the min(rows, columns) singular values of M, in units of σ.

    Attributes:
        sigma_max: At most σmax, but for rounding.
        sigma_min: At least σmin, but for rounding; NaN where it was not asked for.
        sigma_max_error: σmax is at most this much larger, from the residual and the accuracy asked for.
        sigma_min_error: σmin is at most this much smaller; as much as `sigma_min` where it cannot be told
            from 0.
        sigma_max_converged: Whether the accuracy asked for was reached.
        sigma_min_converged: The same of `sigma_min`.
        vectors: For a warm start; None where all singular values were computed.
    """

    sigma_max: float
    sigma_min: float
    sigma_max_error: float
    sigma_min_error: float
    sigma_max_converged: bool
    sigma_min_converged: bool
    vectors: Start | None = None

    @property
    def converged(self) -> bool:
        """Whether both values have the accuracy asked for."""
        return self.sigma_max_converged and self.sigma_min_converged


class Extremes:
    """`extreme_singular_values` of one geometry, to be called with kernels.

    Args:
        conv: The geometry.
        accuracy: As for `extreme_singular_values`.
        max_iterations: As for `extreme_singular_values`.
        low: Whether σmin is wanted.
        dense_rows: Rows of the smaller Gram matrix up to which all singular values are computed.
    """

    def __init__(
        self,
        conv: Convolution,
        accuracy: float,
        *,
        max_iterations: int = 1000,
        low: bool = True,
        dense_rows: int | None = None,
    ):
        self._conv, self._low = conv, low
        self._accuracy = check_accuracy(accuracy)
        self._iterations = check_integer("max_iterations", max_iterations)
        self._size = min(conv.shape)
        # Of the sums that a product with G consists of, as a share of σmax².
        self._rounding = np.finfo(np.float64).eps * math.prod(conv.kernel_size) * sum(conv.blocks[1:])
        dense_rows = DENSE_ROWS if dense_rows is None else dense_rows
        self._direct = self._size <= dense_rows or _is_cheap_by_frequency(conv)
        if not self._direct:
            check_memory(
                8 * VECTORS * self._size,
                f"{VECTORS} vectors of {self._size:,} entries",
                "a smaller input_size",
            )

    def __call__(
        self, kernel: np.ndarray, start: ExtremeSingularValues | None = None
    ) -> ExtremeSingularValues:
        """σmax and σmin of a kernel."""
        scale = largest_entry(kernel)
        kernel = kernel.astype(np.float64) / scale
        start = self._check_start(start)
        if self._direct or not kernel.any():
            found = self._from_all(kernel)
        else:
            found = self._search(self._products(kernel), start)
            reached = found.sigma_max_converged and (found.sigma_min_converged or not self._low)
            if self._size <= RESCUE_ROWS and not reached:
                found = self._from_all(kernel)._replace(vectors=found.vectors)
        return found._replace(**{name: scale * getattr(found, name) for name in found._fields[:4]})

    def _check_start(self, start):
        if start is not None and not isinstance(start, ExtremeSingularValues):
            raise TypeError(
                f"start must be what extreme_singular_values returned. Received: start={reprlib.repr(start)}"
            )
        if start is None or start.vectors is None:
            return None
        if start.vectors.high.size != self._size:
            raise ValueError(
                f"start must come from the same geometry, whose vectors have {self._size} entries. "
                f"Received: start.vectors={start.vectors}"
            )
        return start.vectors

    def _from_all(self, kernel):
        accuracy = 1e-14 if self._size <= SMALL or has_frequencies(self._conv) else 1e-8
        sigma = all_singular_values(kernel, self._conv, accuracy) if kernel.any() else np.zeros(1)
        error = float(max(accuracy, self._size * np.finfo(np.float64).eps) * sigma[0])
        low = (sigma[-1], error) if self._low else (math.nan, math.nan)
        return ExtremeSingularValues(
            float(sigma[0]), float(low[0]), float(error), float(low[1]), True, self._low
        )

    def _products(self, kernel):
        """(a function that multiplies G with a column, its least accuracy), the coarser one first."""
        if gram(self._conv).entries <= SPARSE_ENTRIES:
            return [(gram(self._conv).sparse(kernel).dot, 0.0)]
        return [
            (functools.partial(_gram_product(self._conv, dtype), tf.constant(kernel, dtype)), least)
            for dtype, least in ((tf.float32, SINGLE), (tf.float64, 0.0))
        ]

    def _search(self, products, start):
        product = products[-1][0]
        random = np.random.RandomState(0).standard_normal((self._size, 1))  # fixed: results can be repeated
        mean, spread, random = _rayleigh(product, random)
        if mean == 0.0:
            return self._from_all(np.zeros(1))
        # For a random vector the residual is about the standard deviation of all σ², and θ their mean.
        finest = 0.01 * spread / mean
        first = product(random) if start is None else start.high + NOISE * random
        # An error ε of σ² is one of ε/2σ of σ: σmax can do with twice the residual.
        goal = max(min(2 * self._accuracy / CAUTION, finest), self._rounding)
        high = self._outermost(products, first, goal)
        low = (math.nan, math.nan, None)
        if self._low:
            first = random if start is None or start.low is None else start.low + NOISE * random
            goal = max(min(self._accuracy, finest), self._rounding)
            low = self._outermost(products, first, goal, high[0])
        # Neighbours closer than the accuracy are not told apart, however small the residual is.
        allowed = self._accuracy * high[0]
        above = max(high[1], 2 * allowed) + self._rounding * high[0]
        below = max(low[1], allowed) + self._rounding * high[0]
        sigma_max, sigma_min = (math.sqrt(max(theta, 0.0)) for theta, *_ in (high, low))
        return ExtremeSingularValues(
            sigma_max=sigma_max,
            sigma_min=sigma_min,
            sigma_max_error=math.sqrt(high[0] + above) - sigma_max,
            sigma_min_error=sigma_min - math.sqrt(max(low[0] - below, 0.0)),
            sigma_max_converged=high[1] <= 2 * allowed,
            sigma_min_converged=low[1] <= allowed,
            vectors=Start(high[2], low[2]),
        )

    def _outermost(self, products, vector, accuracy, sigma_max_squared=None):
        """(θ, ‖Gv − θv‖, v) at the upper end of the spectrum or, where that is known, at the lower one."""
        # The lower end of G is the upper one of 2σmax² − G, whose eigenvalues lie between σmax² and 2σmax²:
        # ARPACK's accuracy is relative to the eigenvalue, and out of reach for a σmin near 0.
        shift = 2 * sigma_max_squared if sigma_max_squared else 0.0
        for product, least in products:

            def multiply(column, product=product):
                return shift * column - product(column) if shift else product(column)

            tolerance = 0.9 * max(accuracy, least)
            vector = _lanczos(multiply, vector, tolerance / (2 if shift else 1), self._iterations)
            theta, residual, vector = _rayleigh(products[-1][0], vector)
            scale = sigma_max_squared or theta
            if residual > max(accuracy, least) * scale:
                vector = _lobpcg(multiply, vector, tolerance * scale, self._iterations)
                theta, residual, vector = _rayleigh(products[-1][0], vector)
            if residual <= accuracy * (sigma_max_squared or theta):
                break
        return theta, residual, vector


def _lanczos(multiply, vector, tolerance, iterations):
    """A vector of the largest eigenvalue by ARPACK; the vector given where that fails."""

    def product(column):
        return multiply(column.reshape(-1, 1)).ravel()

    size = len(vector)
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    # A restart takes about ten products.
    options = {"which": "LA", "ncv": min(VECTORS, size), "maxiter": max(iterations // 10, 1)}
    try:
        return eigsh(operator, k=1, v0=vector.ravel(), tol=tolerance, **options)[1]
    except ArpackError:
        return vector


def _lobpcg(multiply, vector, tolerance, iterations):
    """A vector of the largest eigenvalue, or the best one met."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what is not reached: the residual tells
        return lobpcg(multiply, vector, tol=tolerance, maxiter=iterations, largest=True)[1]


def _rayleigh(product, vector):
    """(vᵀGv, ‖Gv − θv‖, v) of a vector, v made a unit vector."""
    vector = vector / np.linalg.norm(vector)
    image = product(vector)
    theta = float(np.vdot(vector, image))
    return theta, float(np.linalg.norm(image - theta * vector)), vector


@functools.lru_cache(maxsize=64)  # tracing takes 0.1 s
def _gram_product(conv: Convolution, dtype) -> Callable[[tf.Tensor, np.ndarray], np.ndarray]:
    """The smaller Gram matrix of a kernel times a column, by convolutions."""
    rows, columns = conv.shape
    shape = (1, *image_shapes(conv)[1 if rows < columns else 0])
    ahead, back = (apply_adjoint, apply) if rows < columns else (apply, apply_adjoint)

    @tf.function(autograph=False)
    def product(kernel, column):
        image = ahead(kernel, tf.reshape(column, shape), conv)
        return tf.reshape(back(kernel, image, conv), [-1, 1])

    # LOBPCG itself is to work in float64 all the same: in float32 it breaks down now and then.
    return lambda kernel, column: product(kernel, tf.constant(column, dtype)).numpy().astype(np.float64)


def _is_cheap_by_frequency(conv):
    groups, g, h = conv.blocks
    frequencies = math.prod(axis.input_size for axis in conv.axes)
    return has_frequencies(conv) and frequencies * groups * g * h * min(g, h) <= FREQUENCY_WORK
