"""A Keras initializer whose kernels are nearly isometries of images."""

import functools
import math
import random
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, Unpack
from weakref import WeakValueDictionary

import keras
import numpy as np

from tf_frobreg.checks import check_integer, check_number, entries_of, received
from tf_frobreg.convolution.geometry import Convolution, Geometry, Size
from tf_frobreg.convolution.isometric_patch import isometric_patch
from tf_frobreg.descent.algorithm_3_1 import StopReason, regularize_kernel
from tf_frobreg.keras.layer_geometry import TakesGeometry

__all__ = ["FrobeniusInitializer"]

# Kernels of initializers that exist, by all that determines them.
COMPUTED: WeakValueDictionary[tuple, np.ndarray] = WeakValueDictionary()


@keras.saving.register_keras_serializable(package="tf_frobreg")
class FrobeniusInitializer(TakesGeometry, keras.initializers.Initializer):
    """Gives a layer a kernel with small R_α = ‖MᵀM − αI‖²_F, by Algorithm 3.1 from a random start.

    The descent stops if the singular values of M are within `tolerance` of √α. It starts from a random
    orthogonal matrix in the centre tap (a delta-orthogonal kernel, all of whose σ are √α), plus normal noise
    in all taps. With strides the matrix fills as many taps as the strides pass over. The kernels that it
    reaches use all taps.

    A layer whose kernel misses the tolerance gets the best kernel found, and a warning says so. This happens
    if no kernel of the geometry reaches √α: for example with padding="valid", more filters than
    strides² · channels and a kernel larger than the stride, because too few taps read the border pixels.

    A kernel is computed once. A copy of the initializer made from its configuration has the same seed, for
    example in a cloned model. It uses the kernel again while the first initializer exists. There is no
    descent when Keras loads a model, whose weights replace the start.

    Args:
        input_size: Spatial size of the layer's input, an int or one int per axis. () for `Dense`.
        alpha: α, the target of σ². Positive. 2 suits a layer that a ReLU follows.
        noise: Standard deviation of the noise, relative to that of a normal kernel whose σ² are α on average.
            0 returns the delta-orthogonal kernel.
        tolerance: Largest accepted max(|σmax − √α|, |σmin − √α|), equation (1.1).
        max_steps: Maximal number of steps of the descent.
        seed: Seed of the random start. None draws a seed, which `keras.utils.set_random_seed` controls.
            Layers that share an initializer get the same start, and copies made from `get_config` too.
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
        max_steps: int = 1000,
        seed: int | None = None,
        **geometry: Unpack[Geometry],
    ) -> None:
        self.alpha = check_number("alpha", alpha, exclusive=True)
        self.noise = check_number("noise", noise)
        self.tolerance = check_number("tolerance", tolerance)
        self.max_steps = check_integer("max_steps", max_steps, minimum=0)
        self.seed = random.randrange(2**31) if seed is None else check_integer("seed", seed, minimum=0)
        self.take_geometry(input_size, geometry)
        self._kernels: dict[tuple, np.ndarray] = {}  # keeps them in COMPUTED

    def __call__(self, shape: Sequence[int], dtype: Any = None) -> Any:
        """Returns a kernel of that shape.

        Args:
            shape: Shape of the kernel.
            dtype: A float dtype. None is float32.

        Returns:
            The kernel, a tensor.

        Raises:
            ValueError: If the shape does not fit the geometry.
            TypeError: If `shape` is no shape, or `dtype` is not a float dtype.
        """
        if entries_of(shape) is None:
            raise TypeError(f"shape must be the shape of a kernel. Received: {received('shape', shape)}")
        conv = self.convolution(shape)
        if not keras.backend.is_float_dtype(dtype or "float32"):
            raise TypeError(f"dtype must be one of floats. Received: {received('dtype', dtype)}")
        precision = "float32" if dtype is None else "float64"
        if _keras_is_loading_a_model():
            kernel = self._start(conv, precision)
        else:
            kernel = self._kernel(conv, precision)
        return keras.ops.convert_to_tensor(kernel, dtype=dtype or "float32")

    def _kernel(self, conv: Convolution, precision: str) -> np.ndarray:
        """Returns the kernel that this initializer, or an equal one, computed before. Computes a new one."""
        key = (conv, self.alpha, self.noise, self.tolerance, self.max_steps, self.seed, precision)
        if key not in self._kernels:
            kernel = COMPUTED.get(key)
            self._kernels[key] = self._descend(conv, precision) if kernel is None else kernel
        return COMPUTED.setdefault(key, self._kernels[key])  # an unpickled initializer is not there yet

    def _descend(self, conv: Convolution, precision: str) -> np.ndarray:
        """Returns the kernel that the descent reaches. Warns if it misses the tolerance."""
        descend = functools.partial(
            regularize_kernel,
            input_size=conv.input_size,
            alpha=self.alpha,
            tolerance=self.tolerance,
            **conv.geometry,
        )
        result = descend(self._start(conv, precision), max_steps=self.max_steps, measure="never")
        if result.reason is StopReason.MAX_STEPS:
            # The bound that decides without a measurement can miss what a measurement shows.
            result = descend(result, max_steps=0)
        if not result.converged and self.tolerance > 0:
            warnings.warn(
                f"the kernel of shape {conv.kernel_shape} misses tolerance={self.tolerance}: "
                f"{result.reason.value}",
                stacklevel=2,
            )
        return result.kernel

    def _start(self, conv: Convolution, precision: str) -> np.ndarray:
        """Returns a random delta-orthogonal kernel plus noise."""
        draw = np.random.RandomState(self.seed).standard_normal
        groups, g, h = conv.blocks
        deviation = self.noise * (self.alpha / (math.prod(conv.kernel_size) * max(g, h))) ** 0.5
        blocks = deviation * draw((*conv.kernel_size, groups, g, h))
        patch = isometric_patch(conv)
        _, rows, _ = patch.matrix_shape
        size = max(rows, h)
        orthogonal = np.linalg.qr(draw((groups, size, size)))[0][:, :rows, :h]
        blocks += self.alpha**0.5 * patch.place(orthogonal)
        return conv.from_groups(blocks, np).astype(precision)

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


def _keras_is_loading_a_model() -> bool:
    """Returns whether `keras.saving.load_model` called this. It then replaces all weights."""
    return any(
        frame.f_code.co_name == "load_model" and frame.f_globals.get("__name__", "").startswith("keras.")
        for frame, _ in traceback.walk_stack(None)
    )
