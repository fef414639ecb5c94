"""The smaller Gram matrix of M, entry by entry and by its eigenvalues."""

import numpy as np
import pytest
import tensorflow as tf
from geometries import CIRCULAR_CASES, KERAS_CASES, label
from oracles import impulse_matrix, naive_matrix

import tf_frobreg.checks
from tf_frobreg import Convolution, transformation_matrix
from tf_frobreg.spectrum.gram_matrix import GramMatrix, gram_matrix


def smaller_gram(matrix):
    """The smaller of MMᵀ and MᵀM; MᵀM if M is square."""
    return matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix


def of_case(case):
    return GramMatrix(Convolution.of(case.kernel_shape, case.image, case.geometry))


@pytest.mark.parametrize("case", [*KERAS_CASES, *CIRCULAR_CASES], ids=label)
def test_the_gram_matrix_is_that_of_m(case):
    kernel = case.kernel()
    matrix = tf.sparse.to_dense(transformation_matrix(kernel, case.image, **case.geometry)).numpy()
    expected = np.linalg.eigvalsh(smaller_gram(matrix))
    gram = of_case(case)
    whole = gram.sparse(kernel)
    assert whole.nnz == gram.entries
    by_group = np.concatenate([np.linalg.eigvalsh(block) for block in gram.dense(kernel)])
    for found in (np.linalg.eigvalsh(whole.toarray()), np.sort(by_group)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * expected[-1])


@pytest.mark.parametrize("case", KERAS_CASES, ids=label)
def test_its_rows_are_in_the_order_of_the_keras_layer(case):
    kernel = case.kernel()
    expected = smaller_gram(impulse_matrix(case.layer(kernel), case.image, case.channels))
    found = of_case(case).sparse(kernel).toarray()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * expected.max())


@pytest.mark.parametrize("case", CIRCULAR_CASES, ids=label)
def test_its_rows_are_in_the_order_of_the_slow_twin(case):
    kernel = case.kernel()
    geometry = {name: value for name, value in case.geometry.items() if name != "kind"}
    expected = smaller_gram(naive_matrix(kernel, case.image, **geometry))
    found = of_case(case).sparse(kernel).toarray()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * expected.max())


@pytest.mark.parametrize("case", [*KERAS_CASES, *CIRCULAR_CASES], ids=label)
def test_each_group_has_its_own_block(case):
    kernel, gram = case.kernel(), of_case(case)
    conv = Convolution.of(case.kernel_shape, case.image, case.geometry)
    groups, g, h = conv.blocks
    channels = h if conv.gram_side == "output" else g
    whole, blocks = gram.sparse(kernel).toarray(), list(gram.dense(kernel))
    assert len(blocks) == groups
    assert len(whole) == min(conv.shape) == groups * gram.group_size
    for number, block in enumerate(blocks):
        own = np.arange(len(whole)) // channels % groups == number
        np.testing.assert_array_equal(whole[np.ix_(own, own)], block)
        assert not whole[np.ix_(own, ~own)].any()


def test_one_geometry_has_one_gram_matrix():
    first, second = (Convolution((3, 3, 2, 4), 6, strides=strides) for strides in (2, (2, 2)))
    assert gram_matrix(first) is gram_matrix(second)
    assert gram_matrix(Convolution((3, 3, 2, 4), 6)) is not gram_matrix(first)


def test_the_matrix_is_float64():
    gram, kernel = GramMatrix(Convolution((3, 2, 2), 5)), np.ones((3, 2, 2), "float32")
    assert gram.sparse(kernel).dtype == np.float64
    assert next(gram.dense(kernel)).dtype == np.float64


def test_a_dense_matrix_that_does_not_fit_is_refused():
    gram = GramMatrix(Convolution((1, 1, 1, 1), 512))
    with pytest.raises(ValueError, match="M of shape 262144 × 262144 need a dense matrix.*Use extreme_sing"):
        next(gram.dense(np.ones((1, 1, 1, 1))))


def test_a_kernel_with_too_many_pairs_of_taps_is_refused(monkeypatch):
    monkeypatch.setattr(tf_frobreg.checks, "free_memory", lambda: 5 * 10**7)
    gram = GramMatrix(Convolution((7, 7, 64, 64), 2))
    with pytest.raises(ValueError, match=r"of shape \(7, 7, 64, 64\) has 49² pairs of taps.*smaller kernel"):
        gram.sparse(np.ones((7, 7, 64, 64)))
