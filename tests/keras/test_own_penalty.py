"""Whether a kernel's own penalty suits its layer."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_frobreg import (
    Convolution,
    FrobeniusRegularizer,
    ReshapedRegularizer,
    SpectralRegularizer,
    SumRegularizer,
    transformation_matrix,
)
from tf_frobreg.keras.own_penalty import differences, is_for, own_penalty, remark_on, target_of
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


def kernel_of(layer, *sizes):
    """The kernel of a layer that is applied to images of these sizes."""
    inputs = [keras.Input((*size, 2)) for size in sizes]
    return read_kernels(keras.Model(inputs, [layer(x) for x in inputs])).kernels[0]


@pytest.mark.parametrize(
    ("penalty", "alpha", "padding"),
    [
        (None, 1.0, "same"),
        ("l2", 1.0, "same"),
        (FrobeniusRegularizer(8, alpha=2.0), 2.0, "same"),
        (FrobeniusRegularizer(8, alpha=2.0, padding="circular"), 2.0, "circular"),
        (SpectralRegularizer(8, alpha=3.0), 3.0, "same"),
        (SpectralRegularizer(8, alpha=3.0, padding="circular"), 3.0, "circular"),
        (ReshapedRegularizer(alpha=4.0), 4.0, "same"),
        (SumRegularizer([ReshapedRegularizer(alpha=4.0), FrobeniusRegularizer(8, alpha=2.0)]), 2.0, "same"),
    ],
)
def test_how_a_penalty_says_to_measure(penalty, alpha, padding):
    layer = keras.layers.Conv2D(3, 3, padding="same", kernel_regularizer=penalty)
    kernel = kernel_of(layer, (8, 8))
    for given, expected in ((None, alpha), (0.5, 0.5)):
        target = target_of(kernel, given)
        assert (target.alpha, target.kernel.conv.padding, target.mismatch) == (expected, padding, "")


CIRCULAR = "penalised without border (circular), measured with the layer's padding"


@pytest.mark.parametrize(
    ("penalty", "size", "remark"),
    [
        (None, 3, None),
        (FrobeniusRegularizer(8), 3, None),
        (FrobeniusRegularizer(8, padding="circular"), 3, CIRCULAR),
        (SpectralRegularizer(8, padding="circular"), 3, CIRCULAR),
        (SumRegularizer(["l2", FrobeniusRegularizer(8, padding="circular")]), 3, CIRCULAR),
        (FrobeniusRegularizer(8, padding="circular"), 1, None),
    ],
)
def test_what_a_measurement_of_the_layer_leaves_out(penalty, size, remark):
    layer = keras.layers.Conv2D(3, size, padding="same", kernel_regularizer=penalty)
    kernel = kernel_of(layer, (8, 8))
    assert remark_on(kernel) == remark
    shared = "also applied to 64×32, 5×5"
    kernel = kernel._replace(other_sizes=((64, 32), (5, 5)))
    assert remark_on(kernel) == (f"{remark}; {shared}" if remark else shared)


def test_the_other_sizes_of_a_shared_layer_are_named():
    kernel = kernel_of(keras.layers.Conv2D(3, 3), (8, 8), (64, 32))
    others = {(8, 8): "64×32", (64, 32): "8×8"}
    assert remark_on(kernel) == f"also applied to {others[kernel.conv.input_size]}"


def test_a_dense_layer_has_no_border():
    layer = keras.layers.Dense(3, kernel_regularizer=FrobeniusRegularizer((), padding="circular"))
    assert remark_on(kernel_of(layer, ())) is None
