"""Coincidence classes: those of a long axis follow from short ones."""

import numpy as np
import pytest
from geometries import axes
from hypothesis import given
from hypothesis import strategies as st

from tf_frobreg import frobenius_penalty
from tf_frobreg.convolution.axis import Axis
from tf_frobreg.penalties.coincidence_classes import coincidences, count_places, places, rows_and_columns


@given(axes(), st.sampled_from(["input", "output"]))
def test_classes_of_a_long_axis_follow_from_short_ones(axis, side):
    assert axis.num_taps == len(axis.taps.entries)
    expected = count_places(axis, side)
    found = coincidences(axis, side)
    classes = {
        tuple(map(tuple, found.pairs[members.astype(bool)].tolist())): count
        for members, count in zip(found.members, found.counts, strict=True)
    }
    assert classes == dict(expected)
    halved = coincidences(axis, side, half=True)
    assert halved.counts.sum() == found.counts.sum()
    assert np.array_equal(halved.counts[halved.diagonal], found.counts[found.diagonal])


@given(axes(longest=60), st.sampled_from(["input", "output"]))
def test_rows_and_columns_of_a_long_axis_follow_from_a_short_one(axis, side):
    classes = coincidences(axis, side)
    expected = {}  # by pixel: how often each class occurs in its row and in its column
    for i, j, number in places(axis, side).tolist():
        for pixel, end in ((i, 0), (j, 1)):
            expected.setdefault(pixel, np.zeros((2, len(classes.counts))))[end, number] += 1
    found = rows_and_columns(axis, side)
    rows = {tuple(row.ravel()) for row in np.moveaxis(found, 1, 0) if row.any()}
    assert rows == {tuple(row.ravel()) for row in expected.values()}
    # One of two classes that are each other's transpose stands for both. Its column is the other's row.
    half = rows_and_columns(axis, side, half=True)
    assert {pixel.sum() for pixel in np.moveaxis(half, 1, 0)} == {
        pixel[0].sum() for pixel in np.moveaxis(found, 1, 0)
    }


def test_a_3_tap_same_axis_has_seven_classes():
    assert len(coincidences(Axis(100, 3, 1, 1, "same"), "input").counts) == 7
    assert len(coincidences(Axis(3, 3, 1, 1, "same"), "input").counts) == 7


@pytest.mark.slow
def test_long_kernels_are_refused_before_they_fill_the_memory():
    assert np.isfinite(frobenius_penalty(np.ones((40, 1, 2)), 16000, strides=4, padding="valid"))
    with pytest.raises(ValueError, match=r"an axis of 320 taps has [\d,]+ coincidence classes.*bytes"):
        frobenius_penalty(np.ones((320, 1, 2)), 160000, strides=80, padding="valid")


@pytest.mark.parametrize("padding", ["same", "valid", "circular"])
def test_wide_kernels_are_refused_before_they_fill_the_memory(padding):
    options = {"dilation_rate": 10**9, "padding": padding}
    assert np.isfinite(frobenius_penalty(np.ones((3, 1, 2)), 30, **options | {"padding": "same"}))
    with pytest.raises(ValueError, match="kernel spans 2,000,000,001: this needs .* Use a smaller dilation"):
        frobenius_penalty(np.ones((3, 1, 2)), 2**31 - 1, **options)
