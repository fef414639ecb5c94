"""Singular values against the SVD of the slow twin's M."""

import numpy as np
import pytest
import tensorflow as tf
from geometries import CIRCULAR_CASES, KERAS_CASES, Case, label
from oracles import impulse_matrix, naive_matrix

import tf_frobreg.spectrum
from tf_frobreg import singular_values, transformation_matrix
from tf_frobreg.spectrum import extreme_singular_values


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
@pytest.mark.parametrize("small", [0, 10**6], ids=["gram", "svd"])
def test_singular_values_are_those_of_dense_m(case, small, monkeypatch):
    monkeypatch.setattr(tf_frobreg.spectrum, "SMALL", small)
    for dtype in ("float32", "float64"):
        kernel = case.kernel(dtype=dtype)
        sparse = transformation_matrix(kernel.astype("float64"), case.image, **case.geometry)
        expected = np.linalg.svd(tf.sparse.to_dense(sparse), compute_uv=False)
        found = singular_values(kernel, case.image, **case.geometry)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8 * expected[0])


@pytest.mark.parametrize("scale", [1e-160, 1.0, 1e150])
@pytest.mark.parametrize("padding", ["same", "circular"])
def test_small_singular_values_are_right_where_a_gram_matrix_loses_them(padding, scale, monkeypatch):
    monkeypatch.setattr(tf_frobreg.spectrum, "SMALL", 0)
    kernel = np.zeros((3, 3, 2, 2))
    kernel[1, 1] = scale * np.diag([1.0, 1e-9])
    found = singular_values(kernel, 5, padding=padding)
    np.testing.assert_allclose(found, scale * np.repeat([1.0, 1e-9], 25), rtol=1e-5)
    assert singular_values(0 * kernel, 5, padding=padding).max() == 0


def test_squares_add_up_to_the_norm_of_m():
    case = CIRCULAR_CASES[0]
    geometry = case.geometry
    del geometry["kind"]
    matrix = naive_matrix(case.kernel(), case.image, **geometry)
    assert np.sum(singular_values(case.kernel(), case.image, **geometry) ** 2) == pytest.approx(
        np.sum(matrix**2)
    )


def test_float32_kernels_are_measured_in_float64():
    kernel = np.random.RandomState(0).standard_normal((3, 3, 2, 2)).astype("float32")
    assert np.array_equal(singular_values(kernel, 5), singular_values(kernel.astype("float64"), 5))


@pytest.mark.parametrize(
    "case", [Case((3, 3, 3, 6), (12, 12)), Case((3, 3, 6, 3), (12, 10)), *KERAS_CASES[::3]]
)
@pytest.mark.parametrize("small", [0, 10**6], ids=["arpack", "lapack"])
def test_extremes_are_the_ends_of_the_spectrum(case, small, monkeypatch):
    monkeypatch.setattr(tf_frobreg.spectrum, "SMALL", max(small, 22))
    sigma = singular_values(case.kernel(), case.image, **case.geometry)
    found = extreme_singular_values(case.kernel(), case.image, **case.geometry)
    assert found.sigma_max == pytest.approx(sigma[0], rel=1e-6)
    assert found.sigma_min**2 == pytest.approx(sigma[-1] ** 2, abs=5e-6 * sigma[0] ** 2)


@pytest.mark.parametrize(
    "case",
    [
        Case((3, 3, 3, 6), (12, 12)),
        Case((3, 3, 6, 3), (12, 10), padding="valid"),
        Case((3, 3, 4, 4), (11, 12), padding="circular"),
        Case((3, 3, 4, 6), (17, 16), strides=2),
        Case((3, 3, 2, 8), (9, 10), groups=2),
        Case((3, 3, 5, 2), (9, 10), kind="depthwise"),
        Case((3, 3, 3, 6), (9, 8), strides=2, kind="transpose"),
    ],
    ids=label,
)
def test_extremes_without_any_matrix(case, monkeypatch):
    monkeypatch.setattr(tf_frobreg.spectrum, "SPARSE", 0)
    sigma = singular_values(case.kernel(), case.image, **case.geometry)
    found = extreme_singular_values(case.kernel(), case.image, **case.geometry)
    assert found.sigma_max == pytest.approx(sigma[0], rel=1e-6)
    assert found.sigma_min**2 == pytest.approx(sigma[-1] ** 2, abs=5e-6 * sigma[0] ** 2)


def test_an_accuracy_out_of_reach_is_no_silent_nan(monkeypatch):
    monkeypatch.setattr(tf_frobreg.spectrum, "SPARSE", 0)
    monkeypatch.setattr(tf_frobreg.spectrum, "RESTARTS", 1)
    with pytest.raises(ValueError, match="accuracy is not reached .* Received: accuracy=1e-10"):
        extreme_singular_values(np.random.RandomState(0).randn(3, 3, 4, 4), 16, accuracy=1e-10)


def test_extremes_of_a_rank_deficient_kernel():
    kernel = np.zeros((3, 3, 2, 2))
    kernel[1, 1, 0, 0] = 3.0
    assert extreme_singular_values(kernel, 16) == (pytest.approx(3.0), pytest.approx(0.0, abs=1e-7))


@pytest.mark.parametrize("scale", [1e-170, 1e-20, 1e20, 1e160])
@pytest.mark.parametrize("size", [5, 20])
def test_extremes_of_badly_scaled_kernels(scale, size):
    kernel = np.random.RandomState(0).standard_normal((3, 3, 1, 2))
    expected, found = (extreme_singular_values(k, size) for k in (kernel, scale * kernel))
    np.testing.assert_allclose(found, scale * np.array(expected), rtol=1e-6)


def test_zero_kernel_has_zero_extremes():
    assert extreme_singular_values(np.zeros((3, 3, 1, 1)), 6) == (0.0, 0.0)


def test_values_are_needed():
    with pytest.raises(TypeError, match="kernel must have known values"):
        tf.function(lambda k: singular_values(k, 5))(tf.ones((3, 3, 1, 1)))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="the singular values of M of shape 262144 × 262144 need a dense"):
        singular_values(np.ones((1, 1, 1, 1)), 512)
