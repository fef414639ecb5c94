"""The Keras regularizer that computes a function of the user."""

import inspect
import reprlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self, Unpack

import keras
import tensorflow as tf

from tf_frobreg.backends import dtype_of
from tf_frobreg.checks import received
from tf_frobreg.convolution.geometry import Convolution, Geometry, Size
from tf_frobreg.keras.layer_geometry import TakesGeometry
from tf_frobreg.keras.regularizer_base import WeightedRegularizer, function_name
from tf_frobreg.keras.training_backend import try_gradient
from tf_frobreg.penalties.penalty_function import Weight, weighted

__all__ = ["FunctionRegularizer"]

WANTED = (
    "penalty must be a function of (kernel, convolution) that returns a scalar, which can be "
    "differentiated in the kernel"
)
LONGEST_ERROR = 300  # characters
CANNOT_BE_SAVED = "Keras cannot save the function: write one with def"


@keras.saving.register_keras_serializable(package="tf_frobreg")
class FunctionRegularizer(TakesGeometry, WeightedRegularizer):
    """Penalises a kernel by `factor` times a function of the kernel and the layer's geometry.

    The function is called as `function(kernel, convolution)`. `kernel` is a tensor of float32 or float64.
    `convolution` is the layer's `Convolution`: the shapes of M, and `**convolution.geometry` for the
    functions of this package. The result must be a scalar that Keras' backend can differentiate in the
    kernel.

    Keras saves the name of the function. A function with `@keras.saving.register_keras_serializable()` is
    found again on loading. For any other one give `load_model` its `custom_objects`.

    Args:
        function: The function.
        input_size: Spatial size of the layer's input, an int or one int per axis. () for `Dense`.
        factor: Weight of the penalty, at least 0.
        scale: Multiplier of `factor` that `FactorSchedule` changes. It is saved with the model.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups` and `kind` of the layer, as for
            `tf_frobreg.Convolution`.

    Raises:
        ValueError: If an argument is invalid. When the penalty is computed: if an argument does not fit the
            kernel, or the result of the function is not a scalar.
        TypeError: If an argument has the wrong type.

    Example:
        The mean of σ², which is ‖M‖²_F per column of M. TensorFlow computes M, so this function needs it as
        the backend of Keras:

        >>> from tf_frobreg import transformation_matrix
        >>> @keras.saving.register_keras_serializable(package="example")
        ... def mean_square(kernel, convolution):
        ...     matrix = transformation_matrix(kernel, convolution.input_size, **convolution.geometry)
        ...     return tf.reduce_sum(matrix.values**2) / convolution.shape[1]
        >>> regularizer = FunctionRegularizer(mean_square, input_size=8, factor=0.5)
        >>> layer = keras.layers.Conv2D(
        ...     1, 1, kernel_initializer=keras.initializers.Constant(2.0), kernel_regularizer=regularizer)
        >>> _ = layer(tf.zeros((1, 8, 8, 1)))
        >>> print(layer.losses[0].numpy())
        2.0
    """

    def __init__(
        self,
        function: Callable[[Any, Convolution], Any],
        input_size: Size,
        factor: float = 0.01,
        *,
        scale: float = 1.0,
        **geometry: Unpack[Geometry],
    ) -> None:
        super().__init__(factor, scale)
        self.function = check_function("function", function)
        self.take_geometry(input_size, geometry)

    def evaluate(self, x: Any, kernel: Any, weight: Weight) -> Any:
        """Returns the weight times the result of the function."""
        conv = self.convolution(kernel.shape)
        return weighted(lambda kernel: self._result(kernel, conv), kernel, weight)

    def _result(self, kernel: Any, conv: Convolution) -> Any:
        """Returns the result of the function, or raises an error if it is not a scalar of Keras' backend."""
        result = self.function(kernel, conv)
        if isinstance(result, tf.Tensor) and not keras.ops.is_tensor(result):  # it would have no gradient
            raise ValueError(
                f"function {function_name(self.function)} must return a tensor of Keras' backend, "
                f"{keras.config.backend()}. Received: a tensor of TensorFlow"
            )
        try:
            value = keras.ops.convert_to_tensor(result)
            dtype = dtype_of(value)
        except (TypeError, ValueError, tf.errors.OpError):
            value, dtype = None, ""
        if len(getattr(value, "shape", "?")) != 0 or not dtype.startswith(("float", "bfloat", "int", "uint")):
            is_tensor = value is not None and keras.ops.is_tensor(result)
            found = f"a {dtype} tensor of shape {tuple(value.shape)}" if is_tensor else reprlib.repr(result)
            raise ValueError(
                f"function {function_name(self.function)} must return a real scalar. Received: {found}"
            )
        return keras.ops.cast(value, dtype_of(kernel))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments as plain values."""
        function = keras.saving.serialize_keras_object(self.function)
        return {**super().get_config(), "function": function, **self.geometry_config()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Returns the regularizer of a configuration. Keras looks up the function."""
        return cls(**config | {"function": keras.saving.deserialize_keras_object(config["function"])})


def check_function(
    name: str, function: Any, else_: str = "", hint: str = ""
) -> Callable[[Any, Convolution], Any]:
    """Returns a function of kernel and convolution, or raises an error that names the argument."""
    if not callable(function) or isinstance(function, (type, keras.regularizers.Regularizer)):
        raise TypeError(
            f"{name} must be {else_}a function of (kernel, convolution). "
            f"Received: {received(name, function)}{hint}"
        )
    return function


def try_function(penalty: FunctionRegularizer, shape: Sequence[int], dtype: str) -> None:
    """Traces the function of a penalty and its gradient as `fit` does, see `try_gradient`.

    Args:
        penalty: The penalty.
        shape: Shape of the kernel.
        dtype: Its dtype.

    Raises:
        ValueError: If the function raises, returns no scalar, or cannot be differentiated.
    """
    name = function_name(penalty.function)
    try:
        has_gradient = try_gradient(penalty, shape, dtype)
    except Exception as error:  # the function may raise any
        text = " ".join(str(error).split())
        text = text if len(text) <= LONGEST_ERROR else f"{text[:LONGEST_ERROR]} …"
        raise ValueError(
            f"{WANTED}. Received: the function {name}, which fails with {type(error).__name__}: {text}"
        ) from error
    if not has_gradient:
        raise ValueError(
            f"{WANTED}. Received: the function {name}, whose result has no gradient. It is a constant, or "
            "NumPy computes it"
        )


def remark_on_loading(function: Any) -> str:
    """Returns what loading a saved penalty of this function needs, or "" if it needs nothing."""
    name = function_name(function)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a lambda
            keras.saving.serialize_keras_object(function)
    except Exception:  # Keras raises many types
        return CANNOT_BE_SAVED
    if name == "<lambda>":  # Keras saves its code without the modules that it uses
        return "loading needs safe_mode=False, because of the lambda, whose names are lost: use def"
    saved = function if inspect.isroutine(function) else type(function)  # an object is saved by its class
    is_registered = keras.saving.get_registered_name(saved) != saved.__name__
    return "" if is_registered else f'loading needs custom_objects={{"{name}": {name}}}'
