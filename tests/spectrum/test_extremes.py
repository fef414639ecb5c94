"""σmax and σmin, against all singular values and against spectra that a search finds difficult."""

import math

import numpy as np
import pytest
import tensorflow as tf
from geometries import CIRCULAR_CASES, KERAS_CASES, Case, label
from ids import stable_id

import tf_frobreg.spectrum.extreme_search
import tf_frobreg.spectrum.extremes
from tf_frobreg import (
    Convolution,
    condition_number,
    extreme_singular_values,
    regularize_kernel,
    singular_values,
    spectral_norm,
)

SMALLEST_SEARCHED = 6  # rows of the smaller Gram matrix, by the fixture `searched`
LARGER_CASES = [
    Case((3, 3, 3, 6), (12, 12)),
    Case((3, 3, 6, 3), (12, 10), padding="valid"),
    Case((3, 3, 4, 4), (11, 12), padding="circular"),
    Case((3, 3, 4, 6), (17, 16), strides=2),
    Case((3, 3, 2, 8), (9, 10), groups=2),
    Case((3, 3, 5, 2), (9, 10), kind="depthwise"),
    Case((3, 3, 3, 6), (9, 8), strides=2, kind="transpose"),
    Case((5, 4, 6), (80,), dilation_rate=2),
    Case((3, 3, 3, 2, 3), (5, 6, 5)),
    Case((70, 50), ()),
]


CASES = [*LARGER_CASES, *KERAS_CASES, *CIRCULAR_CASES]


def rows(case):
    """Rows of the smaller Gram matrix. A kernel of one tap counts at one pixel only."""
    conv = Convolution.of(case.kernel_shape, case.image, case.geometry)
    if math.prod(conv.kernel_size) == 1 and case.strides == 1:
        return min(conv.blocks[1:]) * conv.blocks[0]
    return min(conv.shape)


def normal(*shape, seed=1):
    return np.random.RandomState(seed).randn(*shape)


@pytest.fixture(params=["sparse", "convolutions"])
def searched(request, monkeypatch):
    """Sends small layers through the search that large layers need."""
    monkeypatch.setattr(tf_frobreg.spectrum.extremes, "DENSE_ROWS", SMALLEST_SEARCHED - 1)
    monkeypatch.setattr(tf_frobreg.spectrum.extremes, "FREQUENCY_WORK", 0)
    monkeypatch.setattr(tf_frobreg.spectrum.extremes, "RESCUE_ROWS", 0)
    if request.param == "convolutions":
        monkeypatch.setattr(tf_frobreg.spectrum.extreme_search, "SPARSE_ENTRIES", 0)
    return request.param


def check_estimates(found, sigma, accuracy=1e-4):
    """Some σ lies within each error estimate. If a search converged, the outermost σ does."""
    rounding = 1e-7 * sigma[0]  # the error of a σmin near 0

    def within(low, high):
        return ((low - rounding <= sigma) & (sigma <= high + rounding)).any()

    assert found.sigma_max <= sigma[0] + rounding
    assert found.sigma_min >= sigma[-1] - rounding
    assert within(found.sigma_max - found.sigma_max_error, found.sigma_max + found.sigma_max_error)
    assert within(found.sigma_min - found.sigma_min_error, found.sigma_min + found.sigma_min_error)
    assert found.converged or accuracy < 1e-4  # 1000 iterations may not separate many σ² near 0
    if found.sigma_max_converged:
        assert found.sigma_max_error <= 1.01 * accuracy * sigma[0] + rounding
        assert sigma[0] - found.sigma_max <= accuracy * sigma[0] + rounding
    if found.sigma_min_converged:
        assert found.sigma_min_error <= 1.01 * accuracy**0.5 * sigma[0] + rounding
    if accuracy >= 1e-4:  # among several σ² far below the residual, the search may not find the smallest
        assert found.sigma_min - sigma[-1] <= accuracy**0.5 * sigma[0] + rounding


@pytest.mark.parametrize("case", [case for case in CASES if rows(case) >= SMALLEST_SEARCHED], ids=label)
@pytest.mark.parametrize("accuracy", [1e-4, 1e-7])
def test_a_search_finds_the_ends_of_the_spectrum(case, accuracy, searched):
    kernel = case.kernel()
    sigma = singular_values(kernel, case.image, **case.geometry)
    found = extreme_singular_values(kernel, case.image, accuracy=accuracy, **case.geometry)
    assert found.vectors is not None
    check_estimates(found, sigma, accuracy)


@pytest.mark.parametrize("case", [case for case in CASES if rows(case) < SMALLEST_SEARCHED], ids=label)
@pytest.mark.parametrize("accuracy", [1e-4, 1e-7])
def test_smaller_layers_are_not_searched(case, accuracy, searched):
    kernel = case.kernel()
    sigma = singular_values(kernel, case.image, **case.geometry)
    found = extreme_singular_values(kernel, case.image, accuracy=accuracy, **case.geometry)
    assert found.vectors is None
    assert found[:2] == pytest.approx((sigma[0], sigma[-1]), rel=1e-6, abs=1e-8 * sigma[0])
    check_estimates(found, sigma, accuracy)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_small_layers_are_exact(case):
    kernel = case.kernel()
    sigma = singular_values(kernel, case.image, accuracy=1e-14, **case.geometry)
    found = extreme_singular_values(kernel, case.image, **case.geometry)
    assert sigma.size <= tf_frobreg.spectrum.extremes.DENSE_ROWS
    assert found[:2] == pytest.approx((sigma[0], sigma[-1]), rel=1e-6, abs=1e-8 * sigma[0])
    assert found.sigma_max_error <= 1.01e-8 * sigma[0]
    assert found.vectors is None
    check_estimates(found, sigma)


@pytest.mark.parametrize("shape", [(3, 3, 3, 6), (3, 3, 6, 3), (3, 3, 8, 8)], ids=stable_id)
@pytest.mark.parametrize("steps", [1, 20, 100, 300])
def test_extremes_of_regularized_kernels(shape, steps, searched):
    """If all σ² are close together, θ of a random vector is close to one. The search must not stop there."""
    kernel = regularize_kernel(normal(*shape), 12, tolerance=0.0, max_steps=steps).kernel
    sigma = singular_values(kernel, 12)
    spread = np.std(sigma**2)
    found = extreme_singular_values(kernel, 12)
    check_estimates(found, sigma)
    assert sigma[0] ** 2 - found.sigma_max**2 <= 0.1 * spread
    assert found.sigma_min**2 - sigma[-1] ** 2 <= 0.1 * spread + 1e-12


@pytest.mark.parametrize(
    ("case", "without_search"),
    [
        (Case((1, 1, 3, 5), (9, 8)), True),
        (Case((1, 1, 5, 3), (9, 8), strides=2), True),
        (Case((1, 1, 3, 5), (9, 8), strides=2), False),  # σ = 0 at the pixels between the strides
        (Case((1, 1, 3, 5), (9, 8), padding="circular"), True),
        (Case((1, 1, 2, 4), (9, 8), groups=2), True),
        (Case((1, 1, 4, 1), (9, 8), kind="depthwise"), True),
        (Case((1, 1, 3, 5), (4, 5), strides=2, kind="transpose"), False),
        (Case((1, 1, 5, 3), (9, 8), kind="transpose"), True),
        (Case((1, 3, 5), (40,)), True),
    ],
    ids=stable_id,
)
def test_a_kernel_of_one_tap_is_not_searched(case, without_search, searched):
    kernel = case.kernel()
    sigma = singular_values(kernel, case.image, **case.geometry)
    found = extreme_singular_values(kernel, case.image, **case.geometry)
    assert (found.vectors is None) == without_search
    check_estimates(found, sigma)


def test_an_image_of_any_size_does_not_matter_for_one_tap():
    kernel = normal(1, 1, 64, 32)
    sigma = np.linalg.svd(kernel[0, 0], compute_uv=False)
    found = extreme_singular_values(kernel, 10**6)
    assert found[:2] == pytest.approx((sigma[0], sigma[-1]), rel=1e-9)


@pytest.mark.slow
def test_a_large_layer_whose_spectrum_is_known():
    """3×3×64×64 at 32×32 has 65,536 singular values. Without a border, a Fourier transform gives them all."""
    kernel = normal(3, 3, 64, 64) / 24
    sigma = singular_values(kernel, 32, padding="circular")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tf_frobreg.spectrum.extremes, "FREQUENCY_WORK", 0)
        check_estimates(extreme_singular_values(kernel, 32, padding="circular"), sigma)
        assert spectral_norm(kernel, 32, padding="circular") == pytest.approx(sigma[0], rel=1e-4)
    found = extreme_singular_values(kernel, 32, padding="circular")
    assert found[:2] == pytest.approx((sigma[0], sigma[-1]), rel=1e-12)


def orthogonal(n, seed=0):
    return np.linalg.qr(normal(n, n, seed=seed))[0]


def tap(matrix, place=(1, 1)):
    kernel = np.zeros((3, 3, *matrix.shape))
    kernel[place] = matrix
    return kernel


@pytest.mark.parametrize(
    ("kernel", "size", "expected"),
    [
        (tap(np.eye(3)), 9, (1.0, 1.0)),
        (tap(2 * orthogonal(4)), 9, (2.0, 2.0)),
        (tap(orthogonal(4), (0, 1)), 9, (1.0, 0.0)),  # a shift loses a row of pixels
        (np.zeros((3, 3, 2, 5)), 9, (0.0, 0.0)),
        (tap(np.diag([3.0, 0.0])), 9, (3.0, 0.0)),
        (tap(np.diag([3.0] + [1.0] * 30)), 9, (3.0, 1.0)),
        (tap(orthogonal(6)[:, :2]), 9, (1.0, 1.0)),  # 2 filters of 6 channels: 2·81 values
        (normal(3, 3, 5, 5), 1, None),  # a single pixel sees the centre tap
        (normal(3, 3, 12, 30), 1, None),
    ],
    ids=["identity", "orthogonal", "shift", "zero", "rank", "outlier", "wide", "pixel", "wide pixel"],
)
@pytest.mark.parametrize("scale", [1e-160, 1e-20, 1.0, 1e20, 1e150])
def test_special_kernels(kernel, size, expected, scale, searched):
    if expected is None:
        sigma = np.linalg.svd(kernel[1, 1], compute_uv=False)
        expected = sigma[0], sigma[-1]
    found = extreme_singular_values(scale * kernel, size)
    assert np.isfinite(found[:4]).all()
    assert found.converged
    assert found.sigma_max == pytest.approx(scale * expected[0], rel=1e-4)
    assert found.sigma_min == pytest.approx(scale * expected[1], rel=1e-4, abs=0.01 * found.sigma_max)
    assert spectral_norm(scale * kernel, size) == pytest.approx(scale * expected[0], rel=1e-4)
    exact = expected[0] / expected[1] if expected[1] else np.inf
    assert condition_number(scale * kernel, size) == pytest.approx(exact, rel=0.01)
    every = singular_values(scale * kernel, size)
    assert every[[0, -1]] == pytest.approx(scale * np.array(expected), rel=1e-8, abs=1e-8 * found.sigma_max)


def test_the_zero_operator():
    # Dilation 2 moves every tap except the middle one off a single pixel.
    kernel = normal(3, 1, 2, 2)
    kernel[1] = 0.0
    assert extreme_singular_values(kernel, 1, dilation_rate=2)[:4] == (0.0, 0.0, 0.0, 0.0)
    assert condition_number(kernel, 1, dilation_rate=2) == np.inf


def test_a_warm_start_takes_few_products(searched, monkeypatch):
    kernel = normal(3, 3, 8, 8)
    cold = extreme_singular_values(kernel, 12)
    count = []
    products = tf_frobreg.spectrum.extremes.gram_products

    def counted(kernel, conv):
        def count_one(multiply):
            return lambda column: count.append(1) or multiply(column)

        return [p._replace(multiply=count_one(p.multiply)) for p in products(kernel, conv)]

    monkeypatch.setattr(tf_frobreg.spectrum.extremes, "gram_products", counted)
    near = kernel + 1e-3 * normal(3, 3, 8, 8, seed=2)
    again = extreme_singular_values(near, 12)
    without, count[:] = len(count), []
    warm = extreme_singular_values(near, 12, start=cold)
    assert len(count) < without / 2
    check_estimates(warm, singular_values(near, 12))
    assert again.sigma_max == pytest.approx(warm.sigma_max, rel=2e-4)


@pytest.mark.parametrize("high", [1.5, 1.01])
@pytest.mark.parametrize("low", [0.2, 0.49])
def test_a_warm_start_notices_another_outermost_value(high, low, searched):
    """The old vectors remain singular vectors, but their σ is no longer the outermost one."""
    before = tap(np.diag([1.0] + [0.5] * 8))
    after = tap(np.diag([1.0, high] + [0.5] * 6 + [low]))
    found = extreme_singular_values(after, 9, start=extreme_singular_values(before, 9))
    assert found.sigma_max == pytest.approx(high, rel=1e-4)
    assert found.sigma_min == pytest.approx(low, rel=1e-3)


def test_a_search_that_did_not_converge_says_so(searched):
    kernel = normal(3, 3, 8, 8)
    found = extreme_singular_values(kernel, 12, max_iterations=2)
    assert not found.converged
    assert not found.sigma_min_converged
    sigma = singular_values(kernel, 12)
    assert found.sigma_max <= sigma[0]
    assert found.sigma_min >= sigma[-1]
    assert found.sigma_min_error > 0.1
    again = extreme_singular_values(kernel, 12, start=found)
    check_estimates(again, sigma)


@pytest.mark.parametrize("seed", range(20))
def test_ordinary_kernels_are_within_their_error_estimates(seed):
    """A search would miss some of these: a σ next to the outermost one hides it."""
    random = np.random.RandomState(seed)
    shape, size = [((3, 3, 4, 8), 15), ((3, 3, 8, 4), 14), ((3, 3, 6, 2), 20), ((3, 3, 3, 2, 3), 9)][seed % 4]
    kernel = random.randn(*shape)
    sigma = singular_values(kernel, size)
    found = extreme_singular_values(kernel, size)
    assert 0 <= sigma[0] - found.sigma_max + 1e-12 <= found.sigma_max_error + 2e-12
    assert 0 <= found.sigma_min - sigma[-1] + 1e-12 <= found.sigma_min_error + 2e-12


def test_small_layers_that_do_not_converge_are_decomposed(monkeypatch):
    monkeypatch.setattr(tf_frobreg.spectrum.extremes, "DENSE_ROWS", 5)
    kernel = normal(3, 3, 8, 8)
    found = extreme_singular_values(kernel, 8, max_iterations=2)
    check_estimates(found, singular_values(kernel, 8), accuracy=1e-8)


def test_spectral_norm_and_condition_number_warn_if_they_are_not_accurate(searched, monkeypatch):
    kernel = normal(3, 3, 8, 8)
    with pytest.warns(RuntimeWarning, match="σmax = .* may be about .* too small"):
        spectral_norm(kernel, 12, accuracy=1e-16)
    monkeypatch.setattr(tf_frobreg.spectrum.extremes, "ALL_ROWS", 10)
    shift = tap(np.diag([1.0, 0.999]), (0, 1))
    with pytest.warns(RuntimeWarning, match="σmin = .* too large, and the condition number too small"):
        assert condition_number(shift, 12) > 1e4


@pytest.mark.parametrize("spread", [10.0, 1e3, 1e5, 1e7])
def test_condition_number(spread, searched):
    kernel = tap(np.diag(np.geomspace(1.0, 1 / spread, 6)))
    assert condition_number(kernel, 6) == pytest.approx(spread, rel=0.01)


def test_float32_kernels_are_computed_in_float64():
    kernel = normal(3, 3, 2, 2).astype("float32")
    assert extreme_singular_values(kernel, 5)[:4] == extreme_singular_values(kernel.astype("float64"), 5)[:4]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"accuracy": 0}, ValueError, "accuracy must be a finite number above 0. Received: accuracy=0"),
        ({"accuracy": 1}, ValueError, "accuracy must be below 1. Received: accuracy=1"),
        ({"max_iterations": 0}, ValueError, "max_iterations must be at least 1"),
        ({"start": 3.0}, TypeError, "start must be a result of extreme_singular_values.*start=3.0"),
        ({"stride": 2}, TypeError, "unknown argument 'stride'"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        extreme_singular_values(normal(3, 3, 8, 8), 12, **arguments)


def test_a_start_of_another_geometry_is_refused():
    start = extreme_singular_values(normal(3, 3, 8, 8), 16)
    with pytest.raises(ValueError, match="start must come from the same geometry, whose vectors have 2592"):
        extreme_singular_values(normal(3, 3, 8, 8), 18, start=start)


def test_vectors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="vectors of 4,611,686,014,132,420,609 entries"):
        extreme_singular_values(np.ones((2, 1, 1, 1)), 2**31 - 1)


def test_a_kernel_without_known_values_is_refused():
    for function in (extreme_singular_values, spectral_norm, condition_number):
        with pytest.raises(TypeError, match="kernel must have known values"):
            tf.function(lambda k, f=function: f(k, 5))(tf.ones((3, 3, 1, 1)))


def test_printing_a_result_shows_no_vectors(searched):
    found = extreme_singular_values(normal(3, 3, 2, 4), 5)
    assert str(found).endswith("vectors=<vectors of 50 entries>)")
