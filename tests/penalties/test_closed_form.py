"""The closed form in every mode of TensorFlow, its second derivative, and its coefficients along a line."""

import numpy as np
import pytest
import tensorflow as tf
from geometries import CIRCULAR_CASES, KERAS_CASES, Case, label

import tf_frobreg.checks
from tf_frobreg import frobenius_gradient, frobenius_penalty, penalty_floor
from tf_frobreg.convolution.geometry import Convolution
from tf_frobreg.penalties.closed_form import closed_form

ALPHA = 1.7
ALL_CASES = [*KERAS_CASES, *CIRCULAR_CASES, Case((2, 1, 1, 1), (1, 1), dilation_rate=2)]


@pytest.mark.parametrize("compiled", [None, False, True], ids=["eager", "graph", "xla"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", ALL_CASES[::4], ids=label)
def test_closed_form_in_every_mode(case, dtype, compiled):
    def value_and_gradient(kernel):
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            value = frobenius_penalty(kernel, case.image, alpha=ALPHA, **case.geometry)
        return value, tape.gradient(value, kernel)

    function = value_and_gradient
    if compiled is not None:
        function = tf.function(value_and_gradient, jit_compile=compiled)
    kernel = case.kernel(dtype=dtype)
    value, gradient = function(tf.constant(kernel))
    assert value.dtype == gradient.dtype == dtype
    exact = frobenius_gradient(case.kernel(), case.image, alpha=ALPHA, method="sparse", **case.geometry)
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    np.testing.assert_allclose(gradient, exact, rtol=0, atol=tolerance * np.abs(exact).max())
    penalty = frobenius_penalty(case.kernel(), case.image, alpha=ALPHA, method="sparse", **case.geometry)
    assert value.numpy() == pytest.approx(penalty.numpy(), rel=tolerance)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("case", ALL_CASES[::6], ids=label)
def test_hessian_vector_product(case, traced):
    def product(kernel, direction):
        with tf.GradientTape() as outer:
            outer.watch(kernel)
            with tf.GradientTape() as inner:
                inner.watch(kernel)
                penalty = frobenius_penalty(kernel, case.image, alpha=ALPHA, **case.geometry)
            gradient = inner.gradient(penalty, kernel)
        return outer.gradient(gradient, kernel, output_gradients=direction)

    kernel, direction = case.kernel(0), case.kernel(1)
    found = (tf.function(product) if traced else product)(tf.constant(kernel), tf.constant(direction))

    def gradient(t):
        return frobenius_gradient(kernel + t * direction, case.image, alpha=ALPHA, **case.geometry).numpy()

    t = 0.1
    expected = (8 * (gradient(t) - gradient(-t)) - (gradient(2 * t) - gradient(-2 * t))) / (12 * t)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * max(np.abs(expected).max(), 1.0))


@pytest.mark.parametrize("shape", [(3, 3, 16, 16), (3, 3, 16, 32), (3, 3, 32, 16)])
def test_float32_keeps_its_digits_near_the_optimum(shape):
    g, h = shape[-2:]
    q, _ = np.linalg.qr(np.random.RandomState(0).standard_normal((max(g, h), min(g, h))))
    kernel = 4e-5 * np.random.RandomState(1).standard_normal(shape)
    kernel[1, 1] += q.T if g < h else q
    kernel = kernel.astype("float32")
    floor = penalty_floor(shape, 16)
    exact = frobenius_penalty(kernel.astype("float64"), 16).numpy()
    assert 1e-7 < (exact - floor) / (256 * g) < 1e-6
    single = frobenius_penalty(kernel, 16).numpy()
    assert single >= 0
    assert single == pytest.approx(exact, rel=1e-3)


def test_large_closed_forms_are_refused_before_they_fill_the_memory(monkeypatch):
    monkeypatch.setattr(tf_frobreg.checks, "free_memory", lambda: 5 * 10**7)
    with pytest.raises(ValueError, match=r"the closed form of a kernel of shape \(3, 3, 256.* has 54 blocks"):
        frobenius_penalty(np.ones((3, 3, 256, 256)), 8)
    assert penalty_floor((3, 3, 256, 256), 8) == 0.0


def test_images_beyond_all_int64():
    sizes = [2 * 10**9, 10**6]
    densities = [frobenius_penalty(np.ones((3, 3, 1, 1)), n).numpy() / n**2 for n in sizes]
    assert densities[0] == pytest.approx(densities[1], rel=1e-5)
    kernel = np.ones((3, 3, 3, 1, 1))
    densities = [frobenius_penalty(kernel, n).numpy() / n**3 for n in (3 * 10**6, 10**6)]
    assert densities[0] == pytest.approx(densities[1], rel=1e-5)


@pytest.mark.parametrize("case", ALL_CASES, ids=label)
def test_the_line_is_the_penalty_along_a_direction(case):
    kernel, direction = case.kernel(), case.kernel(seed=1)
    form = closed_form(Convolution.of(kernel.shape, case.image, case.geometry))
    line = [c.numpy() for c in form.line(tf.constant(kernel), tf.constant(direction), 1.5)]
    for t in (-2.0, -0.3, 0.1, 1.0):
        change = np.polyval([*line[::-1], 0.0], t)
        ends = [
            frobenius_penalty(k, case.image, alpha=1.5, **case.geometry)
            for k in (kernel, kernel + t * direction)
        ]
        assert change == pytest.approx((ends[1] - ends[0]).numpy(), rel=1e-10, abs=1e-10)
