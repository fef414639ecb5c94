"""The isometric patch: all its singular values are √α, and it is near the kernel that it comes from."""

import numpy as np
import pytest
from geometries import CIRCULAR_CASES, KERAS_CASES, Case, axes, cases, label, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import kernels_by_group, matrix_function, true_matrix

from tf_frobreg.convolution.geometry import Convolution
from tf_frobreg.convolution.isometric_patch import isometric_patch

CASES = KERAS_CASES + CIRCULAR_CASES
# No kernel of the first two has all σ at √α. Only kernels without a patch do it in the third.
WITHOUT_PATCH = [
    Case((1, 1, 2, 3), (5, 5), strides=2),
    Case((3, 3, 2, 3), (6, 5), kind="depthwise", padding="valid"),
    Case((4, 2, 1, 2), (5, 7), padding="valid"),
]


def geometry_of(case):
    return Convolution.of(case.kernel_shape, case.image, case.geometry)


def is_isometric(matrix, alpha):
    return np.abs(np.linalg.svd(matrix, compute_uv=False) - alpha**0.5).max() < 1e-12


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_all_singular_values_of_the_nearest_isometry_are_the_root_of_alpha(case, alpha):
    nearest = isometric_patch(geometry_of(case)).nearest_isometry(case.kernel(), alpha)
    assert nearest.shape == case.kernel_shape
    assert is_isometric(true_matrix(case, nearest), alpha) == (case not in WITHOUT_PATCH)


@settings(max_examples=60)
@given(cases(), st.integers(0, 100), st.sampled_from([1.0, 2.0]))
def test_the_nearest_isometry_of_any_geometry_is_one_for_every_kernel_or_for_none(case, seed, alpha):
    patch, matrix = isometric_patch(geometry_of(case)), matrix_function(case)
    found = {
        is_isometric(matrix(patch.nearest_isometry(kernel, alpha)), alpha)
        for kernel in (case.kernel(seed), np.zeros(case.kernel_shape), np.ones(case.kernel_shape))
    }
    assert len(found) == 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_the_nearest_isometry_of_an_isometry_is_itself(case, dtype):
    patch = isometric_patch(geometry_of(case))
    once = patch.nearest_isometry(case.kernel(dtype=dtype), 1.7)
    assert once.dtype == dtype
    twice = patch.nearest_isometry(once, 1.7)
    np.testing.assert_allclose(twice, once, rtol=0, atol=1e-14 if dtype == "float64" else 1e-6)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.strides == 1 and case not in WITHOUT_PATCH], ids=label
)
def test_at_stride_1_it_is_one_tap_with_the_polar_factor_of_the_sum_of_all_taps(case):
    conv = geometry_of(case)
    patch = isometric_patch(conv)
    assert patch.counts == (1,) * len(case.image)
    kernel = case.kernel()
    nearest = patch.nearest_isometry(kernel, 2.0)
    for group, found in zip(kernels_by_group(case, kernel), kernels_by_group(case, nearest), strict=True):
        values, vectors = np.linalg.eigh((total := group.sum(axis=tuple(range(len(case.image))))).T @ total)
        if total.shape[0] >= total.shape[1]:  # total · (totalᵀ total)^(−½)
            expected = 2.0**0.5 * total @ (vectors / np.sqrt(values)) @ vectors.T
        else:
            values, vectors = np.linalg.eigh(total @ total.T)
            expected = 2.0**0.5 * (vectors / np.sqrt(values)) @ vectors.T @ total
        np.testing.assert_allclose(found[patch.firsts], expected, atol=1e-10)
        assert np.count_nonzero(found) <= expected.size


@pytest.mark.parametrize("case", [case for case in CASES if case not in WITHOUT_PATCH], ids=label)
def test_no_other_isometry_of_the_patch_is_nearer_to_the_folded_kernel(case):
    conv = geometry_of(case)
    patch = isometric_patch(conv)
    kernel = case.kernel()

    def folded(k):
        return patch.fold(conv.by_group(k, np))

    distance = np.linalg.norm(folded(kernel) - folded(patch.nearest_isometry(kernel, 1.5)))
    matrix = matrix_function(case)
    for seed in range(1, 6):
        other = patch.nearest_isometry(0.3 * seed * kernel + case.kernel(seed), 1.5)
        assert is_isometric(matrix(other), 1.5)
        assert np.linalg.norm(folded(kernel) - folded(other)) >= distance


@pytest.mark.parametrize("case", [case for case in CIRCULAR_CASES if case.strides == 1], ids=label)
def test_the_folded_kernel_is_the_response_to_constant_images(case):
    conv = geometry_of(case)
    kernel = case.kernel()
    folded = isometric_patch(conv).fold(conv.by_group(kernel, np))
    pixels = int(np.prod(case.image))
    constant = np.tile(np.eye(case.channels), (pixels, 1))  # one column per channel
    response = (true_matrix(case, kernel) @ constant).reshape(pixels, -1, case.channels)
    groups, g, h = conv.blocks
    for group in range(groups):
        found = response[:, group * h : (group + 1) * h, group * g : (group + 1) * g]
        np.testing.assert_allclose(found, np.broadcast_to(folded[group].T, found.shape), atol=1e-12)
    assert np.count_nonzero(np.abs(response).max(axis=0) > 1e-12) == groups * g * h


@pytest.mark.parametrize("case", CASES, ids=label)
def test_folding_inverts_placing(case):
    conv = geometry_of(case)
    patch = isometric_patch(conv)
    matrices = normal(*patch.matrix_shape)
    placed = patch.place(matrices)
    assert placed.shape == (*conv.kernel_size, *conv.blocks)
    assert np.array_equal(patch.fold(placed), matrices)
    assert np.count_nonzero(placed) == matrices.size
    # Folding is linear, and keeps every entry once.
    blocks = conv.by_group(case.kernel(), np)
    assert patch.fold(blocks).sum() == pytest.approx(blocks.sum(), abs=1e-12)
    np.testing.assert_allclose(patch.fold(blocks + placed), patch.fold(blocks) + matrices, atol=1e-12)


@pytest.mark.parametrize("image", [14, 15, 16])
@pytest.mark.parametrize("strides", [2, 3])
def test_with_strides_the_patch_reads_every_input_once(strides, image):
    # More filters than the inputs of a window, so the smaller Gram matrix is that of the inputs.
    case = Case((5, 1, 9), (image,), strides=strides)
    patch = isometric_patch(geometry_of(case))
    assert patch.counts == (strides,)
    kernel = np.zeros(case.kernel_shape)
    kernel[patch.firsts[0] : patch.firsts[0] + strides] = 1.0
    reads = (true_matrix(case, kernel) != 0).sum(axis=0)
    assert (reads == 9).all()


@pytest.mark.parametrize("padding", ["same", "circular"])
@pytest.mark.parametrize("shape", [(3, 3, 4, 4), (2, 2, 4, 4), (5, 5, 2, 4), (4, 2, 2)])
def test_taps_that_never_meet_a_tiny_image_are_not_in_the_patch(shape, padding):
    case = Case(shape, (1,) * (len(shape) - 2), strides=2, padding=padding)
    patch = isometric_patch(geometry_of(case))
    assert is_isometric(true_matrix(case, patch.nearest_isometry(case.kernel(), 1.5)), 1.5)


def taps_at_end(axis, count, *, last):
    """Which outputs read the first or the last inputs through which entries, counted from that end."""
    outputs, inputs, entries = (array.tolist() for array in axis.taps)
    found = set()
    for output, place, entry in zip(outputs, inputs, entries, strict=True):
        if last:
            output, place = output - axis.output_size, place - axis.input_size
        if place in (range(-count, 0) if last else range(count)):
            if axis.padding == "circular":  # outputs of the other end may read here too
                output = (output + axis.output_size // 2) % axis.output_size - axis.output_size // 2
            found.add((output, place, entry))
    return found


@given(axes())
def test_a_shortened_axis_has_the_border_and_the_period_of_the_long_one(axis):
    n, stride, padding = axis.input_size, axis.stride, axis.padding
    short = axis.shortened()
    assert short.shortened() == short
    assert short.input_size <= n
    assert (n - short.input_size) % stride == 0
    assert short.pad == axis.pad
    assert short.output_size == axis.output_size - (n - short.input_size) // stride
    # The same outputs read the first pixels of both axes through the same entries, and the last pixels.
    count = stride if padding == "circular" else short.input_size // 2
    for last in (False, True) if short != axis else ():
        assert taps_at_end(axis, count, last=last) == taps_at_end(short, count, last=last)


@settings(max_examples=60)
@given(cases(ranks=(1,)), st.integers(6, 9))
def test_the_patch_of_a_long_image_is_that_of_a_shorter_one(case, periods):
    # Keras' border depends on the image size modulo the stride.
    (n,), strides = case.image, case.strides
    short, long = (
        isometric_patch(Convolution.of(case.kernel_shape, n + 8 * strides * count, case.geometry))
        for count in (periods, 100 * periods)
    )
    if short.conv.wide == long.conv.wide:
        assert (short.firsts, short.counts) == (long.firsts, long.counts)
