"""Explicit M against the slow twin, the real Keras layers, and the paper's own print."""

import tracemalloc

import numpy as np
import pytest
import tensorflow as tf
from geometries import CIRCULAR_CASES, KERAS_CASES, Case, cases, label
from hypothesis import given, settings
from oracles import impulse_matrix, naive_matrix, printed_blocks

from tf_frobreg import index_set, toeplitz_indices, transformation_matrix
from tf_frobreg.convolution.matrix import BYTES_PER_ENTRY


def dense(case, kernel, **options):
    return tf.sparse.to_dense(transformation_matrix(kernel, case.image, **case.geometry, **options)).numpy()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
@pytest.mark.parametrize("case", KERAS_CASES, ids=label)
def test_matrix_is_what_the_keras_layer_does_to_impulses(case, dtype, tolerance):
    kernel = case.kernel(dtype=dtype)
    expected = impulse_matrix(case.layer(kernel), case.image, case.channels)
    found = dense(case, kernel)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@settings(max_examples=60)
@given(cases(paddings=("same", "valid")))
def test_matrix_is_what_any_keras_layer_does_to_impulses(case):
    kernel = case.kernel()
    expected = impulse_matrix(case.layer(kernel), case.image, case.channels)
    np.testing.assert_allclose(dense(case, kernel), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CIRCULAR_CASES, ids=label)
def test_circular_matrix_is_the_slow_twins(case):
    geometry = case.geometry
    assert geometry.pop("kind") == "conv"
    expected = naive_matrix(case.kernel(), case.image, **geometry)
    np.testing.assert_allclose(dense(case, case.kernel()), expected, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:A kernel of shape")  # some seem to be in PyTorch's order
@settings(max_examples=60)
@given(cases(kinds=("conv",)))
def test_matrix_is_the_slow_twins_for_any_geometry(case):
    geometry = case.geometry
    del geometry["kind"]
    expected = naive_matrix(case.kernel(), case.image, **geometry)
    np.testing.assert_allclose(dense(case, case.kernel()), expected, rtol=0, atol=1e-12)


def test_paper_layout_is_2_1_entry_by_entry():
    kernel = np.arange(1.0, 10.0).reshape(3, 3)
    found = dense(Case((3, 3, 1, 1), (5, 5)), kernel[:, :, None, None], layout="paper")
    assert np.array_equal(found, printed_blocks(kernel, 5))


def test_paper_layout_is_3_1_block_by_block():
    case = Case((3, 3, 2, 3), (5, 5))
    kernel = case.kernel()
    blocks = [[printed_blocks(kernel[:, :, d, c], 5) for d in range(2)] for c in range(3)]
    assert np.array_equal(dense(case, kernel, layout="paper"), np.block(blocks))


def test_values_are_in_canonical_order_without_repetition():
    for case in [*KERAS_CASES, *CIRCULAR_CASES]:
        matrix = transformation_matrix(case.kernel(), case.image, **case.geometry)
        keys = np.ravel_multi_index(matrix.indices.numpy().T, matrix.dense_shape.numpy())
        assert (np.diff(keys) > 0).all()


def test_tape_carries_any_function_of_m_back_to_the_kernel():
    case = Case((3, 2, 2, 2), (4, 5), padding="circular")
    kernel = tf.Variable(case.kernel())
    weights = np.random.RandomState(1).standard_normal((40, 40))
    with tf.GradientTape() as tape:
        matrix = tf.sparse.to_dense(transformation_matrix(kernel, case.image, **case.geometry))
        loss = tf.reduce_sum(weights * matrix)
    gradient = tape.gradient(loss, kernel).numpy()
    for entry in np.ndindex(*case.kernel_shape):
        omega = index_set(case.kernel_shape, case.image, entry, **case.geometry)
        assert gradient[entry] == pytest.approx(sum(weights[i, j] for i, j in omega), rel=1e-12)


def test_matrix_works_inside_a_traced_function(caplog):
    case = KERAS_CASES[0]

    @tf.function
    def function(kernel):
        return tf.sparse.to_dense(transformation_matrix(kernel, case.image))

    assert np.array_equal(function(tf.constant(case.kernel())), dense(case, case.kernel()))
    assert "AutoGraph" not in caplog.text


@pytest.mark.parametrize("layout", ["channels_last", "paper"])
def test_index_set_is_where_the_entry_stands(layout):
    case = Case((3, 3, 2, 2), (3, 4))
    for entry in [(0, 0, 0, 0), (1, 2, 1, 0), (2, 2, 1, 1)]:
        kernel = np.zeros(case.kernel_shape)
        kernel[entry] = 1.0
        expected = np.argwhere(dense(case, kernel, layout=layout))
        assert np.array_equal(index_set(case.kernel_shape, case.image, entry, layout=layout), expected)


@pytest.mark.parametrize("entry", [(3, 0, 0, 0), (0, 0, 0), (-1, 0, 0, 0), (0.5, 0, 0, 0)])
def test_index_set_refuses_what_is_not_an_entry(entry):
    with pytest.raises((ValueError, TypeError), match="entry must be.*Received: entry="):
        index_set((3, 3, 1, 1), 4, entry)


def test_what_does_not_fit_is_refused_before_it_is_allocated():
    with pytest.raises(ValueError, match=r"has [\d,]+ entries.*needs [\d,]+ bytes.*closed_form"):
        toeplitz_indices((3, 3, 512, 512), 10**9)


def test_the_memory_it_is_refused_by_is_the_memory_it_takes():
    tracemalloc.start()
    index = toeplitz_indices((3, 3, 8, 8), 32)
    peak = tracemalloc.get_traced_memory()[1] / len(index.positions)
    tracemalloc.stop()
    assert 0.8 * BYTES_PER_ENTRY < peak <= BYTES_PER_ENTRY


def test_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="layout must be one of .*Received: layout='channels_first'"):
        transformation_matrix(np.ones((3, 3, 1, 1)), 8, layout="channels_first")
