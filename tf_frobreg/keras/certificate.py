"""Certified radii: how far an input can move without a change of the predicted class."""

from typing import Any

import keras
import numpy as np

from tf_frobreg.backends import to_array
from tf_frobreg.checks import check_number, received
from tf_frobreg.keras.layer_bounds import WITHOUT_SOFTMAX, is_softmax
from tf_frobreg.keras.lipschitz import lipschitz_bound
from tf_frobreg.keras.lipschitz_report import Head, LipschitzBound
from tf_frobreg.keras.read_layers import flat_layers
from tf_frobreg.keras.trace import InputSize

__all__ = ["certified_radius"]

# Times the spacing of numbers at the largest logit, the allowance for rounding in a margin.
ROUNDING_UNITS = 32
EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float64": 2.0**-52}
CHUNK = 2**22  # entries of the arrays that are computed at once


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
        x: A batch of inputs, as `model.predict` accepts them.
        bound: What `lipschitz_bound(model)` returned, or a Lipschitz constant L of the model. None
            computes it. The kernels must not have changed since then.
        input_size: As in `lipschitz_bound`, if the model leaves its size open.
        batch_size: Images that are predicted at once.

    Returns:
        A float64 array of shape `(batch,)`, in units of the input. 0 if two classes are equally likely.

    Raises:
        ValueError: If the model ends in a softmax, does not return one matrix of at least two logits, a logit
            is not finite, or the model cannot be bounded.
        TypeError: If an argument has the wrong type.

    Example:
        The identity decides between the two entries. Their difference is 1, so 1/√2 brings them together:

        >>> layer = keras.layers.Dense(2, kernel_initializer="identity")
        >>> model = keras.Sequential([keras.Input((2,)), layer])
        >>> print(certified_radius(model, np.array([[3.0, 2.0]])).round(4))
        [0.7071]
    """
    _check_logits(model)
    if bound is None:
        bound = lipschitz_bound(model, input_size)
    head = bound.head if isinstance(bound, LipschitzBound) else None
    constant = bound.value if isinstance(bound, LipschitzBound) else check_number("bound", bound)
    logits = np.asarray(to_array(model.predict(x, batch_size=batch_size, verbose=0)))
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
    layer: Any = model
    while isinstance(layer, keras.Model) and getattr(layer, "outputs", None):
        is_sequence = isinstance(layer, keras.Sequential)
        layer = layer.layers[-1] if is_sequence else layer.outputs[0]._keras_history.operation
    if is_softmax(layer) or type(layer).__name__ == "LogSoftmax":
        raise ValueError(f"model ends in a softmax, in {layer.name!r}; {WITHOUT_SOFTMAX}")


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
