"""Products with the Gram matrix, and the search for its outermost eigenvalues."""

import numpy as np
import pytest
import tensorflow as tf
from geometries import CIRCULAR_CASES, KERAS_CASES, label

import tf_frobreg.spectrum.extreme_search
from tf_frobreg import Convolution, transformation_matrix
from tf_frobreg.spectrum.extreme_search import (
    SINGLE_ACCURACY,
    Product,
    find_outermost,
    gram_products,
    rayleigh,
)

SIZE = 60


def random_column(size, seed=0):
    return np.random.RandomState(seed).standard_normal((size, 1))


def matrix_with(eigenvalues):
    basis = np.linalg.qr(np.random.RandomState(3).standard_normal((SIZE, SIZE)))[0]
    return (basis * eigenvalues) @ basis.T


def exact_product(matrix):
    return Product(matrix.__matmul__, 0.0)


@pytest.mark.parametrize("case", [*KERAS_CASES, *CIRCULAR_CASES], ids=label)
@pytest.mark.parametrize("way", ["sparse", "convolutions"])
def test_products_are_those_of_the_smaller_gram_matrix(case, way, monkeypatch):
    if way == "convolutions":
        monkeypatch.setattr(tf_frobreg.spectrum.extreme_search, "SPARSE_ENTRIES", 0)
    kernel = case.kernel()
    matrix = tf.sparse.to_dense(transformation_matrix(kernel, case.image, **case.geometry)).numpy()
    gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    column = random_column(len(gram))
    products = gram_products(kernel, Convolution.of(kernel.shape, case.image, case.geometry))
    assert [p.accuracy for p in products] == [0.0] if way == "sparse" else [SINGLE_ACCURACY, 0.0]
    scale = np.linalg.norm(gram, 2) * np.linalg.norm(column)
    for product in products:
        image = product.multiply(column)
        assert image.dtype == np.float64
        np.testing.assert_allclose(image, gram @ column, rtol=0, atol=max(product.accuracy, 1e-13) * scale)


@pytest.mark.parametrize("accuracy", [1e-4, 1e-8, 1e-12])
def test_both_ends_are_found(accuracy):
    eigenvalues = np.geomspace(0.01, 9.0, SIZE)
    products = [exact_product(matrix_with(eigenvalues))]
    high = find_outermost(products, random_column(SIZE), accuracy, 1000)
    low = find_outermost(products, random_column(SIZE), accuracy, 1000, largest=high.value)
    for found, expected in ((high, 9.0), (low, 0.01)):
        assert found.residual <= accuracy * high.value
        assert found.value == pytest.approx(expected, abs=2 * accuracy * 9.0)
        assert found.vector.shape == (SIZE, 1)
        assert np.linalg.norm(found.vector) == pytest.approx(1.0)


def test_a_coarse_product_is_followed_by_an_exact_one():
    matrix = matrix_with(np.linspace(1.0, 2.0, SIZE))
    coarse = Product(lambda column: (matrix.astype("float32") @ column).astype("float64"), SINGLE_ACCURACY)
    found = find_outermost([coarse, exact_product(matrix)], random_column(SIZE), 1e-10, 1000)
    assert found.residual <= 1e-10 * found.value
    assert found.value == pytest.approx(2.0, rel=1e-10)


def test_the_exact_product_is_spared_if_the_coarse_one_is_accurate_enough():
    matrix, count = matrix_with(np.linspace(1.0, 2.0, SIZE)), []
    exact = Product(lambda column: count.append(1) or matrix @ column, 0.0)
    find_outermost([Product(matrix.__matmul__, SINGLE_ACCURACY), exact], random_column(SIZE), 1e-4, 1000)
    assert len(count) == 1  # the Rayleigh quotient


def test_a_search_that_runs_out_of_iterations_returns_its_best_vector():
    eigenvalues = np.linspace(1.0, 2.0, SIZE)
    products = [exact_product(matrix_with(eigenvalues))]
    start = random_column(SIZE)
    found = find_outermost(products, start, 1e-12, 2)
    assert found.residual > 1e-12 * found.value
    assert rayleigh(products[0].multiply, start).value < found.value <= 2.0
    assert np.abs(eigenvalues - found.value).min() <= found.residual


def test_the_rayleigh_quotient_lies_within_its_residual_of_an_eigenvalue():
    eigenvalues = np.linspace(0.0, 5.0, SIZE)
    matrix = matrix_with(eigenvalues)
    for seed in range(5):
        column = random_column(SIZE, seed)
        found = rayleigh(matrix.__matmul__, column)
        np.testing.assert_allclose(found.vector, column / np.linalg.norm(column))
        assert found.value == pytest.approx((found.vector.T @ matrix @ found.vector).item())
        assert found.residual == pytest.approx(
            np.linalg.norm(matrix @ found.vector - found.value * found.vector)
        )
        assert np.abs(eigenvalues - found.value).min() <= found.residual
