"""Products with M and Mᵀ against the explicit matrix."""

import numpy as np
import pytest
import tensorflow as tf
from geometries import CIRCULAR_CASES, KERAS_CASES, label, normal

from tf_frobreg import transformation_matrix
from tf_frobreg.convolution.apply import apply, apply_adjoint
from tf_frobreg.convolution.geometry import Convolution

ALL_CASES = KERAS_CASES + CIRCULAR_CASES


def dense(kernel, case):
    return tf.sparse.to_dense(transformation_matrix(kernel, case.image, **case.geometry))


@pytest.mark.parametrize("case", ALL_CASES, ids=label)
def test_the_map_and_its_adjoint_are_m(case):
    kernel = case.kernel()
    conv = Convolution.of(kernel.shape, case.image, case.geometry)
    matrix = dense(kernel, case).numpy()
    ends = [normal(2, *shape) for shape in (conv.input_shape, conv.output_shape)]
    for function, images, expected in [(apply, ends[0], matrix.T), (apply_adjoint, ends[1], matrix)]:
        found = function(tf.constant(kernel), tf.constant(images), conv).numpy()
        assert found.shape[0] == 2
        np.testing.assert_allclose(found.reshape(2, -1), images.reshape(2, -1) @ expected, atol=1e-12)


@pytest.mark.parametrize("case", ALL_CASES, ids=label)
def test_the_map_is_m_in_a_float32_graph_too(case):
    """TensorFlow rewrites graphs, sometimes wrongly. A padded Conv3D lost its padding."""
    kernel = case.kernel(dtype="float32")
    conv = Convolution.of(kernel.shape, case.image, case.geometry)
    matrix = dense(kernel, case).numpy()
    ends = [normal(2, *shape).astype("float32") for shape in (conv.input_shape, conv.output_shape)]
    for function, images, expected in [(apply, ends[0], matrix.T), (apply_adjoint, ends[1], matrix)]:
        traced = tf.function(lambda k, x, f=function: f(k, x, conv), autograph=False)
        found = traced(tf.constant(kernel), tf.constant(images)).numpy()
        np.testing.assert_allclose(found.reshape(2, -1), images.reshape(2, -1) @ expected, atol=1e-4)
