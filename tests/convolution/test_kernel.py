"""Which kernels are accepted."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_frobreg import transformation_matrix
from tf_frobreg.convolution.kernel import as_kernel, known_values

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
    with pytest.raises(
        TypeError, match="kernel must be an array of float32 or float64. Received: a SparseTensor"
    ):
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
