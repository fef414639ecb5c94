"""The 2-norm penalty against an SVD of the explicit matrix."""

import numpy as np
import pytest
import tensorflow as tf
from geometries import CIRCULAR_CASES, KERAS_CASES, label, normal

from tf_frobreg import singular_values, spectral_penalty, transformation_matrix


@pytest.mark.parametrize("gram", ["columns", "smaller"])
@pytest.mark.parametrize("case", KERAS_CASES + CIRCULAR_CASES, ids=label)
def test_spectral_penalty_and_its_gradient_are_those_of_an_svd(case, gram):
    kernel, alpha = tf.constant(case.kernel()), 1.3
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(kernel)
        found = spectral_penalty(
            kernel, case.image, alpha=alpha, gram=gram, power_steps=2000, **case.geometry
        )
        matrix = tf.sparse.to_dense(transformation_matrix(kernel, case.image, **case.geometry))
        if gram == "smaller" and matrix.shape[0] < matrix.shape[1]:
            matrix = tf.transpose(matrix)
        residual = tf.matmul(matrix, matrix, transpose_a=True) - alpha * tf.eye(
            matrix.shape[1], dtype=matrix.dtype
        )
        expected = tf.linalg.svd(residual, compute_uv=False)
        largest = expected[0]
    assert found.numpy() == pytest.approx(largest.numpy(), rel=1e-5)
    if expected[1] < 0.99 * largest:  # otherwise the penalty has no gradient
        np.testing.assert_allclose(
            tape.gradient(found, kernel), tape.gradient(largest, kernel), atol=1e-4 * largest
        )


def test_spectral_penalty_if_both_ends_are_equally_far():
    kernel = np.zeros((1, 1, 2, 2))
    kernel[0, 0] = np.diag([1.5**0.5, 0.5**0.5])  # σ² − 1 = ±0.5
    assert spectral_penalty(kernel, 4).numpy() == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e6])
def test_spectral_penalty_of_multiples_of_the_identity(scale):
    kernel = np.zeros((3, 3, 2, 2))
    kernel[1, 1] = scale * np.eye(2)
    assert spectral_penalty(kernel, 5).numpy() == pytest.approx(abs(scale**2 - 1), rel=1e-12)


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 1e9), ("float32", 1e-30), ("float64", 1e100)])
def test_spectral_penalty_of_badly_scaled_kernels(dtype, scale):
    kernel = (scale * normal(3, 3, 1, 2)).astype(dtype)
    sigma = singular_values(kernel, 8)
    expected = max(abs(sigma[0] ** 2 - 1), abs(sigma[-1] ** 2 - 1))
    assert spectral_penalty(kernel, 8, power_steps=500).numpy() == pytest.approx(expected, rel=1e-4)


KERNEL = np.ones((3, 3, 1, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spectral_penalty(KERNEL, 8, gram="rows"), "gram must be one of .*Received: gram='rows'"),
        (lambda: spectral_penalty(KERNEL, 8, power_steps=0), "power_steps must be at least 1"),
        (lambda: spectral_penalty(KERNEL, 8, alpha=0), "alpha must be"),
        (lambda: spectral_penalty(KERNEL, 8, stride=2), "unknown argument 'stride'"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_an_image_that_does_not_fit_in_memory_is_refused():
    for size in (2**31 - 1, 10**6):
        with pytest.raises(ValueError, match="input_size=.* this needs .* bytes, but .* are free"):
            spectral_penalty(np.ones((3, 3, 1, 1)), size)
    with pytest.raises(ValueError, match="dilation_rate=.2147483647.* this needs .* bytes, but .* are free"):
        spectral_penalty(np.ones((3, 3, 1, 1)), 4, dilation_rate=2**31 - 1)
