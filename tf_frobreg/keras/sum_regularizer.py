"""The Keras regularizer that adds up others."""

from collections.abc import Callable, Iterable
from typing import Any

import keras

from tf_frobreg.checks import received
from tf_frobreg.keras.regularizer_base import Replacement, describe

__all__ = ["SumRegularizer"]


@keras.saving.register_keras_serializable(package="tf_frobreg")
class SumRegularizer(Replacement):
    """Adds up the values of several regularizers, so that a kernel can have more than one.

    Args:
        regularizers: Keras regularizers, their names or configurations, or functions of the kernel.

    Raises:
        ValueError: If `regularizers` is empty, or contains None or what Keras does not know.
        TypeError: If `regularizers` is not iterable.

    Example:
        >>> from tf_frobreg import ReshapedRegularizer
        >>> both = SumRegularizer([keras.regularizers.L2(0.5), ReshapedRegularizer(factor=1.0)])
        >>> print(float(both(keras.ops.ones((1, 1, 1, 1)))))
        0.5
    """

    def __init__(self, regularizers: Iterable[Any]) -> None:
        found = f"Received: {received('regularizers', regularizers)}"
        try:
            given = list(regularizers)
        except (TypeError, NotImplementedError):  # a tensor without values raises the latter
            raise TypeError(f"regularizers must be a list. {found}") from None
        try:
            self.regularizers: list[Callable[[Any], Any]] = [keras.regularizers.get(part) for part in given]
        except (TypeError, ValueError) as error:
            raise type(error)(f"regularizers must hold regularizers. {found}. Keras says: {error}") from error
        if not self.regularizers or any(part is None for part in self.regularizers):
            raise ValueError(f"regularizers must not be empty and must not contain None. {found}")

    def __call__(self, x: Any) -> Any:
        """Returns the sum, a scalar."""
        first, *others = (regularizer(x) for regularizer in self.regularizers)
        return sum(others, first)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({describe(self.regularizers)})"

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments as plain values."""
        return {"regularizers": [keras.regularizers.serialize(part) for part in self.regularizers]}


def regularizer_parts(regularizer: Any) -> list[Any]:
    """Returns the regularizers that a `SumRegularizer` adds up, including those of sums in it.

    Any other regularizer is its own only part. None has no part.
    """
    if isinstance(regularizer, SumRegularizer):
        return [part for summand in regularizer.regularizers for part in regularizer_parts(summand)]
    return [] if regularizer is None else [regularizer]
