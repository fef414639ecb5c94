"""R_α and its gradient: closed form, explicit M, tape, finite differences and slow twin all agree."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from geometries import CIRCULAR_CASES, KERAS_CASES, Case, cases, label
from hypothesis import given, settings
from oracles import dense_penalty, impulse_matrix, naive_matrix

import tf_frobreg.checks
from tf_frobreg import (
    FrobeniusRegularizer,
    frobenius_gradient,
    frobenius_penalty,
    penalty_excess,
    penalty_floor,
    singular_values,
)

ALPHA = 1.7
METHODS = ["closed_form", "sparse"]
ALL_CASES = [*KERAS_CASES, *CIRCULAR_CASES, Case((2, 1, 1, 1), (1, 1), dilation_rate=2)]


def tape_gradient(case, kernel, method):
    kernel = tf.Variable(kernel)
    with tf.GradientTape() as tape:
        penalty = frobenius_penalty(kernel, case.image, alpha=ALPHA, method=method, **case.geometry)
    return tape.gradient(penalty, kernel).numpy()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", KERAS_CASES, ids=label)
def test_penalty_is_that_of_the_keras_layer(case, method):
    kernel = case.kernel()
    expected = dense_penalty(impulse_matrix(case.layer(kernel), case.image, case.channels), ALPHA)
    found = frobenius_penalty(kernel, case.image, alpha=ALPHA, method=method, **case.geometry)
    assert found.numpy() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CIRCULAR_CASES, ids=label)
def test_circular_penalty_is_the_slow_twins(case, method):
    geometry = case.geometry
    del geometry["kind"]
    expected = dense_penalty(naive_matrix(case.kernel(), case.image, **geometry), ALPHA)
    found = frobenius_penalty(case.kernel(), case.image, alpha=ALPHA, method=method, **geometry)
    assert found.numpy() == pytest.approx(expected, rel=1e-12)


def check_all_gradients_agree(case):
    kernel = case.kernel()
    theorem, closed = (
        frobenius_gradient(kernel, case.image, alpha=ALPHA, method=m, **case.geometry).numpy()
        for m in ("sparse", "closed_form")
    )
    tolerance = {"rtol": 0, "atol": 1e-12 * max(np.abs(theorem).max(), 1.0)}
    np.testing.assert_allclose(closed, theorem, **tolerance)
    for method in METHODS:
        np.testing.assert_allclose(tape_gradient(case, kernel, method), theorem, **tolerance)


@pytest.mark.parametrize("case", ALL_CASES, ids=label)
def test_theorem_closed_form_and_tapes_agree(case):
    check_all_gradients_agree(case)


@settings(max_examples=80)
@given(cases(ranks=(0, 1, 2, 3)))
def test_methods_agree_for_any_geometry(case):
    kernel = case.kernel()
    closed, sparse = (
        frobenius_penalty(kernel, case.image, alpha=ALPHA, method=m, **case.geometry).numpy() for m in METHODS
    )
    assert closed == pytest.approx(sparse, rel=1e-12)
    check_all_gradients_agree(case)


@pytest.mark.parametrize("case", ALL_CASES[::5], ids=label)
def test_gradient_is_the_finite_difference(case):
    kernel, direction = case.kernel(0), case.kernel(1)

    def penalty(t):
        return frobenius_penalty(kernel + t * direction, case.image, alpha=ALPHA, **case.geometry).numpy()

    # Fourth-order differences of a quartic are exact: only rounding is left.
    t = 0.1
    slope = (8 * (penalty(t) - penalty(-t)) - (penalty(2 * t) - penalty(-2 * t))) / (12 * t)
    gradient = frobenius_gradient(kernel, case.image, alpha=ALPHA, **case.geometry).numpy()
    assert np.sum(gradient * direction) == pytest.approx(slope, rel=1e-9)


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


@settings(max_examples=40)
@given(cases())
def test_laws(case):
    kernel = case.kernel()
    options = {"alpha": ALPHA, **case.geometry}
    floor = penalty_floor(case.kernel_shape, case.image, **options)
    penalty = frobenius_penalty(kernel, case.image, **options).numpy()
    assert penalty >= floor * (1 - 1e-14)
    sigma = singular_values(kernel, case.image, **case.geometry)
    zero = frobenius_penalty(np.zeros(case.kernel_shape), case.image, **options).numpy()
    columns = zero / ALPHA**2  # the zero kernel costs α² a column
    assert columns == pytest.approx(round(columns), rel=1e-12)
    short = columns - len(sigma)  # columns without a singular value of their own
    assert np.sum((sigma**2 - ALPHA) ** 2) + max(short, 0) * ALPHA**2 == pytest.approx(penalty, rel=1e-10)


def test_floors_of_the_paper():
    assert penalty_floor((3, 3, 3, 1), 20) == 800
    assert penalty_floor((3, 3, 6, 3), 20) == 1200
    assert penalty_floor((3, 3, 6, 3), 20, alpha=2.0) == 4800
    assert penalty_floor((3, 3, 3, 6), 20) == 0


def test_inputs_that_strides_jump_over_count_to_the_floor():
    # 25 of 100 inputs are read: rank 25 at the most, although M has 50 rows.
    assert penalty_floor((1, 1, 1, 2), 10, strides=2) == 75
    kernel = np.full((1, 1, 1, 2), 0.5**0.5)
    assert frobenius_penalty(kernel, 10, strides=2).numpy() == pytest.approx(75, rel=1e-14)


def test_images_beyond_all_int64():
    sizes = [2 * 10**9, 10**6]
    densities = [frobenius_penalty(np.ones((3, 3, 1, 1)), n).numpy() / n**2 for n in sizes]
    assert densities[0] == pytest.approx(densities[1], rel=1e-5)
    kernel = np.ones((3, 3, 3, 1, 1))
    densities = [frobenius_penalty(kernel, n).numpy() / n**3 for n in (3 * 10**6, 10**6)]
    assert densities[0] == pytest.approx(densities[1], rel=1e-5)


def test_a_huge_alpha_overflows_to_infinity_not_to_an_error():
    assert frobenius_penalty(np.ones((3, 3, 1, 1)), 8, alpha=1e200).numpy() == np.inf


def test_centre_tap_orthogonal_kernel_has_no_penalty():
    q, _ = np.linalg.qr(np.random.RandomState(0).standard_normal((4, 4)))
    kernel = np.zeros((3, 3, 4, 4))
    kernel[1, 1] = q
    assert frobenius_penalty(kernel, 9).numpy() == pytest.approx(0, abs=1e-26)
    assert frobenius_penalty(kernel * 2**0.5, 9, alpha=2.0).numpy() == pytest.approx(0, abs=1e-26)


def test_shifted_delta_is_orthogonal_only_on_a_circle():
    kernel = np.zeros((3, 3, 1, 1))
    kernel[0, 2] = 1.0
    assert frobenius_penalty(kernel, 7, padding="circular").numpy() == 0.0
    assert frobenius_penalty(kernel, 7).numpy() == pytest.approx(
        13.0, rel=1e-15
    )  # one row and one column of pixels are lost


def test_penalty_is_invariant_under_orthogonal_mixing_of_channels():
    random = np.random.RandomState(0)
    kernel = random.standard_normal((3, 2, 3, 4))
    u, v = (np.linalg.qr(random.standard_normal((n, n)))[0] for n in (3, 4))
    mixed = u @ kernel @ v
    assert frobenius_penalty(mixed, 6).numpy() == pytest.approx(
        frobenius_penalty(kernel, 6).numpy(), rel=1e-13
    )


@pytest.mark.filterwarnings("ignore:LorthRegularizer. warning configuration:UserWarning")
@pytest.mark.parametrize("shape", [(3, 3, 2, 4), (3, 3, 3, 3), (5, 5, 2, 2), (3, 3, 4, 2)])
def test_circular_penalty_is_deel_lips(shape):
    from deel.lip.regularizers import LorthRegularizer

    kernel, n = np.random.RandomState(0).standard_normal(shape).astype("float32"), 12
    theirs = LorthRegularizer(kernel_shape=shape)(tf.constant(kernel)).numpy()
    # With fewer filters than channels deel-lip measures MMᵀ, which lacks the columns that cannot be reached.
    ours = penalty_excess(kernel, n, padding="circular").numpy() / n**2
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("rank", [1, 2])
def test_both_parts_of_a_separable_convolution(rank):
    image = (6, 5)[:rank]
    layer = getattr(keras.layers, f"SeparableConv{rank}D")(
        4,
        3,
        strides=2,
        padding="same",
        depth_multiplier=2,
        use_bias=False,
        dtype="float64",
        depthwise_regularizer=FrobeniusRegularizer(image, 1.0, strides=2, kind="depthwise"),
        pointwise_regularizer=FrobeniusRegularizer(tuple(-(-n // 2) for n in image), 1.0),
    )
    layer.build((None, *image, 3))
    depthwise, pointwise = (weight.numpy() for weight in layer.weights)
    cases = [
        Case(depthwise.shape, image, strides=2, kind="depthwise"),
        Case(pointwise.shape, tuple(-(-n // 2) for n in image)),
    ]
    matrices = [
        impulse_matrix(case.layer(kernel), case.image, case.channels)
        for case, kernel in zip(cases, (depthwise, pointwise), strict=True)
    ]
    # The two matrices are those of the layer: their product is what it does to impulses.
    np.testing.assert_allclose(matrices[1] @ matrices[0], impulse_matrix(layer, image, 3), atol=1e-12)
    assert [float(loss) for loss in layer.losses] == pytest.approx(
        [dense_penalty(m) for m in matrices], rel=1e-12
    )


@pytest.mark.parametrize("case", [*ALL_CASES[::3], Case((3, 3, 3, 1), (6, 6))], ids=label)
def test_excess_is_the_penalty_above_its_floor(case):
    options = {"alpha": ALPHA, **case.geometry}
    excess = penalty_excess(case.kernel(), case.image, **options).numpy()
    floor = penalty_floor(case.kernel_shape, case.image, **options)
    penalty = frobenius_penalty(case.kernel(), case.image, **options).numpy()
    assert excess + floor == pytest.approx(penalty, rel=1e-14)
    assert excess >= 0


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0}, "alpha must be a finite number above 0. Received: alpha=0"),
        ({"alpha": -1.0}, "alpha must be"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"alpha": float("inf")}, "alpha must be"),
        ({"alpha": "1"}, "alpha must be a number"),
        ({"method": "dense"}, "method must be one of .*Received: method='dense'"),
        ({"kernel": np.ones((3, 3, 1, 1), int)}, "kernel must be float32 or float64"),
        ({"kernel": np.ones((3, 3, 1, 1), np.float16)}, "kernel must be float32 or float64"),
        ({"input_size": 0}, "input_size must be at least 1"),
        ({"padding": "zero"}, "padding must be one of"),
    ],
)
@pytest.mark.parametrize("function", [frobenius_penalty, frobenius_gradient])
def test_bad_arguments_are_refused_by_name(function, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        function(**{"kernel": np.ones((3, 3, 1, 1)), "input_size": 8} | arguments)


@pytest.mark.parametrize("name", ["output_padding", "data_format", "stride"])
@pytest.mark.parametrize("function", [frobenius_penalty, frobenius_gradient, penalty_excess, singular_values])
def test_unknown_arguments_are_refused_by_name(function, name):
    with pytest.raises(TypeError, match=f"unknown argument '{name}'. A convolution is given by strides"):
        function(np.ones((3, 3, 1, 1)), 8, **{name: 1})


def test_sizes_may_be_any_kind_of_integers():
    kernel = np.ones((3, 3, 1, 1))
    expected = frobenius_penalty(kernel, (7, 6)).numpy()
    for size in ([7, 6], np.array([7, 6]), tf.TensorShape([7, 6]), tf.constant([7, 6])):
        assert frobenius_penalty(kernel, size).numpy() == expected


def test_long_kernels_are_refused_before_they_fill_the_memory():
    assert np.isfinite(frobenius_penalty(np.ones((40, 1, 2)), 16000, strides=4, padding="valid"))
    with pytest.raises(ValueError, match=r"an axis of 320 taps has [\d,]+ coincidence classes.*bytes"):
        frobenius_penalty(np.ones((320, 1, 2)), 160000, strides=80, padding="valid")


def test_large_closed_forms_are_refused_before_they_fill_the_memory(monkeypatch):
    monkeypatch.setattr(tf_frobreg.checks, "_free_memory", lambda: 5 * 10**7)
    with pytest.raises(ValueError, match=r"the closed form of a kernel of shape \(3, 3, 256.* has 54 blocks"):
        frobenius_penalty(np.ones((3, 3, 256, 256)), 8)
    assert penalty_floor((3, 3, 256, 256), 8) == 0.0


def test_explicit_method_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r'method="sparse" needs M.*Use method="closed_form"'):
        frobenius_penalty(np.ones((3, 3, 64, 64)), 64, method="sparse")
