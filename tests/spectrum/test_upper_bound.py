"""Bounds of σmax from above, against the true M."""

import numpy as np
import pytest
from geometries import CIRCULAR_CASES, KERAS_CASES, label, normal
from oracles import true_matrix

import tf_frobreg.spectrum.upper_bound
from tf_frobreg import Convolution
from tf_frobreg.spectrum.symbol import symbol_peak, torus_peak
from tf_frobreg.spectrum.upper_bound import sigma_max_bound

CASES = [*KERAS_CASES, *CIRCULAR_CASES]


@pytest.mark.parametrize("method", ["decomposition", "torus", "symbol", "taps"])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_no_singular_value_is_above_the_bound(case, method, monkeypatch):
    module = tf_frobreg.spectrum.upper_bound
    if method != "decomposition":
        monkeypatch.setattr(module, "DECOMPOSED", 0)
    if method in ("symbol", "taps"):
        monkeypatch.setattr(module, "TORUS_WORK", 0)
    if method == "taps":
        monkeypatch.setattr(module, "LARGEST_WORK", 0)
    for seed in range(3):
        kernel = 1e-3 * case.kernel(seed)
        sigma = np.linalg.svd(true_matrix(case, kernel), compute_uv=False)[0]
        bound = sigma_max_bound(kernel, Convolution.of(kernel.shape, case.image, case.geometry))
        assert sigma <= bound.value
        if len(case.image):  # a Dense layer is always decomposed
            assert bound.method == method
        if bound.method == "decomposition":
            assert bound.value <= sigma * (1 + 1e-10)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_the_torus_is_below_the_peak(case):
    kernel = case.kernel()
    conv = Convolution.of(kernel.shape, case.image, case.geometry)
    assert torus_peak(kernel, conv, 1e9) <= symbol_peak(kernel, conv, 1e-4, 1e9).upper * (1 + 1e-12)


@pytest.mark.parametrize("case", [case for case in CIRCULAR_CASES if case.strides == 1], ids=label)
def test_the_torus_is_a_circular_layer_itself(case):
    kernel = case.kernel()
    sigma = np.linalg.svd(true_matrix(case, kernel), compute_uv=False)[0]
    conv = Convolution.of(kernel.shape, case.image, case.geometry)
    assert torus_peak(kernel, conv, 1e9) == pytest.approx(sigma, rel=1e-12)


def test_extreme_scales_and_zero():
    kernel = normal(3, 3, 2, 3)
    conv = Convolution(kernel.shape, 8)
    bound = sigma_max_bound(kernel, conv).value
    for scale in (1e-200, 1e200):
        assert sigma_max_bound(scale * kernel, conv).value == pytest.approx(scale * bound, rel=1e-9)
    assert sigma_max_bound(0 * kernel, conv).value == 0
    with pytest.raises(ValueError, match="NaN or infinity"):
        sigma_max_bound(kernel * np.nan, conv)


def test_many_frequencies_are_left_to_the_peak():
    kernel = normal(3, 3, 1, 1)
    assert torus_peak(kernel, Convolution(kernel.shape, 200), 1e9) is None
    assert sigma_max_bound(kernel, Convolution(kernel.shape, 200)).method == "symbol"


def test_dense_layers_of_both_shapes():
    for shape in ((40, 7), (7, 40)):
        kernel = normal(*shape)
        bound = sigma_max_bound(kernel, Convolution(shape, ()))
        assert bound.value == pytest.approx(np.linalg.norm(kernel, 2), rel=1e-10)
        assert bound.value >= np.linalg.norm(kernel, 2)
