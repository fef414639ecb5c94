"""The projection against the clipped singular values of the dense border-free operator."""

import numpy as np
import pytest
from geometries import Case, label, normal
from oracles import naive_matrix

from tf_frobreg import clip_singular_values, singular_values

CLIP_CASES = [
    Case((3, 3, 2, 3), (5, 6), padding="circular"),
    Case((3, 3, 3, 2), (4, 4), padding="circular"),
    Case((2, 4, 2, 2), (6, 5), padding="circular"),
    Case((3, 2, 2, 2), (7, 6), padding="circular", dilation_rate=2),
    Case((3, 3, 2, 4), (5, 4), padding="circular", groups=2),
    Case((3, 2, 3), (7,), padding="circular"),
    Case((2, 3, 2, 2, 2), (3, 4, 3), padding="circular"),
    Case((5, 3), ()),
    Case((3, 3, 3, 2), (5, 4), padding="circular", kind="depthwise"),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CLIP_CASES, ids=label)
def test_the_projection_is_the_clipped_dense_operator_cut_to_the_kernel(case, dtype):
    kernel, low, high = case.kernel(dtype=dtype), 0.7, 2.0
    found = clip_singular_values(kernel, case.image, low=low, high=high, **case.geometry)
    assert found.dtype == dtype
    # The clipped matrix is again that of a convolution: its entries are those of the new kernel.
    geometry = {"padding": case.padding, "dilation_rate": case.dilation_rate}
    if case.kind == "depthwise":
        channels, multiplier = kernel.shape[-2:]
        kernel = kernel.reshape(*kernel.shape[:-2], 1, channels * multiplier)
        geometry["groups"] = channels
    else:
        geometry["groups"] = case.groups
    left, sigma, right = np.linalg.svd(
        naive_matrix(kernel.astype("float64"), case.image, **geometry), full_matrices=False
    )
    clipped = left * np.clip(sigma, low, high) @ right
    for entry in np.ndindex(kernel.shape):
        one = np.zeros(kernel.shape)
        one[entry] = 1.0
        places = naive_matrix(one, case.image, **geometry) > 0
        np.testing.assert_allclose(
            found.numpy().reshape(kernel.shape)[entry],
            clipped[places],
            atol=1e-11 if dtype == "float64" else 1e-5,
        )


def test_the_projection_leaves_alone_what_lies_inside():
    kernel = normal(3, 3, 2, 3)
    sigma = singular_values(kernel, 8, padding="circular")
    np.testing.assert_allclose(clip_singular_values(kernel, 8, high=sigma[0] + 1e-9), kernel, atol=1e-12)


KERNEL = np.ones((3, 3, 1, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: clip_singular_values(KERNEL, 8, low=2, high=1),
            "low must be at most high. Received: low=2.0",
        ),
        (lambda: clip_singular_values(KERNEL, 8, high=0), "high must be a finite number above 0"),
        (lambda: clip_singular_values(KERNEL, 8, strides=2), "strides must be 1 for the projection"),
        (lambda: clip_singular_values(KERNEL, 2), "input_size must be at least the .* for the projection"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_an_image_that_does_not_fit_in_memory_is_refused():
    for size in (2**31 - 1, 10**6):
        with pytest.raises(ValueError, match="input_size=.* this needs .* bytes, but .* are free"):
            clip_singular_values(np.ones((3, 3, 1, 1)), size)
