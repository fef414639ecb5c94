"""Reads Keras layers: which kernels a model has, and how each layer applies its kernels."""

import contextlib
import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import keras
import numpy as np

from tf_frobreg.backends import to_array
from tf_frobreg.checks import did_you_mean, enumeration, received
from tf_frobreg.convolution.geometry import Convolution, Size
from tf_frobreg.convolution.layer import (
    KNOWN,
    Shape,
    image_sizes,
    kernel_places,
    recorded_shapes,
    why_unsupported,
)
from tf_frobreg.keras.trace import InputSize, Trace, is_size, trace_model


class LayerKernel(NamedTuple):
    """One kernel of a layer.

    Attributes:
        name: Name of the layer, or its path if the name is not unique. A separable convolution has two
            kernels, "<layer>/depthwise" and "<layer>/pointwise".
        layer: The layer.
        attribute: Name of the layer's attribute that holds the kernel.
        regularizer: Name of the layer's attribute that holds the regularizer of the kernel.
        conv: How the layer applies the kernel.
        other_sizes: Other image sizes that a shared layer is applied to.
        is_recorded: Whether the size is that of an earlier call, because no call of the model reaches the
            layer, or the model leaves its size open.
        shares: Name of an earlier kernel that is held in the same variable, or "".
        shares_geometry: Whether the layer applies the kernel as the layer of that earlier kernel does.
        of_building: Whether the size is that for which a model without inputs of its own was built.
    """

    name: str
    layer: keras.layers.Layer
    attribute: str
    regularizer: str
    conv: Convolution
    other_sizes: tuple[Shape, ...] = ()
    is_recorded: bool = False
    shares: str = ""
    shares_geometry: bool = True
    of_building: bool = False

    @property
    def variable(self) -> Any:
        """The Keras variable that holds the kernel. None if the layer computes the kernel.

        With LoRA the kernel is the sum of a frozen variable and a product of two others. A subclass can
        compute `kernel` from another weight, for example to standardize it.
        """
        kernel = getattr(self.layer, self.attribute)
        return kernel if isinstance(kernel, keras.Variable) else None

    @property
    def value(self) -> np.ndarray:
        """The kernel that the layer applies, in float32 or float64."""
        value = to_array(getattr(self.layer, self.attribute))
        return value if value.dtype == np.float64 else value.astype(np.float32)

    def reason_to_skip(self, *, dtypes: Sequence[str] | None = None) -> str | None:
        """Returns why the kernel cannot be regularized, or None.

        Args:
            dtypes: The accepted dtypes of the kernel. None accepts all.

        Returns:
            The reason. If there is none, `variable` is a variable of an accepted dtype.
        """
        variable = self.variable
        if variable is None and getattr(self.layer, "lora_enabled", False):
            return "LoRA is enabled: its kernel is frozen"
        if variable is None:
            return f"its class, {type(self.layer).__name__}, computes the kernel from other weights"
        if self.shares:
            only = "" if self.shares_geometry else f"; penalised only with the geometry of {self.shares!r}"
            return f"it shares its kernel with {self.shares!r}{only}"
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


def read_kernels(model: Any, input_size: InputSize | None = None) -> ModelKernels:
    """Reads the layers of a built model or layer, including nested ones.

    The image size of a layer is what it sees when this model is called on its own inputs. The call is
    followed without data. For a layer that sees several sizes this is the first one. If no call reaches a
    layer, the size is that of an earlier call or of its building, with a warning.

    Args:
        model: A Keras model or layer.
        input_size: Size of the model's input images, if the model leaves it open. An int or one int per axis,
            or a dict of these by the name of an input or of a layer.

    Returns:
        The kernels and the other layers.

    Raises:
        TypeError: If `model` is not a Keras model or layer.
        ValueError: If `model` has not been built, or `input_size` does not suit it.
    """
    check_model(model)
    if not model.built:
        raise ValueError(f"model must be built: call it once on a batch. Received: {model!r}")
    layers = flat_layers(model)
    weights = [own_weights(layer) for layer in layers]
    names = _names(layers, weights)
    known = [layer for layer in layers if isinstance(layer, KNOWN)]
    trace = trace_model(model, known, input_size)
    sizes = _sizes_by_layer(input_size, trace.names, dict(zip(names, layers, strict=True)))
    kernels: list[LayerKernel] = []
    untreated: list[UntreatedLayer] = []
    others: Counter[str] = Counter()
    for layer, name, own in zip(layers, names, weights, strict=True):
        if isinstance(layer, KNOWN):
            found = _read_layer(layer, name, trace, sizes.get(id(layer)))
            if isinstance(found, UntreatedLayer):
                untreated.append(found)
            else:
                kernels += found
        elif any(len(weight.shape) > 1 for weight in own):
            reason = f"{type(layer).__name__} is neither a convolution nor Dense"
            untreated.append(UntreatedLayer(name, layer, reason))
        elif not _children(layer):
            others[type(layer).__name__] += 1
    _warn_of_recorded_sizes(kernels, trace)
    return ModelKernels(kernels, untreated, dict(others), layers)


def check_model(model: Any) -> None:
    """Raises TypeError if `model` is not a Keras model or layer."""
    if not isinstance(model, keras.layers.Layer):
        is_legacy = type(model).__module__.partition(".")[0] == "tf_keras" or any(
            base.__module__.startswith("tf_keras.") for base in type(model).__mro__
        )
        hint = " It is of Keras 2: unset TF_USE_LEGACY_KERAS, or import keras." if is_legacy else ""
        raise TypeError(f"model must be a Keras model or layer. Received: {received('model', model)}.{hint}")


def _read_layer(
    layer: keras.layers.Layer, name: str, trace: Trace, given: Size | None
) -> list[LayerKernel] | UntreatedLayer:
    """Returns the kernels of a convolution or Dense layer, or why it has none that can be treated.

    Raises:
        ValueError: If a size is given for a layer that has one.
    """
    if (reason := why_unsupported(layer)) is not None:
        return UntreatedLayer(name, layer, reason)
    seen = trace.shapes.get(id(layer))
    sizes = image_sizes(layer, seen or recorded_shapes(layer))
    if given is not None and seen and None not in sizes[0]:
        if not is_size(given, sizes[0]):
            raise ValueError(
                f"input_size must not be given for layer {name!r}: the model applies it to images of size "
                f"{sizes[0]}. Received: input_size={{{name!r}: {given!r}}}"
            )
        given = None  # the size that the layer has anyway
    size: Any = given if given is not None else next(iter(sizes), None)
    if size is None:
        return UntreatedLayer(name, layer, "the shape of its input is not recorded")
    if np.ndim(size) and None in size:
        reason = f"its image size is unknown, {size}: give input_size, or a model of fixed size"
        return UntreatedLayer(name, layer, reason, of_unknown_size=True)
    try:
        places = kernel_places(layer, size)
    except (ValueError, TypeError, AttributeError) as error:  # for example an attribute that was replaced
        return UntreatedLayer(name, layer, str(error))
    other_sizes = tuple(other for other in sizes[1:] if None not in other) if given is None else ()
    # In the `build` of its model a layer has been built but never called. It has no other size.
    is_known = trace.problem is not None and not getattr(layer, "_called", True)
    has_image = given is None and sizes != [()]
    is_recorded = has_image and ((seen is None and not is_known) or trace.source == "call")
    of_building = has_image and seen is not None and trace.source == "build"
    return [
        LayerKernel(
            f"{name}/{place.part}" if place.part else name,
            layer,
            place.attribute,
            place.regularizer,
            place.conv,
            other_sizes,
            is_recorded,
            of_building=of_building,
        )
        for place in places
    ]


def _sizes_by_layer(
    input_size: InputSize | None, inputs: Sequence[str], layers: Mapping[str, keras.layers.Layer]
) -> dict[int, Size]:
    """Returns the sizes that were given by name for layers, by the layer's id."""
    sizes: dict[int, Size] = {}
    if not isinstance(input_size, Mapping):
        return sizes
    for name, size in input_size.items():
        if name in layers:
            sizes[id(layers[name])] = size
        elif name not in inputs:
            known = (*inputs, *(key for key, layer in layers.items() if isinstance(layer, KNOWN)))
            raise ValueError(
                f"input_size must have names of inputs or layers. Received: the name {name!r}"
                f"{did_you_mean(name, known)} in {received('input_size', input_size)}. "
                f"Names: {enumeration(known)}"
            )
    return sizes


def _warn_of_recorded_sizes(kernels: Sequence[LayerKernel], trace: Trace) -> None:
    """Warns if image sizes are those of earlier calls."""
    names = [kernel.name for kernel in kernels if kernel.is_recorded]
    if names:
        cause = "the model leaves it open" if trace.source == "call" else "the model does not call them"
        if trace.problem:
            cause = f"the model could not be followed ({trace.problem})"
        warnings.warn(
            f"The image size of {enumeration(names)} is that of an earlier call, because {cause}. "
            "input_size={name: size} sets it.",
            stacklevel=4,
        )


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
