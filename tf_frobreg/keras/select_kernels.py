"""Selects kernels of a model: by name, layer, layer class or function of the layer."""

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import keras

from tf_frobreg.checks import did_you_mean, enumeration, received
from tf_frobreg.keras.read_layers import LayerKernel, read_kernels
from tf_frobreg.keras.trace import InputSize

Selection = str | type | Callable | Sequence


class SelectedKernels(NamedTuple):
    """The kernels of a model that a caller selected.

    Attributes:
        kernels: The selected kernels, in the order of the layers.
        left_out: Why other kernels and layers are not among them, by their names.
    """

    kernels: list[LayerKernel]
    left_out: dict[str, str]


class Candidate(NamedTuple):
    """What a pattern can match: a name, and the layer that has it."""

    name: str
    layer: keras.layers.Layer


def select_kernels(
    model: Any, include: Selection | None, exclude: Selection | None, input_size: InputSize | None
) -> SelectedKernels:
    """Returns the kernels of a model that `include` matches and `exclude` does not match.

    Args:
        model: A built Keras model or layer.
        include: Patterns, see `attach_regularizers`. None selects all kernels.
        exclude: Patterns.
        input_size: Size of the model's input images, if the model leaves it open.

    Returns:
        The selected kernels, and why the others were left out. A kernel that is
        held in the variable of an earlier one has its name as `shares`.

    Raises:
        ValueError: If a name, a layer or a class matches nothing, or the image size of a selected layer is
            unknown.
    """
    included, excluded = check_selection("include", include), check_selection("exclude", exclude)
    found = read_kernels(model, input_size)
    candidates = [Candidate(kernel.name, kernel.layer) for kernel in found.kernels]
    candidates += [Candidate(untreated.name, untreated.layer) for untreated in found.untreated]
    check_matches("include", included or (), candidates, candidates)
    # Excluding a layer without a kernel changes nothing, and is allowed.
    everything = [*candidates, *(Candidate(layer.name, layer) for layer in found.layers)] if excluded else []
    check_matches("exclude", excluded or (), everything, candidates)
    left_out: dict[str, str] = {}
    for candidate in candidates:
        if included is not None and not matches_any(included, candidate):
            left_out[candidate.name] = "not included"
        elif matches_any(excluded or (), candidate):
            left_out[candidate.name] = "excluded"
    kernels = _with_shared(kernel for kernel in found.kernels if kernel.name not in left_out)
    for untreated in found.untreated:
        if untreated.name in left_out:
            continue
        if untreated.of_unknown_size:
            # A layer by itself cannot be left out.
            other = "" if untreated.layer is model else f". Or leave it out, exclude={untreated.name!r}"
            raise ValueError(
                f"layer {untreated.name!r} cannot be treated: {untreated.reason}{other}. "
                f"Received: input_size={input_size}"
            )
        left_out[untreated.name] = untreated.reason
    return SelectedKernels(kernels, left_out)


def _with_shared(kernels: Iterable[LayerKernel]) -> list[LayerKernel]:
    """Notes which kernels are held in the variable of an earlier one."""
    owners: dict[int, LayerKernel] = {}
    noted = []
    for kernel in kernels:
        variable = kernel.variable
        owner = kernel if variable is None else owners.setdefault(id(variable), kernel)
        if owner is not kernel:
            kernel = kernel._replace(shares=owner.name, shares_geometry=owner.conv == kernel.conv)
        noted.append(kernel)
    return noted


def check_selection(argument: str, selection: Selection | None) -> list[Any] | None:
    """Returns the selection as a list of patterns, or raises an error that names the argument."""
    if selection is None:
        return None
    single = isinstance(selection, (str, type)) or callable(selection)
    patterns = [selection] if single else selection
    if not isinstance(patterns, (list, tuple, set, frozenset)) or not all(
        isinstance(pattern, str) or callable(pattern) for pattern in patterns
    ):
        raise TypeError(
            f"{argument} must be a name, a layer, a layer class, a function of the layer, or a list of "
            f"those. Received: {received(argument, selection)}"
        )
    return list(patterns)


def check_matches(
    argument: str, patterns: Sequence[Any], among: Sequence[Candidate], candidates: Sequence[Candidate]
) -> None:
    """Raises an error if a pattern matches nothing, which is a mistake unless it is a function.

    Args:
        argument: Name of the argument that has the patterns.
        patterns: The patterns.
        among: What they may match.
        candidates: What the error lists.

    Raises:
        ValueError: If a name, a layer or a class matches nothing.
    """
    for pattern in patterns:
        is_function = not isinstance(pattern, (str, type, keras.layers.Layer))
        if not is_function and not any(matches(pattern, candidate) for candidate in among):
            names = [candidate.name for candidate in candidates]
            raise ValueError(
                f"{argument} must match a layer with a kernel. "
                f"Received: {argument}={pattern!r}{did_you_mean(pattern, names)}. "
                f"Names: {enumeration(names) or 'none'}"
            )


def matches_any(patterns: Sequence[Any], candidate: Candidate) -> bool:
    """Returns whether one of the patterns matches."""
    return any(matches(pattern, candidate) for pattern in patterns)


def matches(pattern: Any, candidate: Candidate) -> bool:
    """Returns whether the pattern matches the name, the name of the layer, or the layer."""
    name, layer = candidate
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(layer.name, pattern)
    if isinstance(pattern, type):
        return isinstance(layer, pattern)
    if isinstance(pattern, keras.layers.Layer):  # checked before functions, because layers are callable
        return layer is pattern
    return bool(pattern(layer))
