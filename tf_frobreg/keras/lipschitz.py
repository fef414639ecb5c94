"""An upper bound of a model's Lipschitz constant, from bounds of its layers."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from tf_frobreg.backends import to_array
from tf_frobreg.checks import received
from tf_frobreg.keras.layer_bounds import (
    CAN_BE_BOUNDED,
    SLOPES,
    LayerBound,
    activation_name,
    bound_layer,
)
from tf_frobreg.keras.lipschitz_report import Head, LayerRow, LipschitzBound
from tf_frobreg.keras.read_layers import check_model
from tf_frobreg.keras.trace import InputSize, input_specs
from tf_frobreg.text import one_line

__all__ = ["lipschitz_bound"]

MERGING = ("Add", "Subtract", "Average", "Concatenate", "Maximum", "Minimum")
# Layers without training that leave the differences of logits as they are.
KEEPING_LOGITS = ("Identity", "Dropout", "ActivityRegularization", "Activation", "Flatten")
SLOPED_OPERATIONS = ("Relu", "Relu6", "Tanh", "Sigmoid", "Softplus", "Softsign")


def lipschitz_bound(model: keras.layers.Layer, input_size: InputSize | None = None) -> LipschitzBound:
    """Returns an upper bound of a model's Lipschitz constant in the L2 norm, in inference.

    If x and y are two inputs, ‖f(x) − f(y)‖₂ ≤ L·‖x − y‖₂. Each norm runs over one example: all pixels and
    channels, and all inputs or outputs if there are several. L is at least the true constant, and in deep
    networks far above it: the bounds of the layers are multiplied along the model, and added where branches
    meet.

    The bound holds in exact arithmetic, for these reasons:

    - σmax of a kernel is bounded from above. It is computed from all singular values of M, or M is a part of
      the matrix of a layer on a slightly larger torus, or the peak of the symbol over all frequencies is
      bounded. See the column "σmax by". An allowance for float64 rounding, about 1e-12 to 1e-10, is added.
    - The slope of an activation, γ/√(variance + ε) of `BatchNormalization`, and the norms of pooling are
      formulas. Average pooling has the exact σmax, with the border as Keras treats it.
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
            or a size is missing. The message names the layer.

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
        outputs = walk.through_model(model, inputs, "")
    except _Refusal as error:
        raise ValueError(str(error)) from None
    value = math.hypot(*(tensor.bound for tensor in outputs))
    head = outputs[0].head if len(outputs) == 1 else None
    return LipschitzBound(value, walk.rows, head)


class _Tensor(NamedTuple):
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
        if isinstance(model, keras.Sequential):
            tensors = list(inputs)
            for layer in model.layers:
                tensors = self._call(layer, (tensors[0],), {}, path)
            return tensors
        found = {id(symbol): tensor for symbol, tensor in zip(model.inputs, inputs, strict=True)}

        def known(value: Any) -> Any:
            return found[id(value)] if isinstance(value, keras.KerasTensor) else value

        # Keras has no public list of the calls in a model.
        for depth in sorted(model._nodes_by_depth, reverse=True):
            for node in model._nodes_by_depth[depth]:
                if node.is_input:
                    continue
                args, kwargs = keras.tree.map_structure(known, (node.arguments.args, node.arguments.kwargs))
                outputs = self._call(node.operation, args, kwargs, path)
                found |= {id(key): value for key, value in zip(node.output_tensors, outputs, strict=True)}
        return [found[id(symbol)] for symbol in model.outputs]

    def _call(self, layer: Any, args: Any, kwargs: dict[str, Any], path: str) -> list[_Tensor]:
        """Returns the outputs of one call of a layer, a model or an operation."""
        name, kind = f"{path}{layer.name}", type(layer).__name__
        try:
            if kwargs.get("training"):
                raise ValueError("it is called with training=True")
            kwargs = {key: value for key, value in kwargs.items() if key != "training" and value is not None}
            inputs = [value for value in _flat((args, kwargs)) if isinstance(value, _Tensor)]
            if _is_graph(layer):
                return self.through_model(layer, _in_order(layer, args, inputs), f"{name}/")
            output, bound = self._bounded(layer, args, kwargs, inputs)
            if not math.isfinite(output.bound):
                raise ValueError("its bound is not finite")
        except _Refusal:
            raise
        except ValueError as error:
            raise _Refusal(f"layer {name!r} ({kind}) cannot be bounded: {one_line(error)}") from None
        activation = activation_name(layer)
        kind += f", {activation}" if activation not in ("", "linear") else ""
        value, method = bound or (None, "")
        self.rows.append(LayerRow(name, kind, value, output.bound, method))
        return [output]

    def _bounded(
        self, layer: Any, args: Any, kwargs: dict[str, Any], inputs: list[_Tensor]
    ) -> tuple[_Tensor, LayerBound | None]:
        """Returns the output with its bound, and the bound of the layer itself if it has one input."""
        kind = type(layer).__name__
        if not isinstance(layer, keras.layers.Layer):
            output = _output(layer, args, kwargs)
            return output._replace(bound=_bound_operation(layer, args, inputs, output)), None
        if kind in MERGING and isinstance(layer, getattr(keras.layers, kind)):
            output = _output(layer, args, kwargs)
            return output._replace(bound=_bound_merge(kind, layer, inputs, output)), None
        if len(inputs) != 1 or len(_flat(args)) != 1:
            raise ValueError(f"no bound is known for {kind} with these inputs. {CAN_BE_BOUNDED}")
        (source,) = inputs
        key = id(layer), source.shape
        if key not in self._known:
            self._known[key] = bound_layer(layer, source.shape)
        bound = self._known[key]
        output = _output(layer, args, kwargs)
        return output._replace(bound=source.bound * bound.value, head=_head(layer, source)), bound


class _Refusal(ValueError):
    """Names the layer that cannot be bounded. The models around it do not add their names."""


def _is_graph(layer: Any) -> bool:
    """Returns whether a layer is a Sequential or Functional model that calls its layers as Keras does."""
    bases: list[Any] = [base for base in type(layer).__mro__ if base.__name__ in ("Sequential", "Functional")]
    bases = [base for base in bases if base.__module__.startswith("keras.")]
    return bool(bases) and type(layer).call is bases[0].call


def _flat(structure: Any) -> list[Any]:
    """Returns the leaves of lists and dicts. A `_Tensor` is a leaf."""
    if isinstance(structure, dict):
        return [leaf for key in sorted(structure) for leaf in _flat(structure[key])]
    if isinstance(structure, (list, tuple)) and not isinstance(structure, _Tensor):
        return [leaf for part in structure for leaf in _flat(part)]
    return [structure]


def _in_order(model: Any, args: Any, inputs: list[_Tensor]) -> list[_Tensor]:
    """Returns the arguments of a nested model in the order of its inputs."""
    structure = args[0] if len(args) == 1 else None
    expected = getattr(model, "input", None)
    if isinstance(structure, dict) and not (isinstance(expected, dict) and set(expected) == set(structure)):
        raise ValueError("it is called on a dict, but has no dict of the same keys as its input")
    if len(inputs) != len(_flat(args)) or len(inputs) != len(model.inputs or ()):
        raise ValueError("it is not called on one tensor for each of its inputs")
    return inputs


def _output(layer: Any, args: Any, kwargs: dict[str, Any]) -> _Tensor:
    """Returns the output of a layer as Keras describes it, without a bound."""

    def specs(value: Any) -> Any:
        if isinstance(value, _Tensor):
            return value.spec
        if isinstance(value, dict):
            return {key: specs(part) for key, part in value.items()}
        return type(value)(map(specs, value)) if type(value) in (list, tuple) else value

    try:
        found = keras.tree.flatten(layer.compute_output_spec(*specs(tuple(args)), **specs(kwargs)))
    except Exception as error:  # a layer's code can raise anything
        raise ValueError(f"Keras cannot apply it to an input of this shape ({error})") from None
    if len(found) != 1 or None in found[0].shape[1:]:
        raise ValueError(f"its output is not one tensor of known size: {[spec.shape for spec in found]}")
    return _Tensor(tuple(found[0].shape), math.nan, found[0])


def _stretches(inputs: Sequence[_Tensor], output: _Tensor) -> list[float]:
    """Returns how much broadcasting stretches each input of an elementwise operation."""
    if any(len(tensor.shape) != len(output.shape) for tensor in inputs):
        raise ValueError("its inputs have different ranks")
    return [math.sqrt(output.size / tensor.size) for tensor in inputs]


def _bound_merge(kind: str, layer: Any, inputs: list[_Tensor], output: _Tensor) -> float:
    """Returns the bound of the output of a layer that merges its inputs."""
    if type(layer).call is not getattr(keras.layers, kind).call:
        raise ValueError(f"its class, {kind}, overrides call")
    if kind == "Concatenate":
        if layer.axis % len(output.shape) == 0:
            raise ValueError("it joins batches")
        return math.hypot(*(tensor.bound for tensor in inputs))
    return _combined(kind, inputs, output)


def _combined(kind: str, inputs: list[_Tensor], output: _Tensor) -> float:
    stretches = _stretches(inputs, output)
    bounds = [tensor.bound * stretch for tensor, stretch in zip(inputs, stretches, strict=True)]
    if kind in ("Maximum", "Minimum"):  # a maximum moves by at most the largest movement
        return math.hypot(*bounds)
    return sum(bounds) / (len(bounds) if kind == "Average" else 1)


def _bound_operation(operation: Any, args: Any, inputs: list[_Tensor], output: _Tensor) -> float:
    """Returns the bound of the output of a function of `keras.ops`, such as + between tensors."""
    kind = type(operation).__name__
    constants = [value for value in _flat(args) if not isinstance(value, _Tensor)]
    if not type(operation).__module__.startswith("keras."):
        kind = ""
    if kind in ("Add", "Subtract", "Maximum", "Minimum") and len(inputs) + len(constants) == 2:
        return _combined(kind, inputs, output)
    if kind in SLOPED_OPERATIONS and len(inputs) == 1 and not constants:
        return inputs[0].bound * SLOPES[kind.lower()]
    if kind == "Negative" and not constants:
        return inputs[0].bound
    is_factor = kind == "Multiply" or (kind == "TrueDivide" and isinstance(args[0], _Tensor))
    if is_factor and len(inputs) == len(constants) == 1:
        factor = np.abs(np.asarray(to_array(constants[0]), dtype=np.float64))
        (stretch,) = _stretches(inputs, output)
        return inputs[0].bound * stretch * float(np.max(factor if kind == "Multiply" else 1 / factor))
    raise ValueError(f"no bound is known for the operation {type(operation).__name__}. {CAN_BE_BOUNDED}")


def _head(layer: Any, source: _Tensor) -> Head | None:
    """Returns the `Dense` layer whose scaled output a layer returns, if there is one."""
    if activation_name(layer) not in ("", "linear"):
        return None
    if isinstance(layer, keras.layers.Dense) and len(source.shape) == 2:
        return Head(source.bound, np.asarray(to_array(layer.kernel)).astype(np.float64))
    if source.head is None:
        return None
    if type(layer) is keras.layers.Rescaling and np.ndim(layer.scale) == 0:
        return source.head._replace(kernel=source.head.kernel * float(layer.scale))
    kept = type(layer).__name__ in KEEPING_LOGITS and type(layer).__module__.startswith("keras.")
    return source.head if kept else None
