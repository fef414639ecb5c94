"""Bounds on σmax from the symbol, against the true M and against the symbol at many frequencies."""

import itertools

import numpy as np
import pytest
from geometries import CIRCULAR_CASES, KERAS_CASES, Case, label, normal
from oracles import true_matrix

import tf_frobreg.spectrum.extremes
from tf_frobreg import Convolution, extreme_singular_values, singular_values, spectral_norm
from tf_frobreg.spectrum.extremes import ExtremesFinder
from tf_frobreg.spectrum.symbol import symbol_peak, wave_vector

CASES = [*KERAS_CASES, *CIRCULAR_CASES]


def peak_of(kernel, size, accuracy=1e-4, work=1e8, **geometry):
    return symbol_peak(kernel, Convolution.of(kernel.shape, size, geometry), accuracy, work)


@pytest.mark.parametrize("accuracy", [0.5, 1e-3])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_no_singular_value_is_above_the_peak(case, accuracy):
    for seed in range(3):
        kernel = case.kernel(seed)
        sigma = np.linalg.svd(true_matrix(case, kernel), compute_uv=False)[0]
        peak = peak_of(kernel, case.image, accuracy, **case.geometry)
        assert sigma <= peak.upper * (1 + 1e-12)
        assert peak.lower <= peak.upper <= (1 + accuracy) * peak.lower


@pytest.mark.parametrize("shape", [(3, 3, 2, 3), (2, 5, 3, 1), (4, 2, 2), (3, 2, 2, 1, 2)], ids=str)
def test_the_peak_is_the_largest_value_over_all_frequencies(shape):
    kernel = normal(*shape)
    rank = len(shape) - 2
    angles = np.linspace(0, 2 * np.pi, {1: 2000, 2: 100, 3: 30}[rank])
    found = []
    for frequency in itertools.product(angles, repeat=rank):
        block = sum(kernel[p] * np.exp(1j * np.dot(frequency, p)) for p in np.ndindex(*shape[:rank]))
        found.append(np.linalg.norm(block, 2))
    peak = peak_of(kernel, 8)
    assert max(found) <= peak.upper
    assert max(found) == pytest.approx(peak.upper, rel={1: 1e-4, 2: 3e-3, 3: 3e-2}[rank])


def test_the_peak_is_tight_if_all_frequencies_are_alike():
    kernel = np.zeros((3, 3, 2, 2))
    kernel[0, 2] = [[0.6, -0.8], [0.8, 0.6]]
    peak = peak_of(kernel, 8, 1e-3, 1e9)
    assert 1 - 1e-12 <= peak.lower <= peak.upper <= 1.001


def test_the_bound_holds_with_little_work_and_there_is_none_with_less():
    kernel = normal(3, 3, 2, 3)
    assert peak_of(kernel, 8, 1e-6, 10) is None
    rough, fine = peak_of(kernel, 8, 1e-6, 3e3), peak_of(kernel, 8, 1e-6, 1e8)
    assert 1.01 * fine.upper < rough.upper < 1.2 * fine.upper


LARGE = [
    Case((3, 3, 2, 3), (60, 61)),
    Case((3, 3, 3, 2), (60, 60), padding="valid"),
    Case((3, 4, 2, 3), (120, 121), strides=2),
    Case((3, 3, 2, 3), (100, 100), dilation_rate=2),
    Case((3, 3, 2, 6), (60, 60), groups=2),
    Case((3, 3, 4, 2), (60, 60), kind="depthwise"),
    Case((3, 3, 3, 2), (40, 40), strides=2, kind="transpose"),
    Case((3, 3, 1, 2), (60, 60), padding="circular"),
    Case((3, 3, 1, 2), (120, 120), strides=2, padding="circular"),
    Case((5, 3, 2), (400,)),
]


@pytest.mark.parametrize("case", LARGE, ids=label)
def test_a_wave_comes_close_to_the_peak(case):
    """The vector belongs to the right side of M: its Rayleigh quotient by the real layer's Gram matrix."""
    kernel = case.kernel()
    conv = Convolution.of(case.kernel_shape, case.image, case.geometry)
    peak = symbol_peak(kernel, conv, 1e-4, 1e8)
    vector = wave_vector(kernel, conv, peak)
    assert vector.shape == (min(conv.shape), 1)
    product = tf_frobreg.spectrum.extremes.gram_products(kernel, conv)[-1].multiply
    sigma = tf_frobreg.spectrum.extremes.rayleigh(product, vector).value ** 0.5
    assert 0.985 * peak.upper <= sigma <= peak.upper


@pytest.mark.parametrize("case", LARGE, ids=label)
def test_the_search_may_begin_at_the_wave(case, monkeypatch):
    """Whether the wave suffices, is only the start, or is not used: σmax is within its error."""
    monkeypatch.setattr(tf_frobreg.spectrum.extremes, "FREQUENCY_WORK", 1e7)
    monkeypatch.setattr(tf_frobreg.spectrum.extremes, "has_frequencies", lambda conv: False)
    kernel = case.kernel()
    conv = Convolution.of(case.kernel_shape, case.image, case.geometry)
    finder = ExtremesFinder(conv, 1e-3, sigma_min=False, dense_rows=0)
    finder._has_wave = False
    searched = finder(kernel)
    for accuracy in (0.02, 1e-3):
        found = ExtremesFinder(conv, accuracy, sigma_min=False, dense_rows=0)(kernel)
        assert found.sigma_max_converged
        assert found.sigma_max_error <= 1.01 * accuracy * found.sigma_max
        assert found.sigma_max <= searched.sigma_max + searched.sigma_max_error
        assert searched.sigma_max <= found.sigma_max + found.sigma_max_error


@pytest.mark.slow
def test_one_channel_of_many_pixels():
    """A search takes minutes, because many σ are close to σmax. This kernel has a known σmax."""
    n = 4096
    cosine = np.cos(np.pi / (n + 1))
    kernel = np.outer([0.25, 0.5, 0.25], [0.5, 1.0, 0.5])[..., None, None]
    expected = (0.5 + 0.5 * cosine) * (1 + cosine)
    assert expected * (1 - 1e-4) <= spectral_norm(kernel, n) <= expected * (1 + 1e-12)


def test_the_peak_only_tightens_the_error_of_a_search():
    kernel = normal(3, 3, 4, 4) / 6
    found = extreme_singular_values(kernel, 24, accuracy=1e-3)
    sigma = singular_values(kernel, 24, accuracy=1e-6)[0]
    assert found.sigma_max <= sigma * (1 + 1e-9)
    assert sigma <= found.sigma_max + found.sigma_max_error
