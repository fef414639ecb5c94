"""The bound on |σ² − α|: never below the truth, not far above it, and as fast for every image size."""

import numpy as np
import pytest
import tensorflow as tf
from geometries import CIRCULAR_CASES, KERAS_CASES, Case, cases, label
from hypothesis import given, settings
from oracles import kernels_by_group, matrix_function, true_matrix

from tf_frobreg import regularize_kernel
from tf_frobreg.convolution.geometry import Convolution
from tf_frobreg.convolution.isometric_patch import isometric_patch
from tf_frobreg.penalties.closed_form import closed_form
from tf_frobreg.penalties.frobenius import FrobeniusPenalty

ALPHA = 1.7
LONG = [
    Case((3, 1, 2), (90,)),
    Case((3, 2, 2), (61,), strides=2),
    Case((5, 2, 1), (80,), padding="valid"),
    Case((3, 2, 2), (70,), dilation_rate=3),
    Case((3, 2, 2), (40,), kind="transpose", strides=2),
    Case((3, 3, 1, 1), (4, 30)),
    Case((3, 3, 2, 1), (3, 20), kind="depthwise"),
]
# On images smaller than the kernel, the border counts most.
TINY = [Case((2, 2, 1, 1), (2, 2)), Case((3, 3, 1, 1), (3, 2)), Case((3, 3, 1, 2), (5, 3), 2, "circular")]
CASES = [*KERAS_CASES, *CIRCULAR_CASES, *LONG, *TINY]


def penalty_of(case, alpha=ALPHA):
    return FrobeniusPenalty(Convolution.of(case.kernel_shape, case.image, case.geometry), alpha)


def bound(case, kernel, alpha=ALPHA):
    return float(penalty_of(case, alpha).deviation_bound(tf.constant(kernel)))


def truth(matrix, alpha=ALPHA, count=None):
    """The largest |σ² − α| of the `count` largest singular values of the true M."""
    squares = np.linalg.svd(matrix, compute_uv=False)[:count] ** 2
    return np.abs(squares - alpha).max(initial=0.0)


def row_sums(matrix, channels, groups, alpha=ALPHA):
    """The largest row sum of norms (Σ s⁸)^⅛ of the blocks of MMᵀ − αI, one block per two pixels and group."""
    gram = matrix @ matrix.T - alpha * np.eye(len(matrix))
    g = channels // groups
    blocks = gram.reshape(len(gram) // channels, groups, g, -1, groups, g)
    largest = 0.0
    for group in range(groups):
        values = np.linalg.svd(blocks[:, group, :, :, group].transpose(0, 2, 1, 3), compute_uv=False)
        largest = max(largest, np.sum(np.sum(values**8, axis=-1) ** 0.125, axis=1).max())
    return largest


def check_bound(case, kernel, matrix, alpha=ALPHA):
    """Checks that the bound is the row sum, not below the truth and at most six times it."""
    conv = Convolution.of(case.kernel_shape, case.image, case.geometry)
    count = penalty_of(case).num_singular_values
    found = bound(case, kernel, alpha)
    deviation = truth(matrix, alpha, count)
    assert deviation * (1 - 1e-12) - 1e-12 <= found <= 6 * deviation + 1e-12
    # Rows and columns that no tap reaches do not count.
    ends = [
        (matrix[matrix.any(axis=1)], conv.output_shape[-1]),
        (matrix.T[matrix.any(axis=0)], case.channels),
    ]
    smaller, channels = min(ends if conv.transposed else ends[::-1], key=lambda end: len(end[0]))
    if count:
        expected = row_sums(smaller, channels, conv.blocks[0], alpha)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_the_bound_is_the_largest_row_sum_and_one_to_six_times_the_truth(case):
    matrix, conv = matrix_function(case), penalty_of(case).conv
    nearest = isometric_patch(conv).nearest_isometry(case.kernel(), ALPHA)
    for seed in range(3):
        kernel = case.kernel(seed)
        for tried in (kernel, 1e-3 * kernel, nearest + 1e-4 * kernel, nearest + 0.1 * kernel, np.abs(kernel)):
            check_bound(case, tried, matrix(tried))


@settings(max_examples=40)
@given(cases())
def test_the_bound_of_any_geometry_is_one_to_six_times_the_truth(case):
    kernel = case.kernel()
    check_bound(case, kernel, true_matrix(case, kernel), 0.6)


@pytest.mark.parametrize(
    "case",
    [
        Case((3, 3, 4, 4), (8, 8)),
        Case((3, 3, 8, 4), (8, 8), padding="valid"),
        Case((3, 3, 3, 6), (8, 8)),
        Case((5, 4, 4), (32,)),
        Case((3, 3, 4, 1), (8, 8), kind="depthwise"),
        Case((3, 3, 2, 8), (8, 8), groups=4),
        Case((3, 3, 4, 16), (8, 8), strides=2),
        Case((3, 3, 8, 8), (6, 6), padding="circular"),
        Case((3, 3, 3, 2, 2), (5, 4, 4)),
    ],
    ids=label,
)
def test_the_bound_is_one_to_six_times_the_truth_along_a_descent(case):
    kernels = []
    regularize_kernel(
        case.kernel() / 3,
        case.image,
        max_steps=60,
        tolerance=0.0,
        callback=lambda step, kernel, penalty: kernels.append(kernel),
        **case.geometry,
    )
    matrix = matrix_function(case)
    for kernel in kernels[::12]:
        assert 1 <= bound(case, kernel, 1.0) / truth(matrix(kernel), 1.0) <= 6


@pytest.mark.parametrize(
    ("shape", "geometry"),
    [
        ((3, 3, 2, 3), {}),
        ((3, 3, 2, 2), {"padding": "valid"}),
        ((3, 2, 4, 4), {"strides": 2}),
        ((3, 3, 2, 2), {"dilation_rate": 2}),
        ((3, 3, 4, 1), {"kind": "depthwise"}),
        ((3, 3, 2, 3), {"kind": "transpose", "strides": 2}),
        ((3, 2, 2, 1, 2), {}),
    ],
)
def test_the_bound_costs_the_same_for_every_image_size(shape, geometry):
    kernel = np.random.RandomState(0).standard_normal(shape)
    small, large = (Convolution.of(shape, n, geometry) for n in (24, 24 + 12 * 10**5))
    bounds = [
        float(FrobeniusPenalty(conv, ALPHA).deviation_bound(tf.constant(kernel))) for conv in (small, large)
    ]
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-14)
    left, right = closed_form(small), closed_form(large)
    assert left.other_rows.shape == right.other_rows.shape
    for part, other in zip(left.parts, right.parts, strict=True):
        assert part.rows.shape == other.rows.shape
        assert part.rows.shape[-1] * left.other_rows.shape[-1] == len(part.weights)


@pytest.mark.parametrize("case", [*CASES[::4], *TINY], ids=label)
def test_the_bound_of_a_float32_kernel_is_a_float64_number(case):
    kernel = case.kernel(dtype="float32")
    found = penalty_of(case).deviation_bound(tf.constant(kernel))
    assert found.dtype == "float64"
    assert float(found) == pytest.approx(bound(case, kernel.astype("float64")), rel=1e-5)


def test_the_bound_without_a_singular_value_is_zero():
    case = Case((2, 1, 1, 1), (1, 1), dilation_rate=2)  # no tap meets the image
    assert bound(case, case.kernel()) == 0.0
    assert penalty_of(case).excess_by_group(tf.constant(case.kernel())).numpy().tolist() == [0.0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.groups > 1 or case.kind != "conv"], ids=label
)
def test_the_excess_of_each_group_is_that_of_its_own_kernel(case, dtype):
    penalty, kernel = penalty_of(case), case.kernel(dtype=dtype)
    found = penalty.excess_by_group(tf.constant(kernel)).numpy()
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    assert found.dtype == dtype
    assert found.shape == penalty.conv.blocks[:1]
    assert found.sum() == pytest.approx(penalty.excess(tf.constant(kernel)).numpy(), rel=tolerance)
    count = penalty.num_singular_values // len(found)
    for excess, group in zip(found, kernels_by_group(case, kernel.astype("float64")), strict=True):
        kind = "transpose" if case.kind == "transpose" else "conv"
        alone = Case(group.shape, case.image, case.strides, case.padding, case.dilation_rate, kind=kind)
        sigma = np.linalg.svd(true_matrix(alone, group), compute_uv=False)[:count]
        assert excess == pytest.approx(np.sum((sigma**2 - ALPHA) ** 2), rel=max(tolerance, 1e-10))
