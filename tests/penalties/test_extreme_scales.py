"""R and its gradient for very large and very small kernels and α: right, infinite, or refused."""

import numpy as np
import pytest
from oracles import dense_penalty, naive_matrix

from tf_frobreg import (
    FrobeniusRegularizer,
    ReshapedRegularizer,
    SpectralRegularizer,
    frobenius_gradient,
    frobenius_penalty,
    penalty_excess,
    regularize_kernel,
    reshaped_penalty,
    spectral_penalty,
)

SHAPES = [(3, 3, 2, 2), (1, 1, 3, 2), (3, 3, 1, 4)]
POWERS = {"float32": [-60, -40, -17, 17, 31, 33, 60], "float64": [-500, -300, -100, 100, 255, 257, 400, 500]}
CASES = [(dtype, power) for dtype, powers in POWERS.items() for power in powers]


def kernel(shape, dtype):
    return np.random.RandomState(0).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "power"), CASES)
def test_powers_of_two_scale_exactly(dtype, power, shape):
    """With 2ᵖK and 4ᵖα, R is 16ᵖ and the gradient 8ᵖ times as large. Both are infinite only if that is."""
    own = kernel(shape, dtype)
    unit = np.array(2.0**power, dtype)
    largest, smallest = np.finfo(dtype).max, np.finfo(dtype).tiny
    with np.errstate(over="ignore", under="ignore"):
        for function, degree in ((frobenius_penalty, 4), (penalty_excess, 4), (frobenius_gradient, 3)):
            expected = np.asarray(function(own, 4, alpha=0.75))
            found = np.asarray(function(own * unit, 4, alpha=0.75 * 4.0**power))
            for _ in range(degree):
                expected = expected * unit
            normal = (np.abs(expected) <= largest) & (np.abs(expected) >= smallest)
            np.testing.assert_array_equal(found[normal], expected[normal])
            np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
            assert not np.isnan(found).any()


@pytest.mark.parametrize("dtype", POWERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_large_kernel_with_an_ordinary_alpha(dtype, shape):
    own = kernel(shape, dtype) * np.array({"float32": 1e8, "float64": 1e70}[dtype], dtype)
    matrix = naive_matrix(own.astype(float) / 2.0**20, 4)
    expected = dense_penalty(matrix, 2.0**-40) * 2.0**80
    np.testing.assert_allclose(float(frobenius_penalty(own, 4)), expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e19, 1e30, 1e38])
def test_what_does_not_fit_is_infinite(scale):
    own = kernel((3, 3, 2, 2), "float32") / 4 * np.float32(scale)
    assert float(frobenius_penalty(own, 4)) == np.inf
    gradient = np.asarray(frobenius_gradient(own, 4))
    assert np.isinf(gradient).all()


def test_an_alpha_beyond_the_dtype_is_refused():
    own = kernel((3, 3, 2, 2), "float32")
    for function in (frobenius_penalty, frobenius_gradient, penalty_excess):
        with pytest.raises(
            ValueError, match="alpha must be at most 3.4e.38 for a kernel of float32. Received"
        ):
            function(own, 4, alpha=1e39)
    assert float(frobenius_penalty(own.astype(float), 4, alpha=1e39)) == pytest.approx(32 * 1e78)


@pytest.mark.parametrize(("dtype", "power"), CASES)
def test_the_reshaped_penalty_scales_exactly(dtype, power):
    own = kernel((3, 3, 2, 2), dtype)
    unit = np.array(2.0**power, dtype)
    with np.errstate(over="ignore", under="ignore"):
        expected = np.asarray(reshaped_penalty(own, alpha=0.75))
        for _ in range(4):
            expected = expected * unit
        found = np.asarray(reshaped_penalty(own * unit, alpha=0.75 * 4.0**power))
    assert not np.isnan(found)
    if np.finfo(dtype).tiny <= expected:
        assert found == expected


@pytest.mark.parametrize("alpha", [1e10, 1e20, 1e30, 1e38])
def test_the_two_norm_of_a_large_alpha(alpha):
    own = kernel((3, 3, 2, 2), "float32")
    assert float(spectral_penalty(own, 4, alpha=alpha)) == pytest.approx(alpha, rel=1e-5)


def test_an_alpha_beyond_the_dtype_is_refused_by_other_penalties():
    own = kernel((3, 3, 2, 2), "float32")
    for call in (lambda: reshaped_penalty(own, alpha=1e39), lambda: spectral_penalty(own, 4, alpha=1e39)):
        with pytest.raises(
            ValueError, match="alpha must be at most 3.4e.38 for a kernel of float32. Received"
        ):
            call()


def test_an_alpha_beyond_the_dtype_is_refused_by_regularizers_and_descents():
    own = kernel((3, 3, 2, 2), "float32")
    calls = [lambda: regularize_kernel(own, 4, alpha=1e39), lambda: ReshapedRegularizer(alpha=1e39)(own)]
    calls += [
        lambda kind=kind: kind(4, alpha=1e39)(own) for kind in (FrobeniusRegularizer, SpectralRegularizer)
    ]
    for call in calls:
        with pytest.raises(ValueError, match="alpha must be at most 3.4e.38 for a kernel of float32. Receiv"):
            call()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("dtype", "alpha"), [("float32", 3e38), ("float64", 1e308)])
def test_an_alpha_near_the_largest_number_gives_infinity_without_warnings(dtype, alpha):
    for shape in ((3, 3, 2, 2), (3, 3, 1, 1)):
        assert float(FrobeniusRegularizer(4, alpha=alpha)(kernel(shape, dtype))) == np.inf
