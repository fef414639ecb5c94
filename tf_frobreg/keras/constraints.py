"""The Keras constraint."""

from typing import Any, Unpack

import keras

from tf_frobreg.convolution.geometry import Geometry, Size
from tf_frobreg.convolution.kernel import as_kernel
from tf_frobreg.keras.layer_geometry import TakesGeometry
from tf_frobreg.penalties.projection import check_interval, check_strides, clip

__all__ = ["SingularValueClip"]


@keras.saving.register_keras_serializable(package="tf_frobreg")
class SingularValueClip(TakesGeometry, keras.constraints.Constraint):
    """Clips the singular values of a kernel into [low, high], by `clip_singular_values`.

    As a Keras `kernel_constraint` it is applied after every step of the optimizer. Each application takes one
    singular value decomposition per frequency, hundreds of them for an image of 32×32. On layers with many
    channels it costs more than the training step. XLA under TensorFlow has no decomposition of complex
    matrices. If Keras would compile with it, as it does on GPUs by default, use `jit_compile=False`.

    Args:
        input_size: Spatial size of the layer's input, an int or one int per axis. Keras does not pass it to a
            constraint.
        low: Smallest singular value, at least 0.
        high: Largest singular value, positive and at least `low`.
        **geometry: `dilation_rate`, `groups` and `kind` of the layer, as for `tf_frobreg.Convolution`.
            Strides above 1 are refused. `padding` is accepted but not used: the border is periodic.

    Raises:
        ValueError: If an argument is invalid. An argument that does not fit the kernel raises at the first
            training step.
        TypeError: If an argument has the wrong type.

    Example:
        >>> layer = keras.layers.Conv2D(4, 3, kernel_constraint=SingularValueClip(input_size=16, high=0.5))
        >>> layer.build((None, 16, 16, 3))
        >>> tuple(layer.kernel_constraint(layer.kernel).shape)
        (3, 3, 3, 4)
    """

    def __init__(
        self, input_size: Size, low: float = 0.0, high: float = 1.0, **geometry: Unpack[Geometry]
    ) -> None:
        self.low, self.high = check_interval(low, high)
        self.take_geometry(input_size, geometry)
        check_strides(self.strides)

    def __call__(self, w: Any) -> Any:
        """Returns the clipped kernel."""
        kernel = as_kernel(w, check_finite=False)
        return clip(kernel, self.convolution(kernel.shape), self.low, self.high)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments as plain values."""
        return {"low": self.low, "high": self.high, **self.geometry_config()}
