"""Follows one call of a model without data, and notes the shapes that its layers see."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tf_frobreg.checks import check_integer, entries_of, enumeration, received
from tf_frobreg.convolution.geometry import Size, check_size
from tf_frobreg.convolution.layer import Shape, image_sizes

InputSize = Size | Mapping[str, Size]  # one size for all inputs, or one per name of an input or a layer


# Sizes in place of an open axis. JAX and PyTorch need numbers. An axis of a layer that differs is open too.
STAND_INS = (224, 448)


class Trace(NamedTuple):
    """What the layers of a model see when the model is called on its inputs.

    Attributes:
        shapes: The shapes of each layer's first input, in the order of the calls, by the layer's id.
        problem: Why the model could not be followed, or None.
        names: The names of the model's inputs.
        source: Where the sizes come from: "own" for the model's own inputs or a given size, "call" for a call
            of an open model in another model, "build" for what the model was built for.
    """

    shapes: dict[int, list[Shape]]
    problem: str | None
    names: tuple[str, ...]
    source: str = "own"


class _Call(NamedTuple):
    """The arguments of one call of a model, with a `KerasTensor` in place of each tensor."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def map(self, function: Callable[[str, Any], Any]) -> "_Call":
        """Applies a function of name and tensor to every tensor."""
        names = iter(self.names)

        def mapped(value: Any) -> Any:
            return function(next(names), value) if isinstance(value, keras.KerasTensor) else value

        return _Call(*keras.tree.map_structure(mapped, (self.args, self.kwargs)))

    def filled(self, size: int) -> "_Call":
        """Returns the call with a number in place of each axis that has none."""
        return self.map(
            lambda name, spec: keras.KerasTensor([n or size for n in spec.shape], spec.dtype, name=name)
        )

    @property
    def names(self) -> list[str]:
        """A name for each tensor: its key in a dict, the name of its argument, or its own name."""
        found = []
        for path, value in keras.tree.flatten_with_path((self.args, self.kwargs)):
            if isinstance(value, keras.KerasTensor):
                keys = [key for key in path if isinstance(key, str)]
                found.append(keys[-1] if keys else value.name)
        return found

    @property
    def tensors(self) -> list[Any]:
        """The tensors."""
        flat = keras.tree.flatten((self.args, self.kwargs))
        return [value for value in flat if isinstance(value, keras.KerasTensor)]

    @property
    def is_open(self) -> bool:
        """Whether an axis other than the batch has no size."""
        return any(None in tensor.shape[1:] for tensor in self.tensors)


def trace_model(
    model: keras.layers.Layer, layers: Sequence[keras.layers.Layer], input_size: InputSize | None
) -> Trace:
    """Calls a built model on its inputs without data. Returns the shapes that these layers see.

    A Functional or Sequential model is called on its own inputs, any other model or layer as it was called in
    a Functional model, or on the shapes that it was built for. Layers that the call does not reach are looked
    for in a call with `training=True`. What is still unknown then is looked for in a call on zeros.

    Args:
        model: The model or layer.
        layers: Convolution and Dense layers in it.
        input_size: Size of the input images. A dict maps names of inputs to sizes; other names are ignored.

    Returns:
        The shapes, and why the model could not be followed, if so.

    Raises:
        ValueError: If `input_size` does not suit the model. The message says why.
    """
    own, used = _own_call(model), _calls_elsewhere(model)
    source = "own" if own or getattr(model, "_inbound_nodes", None) else "build"
    names = tuple(dict.fromkeys(name for call in own or used for name in call.names))
    if isinstance(input_size, Mapping):
        given = {name: input_size[name] for name in names if name in input_size}
    else:
        given = dict.fromkeys(names, input_size) if input_size is not None else {}
    calls = own or used
    if given and input_size is not None:
        _check_changeable(model, own, input_size)
        calls = [calls[0].map(lambda name, tensor: _resized(model, name, tensor, given))]
        source = "own"
    elif own and own[0].is_open:  # perhaps another model calls it on inputs of fixed size
        calls = [call for call in used if not call.is_open] or own
        source = "call"
    if not calls and input_size is not None and not isinstance(input_size, Mapping):
        raise ValueError(
            "input_size needs a model whose inputs are known: call it once on an image, or give a dict of "
            f"sizes by the names of layers. Received: {received('input_size', input_size)}"
        )
    problem = None if calls else "its inputs are not known"
    shapes: dict[int, list[Shape]] = {}
    for attempt in (_without_data, _in_training, _on_zeros):
        missing = [layer for layer in layers if _is_missing(layer, shapes)]
        if not missing or not calls:
            break
        if attempt is _on_zeros and any(call.is_open for call in calls):
            break  # a model of open size cannot be called on zeros
        found, cause = _shapes_in(attempt, model, calls, missing)
        problem = cause and (problem or cause)
        shapes |= found
    if problem is not None and given:
        raise ValueError(
            f"input_size must suit the model, which fails on such images ({problem}). "
            f"Received: {received('input_size', input_size)}"
        )
    return Trace(shapes, problem, names, source)


def input_specs(model: keras.layers.Layer, input_size: InputSize | None) -> list[keras.KerasTensor]:
    """Returns the inputs of a built Functional or Sequential model, with every size, in the model's order.

    Args:
        model: The model.
        input_size: Size of the input images, if the model leaves it open. A dict gives sizes by the names of
            inputs.

    Returns:
        The inputs.

    Raises:
        ValueError: If a size is missing, or `input_size` does not suit the model.
    """
    (call,) = own = _own_call(model)
    names = call.names
    if isinstance(input_size, Mapping):
        for name in input_size:
            if name not in names:
                raise ValueError(
                    f"input_size must have names of inputs, {enumeration(names)}. "
                    f"Received: {received('input_size', input_size)}"
                )
    if input_size is not None:
        _check_changeable(model, own, input_size)
        given = input_size if isinstance(input_size, Mapping) else dict.fromkeys(names, input_size)
        call = call.map(lambda name, tensor: _resized(model, name, tensor, given))
    if call.is_open:
        raise ValueError(
            f"input_size must be given for a model that leaves the size of its inputs open: {names}. "
            f"Received: {received('input_size', input_size)}"
        )
    return call.tensors


def input_names(model: keras.layers.Layer) -> list[str]:
    """Returns a name for each input of a built Functional or Sequential model, in the model's order."""
    (call,) = _own_call(model)
    return call.names


def _shapes_in(
    attempt: Callable[[keras.layers.Layer, _Call], None],
    model: keras.layers.Layer,
    calls: Sequence[_Call],
    layers: Sequence[keras.layers.Layer],
) -> tuple[dict[int, list[Shape]], str | None]:
    """Returns the shapes that layers see in calls of a model, and why a call failed, if so."""
    if keras.config.backend() != "tensorflow" and any(call.is_open for call in calls):
        (first, cause), (second, other_cause) = (
            _shapes_in(attempt, model, [call.filled(n) for call in calls], layers) for n in STAND_INS
        )
        return {key: _common(first[key], second.get(key, [])) for key in first}, cause or other_cause
    problem = None
    with _noted_shapes(layers) as found:
        try:
            for call in calls:
                attempt(model, call)
        except Exception as error:  # a model's code can raise anything
            problem = _cause(error)
    return found, problem


def _common(first: Sequence[Shape], second: Sequence[Shape]) -> list[Shape]:
    """Returns the shapes of two equal calls with None in place of numbers that differ."""
    pairs = zip(first, second, strict=False)
    return [tuple(n if n == m else None for n, m in zip(*shapes, strict=True)) for shapes in pairs]


def _cause(error: Exception) -> str:
    """Returns the cause in Keras' nested messages, on one line and without colours."""
    text = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())
    text = text.rpartition("Error encountered: ")[2]
    text = re.sub(r"^Exception encountered when calling \S+ ", "", text)
    return text.partition(" Arguments received by")[0][:200] or type(error).__name__


def _is_missing(layer: keras.layers.Layer, shapes: Mapping[int, Sequence[Shape]]) -> bool:
    """Returns whether the size of a layer's images is not known yet."""
    sizes = image_sizes(layer, shapes.get(id(layer), ()))
    return layer.built and (id(layer) not in shapes or any(None in size for size in sizes))


class _Caller(keras.Operation):
    """Calls a model. Keras follows operations without data, in a scope in which no variable changes."""

    def __init__(self, model: keras.layers.Layer, training: bool) -> None:
        super().__init__()
        self._model, self._training = model, training

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, training=self._training, **kwargs)


def _without_data(model: keras.layers.Layer, call: _Call, training: bool = False) -> None:
    _Caller(model, training).compute_output_spec(*call.args, **call.kwargs)


def _in_training(model: keras.layers.Layer, call: _Call) -> None:
    _without_data(model, call, training=True)


def _on_zeros(model: keras.layers.Layer, call: _Call) -> None:
    """Calls the model on zeros. What TensorFlow has compiled is run as plain Python, which can be noted."""
    zeros = call.filled(1).map(lambda _, spec: keras.ops.zeros(spec.shape, spec.dtype))
    eagerly = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        with keras.StatelessScope():
            model(*zeros.args, training=False, **zeros.kwargs)
    finally:
        tf.config.run_functions_eagerly(eagerly)


def _own_call(model: keras.layers.Layer) -> list[_Call]:
    """Returns the call of a Functional or Sequential model on its own inputs."""
    inputs = getattr(model, "inputs", None)
    if not inputs:
        return []
    return [_Call((inputs[0] if isinstance(model, keras.Sequential) else model.input,), {})]


def _calls_elsewhere(model: keras.layers.Layer) -> list[_Call]:
    """Returns the calls of a model or layer in Functional models, or else the one that built it."""
    arguments = [node.arguments for node in getattr(model, "_inbound_nodes", ())]
    return [_Call(call.args, call.kwargs) for call in arguments] or _as_built(model)


def _as_built(model: keras.layers.Layer) -> list[_Call]:
    """Returns the call that a model was built with, if Keras has recorded it."""
    config = model.get_build_config() or {}
    by_argument = config.get("shapes_dict") or {}
    if "input_shape" in config:
        structure = _specs(config["input_shape"], model.input_dtype)
        return [] if structure is None else [_Call((structure,), {})]
    kwargs = {
        name.removesuffix("_shape"): _specs(shape, model.input_dtype) for name, shape in by_argument.items()
    }
    return [_Call((), kwargs)] if kwargs and None not in kwargs.values() else []


def _specs(shape: Any, dtype: str) -> Any:
    """Returns `KerasTensor`s in the structure of these shapes, or None if they are no shapes."""
    if isinstance(shape, Mapping):
        return {name: _specs(part, dtype) for name, part in shape.items()}
    if not isinstance(shape, (list, tuple)):
        return None
    if all(n is None or isinstance(n, int) for n in shape):
        return keras.KerasTensor(tuple(shape), dtype=dtype)
    return [_specs(part, dtype) for part in shape]


def is_size(given: Size, size: Sequence[int | None]) -> bool:
    """Returns whether a given size, one int for all axes or one per axis, is this size."""
    return _sizes(given, len(size)) == list(size)


def check_input_size(input_size: Any) -> InputSize | None:
    """Returns a size of input images, a dict of sizes by name or None, or raises an error."""
    if isinstance(input_size, Mapping):
        for name, size in input_size.items():
            if not isinstance(name, str):
                raise TypeError(
                    "input_size must have names of inputs or layers as its keys. "
                    f"Received: {received('input_size', input_size)}"
                )
            check_size("input_size", size)
    elif input_size is not None:
        check_size("input_size", input_size)
    return input_size


def _sizes(given: Any, rank: int) -> list[int]:
    """Returns a given size as one int per axis."""
    entries = entries_of(given)
    return [check_integer("input_size", n) for n in ([given] * rank if entries is None else entries)]


def _check_changeable(model: keras.layers.Layer, own: Sequence[_Call], input_size: InputSize) -> None:
    """Checks that no input of a Functional model has another fixed size than the given one.

    One size for all inputs fills the open ones if there are any. Otherwise it must be that of all images.

    Raises:
        ValueError: If an input has another fixed size.
    """
    inputs = [
        (name, tensor.shape) for call in own for name, tensor in zip(call.names, call.tensors, strict=True)
    ]
    if not isinstance(input_size, Mapping):
        if any(call.is_open for call in own):
            return
        inputs = [(name, shape) for name, shape in inputs if len(shape) > 2] or inputs
    for name, shape in inputs:
        given = input_size.get(name) if isinstance(input_size, Mapping) else input_size
        if given is None or None in shape[1:]:
            continue
        size = [shape[axis] for axis in _image_axes(model, shape)]
        if not size or not is_size(given, size):
            raise ValueError(
                "input_size goes with a model that leaves the size of its images open; the input "
                f"{name!r} has the fixed shape {tuple(shape)}. "
                f"Received: {received('input_size', input_size)}"
            )


def _image_axes(model: keras.layers.Layer, shape: Sequence[int | None]) -> list[int]:
    """Returns the axes of an input that are not batch and channels."""
    first = getattr(model, "data_format", keras.config.image_data_format()) == "channels_first"
    return list(range(2, len(shape)) if first else range(1, len(shape) - 1))


def _resized(model: keras.layers.Layer, name: str, spec: Any, given: Mapping[str, Size]) -> Any:
    """Returns an input with the size that was given for it.

    The size fills the open axes of a Functional model's input, and may repeat the others. The input of any
    other model or layer has no fixed size: there it replaces all axes of the image.

    Raises:
        ValueError: If the number of axes differs.
    """
    shape = tuple(spec.shape)
    if name not in given:
        return spec
    image = _image_axes(model, shape)
    is_free = not getattr(model, "inputs", None) and len(shape) > 2
    axes = image if is_free else [axis for axis, n in enumerate(shape) if n is None and axis > 0]
    sizes: Any = given[name]
    values = _sizes(sizes, len(axes))
    if len(values) == len(image) and all(
        shape[axis] in (None, n) for axis, n in zip(image, values, strict=True)
    ):
        axes = image  # a size for each axis, which repeats those that are not open
    if axes and len(values) != len(axes):
        raise ValueError(
            f"input_size must be an int or {len(axes)} ints for the input {name!r} of shape {shape}. "
            f"Received: {received('input_size', sizes)}"
        )
    by_axis = dict(zip(axes, values, strict=False))  # an input without open axes takes no size
    filled = [by_axis.get(axis, n) for axis, n in enumerate(shape)]
    return keras.KerasTensor(filled, dtype=spec.dtype, name=name)


@contextlib.contextmanager
def _noted_shapes(layers: Sequence[keras.layers.Layer]) -> Iterator[dict[int, list[Shape]]]:
    """Notes the shape of the first input at every call of the layers, by the layer's id.

    Keras has no public hook that sees a layer's inputs. Its hooks (activity regularizers, masks) see outputs,
    which leave the input size open if there are strides. So a function on each layer hides the method `call`
    of its class until the context ends.

    Yields:
        The shapes, filled while the context lasts.
    """
    shapes: dict[int, list[Shape]] = {}

    def noting(layer: keras.layers.Layer) -> Callable[..., Any]:
        call = layer.call

        def note_and_call(*arguments: Any, **options: Any) -> Any:
            first: Any = next(iter((*arguments, *options.values())), None)
            if hasattr(first, "shape"):
                shapes.setdefault(id(layer), []).append(tuple(first.shape))
            return call(*arguments, **options)

        return note_and_call

    for layer in layers:
        vars(layer)["call"] = noting(layer)  # Keras would track what is set as an attribute
    try:
        yield shapes
    finally:
        for layer in layers:
            del vars(layer)["call"]
