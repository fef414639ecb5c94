"""Reads one Keras layer: which attributes hold its kernels, and how it applies them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras

from tf_frobreg.checks import did_you_mean, enumeration, received
from tf_frobreg.convolution.geometry import Convolution, Size

CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
TRANSPOSED = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)
DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
KNOWN = (*CONVOLUTIONS, *TRANSPOSED, *DEPTHWISE, *SEPARABLE, keras.layers.Dense)

Shape = tuple[int | None, ...]


class KernelPlace(NamedTuple):
    """One kernel of a layer.

    Attributes:
        part: "depthwise" or "pointwise" for the two kernels of a separable convolution, otherwise "".
        attribute: Name of the layer's attribute that holds the kernel.
        regularizer: Name of the layer's attribute that holds the regularizer of the kernel.
        conv: How the layer applies the kernel.
    """

    part: str
    attribute: str
    regularizer: str
    conv: Convolution


def why_unsupported(layer: keras.layers.Layer) -> str | None:
    """Returns why the kernel of a convolution or Dense layer does not determine its matrix, or None."""
    if not layer.built:
        return "it has not been built: call the model on a batch that reaches it"
    base = next(known for known in KNOWN if isinstance(layer, known))
    for method in ("call", "convolution_op"):
        if getattr(type(layer), method, None) is not getattr(base, method, None):
            return f"its class, {type(layer).__name__}, overrides {method}"
    if getattr(layer, "quantization_mode", None) is not None:
        return f"it is quantized ({layer.quantization_mode})"
    if getattr(layer, "output_padding", None) is not None:
        return f"output_padding={layer.output_padding} is not supported"
    if getattr(layer, "padding", None) == "causal":
        return "padding='causal' is not supported"
    return None


def kernel_places(layer: keras.layers.Layer, size: Size) -> list[KernelPlace]:
    """Returns the kernels of a supported layer whose input has that spatial size.

    Raises:
        ValueError: If the size does not suit the layer. The message names the argument.
        TypeError: If the size is not an integer or a sequence of integers.
    """
    if isinstance(layer, keras.layers.Dense):
        return [_place(layer, "kernel", "kernel_regularizer", ())]
    own = {"strides": layer.strides, "dilation_rate": layer.dilation_rate, "padding": layer.padding}
    if isinstance(layer, SEPARABLE):
        own["kind"] = "depthwise"
        first = _place(layer, "depthwise_kernel", "depthwise_regularizer", size, "depthwise", **own)
        between = first.conv.output_shape[:-1]
        return [first, _place(layer, "pointwise_kernel", "pointwise_regularizer", between, "pointwise")]
    if isinstance(layer, DEPTHWISE):
        return [_place(layer, "kernel", "depthwise_regularizer", size, kind="depthwise", **own)]
    if isinstance(layer, TRANSPOSED):
        return [_place(layer, "kernel", "kernel_regularizer", size, kind="transpose", **own)]
    return [_place(layer, "kernel", "kernel_regularizer", size, groups=layer.groups, **own)]


def _place(
    layer: keras.layers.Layer, attribute: str, regularizer: str, size: Size, part: str = "", **geometry: Any
) -> KernelPlace:
    conv = Convolution(tuple(getattr(layer, attribute).shape), size, **geometry)
    return KernelPlace(part, attribute, regularizer, conv)


def image_sizes(layer: keras.layers.Layer, shapes: Sequence[Shape]) -> list[Shape]:
    """Returns the different image sizes in the shapes of a layer's inputs, in their order."""
    if isinstance(layer, keras.layers.Dense):  # it is applied to the last axis alone
        return [()]
    axes = slice(2, None) if layer.data_format == "channels_first" else slice(1, -1)
    return list(dict.fromkeys(shape[axes] for shape in shapes))


def recorded_shapes(layer: keras.layers.Layer) -> list[Shape]:
    """Returns the input shapes of a layer's calls in Functional models, or else the one it was built for.

    Keras rebuilds a layer from a file with the shape of the first build, so its calls count for more.
    """
    shapes = [
        tuple(tensor.shape)
        for node in getattr(layer, "_inbound_nodes", ())  # Keras has no public list of a layer's calls
        for tensor in node.input_tensors[:1]
    ]
    built = (layer.get_build_config() or {}).get("input_shape")
    if not shapes and isinstance(built, Sequence) and not any(isinstance(n, Sequence) for n in built):
        shapes.append(tuple(built))
    return shapes


def read_layer(layer: Any, input_size: Size | None = None, part: str | None = None) -> KernelPlace:
    """Returns the kernel of a built layer and how the layer applies it.

    Args:
        layer: A built Keras convolution or `Dense` layer.
        input_size: Spatial size of its input. None takes the size of the layer's recorded calls.
        part: "depthwise" or "pointwise" for a separable convolution.

    Returns:
        The kernel's place.

    Raises:
        TypeError: If `layer` is not a convolution or `Dense` layer.
        ValueError: If the package cannot treat the layer, or its image size is not known.
    """
    check_layer(layer)
    if isinstance(layer, keras.layers.Dense):
        size = () if input_size is None else input_size
        input_size = Convolution(tuple(layer.kernel.shape), size).input_size
    elif input_size is None:
        input_size = _recorded_size(layer)
    places = kernel_places(layer, input_size)
    parts = [place.part for place in places]
    if (part or "") not in parts:
        wanted = "must be None" if parts == [""] else f"must be one of {tuple(parts)}"
        raise ValueError(
            f"part {wanted} for layer {layer.name!r}. Received: part={part!r}{did_you_mean(part, parts)}"
        )
    return places[parts.index(part or "")]


def check_layer(layer: Any) -> None:
    """Raises TypeError or ValueError if the package cannot treat a layer."""
    if not isinstance(layer, KNOWN):
        raise TypeError(
            f"layer must be a Keras convolution or Dense layer. Received: {received('layer', layer)}"
        )
    if not layer.built:
        raise ValueError(f"layer {layer.name!r} has not been built: build it, or call it once on a batch")
    reason = why_unsupported(layer)  # not :=, which AutoGraph warns about
    if reason is not None:
        raise ValueError(f"layer {layer.name!r} has no matrix that its kernel determines: {reason}")


def _recorded_size(layer: keras.layers.Layer) -> tuple[int, ...]:
    """Returns the image size of a layer's calls, or raises ValueError if there is not exactly one."""
    sizes = image_sizes(layer, recorded_shapes(layer))
    known = [tuple(n for n in size if n is not None) for size in sizes]
    if len(sizes) != 1 or len(known[0]) < len(sizes[0]):
        found = enumeration([str(size) for size in sizes])
        cause = f"was called at the sizes {found}" if len(sizes) > 1 else f"leaves its size open, {found}"
        raise ValueError(
            f"input_size must be given for layer {layer.name!r}, which "
            f"{cause if sizes else 'has no recorded size'}. Received: input_size=None. In a model, "
            "model_spectrum(model) and attach_regularizers(model) read the size that each layer sees."
        )
    return known[0]
