"""Very large layers and images, extreme scales of σ, and threads: right, infinite, or refused in words."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from oracles import dense_penalty, naive_matrix

from tf_frobreg import (
    condition_number,
    extreme_singular_values,
    frobenius_gradient,
    frobenius_penalty,
    regularize_kernel,
    singular_values,
    spectral_norm,
)


def normal(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape)


@pytest.mark.parametrize("padding", ["same", "valid", "circular"])
def test_a_million_pixels_on_an_axis(padding):
    """R grows linearly with each axis once all coincidences fit, so four dense matrices determine it."""
    kernel = normal(3, 3, 2, 2) / 3
    small = np.array(
        [[dense_penalty(naive_matrix(kernel, (n, m), padding=padding), 1.0) for m in (6, 7)] for n in (6, 7)]
    )
    for n, m in [(10**6, 6), (6, 10**6), (10**6, 10**6)]:
        down, right = n - 6, m - 6
        weights = np.outer([1 - down, down], [1 - right, right])
        expected = float((weights * small).sum())
        found = float(frobenius_penalty(kernel, (n, m), padding=padding))
        assert found == pytest.approx(expected, rel=1e-9)


def test_a_long_signal():
    kernel = normal(5, 2, 3) / 3
    small = [dense_penalty(naive_matrix(kernel, (n,)), 1.0) for n in (12, 13)]
    expected = small[0] + (10**6 - 12) * (small[1] - small[0])
    assert float(frobenius_penalty(kernel, 10**6)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_many_channels_on_one_pixel():
    """Only the centre tap meets the pixel, so M is its transpose."""
    kernel = normal(3, 3, 2048, 2048) / 50
    tap = kernel[1, 1]
    values = singular_values(kernel, 1)
    assert (values**2).sum() == pytest.approx((tap**2).sum(), rel=1e-12)
    assert float(frobenius_penalty(kernel, 1)) == pytest.approx(((values**2 - 1) ** 2).sum(), rel=1e-9)
    gradient = np.array(frobenius_gradient(kernel, 1))
    np.testing.assert_allclose(gradient[1, 1], 4 * (tap @ tap.T @ tap - tap), rtol=1e-8, atol=1e-8)
    gradient[1, 1] = 0
    assert not gradient.any()


POWERS = {"float32": [-60, -40, 40, 60], "float64": [-500, -300, 300, 500]}


@pytest.mark.parametrize(
    ("dtype", "power"), [(dtype, power) for dtype, powers in POWERS.items() for power in powers]
)
@pytest.mark.parametrize("shape", [(3, 3, 2, 2), (1, 1, 3, 2)], ids=str)
def test_singular_values_at_extreme_scales(shape, dtype, power):
    """With 2ᵖK they are 2ᵖ times as large."""
    kernel = normal(*shape).astype(dtype)
    large = kernel * np.array(2.0**power, dtype)
    for function in (singular_values, spectral_norm, lambda *args: extreme_singular_values(*args)[:2]):
        before, after = (np.asarray(function(own, 4), float) for own in (kernel, large))
        np.testing.assert_allclose(after, before * 2.0**power, rtol=1e-5)
    assert condition_number(large, 4) == pytest.approx(condition_number(kernel, 4), rel=1e-5)


def test_two_threads_get_what_one_gets():
    kernels = [normal(3, 3, 2, channels, seed=channels) for channels in (1, 2, 3, 4)] * 4

    def everything(kernel):
        return (
            np.asarray(frobenius_penalty(kernel, 7)),
            np.asarray(frobenius_gradient(kernel, 7, strides=2)),
            singular_values(kernel, 5),
            regularize_kernel(kernel, 6, max_steps=5).kernel,
        )

    expected = list(map(everything, kernels))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(everything, kernels))
    for left, right in zip(found, expected, strict=True):
        for one, other in zip(left, right, strict=True):
            np.testing.assert_array_equal(one, other)
