"""The geometry of one axis and of a whole convolution."""

import numpy as np
import pytest
import tensorflow as tf
from geometries import CIRCULAR_CASES, KERAS_CASES, label
from ids import stable_id

from tf_frobreg.convolution.geometry import Convolution


@pytest.mark.parametrize("case", KERAS_CASES + CIRCULAR_CASES, ids=label)
def test_num_taps_is_the_number_of_taps(case):
    axes = Convolution.of(case.kernel_shape, case.image, case.geometry).axes
    assert [axis.num_taps for axis in axes] == [len(axis.taps.entries) for axis in axes]


@pytest.mark.parametrize("case", KERAS_CASES, ids=label)
def test_shapes_are_those_of_the_keras_layer(case):
    conv = Convolution.of(case.kernel_shape, case.image, case.geometry)
    layer = case.layer(case.kernel())
    assert conv.input_shape == (*case.image, case.channels)
    assert conv.output_shape == tuple(layer.compute_output_shape((1, *conv.input_shape)))[1:]
    assert conv.shape == (np.prod(conv.output_shape), np.prod(conv.input_shape))


@pytest.mark.parametrize("case", KERAS_CASES + CIRCULAR_CASES, ids=label)
def test_from_groups_inverts_by_group(case):
    conv = Convolution.of(case.kernel_shape, case.image, case.geometry)
    blocks = conv.by_group(case.kernel(), np)
    assert blocks.shape == (*conv.kernel_size, *conv.blocks)
    assert np.array_equal(conv.from_groups(blocks, np), case.kernel())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_shape": (3,)}, r"kernel must have rank 4.*Received: kernel.shape=\(3,\)"),
        ({"kernel_shape": (3, 3, 3, 3, 3, 3)}, "kernel must have rank 4"),
        ({"kernel_shape": (3, 3, 0, 1)}, "kernel must have a known shape and must not be empty"),
        ({"kernel_shape": 3}, "kernel_shape must be a sequence of integers.*Received: kernel_shape=3"),
        ({"kernel_shape": (3, 3, "1", 1)}, "kernel_shape must be a sequence of integers"),
        ({"kernel_shape": (3, 3, 1.5, 1)}, "kernel_shape must be a sequence of integers"),
        ({"kernel_shape": (3, 3, 3, -1)}, "kernel_shape must be at least 0. Received: kernel_shape=-1"),
        ({"kernel_shape": np.ones((3, 3, 1, 1))}, "kernel_shape must be a sequence of integers, such as"),
        ({"kernel_shape": (2, 4)}, "input_size must be .. for a Dense kernel; .* a LoRA"),
        ({"input_size": 0}, "input_size must be at least 1. Received: input_size=0"),
        ({"input_size": (8, -1)}, "input_size must be at least 1. Received: input_size=-1"),
        ({"input_size": (8, 8, 8)}, "input_size must be an int or 2 ints"),
        ({"input_size": (8, 9, 2)}, r"Received: input_size=\(8, 9, 2\) .write \(8, 9\), without channels.$"),
        ({"kernel_shape": (3, 2, 4), "input_size": (8, 2)}, r"write \(8,\), without channels"),
        (
            {"kernel_shape": (3, 2, 4), "input_size": (5, 8, 2)},
            r"write \(8,\), without batch and channels",
        ),
        ({"input_size": (5, 8, 9, 2)}, r"2\) \(write \(8, 9\), without batch and channels\)$"),
        (
            {"input_size": (None, 28, 28, 1)},
            r"input_size must hold one integer per spatial axis, without batch and channels. "
            r"Received: input_size=\(None, 28, 28, 1\)$",
        ),
        ({"input_size": tf.TensorShape((None, 28, 28, 1))}, "per spatial axis, without batch and channels"),
        ({"strides": (1, None)}, "strides must hold one integer per spatial axis"),
        ({"input_size": (8,)}, r"input_size must be an int or 2 ints.*Received: input_size=\(8,\)$"),
        ({"input_size": 8.0}, "input_size must be an integer. Received: input_size=8.0"),
        ({"input_size": True}, "input_size must be an integer"),
        ({"input_size": None}, "input_size must be an integer"),
        ({"input_size": "8"}, "input_size must be an integer"),
        ({"padding": "full"}, "padding must be one of .*Received: padding='full'"),
        ({"padding": ["same"]}, "padding must be one of"),
        ({"padding": "vaild"}, "Received: padding='vaild' .did you mean 'valid'"),
        ({"kind": "separable"}, "kind must be one of"),
        ({"strides": 2, "dilation_rate": 2}, "strides above 1 cannot be combined with dilation_rate"),
        ({"strides": 0}, "strides must be at least 1"),
        ({"groups": 3}, "groups must divide the filters"),
        ({"groups": 2, "kind": "depthwise"}, 'groups above 1 need kind="conv"'),
        ({"input_size": 2, "padding": "valid"}, "input_size must be at least the .dilated. kernel size"),
        ({"kernel_shape": (3, 4), "input_size": (), "kind": "transpose"}, "needs a spatial axis"),
    ],
)
def test_bad_geometry_is_refused_by_name(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Convolution(**{"kernel_shape": (3, 3, 2, 4), "input_size": 8} | arguments)


@pytest.mark.parametrize("padding", ["SAME", "Valid", "CIRCULAR"])
def test_padding_is_read_in_any_case(padding):
    assert Convolution((3, 3, 1, 1), 8, padding=padding) == Convolution(
        (3, 3, 1, 1), 8, padding=padding.lower()
    )


@pytest.mark.parametrize(
    "size", [[4, 5], (4, 5), np.array([4, 5]), tf.constant([4, 5]), tf.TensorShape([4, 5])]
)
def test_sizes_may_be_any_sequence(size):
    assert Convolution((3, 3, 1, 1), size).input_size == (4, 5)


SIZES = [[1, [2, 3]], "44", b"44", {4, 5}, {4: 5}, print, [4, None], [4, 0.5], np.array([True, True])]


@pytest.mark.parametrize("size", SIZES, ids=stable_id)
@pytest.mark.parametrize("name", ["input_size", "strides", "dilation_rate"])
def test_what_is_no_size_is_refused_by_name(name, size):
    arguments = {"input_size": 4} | {name: size}
    with pytest.raises(TypeError, match=f"{name} must .*Received: {name}="):
        Convolution((3, 3, 1, 1), **arguments)


def test_unknown_arguments_are_refused_with_the_known_ones():
    with pytest.raises(TypeError, match="unknown .*'stride' .did you mean 'strides'.*given by strides, "):
        Convolution.of((3, 3, 1, 1), 8, {"stride": 2})
