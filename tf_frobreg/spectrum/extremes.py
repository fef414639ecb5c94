"""σmax and σmin of M without its other singular values, for layers whose M does not fit in memory."""

import math
import warnings
from typing import Any, NamedTuple, Unpack

import numpy as np

from tf_frobreg.checks import check_accuracy, check_integer, check_memory, check_number, received
from tf_frobreg.convolution.apply import check_images
from tf_frobreg.convolution.geometry import Convolution, Geometry, Size
from tf_frobreg.convolution.kernel import kernel_and_convolution, known_values
from tf_frobreg.spectrum.all_values import (
    DECOMPOSED_ROWS,
    all_singular_values,
    has_frequencies,
    largest_entry,
)
from tf_frobreg.spectrum.extreme_search import (
    LANCZOS_VECTORS,
    Eigenpair,
    Product,
    find_outermost,
    gram_products,
    rayleigh,
)
from tf_frobreg.spectrum.symbol import symbol_peak, wave_vector

__all__ = ["ExtremeSingularValues", "condition_number", "extreme_singular_values", "spectral_norm"]

ALL_ROWS = 5000  # up to which condition_number computes all singular values: about 15 s
DENSE_ROWS = 1500  # of the smaller Gram matrix, up to which all singular values are computed: 0.25 s
RESCUE_ROWS = 2000  # up to which all singular values are computed if the search fails: about 1 s
FREQUENCY_WORK = 3e8  # frequencies·g·h·min(g, h) of "circular" layers: 0.3 s for all singular values
# A σ next to the outermost one can hide it from a search. The search for σmax asks for a residual that is
# this many times smaller: this happens in 1 of 60 kernels instead of 3, at a tenth more products. For σmin it
# would take four times as many products.
CAUTION = 4
PRODUCTS = 20  # whose time the bounds of a large image may take
NOISE = 0.1  # share of a random vector in a warm start, for a σ that has become the outermost since then


class SearchVectors:
    """The vectors at which a search ended. Opaque, so that printing and comparing results ignore them."""

    def __init__(self, high: np.ndarray, low: np.ndarray | None):
        self.high, self.low = high, low

    def __repr__(self) -> str:
        return f"<vectors of {self.high.size} entries>"


class ExtremeSingularValues(NamedTuple):
    """The largest and the smallest of the min(rows, columns) singular values of M, in units of σ.

    The errors are estimates from the residuals of the search, not bounds. A search can miss the outermost σ
    if another one lies close to it. The true error is then larger: by a factor of 1.3 in 1 of 60 kernels.

    Attributes:
        sigma_max: Never above σmax, up to rounding.
        sigma_min: Never below σmin, up to rounding. NaN if it was not requested.
        sigma_max_error: Estimate of how much larger σmax may be.
        sigma_min_error: Estimate of how much smaller σmin may be. At least `sigma_min` if σmin cannot be
            distinguished from 0. σmin is then between 0 and about this number.
        sigma_max_converged: Whether σmax has the requested accuracy, by its error estimate.
        sigma_min_converged: The same for σmin.
        vectors: The vectors at which the search ended, for a warm start. None if there was no search.
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
        """Whether both values have the requested accuracy, by their error estimates."""
        return self.sigma_max_converged and self.sigma_min_converged

    @property
    def sigma_min_bound(self) -> float:
        """The largest number that σmin can be: `sigma_min`, or its error if that is larger.

        A `sigma_min` far below its error is noise. NaN if σmin was not requested.
        """
        return max(self.sigma_min, self.sigma_min_error)

    @property
    def sigma_min_is_bound(self) -> bool:
        """Whether σmin is only bounded from above: it can be 0, or it does not have the accuracy."""
        if math.isnan(self.sigma_min):
            return False
        can_be_0 = self.sigma_min_error > 0 and self.sigma_min_error >= self.sigma_min
        return can_be_0 or not self.sigma_min_converged


class ExtremesFinder:
    """`extreme_singular_values` of one geometry, as a function of the kernel.

    Args:
        conv: The geometry.
        accuracy: Below 1. The error estimate of σmax to reach, relative to σmax.
        max_iterations: Approximate limit on products with G, for each singular value and each solver.
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
        conv = _without_repetition(conv)
        self._conv, self._sigma_min = conv, sigma_min
        self._accuracy = check_accuracy(accuracy)
        self._iterations = check_integer("max_iterations", max_iterations)
        self._size = min(conv.shape)
        # Rounding of the sums in a product with G, relative to σmax².
        self._rounding = np.finfo(np.float64).eps * math.prod(conv.kernel_size) * sum(conv.blocks[1:])
        dense_rows = DENSE_ROWS if dense_rows is None else dense_rows
        self._direct = self._size <= dense_rows or _is_cheap_by_frequency(conv)
        # How far a wave that fades towards the border may be from the peak of the symbol, relative to σmax.
        degrees = [(axis.kernel_size - 1) // axis.stride for axis in conv.axes]
        sizes = [axis.output_size for axis in conv.axes]
        gap = sum((math.pi * d / n) ** 2 / 8 for d, n in zip(degrees, sizes, strict=True))
        self._has_wave = bool(conv.axes) and gap <= 4 * self._accuracy
        if not self._direct:
            check_memory(
                8 * LANCZOS_VECTORS * self._size,
                f"{LANCZOS_VECTORS} vectors of {self._size:,} entries",
                "a smaller input_size",
            )
            check_images(conv, 1)

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
            found = self._search(kernel, vectors)
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
        """Returns the vectors to start at, if there are any."""
        if start is not None and not isinstance(start, ExtremeSingularValues):
            raise TypeError(
                f"start must be a result of extreme_singular_values. Received: {received('start', start)}"
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
        """Returns the largest and the smallest of all singular values, which are computed."""
        decomposed = self._size <= DECOMPOSED_ROWS or has_frequencies(self._conv)
        accuracy = 1e-14 if decomposed else 1e-8
        sigma = all_singular_values(kernel, self._conv, accuracy) if kernel.any() else np.zeros(1)
        error = float(max(accuracy, self._size * np.finfo(np.float64).eps) * sigma[0])
        low = low_error = float(sigma[-1])
        if low > error:
            low_error = error
        elif low > 0 or not decomposed:  # the error has both signs
            low_error += error
        # A decomposition returns exactly 0 only for a zero row or column of M: then σmin is 0.
        return ExtremeSingularValues(
            sigma_max=float(sigma[0]),
            sigma_min=low if self._sigma_min else math.nan,
            sigma_max_error=error,
            sigma_min_error=low_error if self._sigma_min else math.nan,
            sigma_max_converged=True,
            sigma_min_converged=self._sigma_min,
        )

    def _search(self, kernel: np.ndarray, start: SearchVectors | None) -> ExtremeSingularValues:
        """Searches for the outermost eigenpairs of the smaller Gram matrix."""
        products = gram_products(kernel, self._conv)
        random = np.random.RandomState(0).standard_normal((self._size, 1))  # fixed, for repeatable results
        sample = rayleigh(products[-1].multiply, random)
        if sample.value == 0.0:
            return self._from_all(np.zeros(1))
        # For a random vector, θ is about the mean of all σ² and the residual about their standard deviation.
        finest = 0.01 * sample.residual / sample.value
        random = sample.vector
        # An error ε of σ² is an error ε/2σ of σ, so σmax allows twice the residual.
        goal = max(min(2 * self._accuracy / CAUTION, finest), self._rounding)
        high, bound = self._wave(kernel, products[-1])
        if high is None or not self._reaches(high, bound):
            near = high and high.vector if start is None else start.high
            first = products[-1].multiply(random) if near is None else near + NOISE * random
            high = find_outermost(products, first, goal, self._iterations)
        low = None
        if self._sigma_min:
            first = random if start is None or start.low is None else start.low + NOISE * random
            goal = max(min(self._accuracy, finest), self._rounding)
            low = find_outermost(products, first, goal, self._iterations, largest=high.value)
        return self._estimate(high, low, bound)

    def _wave(self, kernel: np.ndarray, product: Product) -> tuple[Eigenpair | None, float]:
        """Returns the eigenpair near the peak of the symbol, and the peak, for a large image.

        The peak is an upper bound of σmax. Without it, the result is (None, inf).
        """
        if not self._has_wave:
            return None, math.inf
        work = 2 * kernel.size * math.prod(axis.output_size for axis in self._conv.axes)
        peak = symbol_peak(kernel, self._conv, 0.1 * self._accuracy, max(FREQUENCY_WORK, PRODUCTS * work))
        if peak is None:
            return None, math.inf
        return rayleigh(product.multiply, wave_vector(kernel, self._conv, peak)), peak.upper

    def _reaches(self, high: Eigenpair, bound: float) -> bool:
        """Returns whether an upper bound of σmax shows that an eigenvalue has the accuracy."""
        return (1 - self._accuracy) * bound <= math.sqrt(max(high.value, 0.0))

    def _estimate(self, high: Eigenpair, low: Eigenpair | None, bound: float) -> ExtremeSingularValues:
        """Returns the singular values of the outermost eigenpairs, with error estimates."""
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
            if low.value < rounding:  # it is noise, and can be too small too
                sigma_min_error = math.sqrt(max(low.value, 0.0) + rounding)
        return ExtremeSingularValues(
            sigma_max=sigma_max,
            sigma_min=sigma_min,
            sigma_max_error=min(math.sqrt(high.value + above), max(bound, sigma_max)) - sigma_max,
            sigma_min_error=sigma_min_error,
            sigma_max_converged=high.residual <= 2 * allowed or self._reaches(high, bound),
            sigma_min_converged=low is not None and low.residual <= allowed,
            vectors=SearchVectors(high.vector, None if low is None else low.vector),
        )


def _without_repetition(conv: Convolution) -> Convolution:
    """Returns a convolution with the same σmax and σmin, on one pixel if the kernel has one tap.

    Such a kernel does the same at each pixel. Strides can add σ = 0, and then the convolution stays.
    """
    groups, g, h = conv.blocks
    count = math.prod(axis.output_size for axis in conv.axes) * groups * min(g, h)
    if not conv.axes or math.prod(conv.kernel_size) > 1 or min(conv.shape) > count:
        return conv
    return Convolution(conv.kernel_shape, 1, groups=conv.groups, kind=conv.kind)


def extreme_singular_values(
    kernel: Any,
    input_size: Size | None = None,
    *,
    accuracy: float = 1e-4,
    start: ExtremeSingularValues | None = None,
    max_iterations: int = 1000,
    **geometry: Unpack[Geometry],
) -> ExtremeSingularValues:
    """Returns σmax and σmin of M with error estimates, for layers of any size.

    σmax² and σmin² are the outermost eigenvalues of the smaller Gram matrix G, MᵀM or MMᵀ. Lanczos iteration
    (ARPACK) searches for them. If it does not converge, LOBPCG continues and returns its best vector in any
    case. Both need only products with G. These use a sparse matrix or, for larger layers, a convolution and
    its adjoint, first in float32, then in float64. If G has up to 1500 rows, and for "circular" layers of
    moderate size, all singular values are computed instead, and none can be missed.

    On a large image the top of the spectrum is dense, and a search takes long. The symbol of the layer
    without its border then gives a true upper bound of σmax, and an image with one plane wave comes close to
    it. If they agree to the accuracy, there is no search for σmax, and its error is a bound. There is no such
    bound for σmin: on millions of pixels the search for it takes minutes. `spectral_norm` leaves it out.

    For a unit vector v, θ = vᵀGv lies between σmin² and σmax², and some σ² is at most the residual ‖Gv − θv‖
    away from θ. Both are computed in float64. The error estimates assume that this σ² is the outermost one.
    A search can miss the outermost σ if another one lies close to it: of 60 kernels, one σmax and one σmin
    were off by 1.3 times their error estimate. If all σ² are close together, as in regularized kernels, every
    vector has a small residual. The search then continues to a residual of a hundredth of their spread.

    Args:
        kernel: `(*kernel_size, in_channels, filters)`, float32 or float64; array, tensor or variable,
            or a built Keras layer.
        input_size: Spatial size of the input image, an int or one int per axis. A layer may know its own.
        accuracy: Below 1. The error estimate to reach is accuracy·σmax for σmax. For σmin it is
            √accuracy·σmax or, if σmin is larger than that, accuracy·σmax²/2σmin. A σmin below 1e-7·σmax is
            noise at any accuracy, unless all singular values are computed.
        start: An earlier result for a similar kernel of the same geometry, such as the kernel one epoch
            before. The search begins at its vectors and takes at least about twenty products per value. A
            share of a random vector is added, because another σ may have become the outermost one.
        max_iterations: Approximate limit on products with G, for each singular value and each solver.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups`, `kind`, as in
            `tf_frobreg.Convolution`.

    Returns:
        An `ExtremeSingularValues`: a named tuple of σmax, σmin, their error estimates, and whether each has
        the requested accuracy.

    Raises:
        ValueError: If an argument is invalid, or if 20 vectors do not fit in memory.
        TypeError: If an argument has the wrong type.

    Example:
        >>> kernel = np.random.RandomState(1).randn(3, 3, 3, 6)
        >>> extremes = extreme_singular_values(kernel, 20)
        >>> print(f"{extremes.sigma_max:.3f} {extremes.sigma_min:.3f}", extremes.converged)
        10.945 1.524 True
        >>> print(f"{extreme_singular_values(1.01 * kernel, 20, start=extremes).sigma_max:.3f}")
        11.055
    """
    kernel, conv = kernel_and_convolution(kernel, input_size, geometry, convert=known_values)
    return ExtremesFinder(conv, accuracy, max_iterations=max_iterations)(kernel, start)


def spectral_norm(
    kernel: Any, input_size: Size | None = None, *, accuracy: float = 1e-4, **geometry: Unpack[Geometry]
) -> float:
    """Returns ‖M‖₂ = σmax, the Lipschitz constant of the layer before its activation.

    Args:
        kernel: `(*kernel_size, in_channels, filters)`, float32 or float64; array, tensor or variable,
            or a built Keras layer.
        input_size: Spatial size of the input image, an int or one int per axis. A layer may know its own.
        accuracy: Below 1. The relative error to reach, by the estimate of `extreme_singular_values`.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups`, `kind`, as in
            `tf_frobreg.Convolution`.

    Returns:
        σmax, a plain float. It is never above the true value, up to rounding. If the accuracy is not reached,
        a RuntimeWarning gives the error estimate.

    Raises:
        ValueError: If an argument is invalid, or if 20 vectors do not fit in memory.
        TypeError: If an argument has the wrong type.

    Example:
        A sum over 3×3 neighbours multiplies a constant image by 9, except at its border:

        >>> print(f"{spectral_norm(np.ones((3, 3, 1, 1)), 100):.3f}")
        8.994
        >>> print(f"{spectral_norm(np.ones((3, 3, 1, 1)), 100, padding='circular'):.3f}")
        9.000
    """
    kernel, conv = kernel_and_convolution(kernel, input_size, geometry, convert=known_values)
    found = ExtremesFinder(conv, accuracy, sigma_min=False)(kernel)
    if not found.sigma_max_converged:
        _warn(
            f"σmax = {found.sigma_max:.6g} did not reach the accuracy. It may be about "
            f"{found.sigma_max_error:.2g} too small"
        )
    return found.sigma_max


def condition_number(
    kernel: Any, input_size: Size | None = None, *, accuracy: float = 0.01, **geometry: Unpack[Geometry]
) -> float:
    """Returns the condition number σmax / σmin. σmin is the smallest of the min(rows, columns) σ of M.

    Args:
        kernel: `(*kernel_size, in_channels, filters)`, float32 or float64; array, tensor or variable,
            or a built Keras layer.
        input_size: Spatial size of the input image, an int or one int per axis. A layer may know its own.
        accuracy: Relative error to reach. If the error estimate of σmin stays above it, and the smaller side
            of M has up to 5000 rows, all singular values are computed.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups`, `kind`, as in
            `tf_frobreg.Convolution`.

    Returns:
        The condition number, a plain float. It is inf if σmin is 0, or if σmin cannot be distinguished from 0
        among all singular values. For a larger M it may be too small, and a RuntimeWarning says so.

    Raises:
        ValueError: If an argument is invalid, or if the vectors or matrices do not fit in memory.
        TypeError: If an argument has the wrong type.

    Example:
        >>> kernel = np.zeros((3, 3, 2, 2))
        >>> kernel[1, 1] = [[2.0, 0.0], [0.0, 0.5]]
        >>> print(condition_number(kernel, 8))
        4.0
        >>> print(condition_number(np.roll(kernel, 1, axis=0), 8))  # a shift loses a row at the border
        inf
    """
    kernel, conv = kernel_and_convolution(kernel, input_size, geometry, convert=known_values)
    accuracy = check_number("accuracy", accuracy, exclusive=True)

    def reached(found: ExtremeSingularValues) -> bool:
        return (
            found.sigma_max_error <= accuracy / 3 * found.sigma_max
            and found.sigma_min_error <= accuracy / 3 * found.sigma_min
        )

    found = ExtremesFinder(conv, min(accuracy, 1e-4))(kernel)
    share = ratio(found.sigma_min, found.sigma_max)
    if not reached(found) and share > 1e-6:  # an error ε of σ² is an error ε/2σ of σ
        found = ExtremesFinder(conv, accuracy / 2 * share**2)(kernel, found)
    if reached(found):
        return ratio(found.sigma_max, found.sigma_min)
    if min(conv.shape) > ALL_ROWS:
        _warn(
            f"σmin = {found.sigma_min:.3g} did not reach the accuracy. It may be about "
            f"{found.sigma_min_error:.2g} too large, and the condition number too small"
        )
        return ratio(found.sigma_max, found.sigma_min)
    sigma = all_singular_values(kernel, conv, max(accuracy / 3 * min(share, 1.0), 1e-14))
    noise = min(conv.shape) * np.finfo(np.float64).eps * sigma[0]
    return ratio(sigma[0], sigma[-1] if sigma[-1] > noise else 0.0)


def ratio(high: float, low: float) -> float:
    """Returns high / low: inf if `low` is 0, NaN if one of them is NaN."""
    return float(high / low) if low else (math.nan if math.isnan(high) else math.inf)


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _is_cheap_by_frequency(conv: Convolution) -> bool:
    """Returns whether a Fourier transform gives all singular values in about 0.3 s."""
    groups, g, h = conv.blocks
    frequencies = math.prod(axis.input_size for axis in conv.axes)
    return has_frequencies(conv) and frequencies * groups * g * h * min(g, h) <= FREQUENCY_WORK
