"""σmax and σmin of M without its other singular values: what fits where M does not."""

import math
import warnings
from typing import Unpack

import numpy as np

from tf_frobreg.checks import check_number
from tf_frobreg.convolution import Convolution, Geometry
from tf_frobreg.search import Extremes, ExtremeSingularValues
from tf_frobreg.spectrum import all_singular_values, known_values

__all__ = ["condition_number", "extreme_singular_values", "ratio", "spectral_norm"]

ALL_ROWS = 5000  # up to which condition_number computes all singular values: about 15 s


def extreme_singular_values(
    kernel,
    input_size,
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
            `tf_frobreg.convolution.Convolution`.

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
    return Extremes(conv, accuracy, max_iterations=max_iterations)(kernel, start)


def spectral_norm(kernel, input_size, *, accuracy: float = 1e-4, **geometry: Unpack[Geometry]) -> float:
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
    found = Extremes(Convolution.of(kernel.shape, input_size, geometry), accuracy, low=False)(kernel)
    if not found.sigma_max_converged:
        _warn(f"σmax = {found.sigma_max:.6g} may be up to {found.sigma_max_error:.2g} too small")
    return found.sigma_max


def condition_number(kernel, input_size, *, accuracy: float = 0.01, **geometry: Unpack[Geometry]) -> float:
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

    found = Extremes(conv, min(accuracy, 1e-4))(kernel)
    share = ratio(found.sigma_min, found.sigma_max)
    if not known(found) and share > 1e-6:  # a residual ε of σ² is one of ε/2σ of σ
        found = Extremes(conv, accuracy / 2 * share**2)(kernel, found)
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
