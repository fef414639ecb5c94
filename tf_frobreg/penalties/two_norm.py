"""The penalty of Guo and Ye, the 2-norm ‖MᵀM − αI‖₂, by power steps that do not form M."""

import functools
from collections.abc import Callable
from typing import Any, Unpack

import keras
import numpy as np

from tf_frobreg.backends import compiled, dtype_of, in_full_precision
from tf_frobreg.checks import check_choice, check_integer, check_number
from tf_frobreg.convolution.apply import apply, apply_adjoint, check_images
from tf_frobreg.convolution.geometry import Convolution, Geometry, Size
from tf_frobreg.convolution.kernel import kernel_and_convolution
from tf_frobreg.penalties.units import check_alpha_fits

__all__ = ["spectral_penalty"]

GRAMS = ("columns", "smaller")
VECTORS = 9  # peak memory of the power steps, in float64 images of either side of M


def spectral_penalty(
    kernel: Any,
    input_size: Size | None = None,
    *,
    alpha: float = 1.0,
    gram: str = "columns",
    power_steps: int = 200,
    **geometry: Unpack[Geometry],
) -> Any:
    """Returns the 2-norm penalty ‖MᵀM − αI‖₂ = max |σ² − α|, estimated from below.

    This is the penalty of P.-C. Guo and Q. Ye (arXiv:1906.04866), reference [7] of the paper. Only the σ with
    the largest |σ² − α| matters. The gradient is that of one pair of singular vectors u and v,
    ∂(uᵀMᵀMv)/∂K. Power steps from a fixed random vector find the pair. Each step takes one convolution and
    one transposed convolution. `SpectralRegularizer` keeps the vectors and needs only two steps per
    evaluation.

    If M has more columns than rows, some σ are 0 for every kernel, and the penalty is at least α. The
    gradient is then zero if σmax² ≤ 2α. With gram="smaller" these σ do not count.

    Args:
        kernel: `(*kernel_size, in_channels, filters)`, float32 or float64; array, tensor or variable,
            or a built Keras layer.
        input_size: Spatial size of the input image, an int or one int per axis. A layer may know its own.
        alpha: α, the target of σ². Positive.
        gram: "columns" for MᵀM, as above. "smaller" for MMᵀ in its place if M has more columns than rows.
        power_steps: Number of products with the Gram matrix. With too few the value is too small. The error
            is about r^(2·power_steps), where r is the ratio of the two largest |σ² − α|.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups` and `kind`, as for
            `tf_frobreg.Convolution`.

    Returns:
        A scalar tensor of the kernel's dtype, in units of σ², differentiable once in `kernel`.

    Raises:
        ValueError: If an argument is invalid. The message names the argument.
        TypeError: If an argument has the wrong type.

    Example:
        Every σ² of twice the identity is 4. One filter of three channels leaves two thirds of the σ at 0:

        >>> import numpy as np
        >>> kernel = np.zeros((3, 3, 1, 1))
        >>> kernel[1, 1] = 2.0
        >>> print(spectral_penalty(kernel, 8).numpy())
        3.0
        >>> wide = np.ones((1, 1, 3, 1)) / 3**0.5
        >>> for gram in ("columns", "smaller"):
        ...     print(gram, abs(spectral_penalty(wide, 8, gram=gram).numpy().round(9)))
        columns 1.0
        smaller 0.0
    """
    alpha = check_number("alpha", alpha, exclusive=True)
    steps = check_integer("power_steps", power_steps)
    kernel, conv = kernel_and_convolution(kernel, input_size, geometry)
    check_alpha_fits(alpha, kernel)
    start = keras.ops.convert_to_tensor(start_vector(conv, check_gram(gram), dtype_of(kernel)))
    return _compiled(conv, alpha, gram, steps)(kernel, start)[0]


@in_full_precision
def power_iteration(
    kernel: Any, vector: Any, conv: Convolution, alpha: float, gram: str, steps: int
) -> tuple[Any, Any]:
    """Returns an estimate of the penalty, and the vector after the power steps.

    Args:
        kernel: Kernel of shape `conv.kernel_shape`.
        vector: Start of the power steps, from `start_vector` or from an earlier call.
        conv: The geometry.
        alpha: α, the target of σ².
        gram: "columns" or "smaller".
        steps: Number of power steps.

    Returns:
        (penalty, vector). The penalty is differentiable in `kernel`.
    """
    ahead, back = (apply_adjoint, apply) if _uses_mmt(conv, gram) else (apply, apply_adjoint)
    # The squares of large kernel entries, and of a large α, overflow long before the penalty does.
    largest = keras.ops.stop_gradient(keras.ops.max(keras.ops.abs(kernel)))
    scale = keras.ops.maximum(largest, keras.ops.cast(max(alpha**0.5, 1.0), dtype_of(kernel)))
    kernel, target = kernel / scale, alpha**0.5 / scale * (alpha**0.5 / scale)
    fixed = keras.ops.stop_gradient(kernel)

    def step(_: Any, vectors: tuple[Any, Any]) -> tuple[Any, Any]:
        right = vectors[1]
        # Without its history: PyTorch would keep that of every step.
        image = keras.ops.stop_gradient(back(fixed, ahead(fixed, right, conv), conv)) - target * right
        norm = _norm(image)
        is_zero = keras.ops.cast(norm == 0, dtype_of(norm))
        # If every σ² is α, the image is zero and the vector stays.
        return right, keras.ops.where(norm > 0, image / (norm + is_zero), right)

    # The last two vectors differ if σ² − α is equally large with both signs. One vector alone would then give
    # too small a value.
    left, right = keras.ops.fori_loop(0, steps, step, (vector, vector))
    left, right = keras.ops.stop_gradient(left), keras.ops.stop_gradient(right)
    both = ahead(kernel, keras.ops.concatenate([left, right], axis=0), conv)
    value = keras.ops.sum(both[0] * both[1]) - target * keras.ops.sum(left * right)
    return scale * (scale * keras.ops.abs(value)), right


def _norm(image: Any) -> Any:
    return keras.ops.sqrt(keras.ops.sum(image * image))


@functools.lru_cache(maxsize=8)
def _compiled(conv: Convolution, alpha: float, gram: str, steps: int) -> Callable[..., Any]:
    """Returns `power_iteration` as a traced function, because many eager steps are slow."""
    return compiled(lambda kernel, start: power_iteration(kernel, start, conv, alpha, gram, steps))


def start_vector(conv: Convolution, gram: str, dtype: str) -> np.ndarray:
    """Returns a random unit vector `(1, *size, channels)`, the same at every call."""
    shape = (1, *(conv.output_shape if _uses_mmt(conv, gram) else conv.input_shape))
    check_images(conv, VECTORS)
    vector = np.random.RandomState(0).standard_normal(shape)
    return (vector / np.linalg.norm(vector)).astype(dtype)


def check_gram(gram: Any) -> str:
    """Returns `gram` if it names a Gram matrix, or raises an error."""
    return check_choice("gram", gram, GRAMS)


def _uses_mmt(conv: Convolution, gram: str) -> bool:
    """Returns whether the Gram matrix is MMᵀ, not MᵀM."""
    return gram == "smaller" and conv.wide
