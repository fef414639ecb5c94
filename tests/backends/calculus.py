"""Derivatives by the means of Keras' backend, as its users write them."""

import sys

import keras
import numpy as np


def value_and_gradient(function, kernel, *, compiled=False):
    """The value of a function of a kernel and its gradient, as arrays."""
    backend = keras.config.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        def both(kernel):
            with tf.GradientTape() as tape:
                tape.watch(kernel)
                value = function(kernel)
            return value, tape.gradient(value, kernel)

        both = tf.function(both, jit_compile=True) if compiled else both
        found = both(tf.constant(kernel))
    elif backend == "jax":
        import jax

        both = jax.value_and_grad(function)
        found = (jax.jit(both) if compiled else both)(jax.numpy.asarray(kernel))
    else:
        import torch

        tensor = torch.tensor(kernel, requires_grad=True)
        value = function(tensor)
        found = value, torch.autograd.grad(value, tensor)[0]
    return tuple(keras.ops.convert_to_numpy(one) for one in found)


def hessian_vector_product(function, kernel, direction):
    """The second derivative of a function of a kernel along a direction."""
    backend = keras.config.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        kernel = tf.constant(kernel)
        with tf.GradientTape() as outer:
            outer.watch(kernel)
            with tf.GradientTape() as inner:
                inner.watch(kernel)
                value = function(kernel)
            slope = tf.reduce_sum(inner.gradient(value, kernel) * direction)
        found = outer.gradient(slope, kernel)
    elif backend == "jax":
        import jax

        slope = lambda kernel: (jax.grad(function)(kernel) * direction).sum()  # noqa: E731
        found = jax.grad(slope)(jax.numpy.asarray(kernel))
    else:
        import torch

        tensor = torch.tensor(kernel, requires_grad=True)
        (gradient,) = torch.autograd.grad(function(tensor), tensor, create_graph=True)
        (found,) = torch.autograd.grad((gradient * torch.tensor(direction)).sum(), tensor)
    return keras.ops.convert_to_numpy(found)


def has_float64():
    """Whether the backend computes in float64. JAX does if jax_enable_x64 is set."""
    return keras.config.backend() != "jax" or bool(sys.modules["jax"].config.jax_enable_x64)


def to_float(tensor):
    """A scalar as a number."""
    return float(np.asarray(keras.ops.convert_to_numpy(tensor)))
