"""Reads Keras layers: which kernels a model has, and how each of its layers applies them."""

import contextlib
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_frobreg.checks import check_integer
from tf_frobreg.convolution.geometry import Convolution

keras = tf.keras

CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
TRANSPOSED = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)
DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)


class LayerKernel(NamedTuple):
    """One kernel of a layer.

    Attributes:
        name: Of the layer, with its path where that is not unique; a separable convolution has two kernels,
            "<layer>/depthwise" and "<layer>/pointwise".
        layer: The layer.
        attribute: The name of the layer's attribute that is the kernel.
        regularizer: The name of the layer's attribute that is the regularizer of that kernel.
        conv: How the layer applies it.
        other_sizes: Sizes of further images that a shared layer is applied to, as far as they are known.
    """

    name: str
    layer: keras.layers.Layer
    attribute: str
    regularizer: str
    conv: Convolution
    other_sizes: tuple[tuple[int, ...], ...] = ()

    @property
    def value(self) -> np.ndarray:
        """The kernel as it is applied (with LoRA, the sum), at least in float32."""
        value = tf.convert_to_tensor(getattr(self.layer, self.attribute))
        return (value if value.dtype == tf.float64 else tf.cast(value, tf.float32)).numpy()


class UntreatedLayer(NamedTuple):
    """A layer that has a matrix, and why it cannot be treated all the same.

    Attributes:
        name: Of the layer, as that of a `LayerKernel`.
        layer: The layer.
        reason: Why.
        of_unknown_size: Whether all that is missing is the size of its image.
    """

    name: str
    layer: keras.layers.Layer
    reason: str
    of_unknown_size: bool = False


class ModelKernels(NamedTuple):
    """What a model consists of.

    Attributes:
        kernels: The kernels of convolutions and Dense layers, in the order of the layers.
        untreated: Layers whose matrix is none of those.
        others: How many layers of each type have no matrix.
    """

    kernels: list[LayerKernel]
    untreated: list[UntreatedLayer]
    others: dict[str, int]


class _Untreated(Exception):
    """Why a layer cannot be treated."""


class _UnknownSize(_Untreated):
    """The size of a layer's image is open."""


def read_kernels(model, input_size=None) -> ModelKernels:
    """Reads the layers of a built model or layer, nested ones included.

    The image size of a layer is that for which it was built: of a layer that is shared between images of
    different sizes, the first one. The others are known of Functional models, and with `input_size`.

    Args:
        model: A Keras model or layer.
        input_size: The size of the model's input images, where it leaves that open: an int or one int per
            axis. The model is then called once, on zeros.

    Raises:
        TypeError, ValueError: Where `model` is none, or has not been built.
    """
    check_model(model)
    if not model.built:
        raise ValueError(
            f"model must be built: call it once, or model.build(input_shape). Received: {model!r}"
        )
    layers = flat_layers(model)
    shapes = {}
    if input_size is not None:
        _check_open(model, input_size)
        shapes = _observed_shapes(model, layers, input_size)
    names = _names(layers)
    kernels, untreated, others = [], [], Counter()
    for layer, name in zip(layers, names, strict=True):
        try:
            found = list(_kernels(layer, name, shapes.get(id(layer)) or _recorded_shapes(layer)))
        except _Untreated as reason:
            untreated.append(UntreatedLayer(name, layer, str(reason), isinstance(reason, _UnknownSize)))
            continue
        kernels += found
        if not found and any(len(weight.shape) > 1 for weight in own_weights(layer)):
            reason = f"{type(layer).__name__} is neither a convolution nor Dense"
            untreated.append(UntreatedLayer(name, layer, reason))
        elif not found and not _children(layer):
            others[type(layer).__name__] += 1
    return ModelKernels(kernels, untreated, dict(others))


def check_model(model) -> None:
    """Raises TypeError where `model` is none."""
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"model must be a Keras model or layer. Received: model={reprlib.repr(model)}")


def _kernels(layer, name, shapes) -> Iterator[LayerKernel]:
    """The kernels of one layer, if it is a convolution or Dense; `shapes` are those of its inputs."""
    known = (*CONVOLUTIONS, *TRANSPOSED, *DEPTHWISE, *SEPARABLE, keras.layers.Dense)
    if not isinstance(layer, known):
        return
    if not layer.built:
        raise _Untreated("it has not been built: the model has not called it")
    base = next(kind for kind in known if isinstance(layer, kind))
    for method in ("call", "convolution_op"):
        if getattr(type(layer), method, None) is not getattr(base, method, None):
            raise _Untreated(f"its class, {type(layer).__name__}, has a {method} of its own")
    if getattr(layer, "quantization_mode", None) is not None:
        raise _Untreated(f"it is quantized ({layer.quantization_mode})")
    if isinstance(layer, keras.layers.Dense):
        yield _kernel(layer, name, "kernel", "kernel_regularizer", ())
        return
    yield from (
        kernel._replace(other_sizes=_other_sizes(layer, shapes)) for kernel in _of_images(layer, name, shapes)
    )


def _of_images(layer, name, shapes):
    """The kernels of a convolution."""
    size = _spatial(layer, shapes)
    own = {"strides": layer.strides, "dilation_rate": layer.dilation_rate, "padding": layer.padding}
    if isinstance(layer, SEPARABLE):
        kind = {"kind": "depthwise", **own}
        depthwise = _kernel(
            layer, f"{name}/depthwise", "depthwise_kernel", "depthwise_regularizer", size, **kind
        )
        between = tuple(axis.output_size for axis in depthwise.conv.axes)
        yield depthwise
        yield _kernel(layer, f"{name}/pointwise", "pointwise_kernel", "pointwise_regularizer", between)
    elif isinstance(layer, DEPTHWISE):
        yield _kernel(layer, name, "kernel", "depthwise_regularizer", size, kind="depthwise", **own)
    elif isinstance(layer, TRANSPOSED):
        if layer.output_padding is not None:
            raise _Untreated(f"output_padding={layer.output_padding} is not known")
        yield _kernel(layer, name, "kernel", "kernel_regularizer", size, kind="transpose", **own)
    else:
        yield _kernel(layer, name, "kernel", "kernel_regularizer", size, groups=layer.groups, **own)


def _kernel(layer, name, attribute, regularizer, size, **geometry):
    shape = tuple(getattr(layer, attribute).shape)
    try:
        return LayerKernel(name, layer, attribute, regularizer, Convolution(shape, size, **geometry))
    except ValueError as error:  # "causal" padding, say
        raise _Untreated(str(error)) from None


def _spatial(layer, shapes):
    """The image size in the first shape of a layer's inputs."""
    if not shapes:
        raise _Untreated("the shape of its input is not recorded")
    size = _image(layer, shapes[0])
    if None in size:
        raise _UnknownSize(
            f"its image size is unknown, {size}: give input_size (--input-size), or a model of fixed size"
        )
    return size


def _other_sizes(layer, shapes):
    sizes = dict.fromkeys(_image(layer, shape) for shape in shapes)
    return tuple(size for size in sizes if size != _image(layer, shapes[0]) and None not in size)


def _image(layer, shape):
    return tuple(shape[2:] if layer.data_format == "channels_first" else shape[1:-1])


def _recorded_shapes(layer):
    """That for which it was built, and those of its calls in Functional models."""
    shapes = [_built_shape(layer)]
    # Keras has no public way to the calls of a shared layer.
    for node in getattr(layer, "_inbound_nodes", ()):
        shapes += [tuple(tensor.shape) for tensor in node.input_tensors[:1]]
    return [shape for shape in shapes if shape is not None]


def _built_shape(layer):
    shape = (layer.get_build_config() or {}).get("input_shape")
    return shape if isinstance(shape, Sequence) else None


def flat_layers(model: keras.layers.Layer) -> list[keras.layers.Layer]:
    """All layers, nested ones after what they are nested in, in the order of the model."""
    layers = []
    queue = [model]
    while queue:
        layer = queue.pop(0)
        if all(layer is not other for other in layers):
            layers.append(layer)
        queue = _children(layer) + queue
    return layers


def _children(layer):
    # There is no public way to the layers of a layer that is no model.
    return list(layer._flatten_layers(include_self=False, recursive=False))


def own_weights(layer: keras.layers.Layer) -> list:
    """The weights of a layer that are of none of its layers."""
    of_children = {id(weight) for child in _children(layer) for weight in child.weights}
    return [weight for weight in layer.weights if id(weight) not in of_children]


def _names(layers):
    """Of each layer its name or, where another layer with weights has that too, its path."""
    weights = [own_weights(layer) for layer in layers]
    count = Counter(layer.name for layer, own in zip(layers, weights, strict=True) if own)
    names, taken = [], set()
    for layer, own in zip(layers, weights, strict=True):
        first = own[0].path.rpartition("/")[0] if count[layer.name] > 1 and own else layer.name
        name, number = first, 1
        while own and name in taken:  # a path can repeat too: models may be called alike
            number += 1
            name = f"{first}_{number}"
        names.append(name)
        taken |= {name} if own else set()
    return names


def _check_open(model, input_size):
    """A size that would change nothing is a mistake."""
    shapes = [spec.shape for spec in getattr(model, "inputs", None) or ()] or [_built_shape(model)]
    if all(shape is not None and None not in shape[1:] for shape in shapes):
        raise ValueError(
            "input_size goes with a model that leaves the size of its images open; this one has inputs of "
            f"shape {', '.join(map(str, shapes))}. Received: input_size={input_size!r}"
        )


def _observed_shapes(model, layers, input_size):
    """Shapes of the first input of each layer while the model sees zeros, by the layer's id."""
    shapes = {}
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_noting(layer, shapes))
        zeros = _zeros(model, input_size)
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
def _noting(layer, shapes):
    call = layer.call

    def noting(*arguments, **options):
        if arguments and hasattr(arguments[0], "shape"):
            shapes.setdefault(id(layer), []).append(tuple(arguments[0].shape))
        return call(*arguments, **options)

    layer.__dict__["call"] = noting  # hides the method of the class
    try:
        yield
    finally:
        del layer.__dict__["call"]


def _zeros(model, input_size):
    """Zeros that the model can be called on: what its input leaves open is filled with `input_size`."""
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


def _filled(shape, input_size):
    open_axes = [axis for axis, n in enumerate(shape) if n is None and axis > 0]
    sizes = (
        [check_integer("input_size", n) for n in input_size]
        if np.ndim(input_size)
        else [check_integer("input_size", input_size)] * len(open_axes)
    )
    if not open_axes:
        return [1, *shape[1:]]
    if len(sizes) != len(open_axes):
        raise ValueError(
            f"input_size must be an int or {len(open_axes)} ints for an input of shape {tuple(shape)}. "
            f"Received: input_size={reprlib.repr(input_size)}"
        )
    filled = list(shape)
    filled[0] = 1
    for axis, n in zip(open_axes, sizes, strict=False):
        filled[axis] = n
    return filled
