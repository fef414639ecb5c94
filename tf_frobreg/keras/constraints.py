"""The Keras constraint."""

from typing import Any, Unpack

import tensorflow as tf

from tf_frobreg.convolution.geometry import Geometry, Size
from tf_frobreg.convolution.kernel import as_kernel
from tf_frobreg.keras.layer_geometry import TakesGeometry
from tf_frobreg.penalties.projection import check_interval, check_strides, clip

__all__ = ["SingularValueClip"]


@tf.keras.utils.register_keras_serializable(package="tf_frobreg")
class SingularValueClip(TakesGeometry, tf.keras.constraints.Constraint):
    """`clip_singular_values` as a Keras `kernel_constraint`: applied after every step of the optimizer.

    Each application takes one singular value decomposition per frequency, hundreds of them for an image of
    32×32: on layers of many channels it costs more than the training step. XLA has no decomposition of
    complex matrices: where Keras would compile with it (by itself on GPUs), use `jit_compile=False`.

    Args:
        input_size: As for `clip_singular_values`; of the layer, which Keras does not show to a constraint.
        low: As for `clip_singular_values`.
        high: As for `clip_singular_values`.
        **geometry: As for `clip_singular_values`.

    Raises:
        ValueError, TypeError: Where an argument is invalid, at once; where it does not fit the kernel, at the
            first training step.

    Example:
        >>> layer = tf.keras.layers.Conv2D(4, 3, kernel_constraint=SingularValueClip(input_size=16, high=0.5))
        >>> layer.build((None, 16, 16, 3))
        >>> layer.kernel_constraint(layer.kernel).shape
        TensorShape([3, 3, 3, 4])
    """

    def __init__(self, input_size: Size, low: float = 0.0, high: float = 1.0, **geometry: Unpack[Geometry]):
        self.low, self.high = check_interval(low, high)
        self.take_geometry(input_size, geometry)
        check_strides(self.strides)

    def __call__(self, w: Any) -> tf.Tensor:
        """Returns the clipped kernel."""
        kernel = as_kernel(w, check_finite=False)
        return clip(kernel, self.convolution(kernel.shape), self.low, self.high)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments as plain values."""
        return {"low": self.low, "high": self.high, **self.geometry_config()}
