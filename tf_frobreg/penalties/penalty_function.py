"""Scalar functions of a kernel that training can skip, and that can bring their own gradient."""

import sys
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tf_frobreg.backends import dtype_of, full_precision, is_known, not_compiled

# A function of the kernel. It returns a value, and a function without arguments that returns the gradient.
ValueAndSlope = Callable[[Any], tuple[Any, Callable[[], Any]]]


class PenaltyFunction:
    """A scalar function of a kernel with its own gradient, twice differentiable.

    TensorFlow traces value and gradient together, once per shape, as a function of its own that is not
    expanded in the graph of a training step. A graph with the operations of all kernels takes long to trace,
    to optimise and to start.

    Args:
        function: Returns the value, and a function that computes the gradient.
        any_shape: Whether TensorFlow traces it once for kernels of all shapes.
    """

    def __init__(self, function: ValueAndSlope, *, any_shape: bool = False) -> None:
        self._function = function
        self._any_shape = any_shape
        self._traced = tf.function(
            self._evaluate, autograph=False, experimental_attributes={"_noinline": True}
        )

    def __call__(self, kernel: Any, active: Any = True) -> Any:
        """Returns the value of the function, a scalar of the kernel's dtype.

        Args:
            kernel: The kernel, a tensor of TensorFlow or of Keras' backend.
            active: Whether to compute it: a bool or, in a function that is being traced, a scalar tensor. If
                it is false, value and gradient are 0.
        """
        if active is False:
            return nothing(kernel)
        if isinstance(kernel, tf.Tensor):
            return self._of_tensorflow(kernel, active)
        return self._of_keras(kernel, active)

    def _evaluate(self, kernel: Any, active: Any) -> tuple[Any, Any]:
        """Returns value and gradient."""

        def compute() -> tuple[Any, Any]:
            value, slope = self._function(kernel)
            return value, slope()

        if active is True:
            return compute()
        none = keras.ops.zeros((), dtype_of(kernel)), keras.ops.zeros_like(kernel)
        return keras.ops.cond(active, compute, lambda: none)

    def _apart(self, kernel: tf.Tensor, active: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns value and gradient by a call of a function apart."""
        if not self._any_shape:
            return self._traced(kernel, active)
        shape = [None] * len(kernel.shape)
        traced = self._traced.get_concrete_function(tf.TensorSpec(shape, kernel.dtype), active)
        value, gradient = traced(kernel) if active is True else traced(kernel, active)
        gradient.set_shape(kernel.shape)
        return value, gradient

    def _of_tensorflow(self, kernel: tf.Tensor, active: Any) -> tf.Tensor:
        @tf.custom_gradient
        def value(kernel: Any) -> tuple:
            if tf.executing_eagerly():
                found, slope = self._function(kernel)
            else:
                # Else two tapes would trace its derivatives. If that is outside XLA, XLA cannot compile them.
                found, gradient = self._apart(tf.stop_gradient(kernel), active)

            @tf.custom_gradient
            def differentiable(kernel: Any) -> tuple:
                def hessian_vector_product(direction: Any) -> Any:
                    with tf.GradientTape() as tape:  # rarely needed, so left to automatic differentiation
                        tape.watch(kernel)
                        again = self._evaluate(kernel, active)[1]
                    return tape.gradient(again, kernel, output_gradients=direction)

                return slope() if tf.executing_eagerly() else gradient, hessian_vector_product

            return found, lambda upstream: upstream * differentiable(kernel)

        return value(kernel)

    def _of_keras(self, kernel: Any, active: Any) -> Any:
        if keras.config.backend() == "torch" and not is_known(kernel):
            # torch.func and torch.vmap do not know this kind of gradient.
            return self._function(kernel)[0]

        def start(kernel: Any) -> tuple[Any, Callable[[], Any]]:
            if active is True:
                return self._function(kernel)
            found, gradient = self._evaluate(kernel, active)
            return found, lambda: gradient

        @keras.ops.custom_gradient
        def value(kernel: Any) -> tuple:
            with full_precision():
                found, slope = start(kernel)

            @not_compiled
            def first_order(*arguments: Any, upstream: Any = None) -> Any:
                if upstream is None:  # JAX passes only the derivative of what follows
                    return arguments[0] * slope()
                # PyTorch passes the kernel too. What `function` computed is no part of the graph of a second
                # derivative, for which PyTorch turns gradients on here.
                is_twice = sys.modules["torch"].is_grad_enabled()
                return upstream * (start(*arguments)[1] if is_twice else slope)()

            return found, first_order

        return value(kernel)


def evaluate_if(active: Any, function: Callable[[Any], Any], kernel: Any) -> Any:
    """Returns a scalar function of the kernel, or 0 without computing it if `active` is false.

    Args:
        active: A bool or, in a function that is being traced, a scalar tensor.
        function: The function. It may read variables.
        kernel: The kernel.
    """
    if isinstance(active, bool):
        return function(kernel) if active else nothing(kernel)
    zero = keras.ops.zeros((), dtype_of(kernel))
    return keras.ops.cond(active, lambda: function(kernel), lambda: zero)


def nothing(kernel: Any) -> Any:
    """Returns 0 with the gradient 0, whatever is in the kernel, a tensor or variable."""
    if keras.config.backend() == "torch":
        # PyTorch needs a gradient of every loss. One of the kernel would cost an array of its size.
        return keras.ops.zeros((), dtype_of(kernel)).requires_grad_()
    return keras.ops.sum(kernel[:0])
