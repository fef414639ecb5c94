"""Reads Keras layers: which kernels a model has, and how each layer applies its kernels."""

import contextlib
import dataclasses
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import keras
import numpy as np
import tensorflow as tf

from tf_frobreg.checks import check_integer
from tf_frobreg.convolution.geometry import Convolution, Size

CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
TRANSPOSED = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)
DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
KNOWN = (*CONVOLUTIONS, *TRANSPOSED, *DEPTHWISE, *SEPARABLE, keras.layers.Dense)

Shape = tuple[int | None, ...]


class LayerKernel(NamedTuple):
    """One kernel of a layer.

    Attributes:
        name: Name of the layer, or its path if the name is not unique. A separable convolution has two
            kernels, "<layer>/depthwise" and "<layer>/pointwise".
        layer: The layer.
        attribute: Name of the layer's attribute that holds the kernel.
        regularizer: Name of the layer's attribute that holds the regularizer of the kernel.
        conv: How the layer applies the kernel.
        other_sizes: Other image sizes that a shared layer is applied to, as far as they are known.
    """

    name: str
    layer: keras.layers.Layer
    attribute: str
    regularizer: str
    conv: Convolution
    other_sizes: tuple[Shape, ...] = ()

    @property
    def variable(self) -> Any:
        """The Keras variable that holds the kernel. None with LoRA.

        With LoRA the kernel is the sum of a frozen variable and a product of two others.
        """
        return None if getattr(self.layer, "lora_enabled", False) else getattr(self.layer, self.attribute)

    @property
    def value(self) -> np.ndarray:
        """The kernel that the layer applies (with LoRA, the sum), in float32 or float64."""
        value = tf.convert_to_tensor(getattr(self.layer, self.attribute))
        return (value if value.dtype == tf.float64 else tf.cast(value, tf.float32)).numpy()

    def reason_to_skip(self, *, dtypes: Sequence[str] | None = None) -> str | None:
        """Returns why the kernel cannot be regularized, or None.

        Args:
            dtypes: The accepted dtypes of the kernel. None accepts all.

        Returns:
            The reason. If there is none, `variable` is a variable of an accepted dtype.
        """
        variable = self.variable
        if variable is None:
            return "LoRA is enabled: its kernel is frozen"
        if dtypes is not None and variable.dtype not in dtypes:
            return f"its kernel is {variable.dtype}"
        return None

    def with_padding(self, padding: str | None) -> Self:
        """Returns this kernel with another border, or raises an error that names the layer."""
        if padding is None:
            return self
        with self.naming_errors():
            return self._replace(conv=dataclasses.replace(self.conv, padding=padding))

    @contextlib.contextmanager
    def naming_errors(self) -> Iterator[None]:
        """Adds the kernel's name to an error about an argument."""
        try:
            yield
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}, for layer {self.name!r}") from None


class UntreatedLayer(NamedTuple):
    """A layer that has a matrix, and why the package cannot treat it.

    Attributes:
        name: Name of the layer, as in `LayerKernel`.
        layer: The layer.
        reason: Why the layer cannot be treated.
        of_unknown_size: Whether only the size of the layer's image is missing.
    """

    name: str
    layer: keras.layers.Layer
    reason: str
    of_unknown_size: bool = False


class ModelKernels(NamedTuple):
    """What a model consists of.

    Attributes:
        kernels: The kernels of convolutions and Dense layers, in the order of the layers.
        untreated: Other layers that have a matrix.
        others: Number of layers without a matrix, by type.
        layers: All layers.
    """

    kernels: list[LayerKernel]
    untreated: list[UntreatedLayer]
    others: dict[str, int]
    layers: list[keras.layers.Layer]


def read_kernels(model: Any, input_size: Size | None = None) -> ModelKernels:
    """Reads the layers of a built model or layer, including nested ones.

    The image size of a layer is the one it was built for. For a layer that is shared between images of
    different sizes this is the first size. The others are known for Functional models, and with `input_size`.

    Args:
        model: A Keras model or layer.
        input_size: Size of the model's input images, if the model leaves it open. An int or one int per axis.
            The model is then called once, on zeros.

    Returns:
        The kernels and the other layers.

    Raises:
        TypeError: If `model` is not a Keras model or layer.
        ValueError: If `model` has not been built, or `input_size` does not suit it.
    """
    check_model(model)
    if not model.built:
        raise ValueError(
            f"model must be built: call it once, or model.build(input_shape). Received: {model!r}"
        )
    layers = flat_layers(model)
    shapes = {} if input_size is None else _observed_shapes(model, layers, input_size)
    weights = [own_weights(layer) for layer in layers]
    kernels: list[LayerKernel] = []
    untreated: list[UntreatedLayer] = []
    others: Counter[str] = Counter()
    for layer, name, own in zip(layers, _names(layers, weights), weights, strict=True):
        if isinstance(layer, KNOWN):
            found = _read_layer(layer, name, shapes.get(id(layer)) or _recorded_shapes(layer))
            if isinstance(found, UntreatedLayer):
                untreated.append(found)
            else:
                kernels += found
        elif any(len(weight.shape) > 1 for weight in own):
            reason = f"{type(layer).__name__} is neither a convolution nor Dense"
            untreated.append(UntreatedLayer(name, layer, reason))
        elif not _children(layer):
            others[type(layer).__name__] += 1
    return ModelKernels(kernels, untreated, dict(others), layers)


def check_model(model: Any) -> None:
    """Raises TypeError if `model` is not a Keras model or layer."""
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"model must be a Keras model or layer. Received: model={reprlib.repr(model)}")


def _read_layer(
    layer: keras.layers.Layer, name: str, shapes: Sequence[Shape]
) -> list[LayerKernel] | UntreatedLayer:
    """Returns the kernels of a convolution or Dense layer whose inputs have these shapes, or why not."""
    if (reason := _unsupported(layer)) is not None:
        return UntreatedLayer(name, layer, reason)
    sizes = _image_sizes(layer, shapes)
    if not sizes:
        return UntreatedLayer(name, layer, "the shape of its input is not recorded")
    if None in sizes[0]:
        reason = f"its image size is unknown, {sizes[0]}: give input_size (--input-size)"
        return UntreatedLayer(name, layer, f"{reason}, or a model of fixed size", of_unknown_size=True)
    try:
        kernels = _kernels(layer, name, sizes[0])
    except ValueError as error:  # a geometry that the package does not have, for example padding="causal"
        return UntreatedLayer(name, layer, str(error))
    other_sizes = tuple(size for size in sizes[1:] if None not in size)
    return [kernel._replace(other_sizes=other_sizes) for kernel in kernels]


def _unsupported(layer: keras.layers.Layer) -> str | None:
    """Returns why the kernel of a convolution or Dense layer does not determine its matrix, or None."""
    if not layer.built:
        return "it has not been built: the model has not called it"
    base = next(known for known in KNOWN if isinstance(layer, known))
    for method in ("call", "convolution_op"):
        if getattr(type(layer), method, None) is not getattr(base, method, None):
            return f"its class, {type(layer).__name__}, overrides {method}"
    if getattr(layer, "quantization_mode", None) is not None:
        return f"it is quantized ({layer.quantization_mode})"
    if getattr(layer, "output_padding", None) is not None:
        return f"output_padding={layer.output_padding} is not supported"
    return None


def _kernels(layer: keras.layers.Layer, name: str, size: Sequence[int | None]) -> list[LayerKernel]:
    """Returns the kernels of a layer, or raises ValueError if the package does not have its geometry."""
    if isinstance(layer, keras.layers.Dense):
        return [_kernel(layer, name, "kernel", "kernel_regularizer", ())]
    own = {"strides": layer.strides, "dilation_rate": layer.dilation_rate, "padding": layer.padding}
    if isinstance(layer, SEPARABLE):
        own["kind"] = "depthwise"
        first = _kernel(layer, f"{name}/depthwise", "depthwise_kernel", "depthwise_regularizer", size, **own)
        between = first.conv.output_shape[:-1]
        second = _kernel(layer, f"{name}/pointwise", "pointwise_kernel", "pointwise_regularizer", between)
        return [first, second]
    if isinstance(layer, DEPTHWISE):
        return [_kernel(layer, name, "kernel", "depthwise_regularizer", size, kind="depthwise", **own)]
    if isinstance(layer, TRANSPOSED):
        return [_kernel(layer, name, "kernel", "kernel_regularizer", size, kind="transpose", **own)]
    return [_kernel(layer, name, "kernel", "kernel_regularizer", size, groups=layer.groups, **own)]


def _kernel(
    layer: keras.layers.Layer, name: str, attribute: str, regularizer: str, size: Any, **geometry: Any
) -> LayerKernel:
    """Returns the kernel in that attribute of a layer, or raises ValueError as `_kernels`."""
    conv = Convolution(tuple(getattr(layer, attribute).shape), size, **geometry)
    return LayerKernel(name, layer, attribute, regularizer, conv)


def _image_sizes(layer: keras.layers.Layer, shapes: Sequence[Shape]) -> list[Shape]:
    """Returns the different image sizes in the shapes of a layer's inputs, in their order."""
    if isinstance(layer, keras.layers.Dense):  # it is applied to the last axis alone
        return [()]
    axes = slice(2, None) if layer.data_format == "channels_first" else slice(1, -1)
    return list(dict.fromkeys(shape[axes] for shape in shapes))


def _recorded_shapes(layer: keras.layers.Layer) -> list[Shape]:
    """Returns the shape that a layer was built for, then those of its calls in Functional models."""
    built = _built_shape(layer)
    shapes = [] if built is None else [built]
    for node in getattr(layer, "_inbound_nodes", ()):  # Keras has no public list of a shared layer's calls
        shapes += [tuple(tensor.shape) for tensor in node.input_tensors[:1]]
    return shapes


def _built_shape(layer: keras.layers.Layer) -> Shape | None:
    """Returns the input shape that a layer was built for, if it is recorded and is one shape."""
    shape = (layer.get_build_config() or {}).get("input_shape")
    return tuple(shape) if isinstance(shape, Sequence) else None


def flat_layers(model: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns all layers in the order of the model, each one before the layers that are nested in it."""
    found: dict[int, keras.layers.Layer] = {}
    stack = [model]
    while stack:
        layer = stack.pop()
        if id(layer) not in found:
            found[id(layer)] = layer
            stack += reversed(_children(layer))
    return list(found.values())


def _children(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns the layers that a layer holds directly."""
    # Only models have a public list of their layers.
    return list(layer._flatten_layers(include_self=False, recursive=False))


def own_weights(layer: keras.layers.Layer) -> list[Any]:
    """Returns the weights of a layer that do not belong to a layer nested in it."""
    nested = {id(weight) for child in _children(layer) for weight in child.weights}
    return [weight for weight in layer.weights if id(weight) not in nested]


def _names(layers: Sequence[keras.layers.Layer], weights: Sequence[Sequence[Any]]) -> list[str]:
    """Returns the name of each layer, or its path if another layer with weights has the same name."""
    count = Counter(layer.name for layer, own in zip(layers, weights, strict=True) if own)
    names: list[str] = []
    taken: set[str] = set()
    for layer, own in zip(layers, weights, strict=True):
        first = own[0].path.rpartition("/")[0] if count[layer.name] > 1 and own else layer.name
        name, number = first, 1
        while own and name in taken:  # a path can occur twice, because models can have the same name
            number += 1
            name = f"{first}_{number}"
        names.append(name)
        if own:
            taken.add(name)
    return names


def _check_open(model: keras.layers.Layer, input_size: Size) -> None:
    """Raises ValueError if the model has a fixed input size, which `input_size` would not change."""
    shapes = [spec.shape for spec in getattr(model, "inputs", None) or ()] or [_built_shape(model)]
    if all(shape is not None and None not in shape[1:] for shape in shapes):
        raise ValueError(
            "input_size goes with a model that leaves the size of its images open; this one has inputs of "
            f"shape {', '.join(map(str, shapes))}. Received: input_size={input_size!r}"
        )


def _observed_shapes(
    model: keras.layers.Layer, layers: Iterable[keras.layers.Layer], input_size: Size
) -> dict[int, list[Shape]]:
    """Calls the model on zeros of that size. Returns the shapes that its layers see, by the layer's id."""
    _check_open(model, input_size)
    zeros = _zeros(model, input_size)
    with _noted_shapes([layer for layer in layers if isinstance(layer, KNOWN)]) as shapes:
        try:
            model(zeros, training=False)
        except (ValueError, tf.errors.OpError) as error:
            cause = " ".join(str(error).split())[:200]
            raise ValueError(
                f"input_size must suit the model, which fails on such images ({cause}). "
                f"Received: input_size={input_size!r}"
            ) from None
    return shapes


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
            if arguments and hasattr(arguments[0], "shape"):
                shapes.setdefault(id(layer), []).append(tuple(arguments[0].shape))
            return call(*arguments, **options)

        return note_and_call

    for layer in layers:
        vars(layer)["call"] = noting(layer)  # Keras would track what is set as an attribute
    try:
        yield shapes
    finally:
        for layer in layers:
            del vars(layer)["call"]


def _zeros(model: keras.layers.Layer, input_size: Size) -> Any:
    """Returns zeros that the model can be called on. Axes that its input leaves open get `input_size`."""
    if inputs := getattr(model, "inputs", None):
        structure = inputs[0] if isinstance(model, keras.Sequential) else model.input
        return tf.nest.map_structure(
            lambda spec: tf.zeros(_filled(spec.shape, input_size), spec.dtype), structure
        )
    shape = _built_shape(model)
    if shape is None:
        raise ValueError(
            "input_size needs a model whose input shape is known: call it once on an image instead. "
            f"Received: {model!r}"
        )
    return tf.zeros(_filled(shape, input_size))


def _filled(shape: Shape, input_size: Any) -> list[int]:
    """Returns the shape of one input of that size, or raises an error if the number of axes differs."""
    open_axes = [axis for axis, n in enumerate(shape) if n is None and axis > 0]
    given = input_size if np.ndim(input_size) else [input_size] * len(open_axes)
    sizes = [check_integer("input_size", n) for n in given]
    if open_axes and len(sizes) != len(open_axes):
        raise ValueError(
            f"input_size must be an int or {len(open_axes)} ints for an input of shape {tuple(shape)}. "
            f"Received: input_size={reprlib.repr(input_size)}"
        )
    by_axis = dict(zip(open_axes, sizes, strict=False))  # an input without open axes takes no size
    return [1, *(by_axis[axis] if n is None else n for axis, n in enumerate(shape[1:], start=1))]
