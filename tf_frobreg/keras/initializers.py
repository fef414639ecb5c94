"""A Keras initializer whose kernels are nearly isometries of images."""

import math
import random
from collections.abc import Sequence
from typing import Any, Unpack

import keras
import numpy as np
import tensorflow as tf

from tf_frobreg.checks import check_integer, check_number
from tf_frobreg.convolution.geometry import Convolution, Geometry, Size
from tf_frobreg.descent.algorithm_3_1 import regularize_kernel
from tf_frobreg.keras.layer_geometry import TakesGeometry

__all__ = ["FrobeniusInitializer"]


@keras.saving.register_keras_serializable(package="tf_frobreg")
class FrobeniusInitializer(TakesGeometry, keras.initializers.Initializer):
    """Gives a layer a kernel with small R_α = ‖MᵀM − αI‖²_F, by Algorithm 3.1 from a random start.

    The descent stops if the singular values of M are within `tolerance` of √α. It starts from a random
    orthogonal matrix in the centre tap (a delta-orthogonal kernel, all of whose σ are √α), plus normal noise
    in all taps. With strides the matrix fills as many taps as the strides pass over. The kernels that it
    reaches use all taps. From a normal start alone, kernels with as many filters as channels mostly end in a
    local minimum.

    Two kinds of kernels can miss the tolerance, and the layer then gets the nearest kernel found.

    - Some channel of a depthwise kernel often ends in a local minimum with σmin = 0. With "same" padding and
      stride 1, this happened with 18 of 20 seeds for 3×3×8 at 16×16. Kernels of `Conv1D` with as many
      filters as channels end there more rarely (3 of 20 seeds for 3×8×8 at 16). Check σ of such a layer.
    - With padding="valid", more filters than strides² · channels, and a kernel larger than the stride, no
      kernel reaches the tolerance, because the border pixels are read by too few taps.

    Args:
        input_size: Spatial size of the layer's input, an int or one int per axis. () for `Dense`.
        alpha: α, the target of σ². Positive. 2 suits a layer that a ReLU follows.
        noise: Standard deviation of the noise, relative to that of a normal kernel whose σ² are α on average.
            0 returns the delta-orthogonal kernel.
        tolerance: Largest accepted max(|σmax − √α|, |σmin − √α|), equation (1.1).
        max_steps: Maximal number of steps of the descent.
        seed: Seed of the random start. None draws a seed, which `keras.utils.set_random_seed` controls.
            Layers that share an initializer get the same start.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups` and `kind` of the layer, as for
            `tf_frobreg.Convolution`.

    Raises:
        ValueError: If an argument is invalid. An argument that does not fit the kernel raises when the layer
            is built.
        TypeError: If an argument has the wrong type.

    Example:
        >>> from tf_frobreg import singular_values
        >>> start = FrobeniusInitializer(input_size=12, seed=1)
        >>> conv = keras.layers.Conv2D(8, 3, padding="same", kernel_initializer=start)
        >>> conv.build((None, 12, 12, 8))
        >>> sigma = singular_values(conv.kernel, 12)
        >>> print(abs(sigma - 1).max() <= 0.05)
        True
    """

    def __init__(
        self,
        input_size: Size,
        alpha: float = 1.0,
        *,
        noise: float = 1.0,
        tolerance: float = 0.05,
        max_steps: int = 200,
        seed: int | None = None,
        **geometry: Unpack[Geometry],
    ) -> None:
        self.alpha = check_number("alpha", alpha, exclusive=True)
        self.noise = check_number("noise", noise)
        self.tolerance = check_number("tolerance", tolerance)
        self.max_steps = check_integer("max_steps", max_steps, minimum=0)
        self.seed = None if seed is None else check_integer("seed", seed, minimum=0)
        self.take_geometry(input_size, geometry)
        self._drawn = random.randrange(2**31) if self.seed is None else self.seed

    def __call__(self, shape: Sequence[int], dtype: Any = None) -> tf.Tensor:
        """Returns a kernel of that shape.

        Args:
            shape: Shape of the kernel.
            dtype: A float dtype. None is float32.

        Returns:
            The kernel, a tensor.

        Raises:
            TypeError: If `dtype` is not a float dtype.
        """
        conv = self.convolution(shape)
        if not tf.as_dtype(dtype or "float32").is_floating:
            raise TypeError(f"dtype must be one of floats. Received: dtype={dtype!r}")
        kernel = conv.from_groups(self._start(conv), np).astype("float32" if dtype is None else "float64")
        result = regularize_kernel(
            kernel,
            conv.input_size,
            alpha=self.alpha,
            tolerance=self.tolerance,
            max_steps=self.max_steps,
            **conv.geometry,
        )
        return tf.cast(result.kernel, dtype or "float32")

    def _start(self, conv: Convolution) -> np.ndarray:
        """Returns a random delta-orthogonal kernel plus noise, of shape (*kernel_size, groups, g, h)."""
        draw = np.random.RandomState(self._drawn).standard_normal
        groups, g, h = conv.blocks
        deviation = self.noise * (self.alpha / (math.prod(conv.kernel_size) * max(g, h))) ** 0.5
        blocks = deviation * draw((*conv.kernel_size, groups, g, h))
        # With as many taps on each axis as its stride, exactly one output reads each input.
        counts = [min(axis.stride, axis.kernel_size) for axis in conv.axes]
        firsts = [
            (axis.kernel_size - count) // 2 if axis.padding == "valid" else axis.pad // axis.dilation
            for axis, count in zip(conv.axes, counts, strict=True)
        ]
        rows = math.prod(counts) * g
        size = max(rows, h)
        orthogonal = np.linalg.qr(draw((groups, size, size)))[0][:, :rows, :h]
        patch = np.moveaxis(orthogonal.reshape(groups, *counts, g, h), 0, -3)
        taps = tuple(slice(first, first + count) for first, count in zip(firsts, counts, strict=True))
        blocks[taps] += self.alpha**0.5 * patch
        return blocks

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments as plain values."""
        return {
            "alpha": self.alpha,
            "noise": self.noise,
            "tolerance": self.tolerance,
            "max_steps": self.max_steps,
            "seed": self.seed,
            **self.geometry_config(),
        }
