"""Slow twins in plain NumPy that share no line with the package, and the real Keras layers."""

import itertools

import keras
import numpy as np


def same_pad(n, k, s, d):
    """(outputs, padding in front) of Keras' "same"."""
    outputs = (n + s - 1) // s
    reach = d * (k - 1) + 1
    return outputs, max(0, reach - n + s * (outputs - 1)) // 2


def naive_matrix(kernel, image, strides=1, padding="same", dilation_rate=1, groups=1):
    """M of a convolution in Keras' order, one pixel at a time."""
    *size, per_group, filters = kernel.shape
    rank = len(size)
    image, strides, dilation = (
        (x,) * rank if np.ndim(x) == 0 else tuple(x) for x in (image, strides, dilation_rate)
    )
    outputs, pads = [], []
    for n, k, s, d in zip(image, size, strides, dilation, strict=True):
        reach = d * (k - 1) + 1
        if padding == "same":
            out, pad = same_pad(n, k, s, d)
        elif padding == "valid":
            out, pad = len(range(0, n - reach + 1, s)), 0
        else:
            out, pad = len(range(0, n, s)), (reach - 1) // 2
        outputs.append(out)
        pads.append(pad)
    channels = per_group * groups
    matrix = np.zeros((*outputs, filters, *image, channels))
    for out in np.ndindex(*outputs):
        for tap in np.ndindex(*size):
            place = [
                o * s + t * d - p for o, s, t, d, p in zip(out, strides, tap, dilation, pads, strict=True)
            ]
            if padding == "circular":
                place = [x % n for x, n in zip(place, image, strict=True)]
            elif any(x < 0 or x >= n for x, n in zip(place, image, strict=True)):
                continue
            for c, z in itertools.product(range(filters), range(per_group)):
                source = c // (filters // groups) * per_group + z
                matrix[(*out, c, *place, source)] += kernel[(*tap, z, c)]
    return matrix.reshape(int(np.prod(outputs)) * filters, -1)


def dense_penalty(matrix, alpha=1.0):
    """‖MᵀM − αI‖²_F."""
    return np.sum((matrix.T @ matrix - alpha * np.eye(matrix.shape[1])) ** 2)


def impulse_matrix(layer, image, channels):
    """M of a built Keras layer without bias or activation, by one unit impulse per input entry."""
    size = int(np.prod(image)) * channels
    impulses = np.eye(size, dtype=layer.compute_dtype).reshape(size, *image, channels)
    return keras.ops.convert_to_numpy(layer(impulses)).reshape(size, -1).T


def printed_blocks(kernel, n):
    """(2.1) as the paper prints it for a 3×3 kernel k11 … k33: a list of lists, entry by entry."""
    (k11, k12, k13), (k21, k22, k23), (k31, k32, k33) = kernel

    def banded(below, centre, above):
        return [
            [{-1: below, 0: centre, 1: above}.get(column - row, 0.0) for column in range(n)]
            for row in range(n)
        ]

    zero = [[0.0] * n for _ in range(n)]
    block = {
        0: banded(k21, k22, k23),  # A_0
        -1: banded(k31, k32, k33),  # A_{-1}
        1: banded(k11, k12, k13),  # A_1
    }
    return np.block([[np.array(block.get(row - column, zero)) for column in range(n)] for row in range(n)])


def true_matrix(case, kernel):
    """M of a case of `geometries`: by the real Keras layer, and by the slow twin if padding is circular."""
    if case.padding != "circular":
        return impulse_matrix(case.layer(kernel), case.image, case.channels)
    geometry = case.geometry
    kind = geometry.pop("kind")
    if kind == "transpose":
        return naive_matrix(kernel, tuple(n * case.strides for n in case.image), **geometry).T
    if kind == "depthwise":
        kernel = kernel.reshape(*kernel.shape[:-2], 1, -1)
        geometry["groups"] = case.channels
    return naive_matrix(kernel, case.image, **geometry)


def matrix_function(case):
    """The function that gives M of a case for a kernel. It asks the Keras layer only once."""
    if case.padding == "circular":  # entries of a small image are sums of taps
        return lambda kernel: true_matrix(case, kernel)
    size = int(np.prod(case.kernel_shape))
    numbers = true_matrix(case, np.arange(1.0, size + 1).reshape(case.kernel_shape)).round().astype(int)
    return lambda kernel: np.append(0.0, kernel)[numbers]


def kernels_by_group(case, kernel):
    """The kernels of the groups, each as a convolution without groups would have it."""
    if case.kind == "depthwise":
        return [kernel[..., channel : channel + 1, :] for channel in range(case.channels)]
    return np.split(kernel, case.groups, axis=-1)
