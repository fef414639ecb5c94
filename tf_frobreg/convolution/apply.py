"""Products of M and Mᵀ with images, computed without forming M."""

import math
from typing import Any

import numpy as np

from tf_frobreg.backends import Operations, dtype_of, operations_of
from tf_frobreg.checks import check_memory, received
from tf_frobreg.convolution.axis import Axis
from tf_frobreg.convolution.geometry import Convolution


def apply(kernel: Any, images: Any, conv: Convolution) -> Any:
    """Returns M times each image of a batch. Differentiable in both arguments.

    Args:
        kernel: Kernel of shape `conv.kernel_shape`.
        images: `(batch, *conv.input_shape)`.
        conv: The geometry.

    Returns:
        `(batch, *conv.output_shape)`.
    """
    return (_adjoint if conv.transposed else _forward)(kernel, images, conv)


def apply_adjoint(kernel: Any, images: Any, conv: Convolution) -> Any:
    """Returns Mᵀ times each image of a batch. Differentiable in both arguments.

    Args:
        kernel: Kernel of shape `conv.kernel_shape`.
        images: `(batch, *conv.output_shape)`.
        conv: The geometry.

    Returns:
        `(batch, *conv.input_shape)`.
    """
    return (_forward if conv.transposed else _adjoint)(kernel, images, conv)


def check_images(conv: Convolution, vectors: int) -> None:
    """Raises ValueError if float64 images do not fit in memory.

    Args:
        conv: The geometry.
        vectors: How many images there are of either side of M, beside the one with its border.
    """
    padded = math.prod(conv.blocks[:2]) * math.prod(map(_padded_size, conv.axes))
    entries = vectors * (math.prod(conv.input_shape) + math.prod(conv.output_shape)) + padded
    sizes = f"{received('input_size', conv.input_size)}, {received('dilation_rate', conv.dilation_rate)}"
    what = f"products with M for {sizes} take images of {entries:,} entries in all"
    check_memory(8 * entries, what, "a smaller input_size")


def _forward(kernel: Any, images: Any, conv: Convolution) -> Any:
    """Applies the convolution that `conv.axes` describe."""
    ops = operations_of(images)
    padded = images
    for number, axis in enumerate(conv.axes, start=1):
        padded = _pad(padded, axis, number, ops)
    if conv.blocks[0] > 1:
        return _forward_by_group(kernel, padded, conv, ops)
    if not conv.axes:
        return ops.matmul(padded, kernel)
    return ops.convolve(padded, kernel, conv.strides, conv.dilation_rate)


def _forward_by_group(kernel: Any, padded: Any, conv: Convolution, ops: Operations) -> Any:
    """Sums over the taps, because TensorFlow's convolution has no groups on CPUs."""
    groups, g, h = conv.blocks
    blocks = conv.by_group(kernel, ops)
    padded = ops.reshape(padded, (*padded.shape[:-1], groups, g))
    total: Any = 0.0
    for tap in np.ndindex(*conv.kernel_size):
        places = tuple(
            slice(p * a.dilation, p * a.dilation + (a.output_size - 1) * a.stride + 1, a.stride)
            for p, a in zip(tap, conv.axes, strict=True)
        )
        read = padded[(slice(None), *places)]  # (batch, *output_size, groups, g)
        total += read * blocks[tap][:, 0] if g == 1 else ops.einsum("...ug,ugh->...uh", read, blocks[tap])
    return ops.reshape(total, (*total.shape[:-2], groups * h))


def _adjoint(kernel: Any, images: Any, conv: Convolution) -> Any:
    """Applies the adjoint of `_forward`, which is its derivative because it is linear."""
    ops = operations_of(images)
    shape = conv.output_shape if conv.transposed else conv.input_shape
    zeros = ops.zeros((images.shape[0], *shape), dtype_of(images))
    return ops.adjoint(lambda inputs: _forward(kernel, inputs, conv), zeros, images)


def _padded_size(axis: Axis) -> int:
    """Returns the number of positions from the first to the last that an output reads."""
    return (axis.output_size - 1) * axis.stride + axis.span


def _pad(images: Any, axis: Axis, number: int, ops: Operations) -> Any:
    """Adds the positions that outputs read outside the image, and drops those that no output reads."""
    end = _padded_size(axis) - axis.pad  # one past the last input read
    if axis.padding == "circular":
        return ops.take(images, np.arange(-axis.pad, end) % axis.input_size, axis=number)
    added = [(0, 0)] * len(images.shape)
    added[number] = (axis.pad, max(end - axis.input_size, 0))
    inside = [slice(None)] * len(images.shape)
    inside[number] = slice(0, min(end, axis.input_size))
    return ops.pad(images[tuple(inside)], added)
