"""The explicit transformation matrix M, a sparse tensor built from its Toeplitz indices."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import numpy as np
import tensorflow as tf

from tf_frobreg.checks import check_choice, check_memory, received
from tf_frobreg.convolution.axis import Taps
from tf_frobreg.convolution.geometry import Convolution, Geometry, Size
from tf_frobreg.convolution.kernel import as_tensorflow_kernel, convolution_of, kernel_and_convolution

__all__ = ["ToeplitzIndices", "index_set", "toeplitz_indices", "transformation_matrix"]

LAYOUTS = ("channels_last", "paper")
# Peak bytes per entry: 66 measured while the index is built and sorted, plus the tensor made from the index.
BYTES_PER_ENTRY = 80


class ToeplitzIndices(NamedTuple):
    """Which kernel entry stands at which position of M, in row-major order.

    Attributes:
        positions: `(entries, 2)` int64, the row and column of each entry of M.
        kernel_index: `(entries,)` int64, the flat index of the kernel entry that stands there.
        dense_shape: (rows, columns) of M.

    Example:
        >>> index = toeplitz_indices((3, 1, 1, 1), (2, 1))
        >>> index.dense_shape, index.kernel_index
        ((2, 2), array([1, 2, 0, 1]))
    """

    positions: np.ndarray
    kernel_index: np.ndarray
    dense_shape: tuple[int, int]


def transformation_matrix(
    kernel: Any,
    input_size: Size | None = None,
    *,
    layout: str = "channels_last",
    **geometry: Unpack[Geometry],
) -> tf.SparseTensor:
    r"""Returns the transformation matrix M of a layer: M·vec(X) = vec(Y) for each input X and its output Y.

    M is the doubly block banded Toeplitz matrix of equations (2.1) and (3.1) of the paper. Its entries are
    gathered from the kernel, so `tf.GradientTape` carries the gradient of any function of M back to the
    kernel. Building M takes about 80 bytes per entry. `frobenius_penalty` computes ‖MᵀM − αI‖²_F without M.

    Args:
        kernel: `(*kernel_size, in_channels, filters)`, float32 or float64; array, tensor or variable,
            or a built Keras layer.
        input_size: Spatial size of the input image, an int or one int per axis. A layer may know its own.
        layout: Order of rows and columns. "channels_last" is (row, column, channel), as Keras flattens an
            image. "paper" is (channel, row, column), as in (3.1) with blocks as in (2.1).
        **geometry: `strides`, `padding`, `dilation_rate`, `groups` and `kind`, as for
            `tf_frobreg.Convolution`.

    Returns:
        A `tf.SparseTensor` of shape `(output pixels · filters, input pixels · in_channels)`, in row-major
        order and without repeated indices.

    Raises:
        ValueError: If an argument is invalid, or if M does not fit in memory. Nothing large has been
            allocated then.
        TypeError: If an argument has the wrong type.

    Example:
        A custom penalty on the row sums of M takes a few lines:

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
    kernel, conv = kernel_and_convolution(kernel, input_size, geometry, convert=as_tensorflow_kernel)
    index = toeplitz_indices(conv.kernel_shape, conv.input_size, layout=layout, **conv.geometry)
    values = tf.gather(tf.reshape(kernel, [-1]), index.kernel_index)
    # On an image smaller than the kernel, several "circular" taps share a position. Their values add up.
    first = np.ones(len(index.positions), dtype=bool)
    first[1:] = (index.positions[1:] != index.positions[:-1]).any(axis=1)
    if not first.all():
        values = tf.math.segment_sum(values, np.cumsum(first) - 1)
    return tf.SparseTensor(index.positions[first], values, index.dense_shape)


def toeplitz_indices(
    kernel_shape: Sequence[int] | Any,
    input_size: Size | None = None,
    *,
    layout: str = "channels_last",
    **geometry: Unpack[Geometry],
) -> ToeplitzIndices:
    """Returns which kernel entry stands at which position of M, equations (2.1) and (3.1).

    Args:
        kernel_shape: Shape of the kernel, or a built Keras layer.
        input_size: Spatial size of the input image, an int or one int per axis. A layer may know its own.
        layout: "channels_last" or "paper", the order of rows and columns.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups` and `kind`, as for
            `tf_frobreg.Convolution`.

    Returns:
        The indices. A position is repeated if several "circular" taps share it.

    Raises:
        ValueError: If an argument is invalid, or if the indices do not fit in memory.
        TypeError: If an argument has the wrong type.

    Example:
        >>> index = toeplitz_indices((3, 1, 1, 1), (2, 1))
        >>> print(index.positions.tolist(), index.kernel_index)
        [[0, 0], [0, 1], [1, 0], [1, 1]] [1 2 0 1]
    """
    conv = convolution_of(kernel_shape, input_size, geometry)
    check_choice("layout", layout, LAYOUTS)
    groups, g, h = conv.blocks
    count = math.prod(a.num_taps for a in conv.axes) * groups * g * h
    check_memory(
        count * BYTES_PER_ENTRY,
        f"M of shape {conv.shape[0]} × {conv.shape[1]} has {count:,} entries",
        'a function that does not form M, such as frobenius_penalty(..., method="closed_form"), or a smaller '
        "input_size",
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
    kernel_shape: Sequence[int] | Any,
    input_size: Size | None = None,
    entry: Sequence[int] | None = None,
    *,
    layout: str = "channels_last",
    **geometry: Unpack[Geometry],
) -> np.ndarray:
    """Returns the paper's set Ω of one kernel entry k: all (i, j) with m_ij = k (Theorems 2.1 and 3.1).

    Args:
        kernel_shape: Shape of the kernel, or a built Keras layer.
        input_size: Spatial size of the input image, an int or one int per axis. A layer may know its own.
        entry: Index of the kernel entry, 0-based, one int per axis of the kernel: (p, q, z, y).
        layout: "channels_last" or "paper", the order of rows and columns.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups` and `kind`, as for
            `tf_frobreg.Convolution`.

    Returns:
        `(|Ω|, 2)` int64, in row-major order.

    Raises:
        ValueError: If an argument is invalid, if `entry` is not an index into the kernel, or if the indices
            do not fit in memory.
        TypeError: If an argument has the wrong type.

    Example:
        >>> index_set((3, 1, 1, 1), (3, 1), (0, 0, 0, 0)).tolist()
        [[1, 0], [2, 1]]
    """
    conv = convolution_of(kernel_shape, input_size, geometry)
    index = toeplitz_indices(conv.kernel_shape, conv.input_size, layout=layout, **conv.geometry)
    shape = conv.kernel_shape
    try:
        flat = np.ravel_multi_index(tuple(entry or ()), shape)
    except (TypeError, ValueError):
        raise ValueError(
            f"entry must be an index into a kernel of shape {shape}. Received: {received('entry', entry)}"
        ) from None
    return index.positions[index.kernel_index == flat]


def _spatial_taps(conv: Convolution) -> Taps:
    """Returns the taps of all axes together, with flat, row-major indices of pixels and kernel entries."""

    def join(left: np.ndarray, right: np.ndarray, size: int) -> np.ndarray:
        return (left[:, None] * size + right).ravel()

    joint = Taps(*np.zeros((3, 1), dtype=np.int64))
    for a in conv.axes:
        sizes = a.output_size, a.input_size, a.kernel_size
        joint = Taps(*map(join, joint, a.taps, sizes))
    return joint


def _positions(pixel: np.ndarray, channel: np.ndarray, pixels: int, channels: int, layout: str) -> np.ndarray:
    """Returns the row or column of M that belongs to each pixel and channel."""
    pixel = pixel[:, None, None, None]
    return pixel * channels + channel if layout == "channels_last" else channel * pixels + pixel
