"""σmax and σmin of M without its other singular values, for layers whose M does not fit in memory."""

import math
import reprlib
import warnings
from typing import Any, NamedTuple, Unpack

import numpy as np

from tf_frobreg.checks import check_accuracy, check_integer, check_memory, check_number
from tf_frobreg.convolution.geometry import Convolution, Geometry, Size
from tf_frobreg.convolution.kernel import known_values
from tf_frobreg.spectrum.all_values import (
    DECOMPOSED_ROWS,
    all_singular_values,
    has_frequencies,
    largest_entry,
)
from tf_frobreg.spectrum.extreme_search import (
    LANCZOS_VECTORS,
    Product,
    find_outermost,
    gram_products,
    rayleigh,
)

__all__ = ["ExtremeSingularValues", "condition_number", "extreme_singular_values", "spectral_norm"]

ALL_ROWS = 5000  # up to which condition_number computes all singular values: about 15 s
DENSE_ROWS = 1500  # of the smaller Gram matrix, up to which all singular values are computed: 0.25 s
RESCUE_ROWS = 2000  # up to which all singular values are computed if the search fails: about 1 s
FREQUENCY_WORK = 3e8  # frequencies·g·h·min(g, h) of a border-free operator: 0.3 s for all its singular values
# A σ next to the outermost one can hide it from a search. A smaller residual of σmax costs a tenth more
# products, and this happens in 1 of 60 kernels instead of 3. For σmin it would cost four times as many.
CAUTION = 4
NOISE = 0.1  # share of a random vector in a warm start, for a σ that has become the outermost since then


class SearchVectors:
    """The vectors a search ended at. Opaque, so that printing or comparing results does not touch them."""

    def __init__(self, high: np.ndarray, low: np.ndarray | None):
        self.high, self.low = high, low

    def __repr__(self):
        return f"<vectors of {self.high.size} entries>"


class ExtremeSingularValues(NamedTuple):
    """The largest and the smallest of the min(rows, columns) singular values of M, in units of σ.

    The errors are estimates from the residuals of the search. A search can miss the outermost σ if another
    one lies close to it, and then the true error is larger.

    Attributes:
        sigma_max: Never above σmax, up to rounding.
        sigma_min: Never below σmin, up to rounding. NaN if it was not asked for.
        sigma_max_error: Estimate of how much larger σmax may be.
        sigma_min_error: Estimate of how much smaller σmin may be. Equal to `sigma_min` if σmin cannot be
            distinguished from 0.
        sigma_max_converged: Whether σmax has the accuracy asked for, by its error estimate.
        sigma_min_converged: The same for σmin.
        vectors: For a warm start. None if all singular values were computed.
    """

    sigma_max: float
    sigma_min: float
    sigma_max_error: float
    sigma_min_error: float
    sigma_max_converged: bool
    sigma_min_converged: bool
    vectors: SearchVectors | None = None

    @property
    def converged(self) -> bool:
        """Whether both values have the accuracy asked for."""
        return self.sigma_max_converged and self.sigma_min_converged


class ExtremesFinder:
    """`extreme_singular_values` of one geometry, as a function of the kernel.

    Args:
        conv: The geometry.
        accuracy: As for `extreme_singular_values`.
        max_iterations: As for `extreme_singular_values`.
        sigma_min: Whether to search for σmin.
        dense_rows: Rows of the smaller Gram matrix up to which all singular values are computed.
            `DENSE_ROWS` by default.
    """

    def __init__(
        self,
        conv: Convolution,
        accuracy: float,
        *,
        max_iterations: int = 1000,
        sigma_min: bool = True,
        dense_rows: int | None = None,
    ):
        self._conv, self._sigma_min = conv, sigma_min
        self._accuracy = check_accuracy(accuracy)
        self._iterations = check_integer("max_iterations", max_iterations)
        self._size = min(conv.shape)
        # Rounding of the sums in a product with G, relative to σmax².
        self._rounding = np.finfo(np.float64).eps * math.prod(conv.kernel_size) * sum(conv.blocks[1:])
        dense_rows = DENSE_ROWS if dense_rows is None else dense_rows
        self._direct = self._size <= dense_rows or _is_cheap_by_frequency(conv)
        if not self._direct:
            check_memory(
                8 * LANCZOS_VECTORS * self._size,
                f"{LANCZOS_VECTORS} vectors of {self._size:,} entries",
                "a smaller input_size",
            )

    def __call__(
        self, kernel: np.ndarray, start: ExtremeSingularValues | None = None
    ) -> ExtremeSingularValues:
        """Returns σmax and σmin of a kernel."""
        scale = largest_entry(kernel)
        kernel = kernel.astype(np.float64) / scale
        vectors = self._check_start(start)
        if self._direct or not kernel.any():
            found = self._from_all(kernel)
        else:
            found = self._search(gram_products(kernel, self._conv), vectors)
            reached = found.sigma_max_converged and (found.sigma_min_converged or not self._sigma_min)
            if self._size <= RESCUE_ROWS and not reached:
                found = self._from_all(kernel)._replace(vectors=found.vectors)
        return found._replace(
            sigma_max=scale * found.sigma_max,
            sigma_min=scale * found.sigma_min,
            sigma_max_error=scale * found.sigma_max_error,
            sigma_min_error=scale * found.sigma_min_error,
        )

    def _check_start(self, start: Any) -> SearchVectors | None:
        if start is not None and not isinstance(start, ExtremeSingularValues):
            raise TypeError(
                f"start must be a result of extreme_singular_values. Received: start={reprlib.repr(start)}"
            )
        if start is None or start.vectors is None:
            return None
        if start.vectors.high.size != self._size:
            raise ValueError(
                f"start must come from the same geometry, whose vectors have {self._size} entries. "
                f"Received: start.vectors={start.vectors}"
            )
        return start.vectors

    def _from_all(self, kernel: np.ndarray) -> ExtremeSingularValues:
        accuracy = 1e-14 if self._size <= DECOMPOSED_ROWS or has_frequencies(self._conv) else 1e-8
        sigma = all_singular_values(kernel, self._conv, accuracy) if kernel.any() else np.zeros(1)
        error = float(max(accuracy, self._size * np.finfo(np.float64).eps) * sigma[0])
        return ExtremeSingularValues(
            sigma_max=float(sigma[0]),
            sigma_min=float(sigma[-1]) if self._sigma_min else math.nan,
            sigma_max_error=error,
            sigma_min_error=error if self._sigma_min else math.nan,
            sigma_max_converged=True,
            sigma_min_converged=self._sigma_min,
        )

    def _search(self, products: list[Product], start: SearchVectors | None) -> ExtremeSingularValues:
        random = np.random.RandomState(0).standard_normal((self._size, 1))  # fixed, for repeatable results
        mean, spread, random = rayleigh(products[-1].multiply, random)
        if mean == 0.0:
            return self._from_all(np.zeros(1))
        # For a random vector θ is about the mean of all σ², and the residual their standard deviation.
        finest = 0.01 * spread / mean
        first = products[-1].multiply(random) if start is None else start.high + NOISE * random
        # An error ε of σ² is an error ε/2σ of σ, so σmax allows twice the residual.
        goal = max(min(2 * self._accuracy / CAUTION, finest), self._rounding)
        high = find_outermost(products, first, goal, self._iterations)
        low = None
        if self._sigma_min:
            first = random if start is None or start.low is None else start.low + NOISE * random
            goal = max(min(self._accuracy, finest), self._rounding)
            low = find_outermost(products, first, goal, self._iterations, largest=high.value)
        # Neighbours closer than the accuracy cannot be distinguished, however small the residual is.
        allowed = self._accuracy * high.value
        rounding = self._rounding * high.value
        above = max(high.residual, 2 * allowed) + rounding
        sigma_max = math.sqrt(max(high.value, 0.0))
        sigma_min = sigma_min_error = math.nan
        if low is not None:
            below = max(low.residual, allowed) + rounding
            sigma_min = math.sqrt(max(low.value, 0.0))
            sigma_min_error = sigma_min - math.sqrt(max(low.value - below, 0.0))
        return ExtremeSingularValues(
            sigma_max=sigma_max,
            sigma_min=sigma_min,
            sigma_max_error=math.sqrt(high.value + above) - sigma_max,
            sigma_min_error=sigma_min_error,
            sigma_max_converged=high.residual <= 2 * allowed,
            sigma_min_converged=low is not None and low.residual <= allowed,
            vectors=SearchVectors(high.vector, None if low is None else low.vector),
        )


def extreme_singular_values(
    kernel: Any,
    input_size: Size,
    *,
    accuracy: float = 1e-4,
    start: ExtremeSingularValues | None = None,
    max_iterations: int = 1000,
    **geometry: Unpack[Geometry],
) -> ExtremeSingularValues:
    """Returns σmax and σmin of M with error bounds, for layers of any size.

    They are the ends of the spectrum of the smaller Gram matrix G, MᵀM or MMᵀ, found by Lanczos iteration
    (ARPACK) and, where that does not converge, by LOBPCG, which has something to show all the same. Both need
    nothing but products with G: a sparse matrix or, of larger layers, a convolution and its adjoint, in
    float32 as far as that goes, then in float64. Layers whose G has up to 1500 rows, and "circular" ones of
    moderate size, have all their singular values computed instead: nothing is hidden there.

    θ = vᵀGv of any unit vector v lies between σmin² and σmax², and some σ² within its residual ‖Gv − θv‖
    (both taken in float64): hence the bounds. That it is the outermost σ² rests, as with every iteration of
    this kind, on the random vector it starts from: a neighbour can hide it (of 60 kernels, one σmax and one
    σmin were 1.3 times as far off as their bounds say). In a tight spectrum, as regularized kernels have,
    every vector has a small residual: there it has to fall to a hundredth of the spread of all σ² too.

    Args:
        kernel: `(*kernel_size, in_channels, filters)`, float32 or float64; array, tensor or variable.
        input_size: Spatial size of the input image, an int or one int per axis.
        accuracy: Below 1. σmax is bounded to accuracy·σmax, and σmin to √accuracy·σmax or, where σmin is not
            that small, to accuracy·σmax²/2σmin. A σmin below 1e-7·σmax is noise for any accuracy, but for
            layers whose singular values are all computed.
        start: What this function gave for a similar kernel of the same geometry, such as that of the epoch
            before: the search begins there and takes twenty products or more for each value. A share of a
            random vector goes in, for a singular value that has become the outermost meanwhile.
        max_iterations: Products with G at the most, about, for each of the two values and of the ways to it.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups`, `kind`, as in
            `tf_frobreg.Convolution`.

    Returns:
        An `ExtremeSingularValues` (sigma_max, sigma_min, sigma_max_error, sigma_min_error,
        sigma_max_converged, sigma_min_converged, vectors), with `.converged` for both.

    Raises:
        ValueError: Where an argument is invalid, or a few vectors would not fit in memory.
        TypeError: Where an argument has the wrong type.

    Example:
        >>> kernel = np.random.RandomState(1).randn(3, 3, 3, 6)
        >>> extremes = extreme_singular_values(kernel, 20)
        >>> print(f"{extremes.sigma_max:.3f} {extremes.sigma_min:.3f}", extremes.converged)
        10.945 1.524 True
        >>> print(f"{extreme_singular_values(1.01 * kernel, 20, start=extremes).sigma_max:.3f}")
        11.055
    """
    kernel = known_values(kernel)
    conv = Convolution.of(kernel.shape, input_size, geometry)
    return ExtremesFinder(conv, accuracy, max_iterations=max_iterations)(kernel, start)


def spectral_norm(
    kernel: Any, input_size: Size, *, accuracy: float = 1e-4, **geometry: Unpack[Geometry]
) -> float:
    """Returns ‖M‖₂ = σmax, the Lipschitz constant of the layer before its activation.

    Args:
        kernel: As for `extreme_singular_values`.
        input_size: As for `extreme_singular_values`.
        accuracy: As for `extreme_singular_values`: the largest relative error.
        **geometry: As for `extreme_singular_values`.

    Returns:
        σmax, a plain float. Where the accuracy is not reached, a RuntimeWarning says what was.

    Raises:
        ValueError, TypeError: As `extreme_singular_values`.

    Example:
        A sum over 3×3 neighbours multiplies a constant image by 9, but for its border:

        >>> print(f"{spectral_norm(np.ones((3, 3, 1, 1)), 100):.3f}")
        8.994
        >>> print(f"{spectral_norm(np.ones((3, 3, 1, 1)), 100, padding='circular'):.3f}")
        9.000
    """
    kernel = known_values(kernel)
    conv = Convolution.of(kernel.shape, input_size, geometry)
    found = ExtremesFinder(conv, accuracy, sigma_min=False)(kernel)
    if not found.sigma_max_converged:
        _warn(f"σmax = {found.sigma_max:.6g} may be up to {found.sigma_max_error:.2g} too small")
    return found.sigma_max


def condition_number(
    kernel: Any, input_size: Size, *, accuracy: float = 0.01, **geometry: Unpack[Geometry]
) -> float:
    """Returns σmax / σmin, σmin being the smallest of the min(rows, columns) singular values of M.

    Args:
        kernel: As for `extreme_singular_values`.
        input_size: As for `extreme_singular_values`.
        accuracy: Relative error. Where `extreme_singular_values` cannot bound σmin that well, all singular
            values are computed, if the smaller side of M has up to 5000 rows.
        **geometry: As for `extreme_singular_values`.

    Returns:
        The condition number, a plain float; inf where σmin is 0 or cannot be told from it by all singular
        values. Of larger M it may be too small, and then a RuntimeWarning says so.

    Raises:
        ValueError, TypeError: As `extreme_singular_values`.

    Example:
        >>> kernel = np.zeros((3, 3, 2, 2))
        >>> kernel[1, 1] = [[2.0, 0.0], [0.0, 0.5]]
        >>> print(condition_number(kernel, 8))
        4.0
        >>> print(condition_number(np.roll(kernel, 1, axis=0), 8))  # a shift loses a row at the border
        inf
    """
    kernel = known_values(kernel)
    accuracy = check_number("accuracy", accuracy, exclusive=True)
    conv = Convolution.of(kernel.shape, input_size, geometry)

    def known(found):
        return (
            found.sigma_max_error <= accuracy / 3 * found.sigma_max
            and found.sigma_min_error <= accuracy / 3 * found.sigma_min
        )

    found = ExtremesFinder(conv, min(accuracy, 1e-4))(kernel)
    share = ratio(found.sigma_min, found.sigma_max)
    if not known(found) and share > 1e-6:  # a residual ε of σ² is one of ε/2σ of σ
        found = ExtremesFinder(conv, accuracy / 2 * share**2)(kernel, found)
    if known(found):
        return ratio(found.sigma_max, found.sigma_min)
    if min(conv.shape) > ALL_ROWS:
        _warn(
            f"σmin = {found.sigma_min:.3g} may be up to {found.sigma_min_error:.2g} too large, and the "
            "condition number too small"
        )
        return ratio(found.sigma_max, found.sigma_min)
    sigma = all_singular_values(kernel, conv, max(accuracy / 3 * min(share, 1.0), 1e-14))
    noise = min(conv.shape) * np.finfo(np.float64).eps * sigma[0]
    return ratio(sigma[0], sigma[-1] if sigma[-1] > noise else 0.0)


def ratio(high: float, low: float) -> float:
    """The condition number of two singular values; NaN where one is, inf where `low` is 0."""
    return float(high / low) if low else (math.nan if math.isnan(high) else math.inf)


def _warn(message):
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _is_cheap_by_frequency(conv: Convolution) -> bool:
    groups, g, h = conv.blocks
    frequencies = math.prod(axis.input_size for axis in conv.axes)
    return has_frequencies(conv) and frequencies * groups * g * h * min(g, h) <= FREQUENCY_WORK
