"""The geometry of one axis and of the whole, and what is refused."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tf_frobreg.checks import check_number
from tf_frobreg.convolution.geometry import Axis, Convolution
from tf_frobreg.penalties.coincidence_classes import _count, coincidences


@given(
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from(["same", "valid", "circular"]),
    st.sampled_from(["input", "output"]),
)
def test_classes_of_a_long_axis_follow_from_short_ones(n, k, stride, dilation, padding, side):
    assume(stride == 1 or dilation == 1)
    axis = Axis(n, k, stride, dilation, padding)
    assume(padding != "valid" or n >= axis.span)
    assert axis.num_taps == len(axis.taps.entries)
    expected = _count(axis, side)
    found = coincidences(axis, side)
    classes = {
        tuple(map(tuple, found.pairs[members.astype(bool)].tolist())): count
        for members, count in zip(found.members, found.counts, strict=True)
    }
    assert classes == dict(expected)
    halved = coincidences(axis, side, half=True)
    assert halved.counts.sum() == found.counts.sum()
    assert np.array_equal(halved.counts[halved.diagonal], found.counts[found.diagonal])


def test_a_3_tap_same_axis_has_seven_classes():
    assert len(coincidences(Axis(100, 3, 1, 1, "same"), "input").counts) == 7
    assert len(coincidences(Axis(3, 3, 1, 1, "same"), "input").counts) == 7


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
        ({"input_size": 8.0}, "input_size must be an integer. Received: input_size=8.0"),
        ({"input_size": True}, "input_size must be an integer"),
        ({"input_size": None}, "input_size must be an integer"),
        ({"input_size": "8"}, "input_size must be an integer"),
        ({"padding": "full"}, "padding must be one of .*Received: padding='full'"),
        ({"padding": ["same"]}, "padding must be one of"),
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


@pytest.mark.parametrize("value", [np.float32(0.5), np.int64(2), 3, 0.25])
def test_numbers_may_be_numpy_scalars(value):
    assert check_number("alpha", value) == value
    assert type(check_number("alpha", value)) is float


@pytest.mark.parametrize("value", [True, np.True_, "1", None, [1.0, 2.0], 1j, float("nan"), float("inf"), -1])
def test_what_is_no_number_is_refused_by_name(value):
    with pytest.raises((ValueError, TypeError), match="alpha must be .*Received: alpha="):
        check_number("alpha", value)
