"""The explicit transformation matrix M, a sparse tensor built from its Toeplitz indices."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import numpy as np
import tensorflow as tf

from tf_frobreg.checks import check_choice, check_memory
from tf_frobreg.convolution.geometry import Convolution, Geometry, Size, Taps
from tf_frobreg.convolution.kernel import as_kernel

__all__ = ["ToeplitzIndices", "index_set", "toeplitz_indices", "transformation_matrix"]

LAYOUTS = ("channels_last", "paper")
# Peak bytes per entry: 66 measured while the index is built and sorted, and room for the tensor made of it.
BYTES_PER_ENTRY = 80


class ToeplitzIndices(NamedTuple):
    """Where each kernel entry stands in M, in row-major order.

    Attributes:
        positions: `(entries, 2)` int64, the row and column of each appearance.
        kernel_index: `(entries,)` int64, the flat index into the kernel of what stands there.
        dense_shape: (rows, columns) of M.
    """

    positions: np.ndarray
    kernel_index: np.ndarray
    dense_shape: tuple[int, int]


def transformation_matrix(
    kernel: Any, input_size: Size, *, layout: str = "channels_last", **geometry: Unpack[Geometry]
) -> tf.SparseTensor:
    r"""Returns the matrix M of a convolution, with `M·vec(X) = vec(Y)`, differentiable in `kernel`.

    M is the doubly block banded Toeplitz matrix of equations (2.1) and (3.1) of the paper: its entries
    are gathered from the kernel, so that `tf.GradientTape` carries the gradient of any function of M
    back to the kernel. It needs about 80 bytes per entry while it is built; for the penalty
    ‖MᵀM − αI‖²_F itself, `frobenius_penalty` needs no M.

    Args:
        kernel: `(*kernel_size, in_channels, filters)`, float32 or float64; array, tensor or variable.
        input_size: Spatial size of the input image, an int or one int per axis.
        layout: "channels_last" orders rows and columns as Keras flattens an image, (row, column,
            channel). "paper" orders them (channel, row, column): (3.1) with blocks as in (2.1).
        **geometry: `strides`, `padding`, `dilation_rate`, `groups`, `kind`, as in
            `tf_frobreg.Convolution`.

    Returns:
        A `tf.SparseTensor` of shape `(out_positions·filters, in_positions·in_channels)` in row-major
        order, without repeated indices.

    Raises:
        ValueError: Where an argument is invalid, or where M would not fit in memory (before anything
            of that size is allocated).
        TypeError: Where an argument has the wrong type.

    Example:
        A penalty of one's own, here on the sum of each row of M, is a few lines:

        >>> kernel = tf.Variable([[[[1.0]]], [[[2.0]]], [[[-1.0]]]])  # 3 × 1 × 1 × 1
        >>> with tf.GradientTape() as tape:
        ...     m = transformation_matrix(kernel, (4, 1))
        ...     penalty = tf.reduce_sum((tf.sparse.reduce_sum(m, axis=1) - 1.0) ** 2)
        >>> print(tf.sparse.to_dense(m).numpy())
        [[ 2. -1.  0.  0.]
         [ 1.  2. -1.  0.]
         [ 0.  1.  2. -1.]
         [ 0.  0.  1.  2.]]
        >>> print(penalty.numpy(), tape.gradient(penalty, kernel).numpy().ravel())
        6.0 [8. 8. 4.]
    """
    kernel = as_kernel(kernel)
    index = toeplitz_indices(kernel.shape, input_size, layout=layout, **geometry)
    values = tf.gather(tf.reshape(kernel, [-1]), index.kernel_index)
    # Where the image is smaller than the kernel, "circular" taps fall onto each other: their sum counts.
    first = np.ones(len(index.positions), dtype=bool)
    first[1:] = (index.positions[1:] != index.positions[:-1]).any(axis=1)
    if not first.all():
        values = tf.math.segment_sum(values, np.cumsum(first) - 1)
    return tf.SparseTensor(index.positions[first], values, index.dense_shape)


def toeplitz_indices(
    kernel_shape: Sequence[int],
    input_size: Size,
    *,
    layout: str = "channels_last",
    **geometry: Unpack[Geometry],
) -> ToeplitzIndices:
    """Returns the row, column and kernel entry of everything that stands in M.

    Args:
        kernel_shape: Shape of the kernel.
        input_size: Spatial size of the input image, an int or one int per axis.
        layout: As for `transformation_matrix`.
        **geometry: As for `transformation_matrix`.

    Returns:
        The index of M. A position appears more than once where "circular" taps fall onto each other.

    Raises:
        ValueError, TypeError: As `transformation_matrix`.

    Example:
        >>> index = toeplitz_indices((3, 1, 1, 1), (2, 1))
        >>> print(index.positions.tolist(), index.kernel_index)
        [[0, 0], [0, 1], [1, 0], [1, 1]] [1 2 0 1]
    """
    conv = Convolution.of(kernel_shape, input_size, geometry)
    check_choice("layout", layout, LAYOUTS)
    groups, g, h = conv.blocks
    count = math.prod(a.num_taps for a in conv.axes) * groups * g * h
    check_memory(
        count * BYTES_PER_ENTRY,
        f"M of shape {conv.shape[0]} × {conv.shape[1]} has {count:,} entries",
        'what needs no M, such as frobenius_penalty(..., method="closed_form"), or a smaller input_size',
    )

    outputs, inputs, entries = _spatial_taps(conv)
    pixels_out = math.prod(a.output_size for a in conv.axes)
    pixels_in = math.prod(a.input_size for a in conv.axes)
    # (taps, groups, g, h) from here on
    flat = np.arange(math.prod(conv.kernel_shape)).reshape(conv.kernel_shape)
    kernel_index = conv.by_group(flat, np).reshape(-1, groups, g, h)[entries]
    group = np.arange(groups)[:, None, None]
    ends = [
        _positions(outputs, group * h + np.arange(h), pixels_out, groups * h, layout),
        _positions(inputs, group * g + np.arange(g)[:, None], pixels_in, groups * g, layout),
    ]
    rows, columns = (
        np.broadcast_to(end, kernel_index.shape).ravel() for end in (ends[::-1] if conv.transposed else ends)
    )
    order = np.argsort(rows * conv.shape[1] + columns, kind="stable")
    positions = np.stack([rows[order], columns[order]], axis=1)
    return ToeplitzIndices(positions, kernel_index.ravel()[order], conv.shape)


def index_set(
    kernel_shape: Sequence[int],
    input_size: Size,
    entry: Sequence[int],
    *,
    layout: str = "channels_last",
    **geometry: Unpack[Geometry],
) -> np.ndarray:
    """Returns the paper's Ω: all (i, j) at which M holds one kernel entry (Theorems 2.1 and 3.1).

    Args:
        kernel_shape: Shape of the kernel.
        input_size: Spatial size of the input image, an int or one int per axis.
        entry: Index of the kernel entry, 0-based, one int per axis of the kernel: (p, q, z, y).
        layout: As for `transformation_matrix`.
        **geometry: As for `transformation_matrix`.

    Returns:
        `(|Ω|, 2)` int64, row-major order.

    Raises:
        ValueError, TypeError: As `transformation_matrix`, and where `entry` is not in the kernel.

    Example:
        >>> index_set((3, 1, 1, 1), (3, 1), (0, 0, 0, 0)).tolist()
        [[1, 0], [2, 1]]
    """
    index = toeplitz_indices(kernel_shape, input_size, layout=layout, **geometry)
    shape = tuple(kernel_shape)
    try:
        flat = np.ravel_multi_index(tuple(entry), shape)
    except (TypeError, ValueError):
        raise ValueError(
            f"entry must be an index into a kernel of shape {shape}. Received: entry={entry!r}"
        ) from None
    return index.positions[index.kernel_index == flat]


def _spatial_taps(conv: Convolution) -> Taps:
    """The taps of all axes together: pixels and kernel entries as flat, row-major indices."""

    def join(left, right, size):
        return (left[:, None] * size + right).ravel()

    joint = Taps(*np.zeros((3, 1), dtype=np.int64))
    for a in conv.axes:
        sizes = a.output_size, a.input_size, a.kernel_size
        joint = Taps(*map(join, joint, a.taps, sizes))
    return joint


def _positions(pixel: np.ndarray, channel: np.ndarray, pixels: int, channels: int, layout: str) -> np.ndarray:
    """Row or column of M for each pixel and channel."""
    pixel = pixel[:, None, None, None]
    return pixel * channels + channel if layout == "channels_last" else channel * pixels + pixel
