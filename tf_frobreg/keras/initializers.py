"""A Keras initializer whose kernels are nearly isometries of images."""

import random
from typing import Unpack

import numpy as np
import tensorflow as tf

from tf_frobreg.checks import check_integer, check_number
from tf_frobreg.convolution.geometry import Geometry
from tf_frobreg.descent.algorithm_3_1 import regularize_kernel
from tf_frobreg.keras.layer_geometry import TakesGeometry

__all__ = ["FrobeniusInitializer"]


@tf.keras.utils.register_keras_serializable(package="tf_frobreg")
class FrobeniusInitializer(TakesGeometry, tf.keras.initializers.Initializer):
    """Gives a layer a kernel whose singular values are within `tolerance` of √α, by a descent on R_α.

    The descent starts from a random orthogonal matrix in the centre tap (a delta-orthogonal kernel, which has
    σ = √α throughout), or in as many taps as the strides pass over, plus normal noise in all taps. From there
    it reaches kernels that use all taps, where a normal start alone can end in a local minimum: with as many
    filters as channels it mostly does. Where the geometry has no such kernel (padding="valid" and more
    filters than channels, whose border pixels are read by too few taps) the layer gets the nearest one found.

    Args:
        input_size: Spatial size of the layer's input, an int or one int per axis; () for `Dense`.
        alpha: α, the target of σ²; positive. 2 suits a ReLU behind the layer.
        noise: Standard deviation of the noise, relative to that of a normal kernel whose σ² are α on average.
            0 leaves the delta-orthogonal kernel.
        tolerance: On max(|σmax − √α|, |σmin − √α|).
        max_steps: Steps of the descent at the most.
        seed: Of the random start. None draws one, which `keras.utils.set_random_seed` controls. Layers that
            share an initializer get the same start.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups`, `kind` of the layer, as in
            `tf_frobreg.Convolution`.

    Raises:
        ValueError, TypeError: Where an argument is invalid, at once; where it does not fit the kernel, when
            the layer is built.

    Example:
        >>> from tf_frobreg import singular_values
        >>> start = FrobeniusInitializer(input_size=12, seed=1)
        >>> conv = tf.keras.layers.Conv2D(8, 3, padding="same", kernel_initializer=start)
        >>> conv.build((None, 12, 12, 8))
        >>> sigma = singular_values(conv.kernel, 12)
        >>> print(abs(sigma - 1).max() <= 0.05)
        True
    """

    def __init__(
        self,
        input_size,
        alpha=1.0,
        *,
        noise=1.0,
        tolerance=0.05,
        max_steps=200,
        seed=None,
        **geometry: Unpack[Geometry],
    ):
        self.alpha = check_number("alpha", alpha, exclusive=True)
        self.noise = check_number("noise", noise)
        self.tolerance = check_number("tolerance", tolerance)
        self.max_steps = check_integer("max_steps", max_steps, minimum=0)
        self.seed = None if seed is None else check_integer("seed", seed, minimum=0)
        self.take_geometry(input_size, geometry)
        self._drawn = random.randrange(2**31) if seed is None else self.seed

    def __call__(self, shape, dtype=None):
        """Returns a kernel of that shape."""
        conv = self.convolution(shape)
        if not tf.as_dtype(dtype or "float32").is_floating:
            raise TypeError(f"dtype must be one of floats. Received: dtype={dtype!r}")
        kernel = conv.from_groups(self._start(conv), np).astype("float32" if dtype is None else "float64")
        options = {name: value for name, value in self.geometry.items() if name != "input_size"}
        result = regularize_kernel(
            kernel,
            conv.input_size,
            alpha=self.alpha,
            tolerance=self.tolerance,
            max_steps=self.max_steps,
            **options,
        )
        return tf.cast(result.kernel, dtype or "float32")

    def _start(self, conv):
        draw = np.random.RandomState(self._drawn).standard_normal
        groups, g, h = conv.blocks
        deviation = self.noise * (self.alpha / (int(np.prod(conv.kernel_size)) * max(g, h))) ** 0.5
        blocks = deviation * draw((*conv.kernel_size, groups, g, h))
        # As many taps of each axis as its stride, so that every input is read, and by one output only.
        counts = [min(axis.stride, axis.kernel_size) for axis in conv.axes]
        firsts = [
            (axis.kernel_size - count) // 2 if axis.padding == "valid" else axis.pad // axis.dilation
            for axis, count in zip(conv.axes, counts, strict=True)
        ]
        rows = int(np.prod(counts)) * g
        size = max(rows, h)
        orthogonal = np.linalg.qr(draw((groups, size, size)))[0][:, :rows, :h]
        patch = np.moveaxis(orthogonal.reshape(groups, *counts, g, h), 0, -3)
        taps = tuple(slice(first, first + count) for first, count in zip(firsts, counts, strict=True))
        blocks[taps] += self.alpha**0.5 * patch
        return blocks

    def get_config(self):
        """Returns the constructor's arguments as plain values."""
        return {
            "alpha": self.alpha,
            "noise": self.noise,
            "tolerance": self.tolerance,
            "max_steps": self.max_steps,
            "seed": self.seed,
            **self.geometry_config(),
        }
