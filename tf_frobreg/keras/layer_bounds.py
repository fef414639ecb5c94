"""How much one Keras layer stretches: an upper bound of its Lipschitz constant in the L2 norm."""

import inspect
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
    "Bounds exist for convolutions, Dense, BatchNormalization in inference, most of keras.activations, "
    "layers of pooling, padding, cropping, reshaping and dropout, Rescaling, Normalization, nearest "
    "UpSampling, Add, Subtract, Average, Concatenate, Maximum and Minimum"
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
# What a subclass may override: it acts in training, or the bound reads its result.
HARMLESS = (
    "build",
    "compile",
    "compute_loss",
    "compute_metrics",
    "fit",
    "from_config",
    "get_config",
    "kernel",
    "loss",
    "metrics",
    "quantize",
    "test_step",
    "train_step",
)

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
PIECEWISE = (layers.ReLU, layers.LeakyReLU, layers.ELU)
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
    base = keras_class(layer)
    if base not in KNOWN and base not in RULES:
        raise ValueError(f"no bound is known for {type(layer).__name__}. {CAN_BE_BOUNDED}")
    check_unchanged(layer)
    if not keras.backend.is_float_dtype(layer.compute_dtype):
        raise ValueError(f"it computes in {layer.compute_dtype}; bounds hold for floating point")
    if base in KNOWN:
        return _bound_kernels(layer, shape)
    return LayerBound(float(RULES[base](layer, shape)))


def keras_class(layer: Any) -> type:
    """Returns the class of Keras that a layer, model or operation is of, or is derived from."""
    return next((cls for cls in type(layer).__mro__ if cls.__module__.startswith("keras.")), object)


def check_unchanged(layer: Any) -> None:
    """Raises ValueError if a layer does not compute what its class of Keras computes."""
    cls, base = type(layer), keras_class(layer)
    names = [name for name in dir(base) if not name.startswith("__") or name == "__call__"]
    for name in names:
        own = inspect.getattr_static(base, name)
        changed = inspect.getattr_static(cls, name) is not own or (name in vars(layer) and callable(own))
        if changed and name not in HARMLESS:
            raise ValueError(f"its class, {cls.__name__}, overrides {name}")


def activation_name(layer: Any) -> str:
    """Returns the name of the function that a layer applies at its end, or ""."""
    if isinstance(layer, layers.Softmax):
        return "softmax"
    function = getattr(layer, "activation", None)
    if isinstance(function, layers.Layer):
        return activation_name(function) or type(function).__name__
    return "" if function is None else getattr(function, "__name__", type(function).__name__)


def is_softmax(layer: Any) -> bool:
    """Returns whether a layer or operation ends in a softmax."""
    return activation_name(layer) in SOFTMAX or type(layer).__name__ in ("Softmax", "LogSoftmax", "Sparsemax")


def bound_activation(operation: Any) -> float | None:
    """Returns the largest slope of an activation in a graph. None if the operation is none that is known."""
    if is_softmax(operation):
        return _softmax(operation, ())
    kind = type(operation).__name__.lower()
    if kind in ("relu", "leakyrelu", "elu"):
        return _piecewise(operation, ())
    name = next((name for name in SLOPES if name.replace("_", "") == kind), None)
    if name is None:
        return None
    for parameter in inspect.signature(type(operation)).parameters.values():
        value = getattr(operation, parameter.name, parameter.default)
        if parameter.name not in ("name", "approximate") and value != parameter.default:
            raise ValueError(f"{parameter.name}={value!r} is not the default, whose slope is known")
    return SLOPES[name]


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
    found = [sigma_max_bound(real_values(getattr(layer, place.attribute)), place.conv) for place in places]
    methods = dict.fromkeys(bound.method for bound in found)
    return LayerBound(math.prod(bound.value for bound in found) * slope, ", ".join(methods))


def real_values(variable: Any) -> np.ndarray:
    """Returns the entries of a weight or constant in float64, or raises ValueError."""
    values = np.asarray(to_array(variable))
    if np.iscomplexobj(values):
        raise ValueError("its weights or constants are complex")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("its weights or constants hold NaN or infinity")
    return values


def _slope(function: Any, shape: Shape) -> float:
    """Returns the largest slope of an activation: a function of Keras, or a layer."""
    if isinstance(function, layers.Layer):
        if keras_class(function) not in (*PIECEWISE, layers.Softmax, layers.Activation):
            kind = type(function).__name__
            raise ValueError(f"its activation is a layer, {kind}: apply that layer after it instead")
        return bound_layer(function, shape).value
    name = getattr(function, "__name__", type(function).__name__)
    of_keras = [getattr(module, name, None) for module in (keras.activations, keras.ops)]
    if name in SOFTMAX:
        raise ValueError(f"its activation is {name}; {WITHOUT_SOFTMAX}")
    if not any(function is known for known in of_keras):
        raise ValueError(f"its activation, {name}, is not of keras.activations, where slopes are known")
    if name not in SLOPES:
        raise ValueError(f"no bound is known for its activation, {name}. It exists for {', '.join(SLOPES)}")
    return SLOPES[name]


def _softmax(layer: Any, shape: Shape) -> float:
    raise ValueError(f"it is a softmax; {WITHOUT_SOFTMAX}")


def _piecewise(layer: Any, shape: Shape) -> float:
    """Returns the largest slope of ReLU, LeakyReLU or ELU, as a layer or an operation."""
    if getattr(layer, "threshold", 0):
        raise ValueError(f"threshold={layer.threshold} makes it jump")
    below = [getattr(layer, name, 0.0) for name in ("negative_slope", "alpha")]
    return float(np.abs(real_values([1.0, *below])).max())


def _batch_normalization(layer: Any, shape: Shape) -> float:
    gamma = real_values(layer.gamma) if layer.scale else np.ones(1)
    return float(np.max(np.abs(gamma) / np.sqrt(real_values(layer.moving_variance) + layer.epsilon)))


def _normalization(layer: Any, shape: Shape) -> float:
    if layer.variance is None:
        raise ValueError("it has neither been adapted nor built")
    variance = real_values(layer.variance)
    _check_broadcasting(shape, real_values(layer.mean), variance)
    deviation = np.maximum(np.sqrt(variance), keras.config.epsilon())
    return float(np.max(deviation if layer.invert else 1 / deviation))


def _rescaling(layer: Any, shape: Shape) -> float:
    scale, offset = real_values(layer.scale), real_values(layer.offset)
    if scale.ndim and keras.config.image_data_format() == "channels_first":  # as Keras does
        scale = scale.reshape(scale.shape + (1,) * (3 - scale.ndim))
    _check_broadcasting(shape, scale, offset)
    return float(np.abs(scale).max())


def _check_broadcasting(shape: Shape, *constants: np.ndarray) -> None:
    """Raises ValueError if constants broadcast an input to a larger shape. Keras does not note that."""
    one = (1, *(int(n) for n in shape[1:] if n is not None))
    found = np.broadcast_shapes(one, *(constant.shape for constant in constants))
    if found != one:
        raise ValueError(f"its constants broadcast the shape {one} to {found}")


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
    **dict.fromkeys(PIECEWISE, _piecewise),
    layers.PReLU: lambda layer, shape: max(1.0, float(np.abs(real_values(layer.alpha)).max())),
    layers.BatchNormalization: _batch_normalization,
    layers.Normalization: _normalization,
    layers.Rescaling: _rescaling,
    # In inference it calls the layer, whose kernel is the one that training has normalized.
    layers.SpectralNormalization: lambda layer, shape: bound_layer(layer.layer, shape).value,
    layers.RepeatVector: lambda layer, shape: math.sqrt(layer.n),
}
