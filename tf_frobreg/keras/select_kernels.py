"""Which kernels of a model are meant: by name, layer, layer class or function of the layer."""

import fnmatch
import reprlib
from collections.abc import Callable, Sequence

import tensorflow as tf

from tf_frobreg.keras.read_layers import LayerKernel, flat_layers, read_kernels

keras = tf.keras

Selection = str | type | Callable | Sequence


def select_kernels(model, include, exclude, input_size) -> tuple[list[LayerKernel], dict[str, str]]:
    """(the chosen kernels of a model, why others were not chosen, by name)."""
    include, exclude = check_selection("include", include), check_selection("exclude", exclude)
    found = read_kernels(model, input_size)
    candidates = [(kernel.name, kernel.layer) for kernel in found.kernels]
    candidates += [(name, layer) for name, layer, *_ in found.untreated]
    every = candidates + [(layer.name, layer) for layer in flat_layers(model)]
    for argument, patterns, among in (("include", include, candidates), ("exclude", exclude, every)):
        for pattern in patterns or ():
            if not _is_function(pattern) and not any(matches(pattern, *c) for c in among):
                raise ValueError(no_match(argument, pattern, candidates))
    left_out = {}

    def chosen(name, layer):
        if include is not None and not any(matches(pattern, name, layer) for pattern in include):
            left_out[name] = "not included"
        elif any(matches(pattern, name, layer) for pattern in exclude or ()):
            left_out[name] = "excluded"
        return name not in left_out

    kernels = [kernel for kernel in found.kernels if chosen(kernel.name, kernel.layer)]
    for untreated in found.untreated:
        if chosen(untreated.name, untreated.layer):
            if untreated.of_unknown_size:
                raise ValueError(
                    f"layer {untreated.name!r} cannot be treated: {untreated.reason}. Or leave it out, "
                    f"exclude={untreated.name!r}. Received: input_size={input_size}"
                )
            left_out[untreated.name] = untreated.reason
    return kernels, left_out


def check_selection(argument: str, selection: Selection | None) -> list | None:
    """The selection as a list, or an error that names the argument."""
    if selection is None:
        return None
    single = isinstance(selection, (str, type)) or callable(selection)
    patterns = [selection] if single else selection
    if not isinstance(patterns, (list, tuple, set, frozenset)) or not all(
        isinstance(pattern, str) or callable(pattern) for pattern in patterns
    ):
        raise TypeError(
            f"{argument} must be a name, a layer, a layer class, a function of the layer, or a list of "
            f"those. Received: {argument}={reprlib.repr(selection)}"
        )
    return list(patterns)


def matches(pattern, name: str, layer: keras.layers.Layer) -> bool:
    """Whether a kernel of that name, of that layer, is meant."""
    if isinstance(pattern, str):
        return any(fnmatch.fnmatchcase(n, pattern) for n in (name, layer.name))
    if isinstance(pattern, type):
        return isinstance(layer, pattern)
    if isinstance(pattern, keras.layers.Layer):  # which is a function too
        return layer is pattern
    return bool(pattern(layer))


def _is_function(pattern):
    return not isinstance(pattern, (str, type, keras.layers.Layer))


def no_match(argument: str, pattern, candidates: list[tuple]) -> str:
    """The error where a pattern means none of (name, layer)."""
    names = ", ".join(name for name, _ in candidates) or "none"
    return f"{argument} must match a layer with a kernel ({names}). Received: {argument}={pattern!r}"
