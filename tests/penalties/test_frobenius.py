"""R_α and its gradient: closed form, explicit M, tape, finite differences and slow twin all agree."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from geometries import CIRCULAR_CASES, KERAS_CASES, Case, cases, label
from hypothesis import given, settings
from oracles import dense_penalty, impulse_matrix, naive_matrix, true_matrix

from tf_frobreg import (
    Convolution,
    FrobeniusRegularizer,
    frobenius_gradient,
    frobenius_penalty,
    penalty_excess,
    penalty_floor,
    singular_values,
)
from tf_frobreg.penalties.frobenius import FrobeniusPenalty

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
    columns = zero / ALPHA**2  # the zero kernel costs α² per column
    assert columns == pytest.approx(round(columns), rel=1e-12)
    short = columns - len(sigma)  # columns beyond the number of singular values
    assert np.sum((sigma**2 - ALPHA) ** 2) + max(short, 0) * ALPHA**2 == pytest.approx(penalty, rel=1e-10)


def test_floors_of_the_paper():
    assert penalty_floor((3, 3, 3, 1), 20) == 800
    assert penalty_floor((3, 3, 6, 3), 20) == 1200
    assert penalty_floor((3, 3, 6, 3), 20, alpha=2.0) == 4800
    assert penalty_floor((3, 3, 3, 6), 20) == 0


def orthogonal(n, seed=0):
    return np.linalg.qr(np.random.RandomState(seed).standard_normal((n, n)))[0]


def check_floor_is_attained(kernel, image, **geometry):
    """Checks that the excess is zero and that the slow twin has σ = 1 for all of its singular values."""
    sigma = np.linalg.svd(naive_matrix(kernel, image, **geometry), compute_uv=False)
    np.testing.assert_allclose(sigma, 1, rtol=0, atol=1e-14)
    np.testing.assert_allclose(singular_values(kernel, image, **geometry), 1, rtol=0, atol=1e-14)
    assert penalty_excess(kernel, image, **geometry).numpy() == pytest.approx(0, abs=1e-27)
    penalty = frobenius_penalty(kernel, image, **geometry).numpy()
    assert penalty == pytest.approx(penalty_floor(kernel.shape, image, **geometry), rel=1e-14, abs=1e-27)


@pytest.mark.parametrize("image", [(5, 4), (2, 1), (3, 3)])
def test_two_taps_of_a_valid_layer_attain_the_floor(image):
    kernel = np.zeros((2, 1, 2, 2))
    kernel[0, 0], kernel[1, 0] = np.diag([1, 0]), np.diag([0, 1])
    check_floor_is_attained(kernel, image, padding="valid")
    assert penalty_excess(kernel, image).numpy() >= 1  # "same"


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(np.ndindex(3, 3), 2)), ids=str)
def test_a_projector_and_its_complement_attain_the_floor_of_a_valid_layer(first, second, rank):
    columns = orthogonal(4)[:, :rank]
    kernel = np.zeros((3, 3, 4, 4))
    kernel[first] = columns @ columns.T
    kernel[second] = np.eye(4) - kernel[first]
    check_floor_is_attained(kernel, (5, 6), padding="valid")
    assert penalty_excess(kernel, (5, 6)).numpy() >= 1  # "same"


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("image", [(6, 8), (2, 2), (5, 7)])
def test_any_orthogonal_matrix_attains_the_floor_with_strides(image, padding):
    kernel = orthogonal(4).reshape(2, 2, 1, 4)
    check_floor_is_attained(kernel, image, padding=padding, strides=2)


SAME_SHAPES = [(3, 3, 4, 4), (3, 3, 2, 4), (3, 3, 4, 2), (2, 4, 3, 3), (5, 3, 2, 2), (3, 3, 1, 1)]


def centre_tap(shape):
    """The kernel with an orthogonal matrix, or part of one, at its centre tap, and the index of that tap."""
    centre = tuple((k - 1) // 2 for k in shape[:-2])
    kernel = np.zeros(shape)
    kernel[centre] = orthogonal(max(shape[-2:]))[: shape[-2], : shape[-1]]
    return kernel, centre


@pytest.mark.parametrize("image", [(5, 5), (8, 6)])
@pytest.mark.parametrize("shape", SAME_SHAPES)
def test_the_centre_tap_of_a_same_layer_attains_the_floor(shape, image):
    check_floor_is_attained(centre_tap(shape)[0], image)


@pytest.mark.parametrize("size", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("image", [(5, 5), (8, 6)])
@pytest.mark.parametrize("shape", SAME_SHAPES)
def test_no_other_tap_of_a_same_layer_attains_the_floor(shape, image, size):
    """The excess is at least ½·‖KₜᵀKₜ‖² for every other tap t.

    The Gram matrix has a diagonal block A for a pixel that all taps reach, and A − B with B ≥ KₜᵀKₜ for a
    pixel at the border that tap t does not reach. ‖A − I‖² + ‖A − B − I‖² is at least ½·‖B‖².
    """
    start, centre = centre_tap(shape)
    for seed in range(5):
        kernel = start + size * np.random.RandomState(seed).standard_normal(shape)
        kernel *= np.sqrt(min(shape[-2:]) / np.sum(kernel**2))
        others = [kernel[tap] for tap in np.ndindex(shape[:2]) if tap != centre]
        bound = 0.5 * max(np.linalg.norm(k.T @ k) for k in others) ** 2
        excess = penalty_excess(kernel, image).numpy()
        assert excess >= bound > 0


@pytest.mark.parametrize("seed", range(5))
def test_one_other_tap_of_a_same_layer_adds_to_the_excess(seed):
    start, centre = centre_tap((3, 3, 4, 4))
    for tap in np.ndindex(3, 3):
        if tap != centre:
            kernel = start.copy()
            kernel[tap] = 1e-3 * np.random.RandomState(seed).standard_normal((4, 4))
            assert penalty_excess(kernel, (5, 5)).numpy() > 1e-6


def test_an_image_smaller_than_the_kernel_is_an_exception():
    kernel = np.zeros((3, 1, 1, 1))
    kernel[:, 0, 0, 0] = 0.6, 0.8, -0.6  # M is a rotation
    check_floor_is_attained(kernel, (2, 1))
    assert penalty_excess(kernel, (3, 1)).numpy() > 0.1


def test_the_floor_is_a_bound_that_not_every_layer_attains():
    # No tap of this layer stands at the centre. The rank of its 3 × 3 matrix is 2.
    shape, image, geometry = (2, 1, 1, 1), (3, 1), {"dilation_rate": 2}
    assert penalty_floor(shape, image, **geometry) == 0
    for seed in range(5):
        kernel = np.random.RandomState(seed).standard_normal(shape)
        assert np.linalg.matrix_rank(naive_matrix(kernel, image, **geometry)) == 2
        assert penalty_excess(kernel, image, **geometry).numpy() >= 1


def test_inputs_that_strides_skip_count_in_the_floor():
    # 25 of 100 inputs are read, so the rank is at most 25, although M has 50 rows.
    assert penalty_floor((1, 1, 1, 2), 10, strides=2) == 75
    kernel = np.full((1, 1, 1, 2), 0.5**0.5)
    assert frobenius_penalty(kernel, 10, strides=2).numpy() == pytest.approx(75, rel=1e-14)


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
        depthwise_regularizer=FrobeniusRegularizer(image, 1.0, strides=2, kind="depthwise", reduction="sum"),
        pointwise_regularizer=FrobeniusRegularizer(tuple(-(-n // 2) for n in image), 1.0, reduction="sum"),
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


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("output_padding", r" \(did you mean 'padding'\?\)"),
        ("data_format", ""),
        ("stride", r" \(did you mean 'strides'\?\)"),
    ],
)
@pytest.mark.parametrize("function", [frobenius_penalty, frobenius_gradient, penalty_excess, singular_values])
def test_unknown_arguments_are_refused_by_name(function, name, hint):
    with pytest.raises(
        TypeError, match=f"unknown argument '{name}'{hint}. A convolution is given by strides"
    ):
        function(np.ones((3, 3, 1, 1)), 8, **{name: 1})


def test_sizes_may_be_any_kind_of_integers():
    kernel = np.ones((3, 3, 1, 1))
    expected = frobenius_penalty(kernel, (7, 6)).numpy()
    for size in ([7, 6], np.array([7, 6]), tf.TensorShape([7, 6]), tf.constant([7, 6])):
        assert frobenius_penalty(kernel, size).numpy() == expected


@pytest.mark.parametrize("method", METHODS)
def test_the_excess_is_the_sum_over_the_singular_values_that_can_be_positive(method):
    case = Case((3, 3, 3, 1), (4, 5))
    kernel = tf.constant(case.kernel())
    sigma = np.linalg.svd(true_matrix(case, case.kernel()), compute_uv=False)
    penalty = FrobeniusPenalty(Convolution.of(case.kernel_shape, case.image, {}), ALPHA, method)
    assert penalty.floor == pytest.approx(40 * ALPHA**2)
    assert float(penalty.excess(kernel)) == pytest.approx(np.sum((sigma**2 - ALPHA) ** 2), rel=1e-9)


def test_the_excess_of_the_closed_form_loses_no_digits_to_the_floor():
    kernel = np.zeros((3, 3, 3, 1), "float32")
    kernel[1, 1, 0] = 1 + 1e-3
    expected = 400 * (np.float64(kernel[1, 1, 0, 0]) ** 2 - 1) ** 2
    assert float(penalty_excess(kernel, 20)) == pytest.approx(expected, rel=1e-3)
    assert float(penalty_excess(kernel * np.float32(0.999), 20)) < 1e-5 * expected
