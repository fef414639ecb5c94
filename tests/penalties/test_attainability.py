"""Geometries without a kernel whose singular values are all √α: a claim that optimization cannot refute."""

import itertools

import numpy as np
import pytest
import scipy.optimize
from geometries import CIRCULAR_CASES, KERAS_CASES, Case, cases, label
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import matrix_function

from tf_frobreg.convolution.geometry import Convolution
from tf_frobreg.convolution.isometric_patch import isometric_patch
from tf_frobreg.penalties.attainability import is_out_of_reach

DEPTHWISE = {"kind": "depthwise", "padding": "valid"}


def geometry_of(case):
    return Convolution.of(case.kernel_shape, case.image, case.geometry)


def distance(matrix):
    """max |σ − 1|, which is what no kernel may bring to 0."""
    return np.abs(np.linalg.svd(matrix, compute_uv=False) - 1).max()


def least_distance(case, starts=5):
    """The least max |σ − 1| that L-BFGS finds on Σ (σ² − 1)² of the true M."""
    matrix = matrix_function(case)
    size = int(np.prod(case.kernel_shape))
    basis = np.array([matrix(tap.reshape(case.kernel_shape)) for tap in np.eye(size)])
    wide = basis.shape[1] < basis.shape[2]
    if wide:
        basis = basis.transpose(0, 2, 1)

    def penalty(entries):
        m = np.tensordot(entries, basis, 1)
        residual = m.T @ m - np.eye(m.shape[1])
        return np.sum(residual**2), np.tensordot(basis, 4 * m @ residual, 2)

    least = np.inf
    for seed in range(starts):
        start = np.random.RandomState(seed).standard_normal(size) / size**0.5
        found = scipy.optimize.minimize(penalty, start, jac=True, method="L-BFGS-B", options={"maxiter": 500})
        least = min(least, distance(matrix(found.x.reshape(case.kernel_shape))))
    return least


def patch_attains(case):
    kernel = isometric_patch(geometry_of(case)).nearest_isometry(case.kernel(), 1.0)
    return distance(matrix_function(case)(kernel)) < 1e-12


@pytest.mark.parametrize(
    ("shape", "image", "geometry", "expected"),
    [
        ((3, 3, 4, 8), 12, {"padding": "valid"}, True),
        ((3, 3, 8, 4), 12, {"padding": "valid"}, False),
        ((3, 3, 4, 4), 12, {"padding": "valid"}, False),
        ((3, 3, 4, 8), 12, {}, False),
        ((3, 3, 4, 8), 12, {"padding": "circular"}, False),
        ((1, 1, 4, 8), 12, {"padding": "valid"}, False),
        ((1, 1, 4, 8), 12, {"strides": 2}, True),
        ((1, 1, 4, 16), 12, {"strides": 2}, True),
        ((1, 1, 4, 4), 12, {"strides": 2}, False),
        ((2, 2, 4, 4), 12, {"dilation_rate": 2}, True),
        ((2, 2, 4, 4), 12, {}, False),
        ((3, 3, 4, 4), 12, {"dilation_rate": 2}, False),
        ((4, 4, 2), 12, {"dilation_rate": 2}, True),
        ((3, 3, 3, 4), 15, {"strides": 2}, True),
        ((3, 3, 3, 4), 16, {"strides": 2}, False),
        ((3, 3, 3, 16), 15, {"strides": 2}, False),
        ((3, 3, 4, 1), 12, DEPTHWISE, False),
        ((3, 3, 4, 2), 12, DEPTHWISE, True),
        ((3, 3, 4, 2), 12, {"kind": "depthwise"}, False),
        ((3, 3, 2, 8), 12, {"groups": 2, "padding": "valid"}, True),
        ((3, 3, 4, 8), 12, {"groups": 2, "padding": "valid"}, False),
        ((3, 3, 4, 8), 12, {"kind": "transpose", "padding": "valid"}, True),
        ((3, 3, 8, 4), 12, {"kind": "transpose", "padding": "valid"}, False),
        ((8, 4), (), {}, False),
    ],
)
def test_known_geometries(shape, image, geometry, expected):
    assert is_out_of_reach(Convolution.of(shape, image, geometry)) == expected


@pytest.mark.parametrize("case", KERAS_CASES + CIRCULAR_CASES, ids=label)
def test_what_the_patch_attains_is_not_out_of_reach(case):
    assert not (patch_attains(case) and is_out_of_reach(geometry_of(case)))


@settings(max_examples=100)
@given(cases())
def test_what_the_patch_of_any_geometry_attains_is_not_out_of_reach(case):
    if is_out_of_reach(geometry_of(case)):
        assert not patch_attains(case)


# Each argument of the proof, on either side, with the paddings, kinds and groups.
OUT_OF_REACH = [
    Case((3, 1, 2), (6,), padding="valid"),
    Case((2, 2, 1, 2), (4, 3), padding="valid"),
    Case((3, 2, 3), (12,), padding="valid"),
    Case((2, 1, 3), (7,), padding="valid", dilation_rate=2),
    Case((1, 1, 2), (5,), strides=2),
    Case((1, 1, 1, 2), (3, 3), strides=2),
    Case((2, 1, 1), (5,), dilation_rate=2),
    Case((2, 2, 1, 1), (3, 4), dilation_rate=2),
    Case((4, 2, 2), (9,), dilation_rate=2),
    Case((3, 2, 3), (7,), strides=2),
    Case((2, 2, 2), (5,), kind="depthwise", padding="valid"),
    Case((3, 1, 4), (6,), groups=2, padding="valid"),
    Case((1, 1, 2), (4,), kind="transpose", strides=2),
    Case((3, 2, 4), (5,), kind="transpose", padding="valid"),
    Case((1, 1, 2), (4,), strides=2, padding="circular"),
]


@pytest.mark.parametrize("case", OUT_OF_REACH, ids=label)
def test_no_optimization_reaches_what_is_out_of_reach(case):
    assert is_out_of_reach(geometry_of(case))
    assert least_distance(case) > 1e-3


@pytest.mark.parametrize("case", [Case((3, 2, 2), (6,), padding="valid"), Case((3, 2, 1), (6,))], ids=label)
def test_the_optimization_reaches_what_is_within_reach(case):
    assert not is_out_of_reach(geometry_of(case))
    assert least_distance(case) < 1e-3


def grid(sizes, images, channels):
    """Small geometries of all borders, strides and dilations."""
    options = itertools.product(sizes, images, (1, 2, 3), (1, 2), ("same", "valid", "circular"), channels)
    for size, image, strides, dilation, padding, blocks in options:
        fits = all(n > (k - 1) * dilation for n, k in zip(image, size, strict=True))
        if min(strides, dilation) == 1 and (fits or padding != "valid"):
            yield Case((*size, *blocks), image, strides, padding, dilation)


ONE_AXIS = list(
    grid([(1,), (2,), (3,)], [(n,) for n in range(3, 7)], [(1, 1), (1, 2), (2, 1), (2, 3), (1, 4)])
)
TWO_AXES = list(
    grid(
        list(itertools.product((1, 2, 3), repeat=2)),
        [(3, 2), (3, 4), (4, 5)],
        [(1, 1), (1, 2), (2, 1), (2, 3)],
    )
)


def check_the_claims(grid, at_least):
    claimed = [case for case in grid if is_out_of_reach(geometry_of(case))]
    assert len(claimed) >= at_least
    for case in claimed:
        assert least_distance(case) > 1e-3, case


def test_no_optimization_reaches_anything_that_is_called_out_of_reach():
    check_the_claims(ONE_AXIS, 100)


@pytest.mark.slow
def test_no_optimization_reaches_anything_with_two_axes_that_is_called_out_of_reach():
    check_the_claims(TWO_AXES, 100)


@pytest.mark.slow
def test_the_optimization_reaches_everything_that_the_patch_attains():
    attained = [case for case in ONE_AXIS if patch_attains(case)]
    assert len(attained) > 400
    for case in attained:
        assert least_distance(case) < 1e-3, case


@st.composite
def long_axes(draw):
    """Geometries with one axis of at least two kernels and two strides."""
    kind = draw(st.sampled_from(["conv", "depthwise", "transpose"]))
    strides = draw(st.integers(1, 3))
    dilation = draw(st.integers(1, 2)) if strides == 1 and kind != "transpose" else 1
    size = draw(st.integers(1, 5))
    image = 2 * ((size - 1) * dilation + 1) + 2 * strides + draw(st.integers(0, 4))
    blocks = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (2, 3), (4, 6)]))
    padding = draw(st.sampled_from(["same", "valid", "circular"]))
    return Case((size, *blocks), (image,), strides, padding, dilation, kind=kind)


@settings(max_examples=150)
@given(long_axes())
def test_on_long_axes_either_the_patch_attains_or_the_proof_succeeds(case):
    conv = geometry_of(case)
    _, g, h = conv.blocks
    overlap = case.padding == "circular" and case.image[0] % case.strides  # windows meet at the wrap
    border = case.padding == "valid" and conv.gram_side == "output" and h > g  # it alone makes M wide
    if not overlap and not border:
        assert patch_attains(case) != is_out_of_reach(conv)


def test_the_image_size_hardly_matters():
    for geometry, expected in [({"padding": "valid"}, True), ({"padding": "same"}, False)]:
        for size in (7, 8, 100, 10**6):
            assert is_out_of_reach(Convolution.of((3, 3, 4, 8), size, geometry)) == expected


def test_a_proof_that_would_take_too_long_is_not_tried():
    assert not is_out_of_reach(Convolution((31, 31, 1, 2), 200, padding="valid"))


@pytest.mark.parametrize(
    ("shape", "size", "geometry", "expected"),
    [
        ((3, 3, 4, 5), 12, {}, True),
        ((3, 3, 16, 17), 16, {}, True),
        ((3, 3, 4, 5), 8, {"kind": "transpose"}, True),
        ((3, 3, 4, 8), 12, {"dilation_rate": 2}, True),
        ((3, 3, 4, 17), 13, {"strides": 2}, True),
        ((3, 3, 4, 16), 13, {"strides": 2}, False),
        # Not all lags fit into these images.
        ((3, 3, 1, 9), 4, {}, False),
        ((3, 3, 2, 3), 4, {}, False),
        ((3, 3, 3, 6), 3, {}, False),
    ],
)
def test_one_filter_too_many_without_a_border_is_out_of_reach(shape, size, geometry, expected):
    conv = Convolution.of(shape, size, {"padding": "valid", **geometry})
    assert is_out_of_reach(conv) == expected
