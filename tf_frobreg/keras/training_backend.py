"""What a training needs of Keras' backend: variables that traced functions read, and gradients of a loss."""

import contextlib
import operator
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_frobreg.backends import dtype_of


def new_variable(value: Any, name: str) -> Any:
    """Returns a variable that is not trained, with the value and dtype of a tensor or array.

    Several replicas hold the same value, and what the first one assigns counts. Returns None while Keras
    follows a model of PyTorch without data, because no variable can be made then.
    """
    if keras.config.backend() == "tensorflow":
        with tf.init_scope():  # the variable outlives the function that is being traced
            return tf.Variable(
                value, trainable=False, name=name, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA
            )
    is_torch = keras.config.backend() == "torch"
    # A tensor of the inference mode could not change later.
    with sys.modules["torch"].inference_mode(False) if is_torch else contextlib.nullcontext():
        tensor = keras.ops.convert_to_tensor(value)
        try:
            return keras.Variable(tensor, trainable=False, dtype=dtype_of(tensor), name=name)
        except ValueError:
            return None


def read_variable(variable: Any, dtype: str) -> Any:
    """Returns a variable as a tensor of `dtype`, while a function is being traced.

    TensorFlow reads it once per graph and replica. No operation of a graph must change it.
    """
    if keras.config.backend() != "tensorflow":
        return keras.ops.cast(variable, dtype)
    graph = tf.compat.v1.get_default_graph()
    known = graph.get_collection_ref("tf_frobreg_variables")  # inner graphs start with a copy
    key = (variable, dtype, tf.distribute.get_replica_context())
    for names, tensor in known:
        if tensor.graph is graph and all(map(operator.is_, names, key)):
            return tensor
    tensor = tf.cast(variable, dtype)
    known.append((key, tensor))
    return tensor


def keep_in_state(model: keras.Model, variable: Any) -> bool:
    """Makes a variable part of the state that Keras hands to a model's traced functions under JAX.

    Keras has no public way to add a variable to a built model that is not one of its weights, which files and
    `get_weights` hold. The states of random generators are such variables.

    Returns:
        Whether the variable was added.
    """
    if keras.config.backend() != "jax" or any(known is variable for known in model.variables):
        return False
    model._seed_generators.append(types.SimpleNamespace(state=variable))
    return True


def sample_counter(model: keras.Model) -> Callable[..., Any]:
    """Returns a function that returns how many samples the loss of this epoch is the mean of.

    The function returns 0 if Keras does not count them. Under JAX its arguments are what a training step
    takes, or what it returns beside its logs. The first of them is the state of the model. Without arguments
    the model's own variable is read. Looking through the model here keeps that out of each step.
    """
    counts = [metric.count for metric in model.metrics if metric.name == "loss" and hasattr(metric, "count")]
    if not counts:
        return lambda *arguments: 0.0
    place = next(place for place, variable in enumerate(model.metrics_variables) if variable is counts[0])

    def count(*arguments: Any) -> Any:
        if keras.config.backend() == "jax" and arguments:
            return arguments[0][3][place] + 0.0  # the step deletes what it takes
        # A new tensor, because PyTorch changes the old one. Reading the number would wait for the step.
        return keras.ops.convert_to_tensor(counts[0]) + 0.0

    return count


def new_training_function(model: keras.Model) -> Callable[..., Any]:
    """Returns a training function of a compiled model that Keras has not traced. The model keeps its own."""
    own, own_step = model.train_function, vars(model).get("train_step")
    # JAX remembers what it has traced of a method of the model, so this is another function.
    step = model.train_step
    model.train_step = lambda *arguments: step(*arguments)
    try:
        model.make_train_function(force=True)
        return model.train_function
    finally:
        del model.train_step
        if own_step is not None:  # the user has set it on this model
            model.train_step = own_step
        model.train_function = own


def gradient_function(
    function: Callable[[], Any], variables: Sequence[keras.Variable], others: Sequence[keras.Variable]
) -> Callable[[], list[Any]]:
    """Returns a function without arguments that computes the derivatives of a scalar.

    Args:
        function: A function without arguments that reads the variables and returns the scalar.
        variables: The variables to differentiate by. They need not be trainable.
        others: The other variables that `function` reads. JAX compiles it once, as a function of both.

    Returns:
        The function. It returns the derivative in each variable, or None where there is none.
    """
    backend = keras.config.backend()
    if backend == "jax":
        return _jax_gradients(function, variables, others)
    return lambda: (_tensorflow_gradients if backend == "tensorflow" else _torch_gradients)(
        function, variables
    )


def _tensorflow_gradients(function: Callable[[], Any], variables: Sequence[keras.Variable]) -> list[Any]:
    values = [variable.value for variable in variables]
    with tf.GradientTape() as tape:
        tape.watch(values)
        result = function()
    return tape.gradient(result, values)


def _torch_gradients(function: Callable[[], Any], variables: Sequence[keras.Variable]) -> list[Any]:
    values: list[Any] = [variable.value for variable in variables]
    frozen = [value for value in values if not value.requires_grad]
    for value in frozen:
        value.requires_grad_(True)
    try:
        return list(sys.modules["torch"].autograd.grad(function(), values, allow_unused=True))
    finally:
        for value in frozen:
            value.requires_grad_(False)


def _jax_gradients(
    function: Callable[[], Any], variables: Sequence[keras.Variable], others: Sequence[keras.Variable]
) -> Callable[[], list[Any]]:
    jax = sys.modules["jax"]

    def stateless(values: list[Any], state: list[Any]) -> Any:
        mapping = zip((*variables, *others), (*values, *state), strict=True)
        with keras.StatelessScope(state_mapping=list(mapping)):
            return function()

    compiled = jax.jit(jax.grad(stateless))
    return lambda: compiled([v.value for v in variables], [other.value for other in others])


def try_gradient(function: Callable[[Any], Any], shape: Sequence[int], dtype: str) -> bool:
    """Returns whether a scalar function of a kernel has a gradient, as far as the backend says.

    TensorFlow and JAX trace the function and its gradient without computing. PyTorch computes both for zeros.
    Under JAX the gradient of a constant is zero, and counts. Raises what the function raises.
    """
    if keras.config.backend() == "tensorflow":
        slopes: list[Any] = []

        def trace(kernel: Any) -> None:
            with tf.GradientTape() as tape:
                tape.watch(kernel)
                value = function(kernel)
            slopes.append(tape.gradient(value, kernel))

        tf.function(trace, autograph=False).get_concrete_function(tf.TensorSpec(shape, dtype))
        return all(slope is not None for slope in slopes)
    if keras.config.backend() == "jax":
        jax = sys.modules["jax"]
        jax.eval_shape(jax.grad(function), jax.ShapeDtypeStruct(tuple(shape), dtype))
        return True
    kernel = keras.ops.zeros(shape, dtype).requires_grad_(True)
    value = function(kernel)
    if not value.requires_grad:
        return False
    return sys.modules["torch"].autograd.grad(value, kernel, allow_unused=True)[0] is not None


def scope_of(model: keras.Model) -> contextlib.AbstractContextManager:
    """Returns the scope in which variables of a model are made, for TensorFlow's strategies."""
    strategy = getattr(model, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()
