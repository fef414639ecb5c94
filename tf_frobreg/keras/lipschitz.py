"""An upper bound of a model's Lipschitz constant, from bounds of its layers."""

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from tf_frobreg.checks import received
from tf_frobreg.keras.layer_bounds import (
    CAN_BE_BOUNDED,
    LayerBound,
    activation_name,
    bound_activation,
    bound_layer,
    check_unchanged,
    keras_class,
    real_values,
)
from tf_frobreg.keras.lipschitz_report import Head, LayerRow, LipschitzBound
from tf_frobreg.keras.read_layers import check_model
from tf_frobreg.keras.trace import InputSize, input_specs
from tf_frobreg.text import one_line

__all__ = ["lipschitz_bound"]

layers = keras.layers
MERGING = {
    layers.Add: "Add",
    layers.Subtract: "Subtract",
    layers.Average: "Average",
    layers.Concatenate: "Concatenate",
    layers.Maximum: "Maximum",
    layers.Minimum: "Minimum",
}
# Layers without training that leave the differences of logits as they are.
KEEPING_LOGITS = (
    layers.Identity,
    layers.Dropout,
    layers.ActivityRegularization,
    layers.Activation,
    layers.Flatten,
)
ARITHMETIC = ("Add", "Subtract", "Maximum", "Minimum", "Multiply", "Divide", "TrueDivide")
BOUNDED_OPERATIONS = (
    "Bounds exist for +, −, maximum and minimum, for x * constant and x / constant, for reshape, concatenate "
    "and most of keras.activations. A layer of Keras may have one"
)


def lipschitz_bound(model: keras.layers.Layer, input_size: InputSize | None = None) -> LipschitzBound:
    """Returns an upper bound of a model's Lipschitz constant in the L2 norm, in inference.

    The bound holds for `model.predict(x)` and `model(x, training=False)`. In training, dropout and layers of
    random images act, and are not bounded.

    If x and y are two inputs, ‖f(x) − f(y)‖₂ ≤ L·‖x − y‖₂. Each norm runs over one example: all pixels and
    channels, and all inputs or outputs if there are several. L is at least the true constant, and in deep
    networks far above it: the bounds of the layers are multiplied along the model, and added where branches
    meet.

    The bound holds in exact arithmetic, for these reasons:

    - σmax of a kernel is bounded from above. It is computed from all singular values of M, or M is a part of
      the matrix of a layer on a slightly larger torus, or the peak of the symbol over all frequencies is
      bounded. See the column "σmax by". An allowance for float64 rounding, about 1e-12 to 1e-10, is added.
    - The slope of an activation, γ/√(variance + ε) of `BatchNormalization`, and the norms of pooling are
      formulas. Average pooling has the exact σmax up to 1500 pixels on an axis, and a bound of it above.
    - Sums of branches have the sum of their bounds, and other merges the root of the sum of their squares.

    The model itself computes in float32, and rounds outputs and constants. This is not in the bound.

    Args:
        model: A built Sequential or Functional model. Nested models may be in it.
        input_size: Size of the input images, an int or one int per axis, if the model leaves it open. A dict
            gives several sizes by the names of inputs.

    Returns:
        A `LipschitzBound`. `print` shows a row per layer, `float` returns the number.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If a layer cannot be bounded, the model is not a graph of layers, it has not been built,
            or a size is missing. A mask, integers and a subclass that overrides a method of Keras cannot be
            bounded. The message names the layer.

    Example:
        >>> model = keras.Sequential([
        ...     keras.Input((8, 8, 3)),
        ...     keras.layers.Conv2D(3, 1, kernel_initializer="orthogonal", activation="relu"),
        ...     keras.layers.Flatten(),
        ...     keras.layers.Dense(10, kernel_initializer="orthogonal")])
        >>> print(f"{float(lipschitz_bound(model)):.6f}")
        1.000000
    """
    check_model(model)
    if isinstance(model, keras.Sequential) and not model.layers:
        raise ValueError(f"model must have layers. Received: {received('model', model)}")
    if not model.built:
        raise ValueError(f"model must be built: call it once on a batch. Received: {model!r}")
    if not _is_graph(model) or not getattr(model, "inputs", None):
        raise ValueError(
            f"model must be a Sequential or Functional model, which shows how its layers are connected. "
            f"Received: {received('model', model)} of class {type(model).__name__}"
        )
    walk = _Walk()
    inputs = [_Tensor(tuple(spec.shape), 1.0, spec) for spec in input_specs(model, input_size)]
    try:
        with _naming(model, ""):
            outputs = walk.through_model(model, inputs, "")
    except _Refusal as error:
        raise ValueError(str(error)) from None
    value = math.hypot(*(tensor.bound for tensor in outputs))
    head = outputs[0].head if len(outputs) == 1 else None
    return LipschitzBound(value, walk.rows, [tensor.shape for tensor in inputs], head)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor in a model.

    Attributes:
        shape: Its shape, with the batch.
        bound: A Lipschitz constant of the map from the model's inputs to it.
        spec: The tensor as Keras describes it.
        head: The `Dense` layer that it comes from, if only a scale is between them.
    """

    shape: tuple[int | None, ...]
    bound: float
    spec: Any
    head: Head | None = None

    @property
    def size(self) -> int:
        """Number of entries of one example."""
        return math.prod(int(n) for n in self.shape[1:] if n is not None)


class _Walk:
    """Goes through a model from its inputs, and notes a row for each call of a layer."""

    def __init__(self) -> None:
        self.rows: list[LayerRow] = []
        # A shared layer is bounded once.
        self._known: dict[tuple[int, tuple[int | None, ...]], LayerBound] = {}

    def through_model(self, model: Any, inputs: Sequence[_Tensor], path: str) -> list[_Tensor]:
        """Returns the outputs of a Sequential or Functional model."""
        check_unchanged(model)
        # Keras has no public list of the calls in a model.
        graph = getattr(model, "_functional", None) or model
        _check_fit(graph, inputs)
        found = {id(symbol): tensor for symbol, tensor in zip(graph.inputs, inputs, strict=True)}

        def known(value: Any) -> Any:
            return found[id(value)] if isinstance(value, keras.KerasTensor) else value

        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                if node.is_input:
                    continue
                args, kwargs = keras.tree.map_structure(known, (node.arguments.args, node.arguments.kwargs))
                outputs = self._call(node, args, kwargs, path)
                found |= {id(key): value for key, value in zip(node.output_tensors, outputs, strict=True)}
        return [found[id(symbol)] for symbol in graph.outputs]

    def _call(self, node: Any, args: Any, kwargs: dict[str, Any], path: str) -> list[_Tensor]:
        """Returns the outputs of one call of a layer, a model or an operation."""
        layer = node.operation
        with _naming(layer, path):
            if kwargs.get("training") and not _trains_by_default(layer):
                raise ValueError("it is called with training=True")
            kwargs = {
                key: value
                for key, value in kwargs.items()
                if key != "training" and any(leaf is not None for leaf in keras.tree.flatten(value))
            }
            masks = [getattr(tensor, "_keras_mask", None) for tensor in node.input_tensors]
            if any("mask" in key for key in kwargs) or any(mask is not None for mask in masks):
                raise ValueError("it is called with a mask")
            leaves = keras.tree.flatten((args, kwargs))
            inputs = [value for value in leaves if isinstance(value, _Tensor)]
            for tensor in inputs:
                _check_tensor("input", tensor.spec)
            if _is_graph(layer):
                return self.through_model(layer, _in_order(layer, args, kwargs), f"{path}{layer.name}/")
            output, bound = self._bounded(layer, args, kwargs, inputs, leaves)
            if not math.isfinite(output.bound):
                raise ValueError("its bound is not finite")
            if any(tensor.shape[0] != output.shape[0] for tensor in inputs):
                raise ValueError("it changes the number of examples in a batch")
        activation = activation_name(layer)
        kind = type(layer).__name__ + (f", {activation}" if activation not in ("", "linear") else "")
        value, method = bound or (None, "")
        self.rows.append(LayerRow(f"{path}{layer.name}", kind, value, output.bound, method))
        return [output]

    def _bounded(
        self, layer: Any, args: Any, kwargs: dict[str, Any], inputs: list[_Tensor], leaves: list[Any]
    ) -> tuple[_Tensor, LayerBound | None]:
        """Returns the output with its bound, and the bound of the layer itself if it has one input."""
        if not isinstance(layer, keras.layers.Layer):
            output = _output(layer, args, kwargs)
            bound_so_far = _bound_operation(layer, args, leaves, inputs, output)
            return dataclasses.replace(output, bound=bound_so_far), None
        kind = MERGING.get(keras_class(layer))
        if kind and len(inputs) == len(leaves):
            check_unchanged(layer)
            output = _output(layer, args, kwargs)
            return dataclasses.replace(output, bound=_combined(kind, layer, inputs, output)), None
        if len(inputs) != 1 or len(leaves) != 1:
            raise ValueError(
                f"no bound is known for {type(layer).__name__} with these inputs. {CAN_BE_BOUNDED}"
            )
        (source,) = inputs
        key = id(layer), source.shape
        if key not in self._known:
            self._known[key] = bound_layer(layer, source.shape)
        bound = self._known[key]
        output = _output(layer, args, kwargs)
        head = _head(layer, source)
        return dataclasses.replace(output, bound=source.bound * bound.value, head=head), bound


class _Refusal(ValueError):
    """Names the layer that cannot be bounded. The models around it do not add their names."""


@contextlib.contextmanager
def _naming(layer: Any, path: str) -> Iterator[None]:
    """Adds the name of a layer to any error about it."""
    try:
        yield
    except _Refusal:
        raise
    except Exception as error:  # attributes of a layer can hold anything
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        name, kind = f"{path}{layer.name}", type(layer).__name__
        raise _Refusal(f"layer {name!r} ({kind}) cannot be bounded: {one_line(reason)}") from error


def _trains_by_default(layer: Any) -> bool:
    """Returns whether a layer has training=True by default, which inference replaces."""
    parameters = inspect.signature(layer.call).parameters
    return "training" in parameters and parameters["training"].default is True


def _is_graph(layer: Any) -> bool:
    """Returns whether a layer is a Sequential or Functional model that calls its layers as Keras does."""
    base: Any = keras_class(layer)
    return base.__name__ in ("Sequential", "Functional") and type(layer).call is base.call


def _check_fit(graph: Any, inputs: Sequence[_Tensor]) -> None:
    """Raises ValueError if Keras would change the rank or the numbers of a model's inputs."""
    for symbol, tensor in zip(graph.inputs, inputs, strict=True):
        own, shape = tuple(symbol.shape), tensor.shape
        if len(own) != len(shape) or any(n not in (None, m) for n, m in zip(own[1:], shape[1:], strict=True)):
            raise ValueError(f"it is called on a tensor of shape {shape}, but its input has the shape {own}")
        _check_tensor("input", symbol)


def _check_tensor(which: str, spec: Any) -> None:
    """Raises ValueError if a tensor has no entries, or is not of floating point."""
    if 0 in spec.shape[1:]:
        raise ValueError(f"its {which} has no entries: shape {tuple(spec.shape)}")
    if not keras.backend.is_float_dtype(spec.dtype):
        raise ValueError(f"its {which} is {spec.dtype}; bounds hold for floating point")


def _in_order(model: Any, args: Any, kwargs: dict[str, Any]) -> list[_Tensor]:
    """Returns the arguments of a nested model in the order of its inputs."""
    inputs = keras.tree.flatten((args, kwargs))
    if not all(isinstance(value, _Tensor) for value in inputs) or len(inputs) != len(model.inputs):
        raise ValueError("it is not called on one tensor for each of its inputs")
    structure = (*args, *kwargs.values())
    paths = [_paths(value) for value in (structure[0], model.input)]
    if any(isinstance(key, str) for path in paths[0] + paths[1] for key in path) and paths[0] != paths[1]:
        raise ValueError("it is called on a dict, but its input has other keys, or another order of them")
    return inputs


def _paths(structure: Any) -> list[tuple[Any, ...]]:
    """Returns the keys and indices that lead to each leaf, in the order of Keras."""
    return [tuple(path) for path, _ in keras.tree.flatten_with_path(structure)]


def _output(layer: Any, args: Any, kwargs: dict[str, Any]) -> _Tensor:
    """Returns the output of a layer as Keras describes it, without a bound."""

    def spec_of(value: Any) -> Any:
        return value.spec if isinstance(value, _Tensor) else value

    args, kwargs = keras.tree.map_structure(spec_of, (args, kwargs))
    try:
        found = keras.tree.flatten(layer.compute_output_spec(*args, **kwargs))
    except Exception as error:  # a layer's code can raise anything
        raise ValueError(f"Keras cannot apply it to an input of this shape ({error})") from None
    if len(found) != 1 or None in found[0].shape[1:]:
        raise ValueError(f"its output is not one tensor of known size: {[spec.shape for spec in found]}")
    _check_tensor("output", found[0])
    return _Tensor(tuple(found[0].shape), math.nan, found[0])


def _combined(kind: str, layer: Any, inputs: list[_Tensor], output: _Tensor) -> float:
    """Returns the bound of the output of a layer or operation that merges its inputs."""
    if kind == "Concatenate":
        if layer.axis % len(output.shape) == 0:
            raise ValueError("it joins batches")
        return math.hypot(*(tensor.bound for tensor in inputs))
    stretches = _stretches(inputs, output)
    bounds = [tensor.bound * stretch for tensor, stretch in zip(inputs, stretches, strict=True)]
    if kind in ("Maximum", "Minimum"):  # a maximum moves by at most the largest movement
        return math.hypot(*bounds)
    return sum(bounds) / (len(bounds) if kind == "Average" else 1)


def _stretches(inputs: Sequence[_Tensor], output: _Tensor) -> list[float]:
    """Returns how much broadcasting stretches each input of an elementwise operation."""
    if any(len(tensor.shape) != len(output.shape) for tensor in inputs):
        raise ValueError("its inputs have different ranks")
    return [math.sqrt(output.size / tensor.size) for tensor in inputs]


def _bound_operation(
    operation: Any, args: Any, leaves: list[Any], inputs: list[_Tensor], output: _Tensor
) -> float:
    """Returns the bound of the output of a function of `keras.ops`, such as + between tensors."""
    kind = type(operation).__name__ if keras_class(operation) is type(operation) else ""
    constants = [value for value in leaves if not isinstance(value, _Tensor)]
    if kind in ARITHMETIC:
        constants = [real_values(value) for value in constants]
    if kind in ("Add", "Subtract", "Maximum", "Minimum") and len(leaves) == 2:
        return _combined(kind, operation, inputs, output)
    if kind == "Concatenate" and not constants:
        return _combined(kind, operation, inputs, output)
    if len(inputs) == 1 and not constants:
        (source,) = inputs
        if kind == "Reshape" and source.size != output.size:
            raise ValueError("it mixes the examples of a batch")
        if kind in ("Negative", "Reshape"):
            return source.bound
        slope = bound_activation(operation) if kind else None
        if slope is not None:
            return source.bound * slope
    if kind in ARITHMETIC and len(inputs) == len(constants) == 1:
        factor = np.abs(constants[0])
        (stretch,) = _stretches(inputs, output)
        if kind == "Multiply":
            return inputs[0].bound * stretch * float(factor.max())
        if isinstance(args[0], _Tensor):
            if not factor.all():
                raise ValueError("it divides by 0")
            return inputs[0].bound * stretch / float(factor.min())
    raise ValueError(f"no bound is known for the operation {type(operation).__name__}. {BOUNDED_OPERATIONS}")


def _head(layer: Any, source: _Tensor) -> Head | None:
    """Returns the `Dense` layer whose scaled output a layer returns, if there is one."""
    if activation_name(layer) not in ("", "linear"):
        return None
    if isinstance(layer, keras.layers.Dense) and len(source.shape) == 2:
        return Head(source.bound, real_values(layer.kernel))
    if source.head is None:
        return None
    if keras_class(layer) is layers.Rescaling and np.ndim(layer.scale) == 0:
        return source.head._replace(kernel=source.head.kernel * float(layer.scale))
    return source.head if keras_class(layer) in KEEPING_LOGITS else None
