"""The Keras regularizers that penalise a kernel by a formula of this package."""

import weakref
from typing import Any, Unpack

import keras

from tf_frobreg.backends import dtype_of
from tf_frobreg.checks import check_choice, check_integer
from tf_frobreg.convolution.geometry import Convolution, Geometry, Size
from tf_frobreg.keras.layer_geometry import TakesGeometry
from tf_frobreg.keras.regularizer_base import WeightedRegularizer, check_constant
from tf_frobreg.keras.training_backend import new_variable
from tf_frobreg.penalties.frobenius import METHODS, FrobeniusPenalty
from tf_frobreg.penalties.penalty_function import Weight, weighted
from tf_frobreg.penalties.reshaped import evaluate_reshaped
from tf_frobreg.penalties.two_norm import check_gram, power_iteration, start_vector
from tf_frobreg.penalties.units import check_alpha_fits

__all__ = ["FrobeniusRegularizer", "ReshapedRegularizer", "SpectralRegularizer"]

REDUCTIONS = ("sum", "mean")
# Power steps of each evaluation if nothing can be kept from the one before.
STEPS_WITHOUT_STATE = 40


@keras.saving.register_keras_serializable(package="tf_frobreg")
class FrobeniusRegularizer(TakesGeometry, WeightedRegularizer):
    """Penalises a kernel by `factor`·R_α(K) per column of M, with R_α(K) = ‖MᵀM − αI‖²_F.

    M is the transformation matrix of equations (2.1) and (3.1), the linear map that the layer applies to an
    image. The penalty draws the singular values of M towards √α.

    Keras passes a regularizer only the kernel. You must repeat the layer's input size, strides, padding,
    dilation and groups. A wrong value that still fits the kernel's shape is not detected. Two mistakes are
    likely. The default padding is "valid" in Keras' layers and "same" in this class. With LoRA, a `Dense`
    layer passes its two factors in place of the kernel.

    With padding="same" and strides of 1, R_α is smallest for kernels with one tap only. A large `factor` then
    turns a 3×3 convolution into a 1×1 one. With padding="valid", or with larger strides, kernels of several
    taps can reach the smallest value too. padding="circular" penalises the operator without border, and its
    minimisers use all taps.

    Args:
        input_size: Spatial size of the layer's input, an int or one int per axis. () for `Dense`.
        factor: Weight of the penalty, at least 0.
        alpha: α, the target of σ². Positive.
        strides: As given to the layer.
        padding: As given to the layer, or "circular".
        dilation_rate: As given to the layer.
        groups: As given to the layer.
        kind: "conv", "depthwise" or "transpose", by the type of the layer.
        reduction: "mean" divides R_α by the number of columns of M, so that one factor suits layers of any
            size. "sum" is R_α itself, in units of σ⁴.
        method: "closed_form" costs the same for every image size. "sparse" forms M. Both are exact.
        scale: Multiplier of `factor` that `FactorSchedule` changes. It is saved with the model.

    Raises:
        ValueError: If an argument is invalid. An argument that does not fit the kernel raises when the
            penalty is first computed: by `layer.losses` or in the first step of `fit`.
        TypeError: If an argument has the wrong type.

    Example:
        >>> layer = keras.layers.Conv2D(
        ...     8, 3, padding="same", kernel_regularizer=FrobeniusRegularizer(input_size=28))
        >>> _ = layer(keras.ops.zeros((1, 28, 28, 1)))
        >>> len(layer.losses), float(layer.losses[0]) > 0
        (1, True)
    """

    def __init__(
        self,
        input_size: Size,
        factor: float = 0.01,
        alpha: float = 1.0,
        *,
        strides: Size = 1,
        padding: str = "same",
        dilation_rate: Size = 1,
        groups: int = 1,
        kind: str = "conv",
        reduction: str = "mean",
        method: str = "closed_form",
        scale: float = 1.0,
    ) -> None:
        super().__init__(factor, scale)
        self.alpha = check_constant("alpha", alpha, exclusive=True)
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)
        self.method = check_choice("method", method, METHODS)
        geometry = Geometry(
            strides=strides, padding=padding, dilation_rate=dilation_rate, groups=groups, kind=kind
        )
        self.take_geometry(input_size, geometry)

    def evaluate(self, x: Any, kernel: Any, weight: Weight) -> Any:
        """Returns weight·R_α, divided by the number of columns if `reduction` is "mean"."""
        conv = self.convolution(kernel.shape)
        if self.reduction == "mean":
            weight = weight.times(1 / conv.shape[1])
        check_alpha_fits(self.alpha, kernel)
        return FrobeniusPenalty(conv, self.alpha, self.method).weighted(kernel, weight)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments as plain values."""
        return {
            **super().get_config(),
            "alpha": self.alpha,
            "reduction": self.reduction,
            "method": self.method,
            **self.geometry_config(),
        }


@keras.saving.register_keras_serializable(package="tf_frobreg")
class SpectralRegularizer(TakesGeometry, WeightedRegularizer):
    """Penalises a kernel by `factor`·‖MᵀM − αI‖₂, the earlier penalty of Guo and Ye (arXiv:1906.04866).

    `spectral_penalty` defines it. Each evaluation takes a few power steps. They start from the vector that
    the last evaluation of the same kernel reached. While training moves the kernel slowly, two steps follow
    the σ that is farthest from √α. The value is too small until the steps have converged. The vectors are not
    saved with a model. A loaded model starts from a random vector.

    Args:
        input_size: Spatial size of the layer's input, an int or one int per axis. () for `Dense`.
        factor: Weight of the penalty, at least 0.
        alpha: α, the target of σ². Positive.
        gram: "columns" for MᵀM, or "smaller" for MMᵀ if M has more columns than rows. With "columns" the
            gradient of such an M ends at zero.
        power_steps: Power steps at each evaluation.
        scale: Multiplier of `factor` that `FactorSchedule` changes. It is saved with the model.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups` and `kind` of the layer, as for
            `tf_frobreg.Convolution`.

    Raises:
        ValueError: If an argument is invalid. An argument that does not fit the kernel raises when the
            penalty is first computed.
        TypeError: If an argument has the wrong type.

    Example:
        >>> regularizer = SpectralRegularizer(input_size=8, factor=0.1, gram="smaller")
        >>> layer = keras.layers.Conv2D(4, 3, padding="same", kernel_regularizer=regularizer)
        >>> _ = layer(keras.ops.zeros((1, 8, 8, 3)))
        >>> values = [layer.losses[0].numpy() for _ in range(200)]  # each one takes two more power steps
        >>> from tf_frobreg import singular_values
        >>> sigma = singular_values(layer.kernel, 8)
        >>> print(abs(values[-1] - 0.1 * abs(sigma**2 - 1).max()) < 1e-3)
        True
    """

    def __init__(
        self,
        input_size: Size,
        factor: float = 0.01,
        alpha: float = 1.0,
        *,
        gram: str = "columns",
        power_steps: int = 2,
        scale: float = 1.0,
        **geometry: Unpack[Geometry],
    ) -> None:
        super().__init__(factor, scale)
        self.alpha = check_constant("alpha", alpha, exclusive=True)
        self.gram = check_gram(gram)
        self.power_steps = check_integer("power_steps", power_steps)
        self.take_geometry(input_size, geometry)
        # Maps each kernel to (weak reference to the kernel or None, variable with its vector).
        self._vectors: dict[Any, tuple[weakref.ref | None, Any]] = {}

    def evaluate(self, x: Any, kernel: Any, weight: Weight) -> Any:
        """Returns weight·‖MᵀM − αI‖₂."""
        check_alpha_fits(self.alpha, kernel)
        conv = self.convolution(kernel.shape)
        vector = self._vector(x, dtype_of(kernel), conv)
        return weighted(lambda kernel: self._iterate(kernel, vector, conv), kernel, weight)

    def _iterate(self, kernel: Any, vector: Any, conv: Convolution) -> Any:
        """Returns the penalty, and keeps the vector that its power steps reach."""
        if vector is None:
            start = keras.ops.convert_to_tensor(start_vector(conv, self.gram, dtype_of(kernel)))
            steps = max(self.power_steps, STEPS_WITHOUT_STATE)
            return power_iteration(kernel, start, conv, self.alpha, self.gram, steps)[0]
        start = keras.ops.convert_to_tensor(vector)
        value, new = power_iteration(kernel, start, conv, self.alpha, self.gram, self.power_steps)
        # A NaN loss of a diverging training must not stay in the vector.
        vector.assign(keras.ops.where(keras.ops.isfinite(value), new, start))
        return value

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments as plain values."""
        return {
            **super().get_config(),
            "alpha": self.alpha,
            "gram": self.gram,
            "power_steps": self.power_steps,
            **self.geometry_config(),
        }

    def _vector(self, x: Any, dtype: str, conv: Convolution) -> Any:
        """Returns the variable with the vector of this kernel. One regularizer can serve several layers.

        Returns None under JAX, whose traced functions keep nothing from one call to the next.
        """
        if keras.config.backend() == "jax":
            return None
        is_variable = hasattr(x, "assign")
        key = id(x) if is_variable else (conv.kernel_shape, dtype)
        owner, vector = self._vectors.get(key, (None, None))
        if vector is None or (owner is not None and owner() is not x):
            # Forget the kernels that are gone, because a new kernel can have the id of an old one.
            self._vectors = {k: (o, v) for k, (o, v) in self._vectors.items() if o is None or o() is not None}
            vector = new_variable(start_vector(conv, self.gram, dtype), "singular_vector")
            self._vectors[key] = (weakref.ref(x) if is_variable else None, vector)
        return vector

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_vectors": {}}  # a copy serves other kernels


@keras.saving.register_keras_serializable(package="tf_frobreg")
class ReshapedRegularizer(WeightedRegularizer):
    """Penalises a kernel by `factor`·‖WᵀW − αI‖²_F, with W the kernel reshaped to filters × the rest.

    W is not the transformation matrix of the layer, see `reshaped_penalty`. This class is here for
    comparison. It needs no geometry.

    Args:
        factor: Weight of the penalty, at least 0.
        alpha: α, the target of the squared singular values of W. Positive.
        scale: Multiplier of `factor` that `FactorSchedule` changes. It is saved with the model.

    Raises:
        ValueError: If an argument is invalid. The message names the argument.
        TypeError: If an argument has the wrong type.

    Example:
        >>> layer = keras.layers.Conv2D(9, 3, kernel_regularizer=ReshapedRegularizer(factor=0.1))
        >>> _ = layer(keras.ops.zeros((1, 8, 8, 1)))
        >>> float(layer.losses[0]) > 0
        True
    """

    def __init__(self, factor: float = 0.01, alpha: float = 1.0, *, scale: float = 1.0) -> None:
        super().__init__(factor, scale)
        self.alpha = check_constant("alpha", alpha, exclusive=True)

    def evaluate(self, x: Any, kernel: Any, weight: Weight) -> Any:
        """Returns weight·‖WᵀW − αI‖²_F."""
        check_alpha_fits(self.alpha, kernel)
        return weighted(lambda kernel: evaluate_reshaped(kernel, self.alpha), kernel, weight)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments as plain values."""
        return super().get_config() | {"alpha": self.alpha}
