"""Whether a kernel's own penalty suits its layer."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_frobreg import Convolution, FrobeniusRegularizer, SumRegularizer, transformation_matrix
from tf_frobreg.keras.own_penalty import differences, is_for, own_penalty
from tf_frobreg.keras.read_layers import read_kernels

DOWN = Convolution((3, 3, 2, 4), 8, strides=2, padding="valid")
POINT = Convolution((1, 1, 2, 4), 8, padding="valid")
WHOLE = Convolution((3, 3, 4, 2), 3, padding="valid", groups=2)
PAIRS = [
    (DOWN, FrobeniusRegularizer(8, strides=2, padding="valid"), ""),
    (DOWN, FrobeniusRegularizer((8, 8), strides=(2, 2), padding="circular"), ""),
    (POINT, FrobeniusRegularizer(8, padding="same", dilation_rate=2), ""),
    (DOWN, FrobeniusRegularizer(9, strides=2, padding="valid"), "input_size=(9, 9) instead of (8, 8)"),
    (DOWN, FrobeniusRegularizer(9, strides=2, padding="circular"), "input_size=(9, 9) instead of (8, 8)"),
    (DOWN, FrobeniusRegularizer(8, strides=2), "padding=same instead of valid"),
    (DOWN, FrobeniusRegularizer(8, padding="valid"), "strides=(1, 1) instead of (2, 2)"),
    (WHOLE, FrobeniusRegularizer(3, padding="valid"), "groups=1 instead of 2"),
    (
        DOWN,
        FrobeniusRegularizer((8,), strides=2),
        "input_size=(8,) instead of (8, 8), padding=same instead of valid",
    ),
    (
        Convolution((3, 3, 4, 4), 6),
        FrobeniusRegularizer(6, kind="transpose"),
        "kind=transpose instead of conv",
    ),
    (Convolution((2, 4), ()), FrobeniusRegularizer(()), ""),
    (Convolution((2, 4), ()), FrobeniusRegularizer(5), "input_size=5 instead of ()"),
]


@pytest.mark.parametrize(("conv", "penalty", "words"), PAIRS, ids=range(len(PAIRS)))
def test_a_penalty_suits_a_layer_if_the_matrix_is_the_same(conv, penalty, words):
    assert is_for(penalty, conv) == (words == "")
    if words:
        assert words in differences(penalty, conv)
    elif penalty.padding != "circular":
        kernel = np.random.RandomState(0).randn(*conv.kernel_shape)
        own, right = (
            tf.sparse.to_dense(tf.sparse.reorder(transformation_matrix(kernel, size, **geometry)))
            for size, geometry in ((penalty.input_size, penalty.geometry), (conv.input_size, conv.geometry))
        )
        np.testing.assert_array_equal(own, right)


def test_the_first_penalty_in_sums_is_the_own_one():
    penalty = FrobeniusRegularizer((), 0.1)
    nested = SumRegularizer(["l2", SumRegularizer(["l1", penalty])])
    dense, plain = keras.layers.Dense(3, kernel_regularizer=nested), keras.layers.Dense(2)
    model = keras.Sequential([keras.Input((4,)), dense, plain])
    assert [own_penalty(kernel) for kernel in read_kernels(model).kernels] == [penalty, None]
    dense.enable_lora(2)  # the kernel is computed now
    assert own_penalty(read_kernels(model).kernels[0]) is penalty
