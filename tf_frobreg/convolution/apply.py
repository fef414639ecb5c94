"""Products of M and Mᵀ with images, computed without forming M."""

import numpy as np
import tensorflow as tf

from tf_frobreg.convolution.axis import Axis
from tf_frobreg.convolution.geometry import Convolution


def apply(kernel: tf.Tensor, images: tf.Tensor, conv: Convolution) -> tf.Tensor:
    """Returns M times each image of a batch. Differentiable in both arguments.

    Args:
        kernel: Kernel of shape `conv.kernel_shape`.
        images: `(batch, *conv.input_shape)`.
        conv: The geometry.

    Returns:
        `(batch, *conv.output_shape)`.
    """
    return (_adjoint if conv.transposed else _forward)(kernel, images, conv)


def apply_adjoint(kernel: tf.Tensor, images: tf.Tensor, conv: Convolution) -> tf.Tensor:
    """Returns Mᵀ times each image of a batch. Differentiable in both arguments.

    Args:
        kernel: Kernel of shape `conv.kernel_shape`.
        images: `(batch, *conv.output_shape)`.
        conv: The geometry.

    Returns:
        `(batch, *conv.input_shape)`.
    """
    return (_forward if conv.transposed else _adjoint)(kernel, images, conv)


def _forward(kernel: tf.Tensor, images: tf.Tensor, conv: Convolution) -> tf.Tensor:
    """Applies the convolution that `conv.axes` describe."""
    padded = images
    for number, axis in enumerate(conv.axes, start=1):
        padded = _pad(padded, axis, number)
    if conv.blocks[0] > 1:
        return _forward_by_group(kernel, padded, conv)
    if not conv.axes:
        return tf.matmul(padded, kernel)
    return tf.nn.convolution(
        padded,
        kernel,
        strides=conv.strides,
        padding="VALID",
        dilations=conv.dilation_rate,
        data_format=("NWC", "NHWC", "NDHWC")[len(conv.axes) - 1],  # eager 3-D gradients need it
    )


def _forward_by_group(kernel: tf.Tensor, padded: tf.Tensor, conv: Convolution) -> tf.Tensor:
    """Sums over the taps, because `tf.nn.convolution` has no groups on CPUs."""
    groups, g, h = conv.blocks
    blocks = conv.by_group(kernel, tf)
    padded = tf.reshape(padded, (*padded.shape[:-1], groups, g))
    total = tf.zeros((), kernel.dtype)
    for tap in np.ndindex(*conv.kernel_size):
        places = tuple(
            slice(p * a.dilation, p * a.dilation + (a.output_size - 1) * a.stride + 1, a.stride)
            for p, a in zip(tap, conv.axes, strict=True)
        )
        read = padded[(slice(None), *places)]  # (batch, *output_size, groups, g)
        total += read * blocks[tap][:, 0] if g == 1 else tf.einsum("...ug,ugh->...uh", read, blocks[tap])
    return tf.reshape(total, (*total.shape[:-2], groups * h))


def _adjoint(kernel: tf.Tensor, images: tf.Tensor, conv: Convolution) -> tf.Tensor:
    """Applies the adjoint of `_forward`, which is its derivative because it is linear."""
    shape = conv.output_shape if conv.transposed else conv.input_shape
    with tf.GradientTape() as tape:
        zeros = tf.zeros((images.shape[0], *shape), images.dtype)
        tape.watch(zeros)
        outputs = _forward(kernel, zeros, conv)
    return tape.gradient(outputs, zeros, output_gradients=images)


def _pad(images: tf.Tensor, axis: Axis, number: int) -> tf.Tensor:
    """Adds the positions that outputs read outside the image, and drops those that no output reads."""
    end = (axis.output_size - 1) * axis.stride + axis.span - axis.pad  # one past the last input read
    if axis.padding == "circular":
        return tf.gather(images, np.arange(-axis.pad, end) % axis.input_size, axis=number)
    added = [(0, 0)] * images.shape.rank
    added[number] = (axis.pad, max(end - axis.input_size, 0))
    inside = [slice(None)] * images.shape.rank
    inside[number] = slice(0, min(end, axis.input_size))
    # Not tf.pad: TensorFlow 2.21 fuses Pad with a float32 Conv3D into an operation that ignores the padding.
    zero = tf.zeros((), images.dtype)
    return tf.raw_ops.PadV2(input=images[tuple(inside)], paddings=added, constant_values=zero)
