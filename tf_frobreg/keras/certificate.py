"""Certified radii: how far an input can move without a change of the predicted class."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from tf_frobreg.backends import to_array
from tf_frobreg.checks import check_integer, check_number, holds_numbers, received
from tf_frobreg.convolution.layer import Shape
from tf_frobreg.keras.layer_bounds import WITHOUT_SOFTMAX, is_softmax, keras_class
from tf_frobreg.keras.lipschitz import ARITHMETIC, KEEPING_LOGITS, lipschitz_bound
from tf_frobreg.keras.lipschitz_report import Head, LipschitzBound
from tf_frobreg.keras.read_layers import flat_layers
from tf_frobreg.keras.trace import InputSize, input_names, input_specs

__all__ = ["certified_radius"]

# Times the spacing of numbers at the largest logit, the allowance for rounding in a margin.
ROUNDING_UNITS = 32
EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float64": 2.0**-52}
CHUNK = 2**22  # entries of the arrays that are computed at once
# After a softmax, they do not make logits of its probabilities.
AFTER_SOFTMAX = (*KEEPING_LOGITS, keras.layers.InputLayer, keras.layers.Rescaling, keras.layers.Reshape)


def certified_radius(
    model: keras.Model,
    x: Any,
    bound: LipschitzBound | float | None = None,
    input_size: InputSize | None = None,
    *,
    batch_size: int = 128,
) -> np.ndarray:
    """Returns the L2 radius around each image within which the predicted class cannot change.

    For logits f and predicted class i, the radius is the smallest (f_i − f_j)/L_ij over all other classes j.
    L_ij is a Lipschitz constant of f_i − f_j: √2·L, with L from `lipschitz_bound` (Tsuzuku et al. 2018). If
    the model ends in a `Dense` layer with columns w, L'·‖w_i − w_j‖₂ is smaller, with L' of the layers before
    it. A `Rescaling` of the logits changes nothing: margins and bounds scale alike.

    An image counts as certified at ε if its radius is above ε and its class is right.

    The radius holds for the model in exact arithmetic. The margins come from logits in the model's floating
    point type. An allowance of 32·2^−23 of the largest logit, 4e-6 of it, is subtracted from each margin in
    float32. It is not a bound: a ResNet-18 and 80 plain convolutions rounded logits by up to 1.2e-6 of the
    largest one. Radii near 0 are not reliable.

    Args:
        model: A built Sequential or Functional classifier whose output are logits, `(batch, classes)`.
        x: A batch of inputs, as `model.predict` accepts them. Arrays, also in a list or dict, must be finite.
        bound: What `lipschitz_bound(model)` returned, or a Lipschitz constant L of the model. None
            computes it. The kernels must not have changed since then. A constant must hold for the size of x.
        input_size: As in `lipschitz_bound`, if the model leaves its size open. None takes the size of x.
        batch_size: Images that are predicted at once.

    Returns:
        A float64 array of shape `(batch,)`, in units of the input. 0 if two classes are equally likely.

    Raises:
        ValueError: If the model ends in a softmax, does not return one matrix of at least two logits, or
            cannot be bounded. The shapes of x must be those of the model and of the bound. The numbers in x
            and the logits must be finite.
        TypeError: If an argument has the wrong type.

    Example:
        The identity decides between the two entries. Their difference is 1, so 1/√2 brings them together:

        >>> layer = keras.layers.Dense(2, kernel_initializer="identity")
        >>> model = keras.Sequential([keras.Input((2,)), layer])
        >>> print(certified_radius(model, np.array([[3.0, 2.0]])).round(4))
        [0.7071]
    """
    _check_logits(model)
    batch_size = check_integer("batch_size", batch_size)
    shapes = _shapes(model, x)
    if input_size is not None:
        sized = [tuple(spec.shape) for spec in input_specs(model, input_size)]
        _check_size(
            f"input_size must be the size of x. Received: {received('input_size', input_size)}", sized, shapes
        )
    if bound is None:
        bound = lipschitz_bound(model, _open_sizes(model, shapes) if input_size is None else input_size)
    if isinstance(bound, LipschitzBound):
        text = f"bound must be for the size of x. Received: a bound for {_as_text(bound.input_shapes)}"
        _check_size(text, bound.input_shapes, shapes)
    head = bound.head if isinstance(bound, LipschitzBound) else None
    constant = bound.value if isinstance(bound, LipschitzBound) else check_number("bound", bound)
    if any(shape[0] == 0 for shape in shapes):
        return np.zeros(0)
    try:
        found = model.predict(x, batch_size=batch_size, verbose=0)
    except UnboundLocalError:  # Keras found no batch
        raise ValueError(f"x must hold at least one batch. Received: {received('x', x)}") from None
    logits = np.asarray(to_array(keras.tree.flatten(found)[0]))
    logits = logits.astype(np.float64)
    if not np.isfinite(logits).all():
        raise ValueError("the logits of the model must be finite. Received: NaN or infinity in them")
    if head is not None and head.kernel.shape[1] != logits.shape[1]:
        raise ValueError(
            f"bound must belong to the model. Received: a bound of {head.kernel.shape[1]} classes for "
            f"{logits.shape[1]} logits"
        )
    chunk = max(CHUNK // logits.shape[1], 1)
    constants = _constants(constant, head, logits.shape[1])
    epsilon = max(EPSILON.get(layer.compute_dtype, 2.0**-23) for layer in flat_layers(model))
    parts = [
        _radii(logits[start : start + chunk], constants, epsilon) for start in range(0, len(logits), chunk)
    ]
    return np.concatenate([np.zeros(0), *parts])


def _check_logits(model: Any) -> None:
    """Raises an error if a model does not return one matrix of logits."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a Keras model. Received: {received('model', model)}")
    outputs = getattr(model, "outputs", None)
    if not outputs:
        raise ValueError("model must be a built Sequential or Functional model, whose outputs are known")
    if len(outputs) != 1 or len(outputs[0].shape) != 2:
        shapes = [tuple(output.shape) for output in outputs]
        raise ValueError(f"model must return one matrix of logits, (batch, classes). Received: {shapes}")
    if outputs[0].shape[1] is not None and outputs[0].shape[1] < 2:
        raise ValueError(
            f"model must return logits of at least two classes. Received: output shape {outputs[0].shape}"
        )
    for layer in _from_the_end(model):
        if is_softmax(layer):
            raise ValueError(f"model ends in a softmax, in {layer.name!r}; {WITHOUT_SOFTMAX}")
        if keras_class(layer) not in AFTER_SOFTMAX and type(layer).__name__ not in ARITHMETIC:
            break


def _from_the_end(model: Any) -> Iterator[Any]:
    """Yields the layers and operations of a model from its last one, as far as each has one input."""
    tensor = model.outputs[0]
    while tensor is not None:
        operation, index, _ = tensor._keras_history
        if isinstance(operation, keras.Model) and getattr(operation, "outputs", None):
            yield from _from_the_end(operation)
        else:
            yield operation
        sources = operation._inbound_nodes[index].input_tensors
        tensor = sources[0] if len(sources) == 1 else None


def _shapes(model: Any, x: Any) -> list[Shape]:
    """Returns the shapes of the inputs in x, in the model's order, with None for what is not known.

    Raises:
        ValueError: If x does not suit the model, or an array holds NaN or infinity.
        TypeError: If x is no array, list or dict of arrays, dataset or generator.
    """
    wanted = [tuple(tensor.shape) for tensor in model.inputs]
    text = f"x must be a batch of shape {_as_text(wanted)}"
    spec = getattr(x, "element_spec", None)  # of a dataset of TensorFlow
    tensors = _tensors(model, x if spec is None else spec[0] if isinstance(spec, tuple) else spec)
    if tensors is None:
        if isinstance(x, (Iterable, keras.utils.PyDataset)) and not isinstance(x, (str, bytes, Mapping)):
            return wanted
        raise TypeError(f"{text}. Received: {received('x', x)}")
    if not all(hasattr(tensor, "shape") for tensor in tensors):
        raise TypeError(f"{text}. Received: {received('x', x)}")
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(shapes) != len(wanted) or not all(map(_fits, shapes, wanted)):
        raise ValueError(f"{text}. Received: shape {_as_text(shapes)}")
    for tensor, symbol in zip(tensors, model.inputs, strict=True) if spec is None else ():
        values = to_array(tensor)
        if not holds_numbers(values):
            raise TypeError(f"x must hold real numbers. Received: {values.dtype}")
        with np.errstate(over="ignore"):  # it overflows in the model too
            if not np.isfinite(values.astype(symbol.dtype)).all():
                raise ValueError(f"x must be finite in {symbol.dtype}. Received: NaN or infinity in it")
    return shapes


def _tensors(model: Any, x: Any) -> list[Any] | None:
    """Returns the arrays in x, in the order of the model's inputs. None if x is none and holds none."""
    if hasattr(x, "shape"):
        return [x]
    names = input_names(model)
    if isinstance(x, Mapping) and set(x) >= set(names):
        return [x[name] for name in names]
    return keras.tree.flatten(x) if isinstance(x, (list, tuple)) else None


def _fits(shape: Shape, wanted: Shape) -> bool:
    """Returns whether two shapes are equal, apart from the batch and from numbers that are not known."""
    pairs = zip(shape[1:], wanted[1:], strict=False)
    return len(shape) == len(wanted) and all(None in pair or pair[0] == pair[1] for pair in pairs)


def _check_size(text: str, wanted: Sequence[Shape], shapes: Sequence[Shape]) -> None:
    """Raises ValueError if the examples in x do not have exactly these shapes."""
    if [shape[1:] for shape in wanted] != [shape[1:] for shape in shapes]:
        raise ValueError(f"{text} and x of shape {_as_text(shapes)}")


def _open_sizes(model: Any, shapes: Sequence[Shape]) -> dict[str, tuple[int, ...]] | None:
    """Returns the sizes of x where the model leaves its own open, by the names of inputs."""
    sizes = {}
    for name, tensor, shape in zip(input_names(model), model.inputs, shapes, strict=True):
        size = [n for n, own in zip(shape[1:], tensor.shape[1:], strict=True) if own is None]
        if size and None not in size:
            sizes[name] = tuple(int(n) for n in size if n is not None)
    return sizes or None


def _as_text(shapes: Sequence[Shape]) -> str:
    return " and ".join(map(str, shapes))


def _constants(constant: float, head: Head | None, classes: int) -> np.ndarray:
    """Returns L_ij, `(classes, classes)`."""
    whole = np.full((classes, classes), np.sqrt(2.0) * constant)
    if head is None:
        return whole
    kernel = head.kernel.T
    differences = np.array([np.linalg.norm(kernel - column, axis=1) for column in kernel])
    return np.minimum(whole, head.bound * differences * (1 + 1e-12))


def _radii(logits: np.ndarray, constants: np.ndarray, epsilon: float) -> np.ndarray:
    """Returns the radius of each row."""
    rows = np.arange(len(logits))
    best = logits.argmax(axis=1)
    margins = logits[rows, best][:, None] - logits
    margins = margins - ROUNDING_UNITS * epsilon * np.abs(logits).max(axis=1, keepdims=True)
    margins = np.maximum(margins, 0.0)
    limits = constants[best]
    with np.errstate(divide="ignore", invalid="ignore"):  # a constant difference of logits never changes
        radii = np.where(margins > 0, margins / limits, 0.0)
    radii[rows, best] = np.inf
    return radii.min(axis=1)
