"""Functions with their own gradient: against automatic differentiation of dense matrices, in every mode."""

import numpy as np
import pytest
import tensorflow as tf
from geometries import Case, label
from oracles import matrix_function

from tf_frobreg import FrobeniusRegularizer, frobenius_penalty
from tf_frobreg.penalties.frobenius import FrobeniusPenalty
from tf_frobreg.penalties.penalty_function import PenaltyFunction, Weight, weighted

ALPHA = 1.5
CASES = [
    Case((1, 1, 3, 2), (3, 4)),
    Case((1, 1, 2, 4), (3, 3)),
    Case((1, 1, 3, 3), (4, 3), strides=2),
    Case((1, 1, 2, 6), (3, 3), groups=3),
    Case((1, 1, 3, 2), (3, 3), groups=2),
    Case((1, 1, 3, 1), (3, 4), kind="depthwise"),
    Case((1, 1, 2, 3), (3, 3), kind="transpose"),
    Case((1, 3, 2), (5,)),
    Case((5, 3), ()),
    Case((3, 5), ()),
    Case((3, 3, 3, 1), (5, 4), kind="depthwise"),
    Case((3, 3, 2, 2), (4, 4), kind="depthwise", padding="valid"),
    Case((3, 3, 2, 4), (4, 5)),
    Case((3, 3, 4, 2), (4, 5)),
    Case((3, 3, 2, 4), (5, 4), groups=2, padding="valid"),
    Case((3, 2, 3), (6,), dilation_rate=2),
    Case((2, 3, 2, 2, 3), (3, 3, 2)),
    Case((3, 3, 3, 2), (3, 3), strides=2, kind="transpose"),
]
ONE_TAP = [case for case in CASES if set(case.kernel_shape[:-2]) <= {1}]


def oracle(case):
    """‖MᵀM − αI‖²_F as a function of TensorFlow that only the entries of M describe."""
    size = int(np.prod(case.kernel_shape))
    numbers = matrix_function(case)(np.arange(1.0, size + 1)).astype(int)

    def penalty(kernel):
        entries = tf.concat([tf.zeros(1, kernel.dtype), tf.reshape(kernel, (-1,))], axis=0)
        matrix = tf.gather(entries, numbers)
        gram = tf.matmul(matrix, matrix, transpose_a=True)
        return tf.reduce_sum((gram - ALPHA * tf.eye(len(gram), dtype=kernel.dtype)) ** 2)

    return penalty


def derivatives(function, kernel, direction):
    """Value, gradient, and second derivative along a direction."""
    with tf.GradientTape() as outer:
        outer.watch(kernel)
        with tf.GradientTape() as inner:
            inner.watch(kernel)
            value = function(kernel)
        gradient = inner.gradient(value, kernel)
    return value, gradient, outer.gradient(gradient, kernel, output_gradients=direction)


def assert_close(found, expected, rtol=1e-12):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * np.abs(other).max())


def of_package(case):
    return lambda kernel: frobenius_penalty(kernel, case.image, alpha=ALPHA, **case.geometry)


def regularized(case):
    return FrobeniusRegularizer(case.image, 1.0, ALPHA, reduction="sum", **case.geometry)


@pytest.mark.parametrize("make", [of_package, regularized])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_three_derivatives_are_those_of_the_matrix(case, make):
    kernel, direction = tf.constant(case.kernel(0)), tf.constant(case.kernel(1))
    expected = derivatives(oracle(case), kernel, direction)
    assert_close(derivatives(make(case), kernel, direction), expected)
    graph = tf.function(lambda kernel: derivatives(make(case), kernel, direction))
    assert_close(graph(kernel), expected)


@pytest.mark.parametrize("case", CASES[::3], ids=label)
def test_under_xla(case):
    kernel, direction = tf.constant(case.kernel(0)), tf.constant(case.kernel(1))
    expected = derivatives(oracle(case), kernel, direction)
    function = tf.function(lambda kernel: derivatives(of_package(case), kernel, direction), jit_compile=True)
    assert_close(function(kernel), expected)


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[10], CASES[12], CASES[17]], ids=label)
def test_three_derivatives_with_a_weight_that_is_a_tensor(case):
    """Also under XLA, after the function apart was traced without it."""
    kernel, direction = tf.constant(case.kernel(0)), tf.constant(case.kernel(1))
    penalty = FrobeniusPenalty(case_convolution(case), ALPHA)

    def function(kernel, tensor):
        return derivatives(lambda kernel: penalty.weighted(kernel, Weight(0.5, tensor)), kernel, direction)

    expected = derivatives(oracle(case), kernel, direction)
    for jit_compile in (False, True):
        compiled = tf.function(function, jit_compile=jit_compile)
        assert_close(compiled(kernel, tf.constant(2.0, kernel.dtype)), expected)
        for found in compiled(np.nan * kernel, tf.constant(0.0, kernel.dtype)):
            np.testing.assert_array_equal(found, np.zeros(found.shape))


def case_convolution(case):
    return regularized(case).convolution(case.kernel_shape)


@pytest.mark.parametrize("parallel", [False, True], ids=["loop", "parallel"])
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[8], CASES[10], CASES[15]], ids=label)
def test_the_whole_hessian_in_a_graph(case, parallel):
    kernel = tf.constant(case.kernel())

    def hessian(function):
        with tf.GradientTape() as outer:
            outer.watch(kernel)
            with tf.GradientTape() as inner:
                inner.watch(kernel)
                value = function(kernel)
            gradient = inner.gradient(value, kernel)
        return outer.jacobian(gradient, kernel, experimental_use_pfor=parallel)

    found, expected = (
        tf.reshape(tf.function(hessian)(function), (tf.size(kernel), -1))
        for function in (of_package(case), oracle(case))
    )
    assert_close([found, tf.transpose(found)], [expected, expected])


def batch(case, count=3):
    return tf.constant(np.stack([case.kernel(seed) for seed in range(count)]))


@pytest.mark.parametrize("mapping", [tf.map_fn, tf.vectorized_map], ids=["map_fn", "vectorized_map"])
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[12]], ids=label)
def test_over_many_kernels(case, mapping):
    kernels, function = batch(case), of_package(case)

    def gradient(kernel):
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            value = function(kernel)
        return tape.gradient(value, kernel)

    expected = [derivatives(oracle(case), kernel, kernel)[:2] for kernel in kernels]
    for call in (lambda f: f(), lambda f: tf.function(f)()):
        values = call(
            lambda: (
                mapping(function, kernels)
                if mapping is tf.vectorized_map
                else tf.map_fn(function, kernels, fn_output_signature=tf.float64)
            )
        )
        gradients = call(lambda: mapping(gradient, kernels))
        assert_close([values], [np.stack([value for value, _ in expected])])
        assert_close([gradients], [np.stack([slope for _, slope in expected])])


def test_functions_in_functions():
    case = CASES[12]
    kernel = tf.constant(case.kernel())
    value, expected, _ = derivatives(oracle(case), kernel, kernel)
    inner = tf.function(of_package(case))

    @tf.function
    def outer(kernel):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(kernel)
            twice = inner(kernel) + of_package(case)(kernel)
        return twice, tape.gradient(twice, kernel), tape.gradient(twice, kernel)

    assert_close(outer(kernel), [2 * value, 2 * expected, 2 * expected])


def test_in_a_loop_and_in_a_condition():
    """The function is used within the graphs of TensorFlow's own control flow."""
    case = CASES[0]
    kernel = tf.constant(case.kernel())

    @tf.function
    def train(kernel, flag):
        for _ in tf.range(3):
            with tf.GradientTape() as tape:
                tape.watch(kernel)
                value = of_package(case)(kernel) if flag else 0.0 * tf.reduce_sum(kernel)
            kernel -= 1e-3 * tape.gradient(value, kernel)
        return kernel

    expected = kernel
    for _ in range(3):
        expected -= 1e-3 * derivatives(oracle(case), expected, expected)[1]
    assert_close([train(kernel, tf.constant(True))], [expected])
    assert_close([train(kernel, tf.constant(False))], [kernel])


def cube():
    """Σ x³ as a function with its own gradient, and the shapes for which Python was asked."""
    asked = []

    def function(kernel):
        asked.append(tuple(kernel.shape))
        return tf.reduce_sum(kernel**3), lambda weight: 3.0 * weight * kernel**2

    return function, asked


SHAPES = [(2, 3), (3, 2), (2, 3), (4, 4), (2, 7)]


@pytest.mark.parametrize(("fixed_axes", "traces"), [(None, 4), (1, 3), (0, 1)])
def test_how_often_it_is_traced(fixed_axes, traces):
    """Once per shape, or once for several of them. Every graph that calls it shares the traces."""
    function, asked = cube()
    own = PenaltyFunction(function, fixed_axes=fixed_axes)

    def both(kernel):
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            value = own(kernel)
        return value, tape.gradient(value, kernel)

    for seed, shape in enumerate(SHAPES):
        kernel = tf.constant(np.random.RandomState(seed).randn(*shape))
        value, gradient = tf.function(both)(kernel)
        assert gradient.shape == shape
        assert_close([value, gradient], [np.sum(kernel.numpy() ** 3), 3 * kernel.numpy() ** 2])
    assert len(asked) == traces


@pytest.mark.parametrize("fixed_axes", [None, 1, 0])
def test_each_dtype_and_rank_has_its_own_trace(fixed_axes):
    own = PenaltyFunction(cube()[0], fixed_axes=fixed_axes)
    for dtype in ("float32", "float64", "float32"):
        for shape in ((2, 3), (1, 2, 3), ()):
            found = tf.function(lambda kernel: tf.gradients(own(kernel), kernel)[0])(
                tf.fill(shape, tf.cast(2.0, dtype))
            )
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, np.full(shape, 12.0))


def test_kernels_share_one_function_apart():
    """A graph of many kernels of one tap has one function, which it calls, and few other operations."""

    def total(*kernels):
        return tf.add_n([frobenius_penalty(kernel, 4) for kernel in kernels])

    counts = []
    for number in (1, 5):
        specs = [tf.TensorSpec((1, 1, size + 1, 5)) for size in range(number)]
        definition = tf.function(total).get_concrete_function(*specs).graph.as_graph_def()
        apart = [f for f in definition.library.function if f.attr["_noinline"].b]
        calls = [node for node in definition.node if "PartitionedCall" in node.op]
        assert (len(apart), len(calls)) == (1, number)
        assert not any("MatMul" in node.op for node in definition.node)
        counts.append(len(definition.node))
    assert counts[1] - counts[0] <= 4 * 12


def test_what_does_not_count_is_not_computed():
    function, asked = cube()
    own, kernel = PenaltyFunction(function), tf.constant([1.0, np.nan, np.inf])
    for call in (own, tf.function(own)):
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            value = call(kernel, Weight(0.0))
        assert float(value) == 0.0
        np.testing.assert_array_equal(tape.gradient(value, kernel), np.zeros(3))
    assert not asked


@pytest.mark.parametrize("number", [2.0, 0.0])
def test_a_weighted_function(number):
    kernel, calls = tf.constant([1.0, 2.0]), tf.Variable(0)

    def function(kernel):
        calls.assign_add(1)
        return tf.reduce_sum(kernel**3)

    def both(weight):
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            value = weighted(function, kernel, weight)
        return value, tape.gradient(value, kernel)

    traced = tf.function(lambda tensor: both(Weight(0.5, tensor)))(tf.constant(2 * number))
    for value, gradient in (both(Weight(number)), traced):
        assert float(value) == 9.0 * number
        np.testing.assert_array_equal(gradient, np.array([3.0, 12.0]) * number)
    assert int(calls) == (2 if number else 0)


@pytest.mark.parametrize(
    "case", [case for case in ONE_TAP if len(case.image) == 2 and case.strides == 1], ids=label
)
def test_one_tap_has_the_value_of_a_kernel_of_more_taps(case):
    """Zeros around the one tap leave the operator as it is."""
    kernel = case.kernel()
    wide = np.pad(kernel, ((1, 1), (1, 1), (0, 0), (0, 0)))
    value, gradient, second = derivatives(of_package(case), tf.constant(kernel), tf.constant(kernel))
    other, whole, product = derivatives(of_package(case), tf.constant(wide), tf.constant(wide))
    assert_close([value, gradient, second], [other, whole[1:2, 1:2], product[1:2, 1:2]])
