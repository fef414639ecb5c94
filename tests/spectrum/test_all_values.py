"""All singular values, against the SVD of the real layer, of dense M and of the slow twin's M."""

import numpy as np
import pytest
import tensorflow as tf
from geometries import CIRCULAR_CASES, KERAS_CASES, label
from oracles import impulse_matrix, naive_matrix

import tf_frobreg.checks
import tf_frobreg.spectrum.all_values
from tf_frobreg import singular_values, transformation_matrix


@pytest.mark.parametrize("case", KERAS_CASES, ids=label)
def test_singular_values_are_those_of_the_keras_layer(case):
    kernel = case.kernel()
    matrix = impulse_matrix(case.layer(kernel), case.image, case.channels)
    expected = np.linalg.svd(matrix, compute_uv=False)
    found = singular_values(kernel, case.image, **case.geometry)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * expected[0])
    assert found.dtype == np.float64
    assert (np.diff(found) <= 0).all()


@pytest.mark.parametrize("case", [*KERAS_CASES, *CIRCULAR_CASES], ids=label)
@pytest.mark.parametrize("decomposed_rows", [0, 10**6], ids=["gram", "decomposition"])
def test_singular_values_are_those_of_dense_m(case, decomposed_rows, monkeypatch):
    monkeypatch.setattr(tf_frobreg.spectrum.all_values, "DECOMPOSED_ROWS", decomposed_rows)
    for dtype in ("float32", "float64"):
        kernel = case.kernel(dtype=dtype)
        sparse = transformation_matrix(kernel.astype("float64"), case.image, **case.geometry)
        expected = np.linalg.svd(tf.sparse.to_dense(sparse), compute_uv=False)
        found = singular_values(kernel, case.image, **case.geometry)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8 * expected[0])


@pytest.mark.parametrize("scale", [1e-160, 1.0, 1e150])
@pytest.mark.parametrize("padding", ["same", "circular"])
def test_small_singular_values_are_right_although_a_gram_matrix_loses_them(padding, scale, monkeypatch):
    monkeypatch.setattr(tf_frobreg.spectrum.all_values, "DECOMPOSED_ROWS", 0)
    kernel = np.zeros((3, 3, 2, 2))
    kernel[1, 1] = scale * np.diag([1.0, 1e-9])
    found = singular_values(kernel, 5, padding=padding)
    np.testing.assert_allclose(found, scale * np.repeat([1.0, 1e-9], 25), rtol=1e-5)
    assert singular_values(0 * kernel, 5, padding=padding).max() == 0


def test_squares_add_up_to_the_norm_of_m():
    case = CIRCULAR_CASES[0]
    geometry = {name: value for name, value in case.geometry.items() if name != "kind"}
    matrix = naive_matrix(case.kernel(), case.image, **geometry)
    sigma = singular_values(case.kernel(), case.image, **geometry)
    assert np.sum(sigma**2) == pytest.approx(np.sum(matrix**2))


def test_float32_kernels_are_computed_in_float64():
    kernel = np.random.RandomState(0).standard_normal((3, 3, 2, 2)).astype("float32")
    assert np.array_equal(singular_values(kernel, 5), singular_values(kernel.astype("float64"), 5))


def test_a_kernel_without_known_values_is_refused():
    with pytest.raises(TypeError, match="kernel must have known values"):
        tf.function(lambda k: singular_values(k, 5))(tf.ones((3, 3, 1, 1)))


def test_matrices_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="the singular values of M of shape 262144 × 262144 need a dense"):
        singular_values(np.ones((1, 1, 1, 1)), 512)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"accuracy": 0}, ValueError, "accuracy must be a finite number above 0. Received: accuracy=0"),
        ({"accuracy": "high"}, TypeError, "accuracy must be a number above 0. Received: accuracy='high'"),
        ({"stride": 2}, TypeError, "unknown argument 'stride'"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        singular_values(np.ones((3, 3, 1, 1)), 5, **arguments)


@pytest.mark.parametrize("decomposed_rows", [0, 10**6], ids=["gram", "decomposition"])
def test_what_does_not_fit_in_memory_names_the_function_that_does(decomposed_rows, monkeypatch):
    monkeypatch.setattr(tf_frobreg.spectrum.all_values, "DECOMPOSED_ROWS", decomposed_rows)
    monkeypatch.setattr(tf_frobreg.checks, "free_memory", lambda: 10**7)
    with pytest.raises(ValueError, match="but 10,000,000 are free. Use extreme_singular_values"):
        singular_values(np.ones((3, 3, 1, 1)), 40)
