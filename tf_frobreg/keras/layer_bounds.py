"""How much one Keras layer stretches: an upper bound of its Lipschitz constant in the L2 norm."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from tf_frobreg.backends import to_array
from tf_frobreg.convolution.axis import Axis
from tf_frobreg.convolution.layer import KNOWN, Shape, image_sizes, kernel_places, why_unsupported
from tf_frobreg.spectrum.upper_bound import sigma_max_bound

DECOMPOSED_PIXELS = 1500  # on an axis, up to which average pooling has its exact σmax
ROUNDING = 1e-12  # allowance for a σmax of average pooling, relative
CAN_BE_BOUNDED = (
    "Bounds exist for convolutions, Dense, BatchNormalization in inference, activations except softmax, "
    "pooling, padding, cropping, reshaping, dropout, Rescaling, Normalization, nearest UpSampling, Add, "
    "Subtract, Average, Concatenate, Maximum and Minimum"
)
WITHOUT_SOFTMAX = "a certificate needs logits: give the model without its softmax"

# The largest slope of each activation. GELU has it at √2, the others with a fraction were maximised on a grid
# of 4·10⁶ points. All are rounded up.
SLOPES = {
    "linear": 1.0,
    "relu": 1.0,
    "relu6": 1.0,
    "leaky_relu": 1.0,
    "elu": 1.0,
    "celu": 1.0,
    "selu": 1.7580993408473769,  # scale · α, Klambauer et al. 2017
    "softplus": 1.0,
    "softsign": 1.0,
    "soft_shrink": 1.0,
    "sparse_plus": 1.0,
    "squareplus": 1.0,
    "tanh": 1.0,
    "tanh_shrink": 1.0,
    "hard_tanh": 1.0,
    "log_sigmoid": 1.0,
    "sigmoid": 0.25,
    "sparse_sigmoid": 0.5,
    "hard_sigmoid": 1 / 6,
    "hard_silu": 1.5,
    "silu": 1.09984,
    "mish": 1.0885,
    "gelu": 1.1290,  # with the approximation by tanh too
}
SOFTMAX = ("softmax", "log_softmax", "sparsemax")

layers = keras.layers
SAME_IN_INFERENCE = (
    layers.InputLayer,
    layers.Identity,
    layers.ActivityRegularization,
    layers.Dropout,
    layers.SpatialDropout1D,
    layers.SpatialDropout2D,
    layers.SpatialDropout3D,
    layers.GaussianDropout,
    layers.GaussianNoise,
    layers.AlphaDropout,
    layers.RandomFlip,
    layers.RandomRotation,
    layers.RandomTranslation,
    layers.RandomZoom,
    layers.RandomContrast,
    layers.RandomBrightness,
)
ENTRIES_MOVED_OR_DROPPED = (
    layers.Flatten,
    layers.Reshape,
    layers.Permute,
    layers.ZeroPadding1D,
    layers.ZeroPadding2D,
    layers.ZeroPadding3D,
    layers.Cropping1D,
    layers.Cropping2D,
    layers.Cropping3D,
    layers.GlobalMaxPooling1D,
    layers.GlobalMaxPooling2D,
    layers.GlobalMaxPooling3D,
)
AVERAGE_POOLING = (layers.AveragePooling1D, layers.AveragePooling2D, layers.AveragePooling3D)
MAX_POOLING = (layers.MaxPooling1D, layers.MaxPooling2D, layers.MaxPooling3D)
GLOBAL_AVERAGE = (
    layers.GlobalAveragePooling1D,
    layers.GlobalAveragePooling2D,
    layers.GlobalAveragePooling3D,
)
UP_SAMPLING = (layers.UpSampling1D, layers.UpSampling2D, layers.UpSampling3D)


class LayerBound(NamedTuple):
    """A bound of a layer's Lipschitz constant.

    Attributes:
        value: The bound.
        method: How the σmax of kernels was bounded, see `UpperBound`. "" for a layer without a kernel.
    """

    value: float
    method: str = ""


def bound_layer(layer: keras.layers.Layer, shape: Shape) -> LayerBound:
    """Returns a bound of the Lipschitz constant of a layer with one input.

    Args:
        layer: A built Keras layer.
        shape: Shape of its input, with the batch.

    Returns:
        The bound.

    Raises:
        ValueError: If the layer cannot be bounded. The message is a clause without the layer's name.
    """
    if isinstance(layer, KNOWN):
        return _bound_kernels(layer, shape)
    base: Any = next((cls for cls in type(layer).__mro__ if cls in RULES), None)
    if base is None:
        raise ValueError(f"no bound is known for {type(layer).__name__}. {CAN_BE_BOUNDED}")
    if type(layer).call is not base.call:
        raise ValueError(f"its class, {type(layer).__name__}, overrides call")
    return LayerBound(float(RULES[base](layer, shape)))


def activation_name(layer: Any) -> str:
    """Returns the name of the function that a layer applies at its end, or ""."""
    if isinstance(layer, layers.Softmax):
        return "softmax"
    function = getattr(layer, "activation", None)
    if isinstance(function, layers.Layer):
        return activation_name(function) or type(function).__name__
    return "" if function is None else getattr(function, "__name__", type(function).__name__)


def is_softmax(layer: Any) -> bool:
    """Returns whether a layer ends in a softmax."""
    return activation_name(layer) in SOFTMAX


def _bound_kernels(layer: Any, shape: Shape) -> LayerBound:
    """Returns the bound of a convolution or Dense layer, with its activation."""
    if (reason := why_unsupported(layer)) is not None:
        raise ValueError(reason)
    slope = _slope(layer.activation, shape)  # first, because it takes no time
    (size,) = image_sizes(layer, [shape])
    places = kernel_places(layer, size)  # type: ignore[arg-type]
    channels = shape[1] if getattr(layer, "data_format", "") == "channels_first" else shape[-1]
    if places[0].conv.input_shape[-1] != channels:
        raise ValueError(f"its kernel does not suit an input of shape {shape}")
    found = [sigma_max_bound(_values(getattr(layer, place.attribute)), place.conv) for place in places]
    methods = dict.fromkeys(bound.method for bound in found)
    return LayerBound(math.prod(bound.value for bound in found) * slope, ", ".join(methods))


def _values(variable: Any) -> np.ndarray:
    """Returns the entries of a weight in float64, or raises ValueError."""
    values = np.asarray(to_array(variable)).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("its weights hold NaN or infinity")
    return values


def _slope(function: Any, shape: Shape) -> float:
    """Returns the largest slope of an activation: a function of Keras, or a layer."""
    if isinstance(function, layers.Layer):
        return bound_layer(function, shape).value
    name = getattr(function, "__name__", type(function).__name__)
    if name in SOFTMAX:
        raise ValueError(f"its activation is {name}; {WITHOUT_SOFTMAX}")
    if name not in SLOPES or getattr(keras.activations, name, None) is not function:
        raise ValueError(f"no bound is known for its activation, {name}. {CAN_BE_BOUNDED}")
    return SLOPES[name]


def _softmax(layer: Any, shape: Shape) -> float:
    raise ValueError(f"it is a softmax; {WITHOUT_SOFTMAX}")


def _relu(layer: Any, shape: Shape) -> float:
    if layer.threshold:
        raise ValueError(f"threshold={layer.threshold} makes it jump")
    return max(1.0, abs(float(layer.negative_slope)))


def _batch_normalization(layer: Any, shape: Shape) -> float:
    gamma = _values(layer.gamma) if layer.scale else np.ones(1)
    return float(np.max(np.abs(gamma) / np.sqrt(_values(layer.moving_variance) + layer.epsilon)))


def _normalization(layer: Any, shape: Shape) -> float:
    if layer.variance is None:
        raise ValueError("it has neither been adapted nor built")
    deviation = np.maximum(np.sqrt(_values(layer.variance)), keras.config.epsilon())
    return float(np.max(deviation if layer.invert else 1 / deviation))


def _image(layer: Any, shape: Shape) -> tuple[int, ...]:
    """Returns the size of a layer's images, whose shape is known."""
    axes = slice(2, None) if layer.data_format == "channels_first" else slice(1, -1)
    return tuple(int(n) for n in shape[axes] if n is not None)


def _pooling_axes(layer: Any, shape: Shape) -> list[Axis]:
    sizes = zip(_image(layer, shape), _per_axis(layer.pool_size), _per_axis(layer.strides), strict=True)
    return [Axis(n, k, s, 1, layer.padding) for n, k, s in sizes]


def _per_axis(sizes: Any) -> Sequence[int]:
    return (sizes,) if isinstance(sizes, int) else sizes


def _max_pooling(layer: Any, shape: Shape) -> float:
    # A maximum moves by at most the largest movement in its window. Each input is in so many windows.
    windows = [np.max(np.bincount(axis.taps.inputs)) for axis in _pooling_axes(layer, shape)]
    return math.sqrt(math.prod(int(n) for n in windows))


def _average_pooling(layer: Any, shape: Shape) -> float:
    # The mean over a window is a mean over each axis in turn, so the norms of the axes are multiplied.
    axes = _pooling_axes(layer, shape)
    if keras.config.backend() == "torch" and layer.padding == "same":
        totals = [
            k - 1 if s == 1 else max((axis.output_size - 1) * s + k - axis.input_size, 0)
            for axis in axes
            for k, s in [(axis.kernel_size, axis.stride)]
        ]
        if any(total % 2 for total in totals):
            raise ValueError("PyTorch repeats the border of an image in this geometry of average pooling")
    return math.prod(_averaging_norm(axis) for axis in axes)


def _averaging_norm(axis: Axis) -> float:
    """Returns σmax of the means over windows of an axis. Keras counts only the pixels in the image."""
    outputs, inputs, _ = axis.taps
    weights = 1 / np.bincount(outputs)[outputs]
    if axis.input_size > DECOMPOSED_PIXELS:  # the row sums are 1
        return math.sqrt(np.bincount(inputs, weights).max()) * (1 + ROUNDING)
    matrix = np.zeros((axis.output_size, axis.input_size))
    matrix[outputs, inputs] = weights
    return float(np.linalg.norm(matrix, 2)) * (1 + ROUNDING)


def _global_average(layer: Any, shape: Shape) -> float:
    return 1 / math.sqrt(math.prod(_image(layer, shape)))


def _up_sampling(layer: Any, shape: Shape) -> float:
    if getattr(layer, "interpolation", "nearest") != "nearest":
        raise ValueError(f"interpolation={layer.interpolation!r} has no known bound; nearest has one")
    return math.sqrt(math.prod(_per_axis(layer.size)))


def _one(layer: Any, shape: Shape) -> float:
    return 1.0


Rule = Callable[[Any, Shape], float]
RULES: dict[type, Rule] = {
    **dict.fromkeys((*SAME_IN_INFERENCE, *ENTRIES_MOVED_OR_DROPPED), _one),
    **dict.fromkeys(MAX_POOLING, _max_pooling),
    **dict.fromkeys(AVERAGE_POOLING, _average_pooling),
    **dict.fromkeys(GLOBAL_AVERAGE, _global_average),
    **dict.fromkeys(UP_SAMPLING, _up_sampling),
    layers.Softmax: _softmax,
    layers.Activation: lambda layer, shape: _slope(layer.activation, shape),
    layers.ReLU: _relu,
    layers.LeakyReLU: lambda layer, shape: max(1.0, abs(float(layer.negative_slope))),
    layers.PReLU: lambda layer, shape: max(1.0, float(np.abs(_values(layer.alpha)).max())),
    layers.ELU: lambda layer, shape: max(1.0, abs(float(layer.alpha))),
    layers.BatchNormalization: _batch_normalization,
    layers.Normalization: _normalization,
    layers.Rescaling: lambda layer, shape: float(np.max(np.abs(layer.scale))),
    # In inference it calls the layer, whose kernel is the one that training has normalized.
    layers.SpectralNormalization: lambda layer, shape: bound_layer(layer.layer, shape).value,
    layers.RepeatVector: lambda layer, shape: math.sqrt(layer.n),
}
