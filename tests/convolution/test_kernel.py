"""Which kernels are accepted."""

import inspect
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from geometries import CIRCULAR_CASES, KERAS_CASES

import tf_frobreg as fr
from tf_frobreg import transformation_matrix
from tf_frobreg.convolution.kernel import as_kernel, known_values, remark_on_order

KERNEL = np.full((3, 3, 1, 1), 0.5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("convert", [np.array, tf.constant, tf.Variable, keras.Variable])
def test_arrays_tensors_and_variables_are_kernels(convert, dtype):
    kernel = convert(KERNEL, dtype=dtype)
    assert tf.is_tensor(as_kernel(kernel))
    for found in (as_kernel(kernel).numpy(), known_values(kernel)):
        assert found.dtype == dtype
        assert np.array_equal(found, KERNEL)


def test_kernels_that_are_not_finite_may_be_allowed():
    assert np.isnan(as_kernel(np.nan * KERNEL, check_finite=False)).all()


def test_sparse_kernels_are_refused():
    with pytest.raises(TypeError, match="kernel must be a dense array. Received: a SparseTensor"):
        as_kernel(tf.sparse.from_dense(KERNEL))


def test_values_are_not_known_inside_a_traced_function():
    function = tf.function(known_values, autograph=False)
    with pytest.raises(TypeError, match="kernel must have known values.*Call this function eagerly"):
        function(tf.constant(KERNEL))


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (np.ones((3, 3, 1, 1), dtype=int), "kernel must be float32 or float64. Received: kernel.dtype=int64"),
        (np.ones((3, 3, 1, 1), dtype=complex), "kernel must be float32 or float64"),
        (np.ones((3, 3, 1, 1), dtype=bool), "kernel must be float32 or float64"),
        (np.full((3, 3, 1, 1), "a"), "kernel must be float32 or float64"),
        (None, "kernel must be an array"),
        ([[1.0], [2.0, 3.0]], "kernel must be an array"),
        (np.full((3, 3, 1, 1), np.nan), "kernel must be finite"),
        (np.full((3, 3, 1, 1), np.inf), "kernel must be finite"),
        (np.ones((3, 3)), "input_size must be"),
        (np.ones((0, 3, 1, 1)), "must not be empty"),
    ],
)
def test_bad_kernels_are_refused_by_name(kernel, message):
    with pytest.raises((ValueError, TypeError), match=message):
        transformation_matrix(kernel, 8)


@pytest.mark.parametrize(
    "call",
    [
        lambda k: fr.transformation_matrix(k, 8),
        lambda k: fr.singular_values(k, 8),
        lambda k: fr.extreme_singular_values(k, 8),
        lambda k: fr.spectral_norm(k, 8),
        lambda k: fr.condition_number(k, 8),
        lambda k: fr.frobenius_penalty(k, 8),
        lambda k: fr.frobenius_gradient(k, 8),
        lambda k: fr.penalty_excess(k, 8),
        lambda k: fr.spectral_penalty(k, 8, power_steps=1),
        lambda k: fr.clip_singular_values(k, 8),
        lambda k: fr.regularize_kernel(k, 8, max_steps=0),
        lambda k: fr.reshaped_penalty(k),
    ],
    ids=lambda call: call.__code__.co_names[1],
)
def test_the_remark_on_the_order_points_at_the_line_of_the_user(call):
    kernel = np.random.RandomState(1).randn(6, 2, 3, 3)
    with pytest.warns(UserWarning, match=r"PyTorch's order.*use kernel.transpose\(2, 3, 1, 0\)") as caught:
        call(kernel)
    (warning,) = caught
    assert (warning.filename, warning.lineno) == (__file__, inspect.getsourcelines(call)[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(kernel.transpose(2, 3, 1, 0)[:, :, :, :2])


@pytest.mark.parametrize(
    "shape",
    [
        *[(64, 3, 3, 3), (16, 8, 3, 3), (64, 1, 3, 3), (64, 3, 7, 7), (96, 1, 5, 5), (16, 32, 3)],
        *[(6, 2, 3, 3, 3), (4, 3, 3, 3), (16, 8, 1, 1), (64, 256, 1, 1), (16, 8, 3), (4, 3, 3, 3, 3)],
        (4, 3, 5, 5),
    ],
)
def test_kernels_in_the_order_of_pytorch_are_remarked(shape):
    remark = remark_on_order(shape)
    assert str(shape) in remark
    axes = tuple(map(int, remark.partition("transpose(")[2].partition(")")[0].split(", ")))
    assert np.zeros(shape).transpose(axes).shape == (*shape[2:], shape[1], shape[0])


@pytest.mark.parametrize(
    "shape",
    [
        *(case.kernel_shape for case in KERAS_CASES + CIRCULAR_CASES),
        *[
            (3, 3, 3, 64),
            (7, 7, 3, 64),
            (1, 7, 64, 64),
            (7, 1, 3, 3),
            (3, 3, 3, 3),
            (5, 5, 5, 5),
            (1, 1, 3, 3),
        ],
        *[(31, 31, 64, 1), (16, 16, 3, 768), (4, 4, 3, 3), (3, 3, 64, 3), (9, 9, 3, 3), (64, 3), (3, 3)],
        *[(8, 1, 3), (64, 1, 3), (8, 16, 3), (5, 64, 3), (3, 3, 3), (3, 16, 16)],
        *[(3, 3, 3, 3, 3), (3, 3, 3, 1, 32), (2, 2, 2, 16, 3), (5, 5, 5, 3, 3)],
        *[(1, 1, 16, 8), (1, 7, 128, 128), (7, 1, 64, 64), (3, 1, 8, 8), (3, 8, 16), (5, 5, 1, 1)],
        *[
            (2, 1, 3, 3),
            (1, 2, 3, 3),
            (4, 1, 1, 1),
            (16, 16, 1, 1),
            (8, 8, 1, 1),
            (3, 5, 1, 1),
            (1, 64, 1, 1),
        ],
        *[(16, 8, 1), (16, 1, 3), (16, 4, 3), (2, 2, 3, 3), (3, 5, 3, 3), (1, 1, 1, 64), (4, 4, 1, 1)],
        *[(3,), (), (None, None, 3, 3)],
    ],
    ids=str,
)
def test_kernels_of_keras_are_not_remarked(shape):
    assert remark_on_order(shape) is None


@pytest.mark.parametrize("autograph", [True, False])
def test_the_order_is_not_remarked_inside_a_traced_function(autograph):
    kernel = tf.constant(np.random.RandomState(1).randn(6, 2, 3, 3))
    penalty = tf.function(lambda k: fr.frobenius_penalty(k, 8), autograph=autograph)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced = penalty(kernel)
    with pytest.warns(UserWarning, match="PyTorch's order"):
        assert float(traced) == pytest.approx(float(fr.frobenius_penalty(kernel, 8)))


def test_the_order_of_the_kernel_of_a_layer_is_not_remarked():
    layer = keras.layers.Conv2D(3, (4, 3))
    layer.build((None, 8, 8, 3))
    assert remark_on_order(layer.kernel.shape) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fr.spectral_norm(layer, 8) > 0
        assert fr.reshaped_penalty(layer) >= 0


def test_only_a_dense_kernel_needs_no_input_size():
    dense = np.random.RandomState(1).randn(5, 3)
    assert np.array_equal(fr.singular_values(dense), fr.singular_values(dense, ()))
    assert fr.penalty_floor((5, 3)) == fr.penalty_floor((5, 3), ())
    for call in (fr.singular_values, fr.frobenius_penalty, fr.regularize_kernel, fr.transformation_matrix):
        with pytest.raises(TypeError, match="input_size must be given: .* int per axis"):
            call(KERNEL)
    for call in (fr.penalty_floor, fr.toeplitz_indices):
        with pytest.raises(TypeError, match="input_size must be given"):
            call(KERNEL.shape)
