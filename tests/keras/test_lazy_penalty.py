"""Penalties that are not computed at every step: LazyPenalty, and any weight of 0."""

import collections
import contextlib
import pickle
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from ids import stable_id
from small_models import fit_epochs, penalised_model

from tf_frobreg import (
    FactorSchedule,
    FrobeniusRegularizer,
    FunctionRegularizer,
    LazyPenalty,
    ReshapedRegularizer,
    SpectralRegularizer,
    SumRegularizer,
    attach_regularizers,
)
from tf_frobreg.keras.model_weight import ModelWeight
from tf_frobreg.keras.shared_weight import find_penalties, share_weight

LAYERS = keras.layers
MODES = ["eager", "graph", "jit"]


def sum_of_squares(kernel, convolution):
    return tf.reduce_sum(kernel**2)


# Each takes the factor and other arguments.
PENALTIES = {
    "closed form": lambda factor, **o: FrobeniusRegularizer(6, factor, **o),
    "groups": lambda factor, **o: FrobeniusRegularizer(6, factor, groups=2, **o),
    "sparse": lambda factor, **o: FrobeniusRegularizer(6, factor, method="sparse", **o),
    "spectral": lambda factor, **o: SpectralRegularizer(6, factor, **o),
    "reshaped": ReshapedRegularizer,
    "function": lambda factor, **o: FunctionRegularizer(sum_of_squares, 6, factor, **o),
    "sum": lambda factor, **o: SumRegularizer(
        [FrobeniusRegularizer(6, factor, **o), SumRegularizer([ReshapedRegularizer(factor, **o)])]
    ),
}
HEAVY = {"MatMul", "BatchMatMulV2", "Einsum", "L2Loss", "Sum", "Square", "Conv2D", "SparseTensorDenseMatMul"}
WHOLE = np.random.RandomState(0).randn(3, 3, 2, 4)
KERNELS = {
    "finite": WHOLE,
    "nan": np.where(WHOLE > 1, np.nan, WHOLE),
    "inf": np.where(WHOLE > 1, np.inf, WHOLE),
    "one tap": WHOLE[:1, :1],
}


def value_and_gradient(penalty, mode):
    """A function of the kernel that returns the penalty and its gradient."""

    def both(kernel):
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            value = penalty(kernel)
        return value, tape.gradient(value, kernel)

    return both if mode == "eager" else tf.function(both, jit_compile=mode == "jit")


def weight_of_a_model(penalty):
    """The weight of a model with this penalty alone, with its variable."""
    weight = ModelWeight()
    weight.make_variable()
    share(penalty, weight)
    return weight


def share(penalty, weight):
    """Gives a penalty, or the parts of a sum, the weight of a model."""
    for part in getattr(penalty, "regularizers", [penalty]):
        if isinstance(part, SumRegularizer):
            share(part, weight)
        else:
            part.model_weight = weight


def assert_nothing(found, kernel):
    value, gradient = found
    assert float(value) == 0.0
    assert not np.signbit(value)
    np.testing.assert_array_equal(gradient, np.zeros(kernel.shape))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PENALTIES)
def test_a_weight_of_zero_gives_exactly_zero(name, mode, kernel):
    kernel = tf.constant(KERNELS[kernel], tf.float32)
    for penalty in (PENALTIES[name](0.0), PENALTIES[name](0.5, scale=0.0)):
        assert_nothing(value_and_gradient(penalty, mode)(kernel), kernel)


@pytest.mark.parametrize("name", PENALTIES)
def test_a_weight_that_changes_reaches_a_function_traced_before(name):
    """Once 0, the weight gives exactly zero, also for a kernel that is not finite."""
    for mode in MODES:
        penalty = PENALTIES[name](0.5)
        kernel, nan = (tf.constant(KERNELS[one], tf.float32) for one in ("finite", "nan"))
        plain, slope = value_and_gradient(PENALTIES[name](0.5), "eager")(kernel)
        weight = weight_of_a_model(penalty)
        function = value_and_gradient(penalty, mode)
        weight.set_scale(0.0)
        assert_nothing(function(nan), kernel)
        weight.set_scale(4.0)
        value, gradient = function(kernel)
        assert float(value) == pytest.approx(4 * float(plain), rel=1e-5)
        np.testing.assert_allclose(gradient, 4 * slope, rtol=1e-4, atol=1e-4)
        weight.set_scale(0.0)
        assert_nothing(function(nan), kernel)


def operations(graph, *, branches):
    """The types of the operations of a graph and of the functions it calls, with conditionals or without."""
    definition = graph.as_graph_def()
    functions = {function.signature.name: function.node_def for function in definition.library.function}
    found, todo = set(), list(definition.node)
    while todo:
        node = todo.pop()
        found.add(node.op)
        if branches or node.op not in ("If", "StatelessIf"):
            names = {attribute.func.name for attribute in node.attr.values()} - {""}
            todo += [inner for name in names for inner in functions.pop(name, [])]
    return found


@pytest.mark.parametrize("kernel", ["finite", "one tap"])
@pytest.mark.parametrize("name", PENALTIES)
def test_every_operation_stands_in_a_branch(name, kernel):
    kernel = tf.TensorSpec(KERNELS[kernel].shape)
    penalty = PENALTIES[name](0.5)
    weight_of_a_model(penalty)
    graph = value_and_gradient(penalty, "graph").get_concrete_function(kernel).graph
    assert operations(graph, branches=True) & HEAVY
    assert not operations(graph, branches=False) & HEAVY


@pytest.mark.parametrize("mode", MODES)
def test_a_function_is_not_called(mode):
    calls = tf.Variable(0)

    def counted(kernel, convolution):
        calls.assign_add(1)
        return tf.reduce_sum(kernel)

    penalty = FunctionRegularizer(counted, 6, 0.5)
    weight = weight_of_a_model(penalty)
    function = value_and_gradient(penalty, mode)
    found = []
    for multiplier in (1.0, 0.0, 0.0, 3.0, 0.0):
        weight.set_scale(multiplier)
        function(tf.constant(WHOLE, tf.float32))
        found.append(int(calls))
    assert found == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("mode", MODES)
def test_the_power_steps_rest(mode):
    """A penalty that has rested goes on where it was."""
    kernel = tf.constant(WHOLE, tf.float32)
    found = []
    for multipliers in ((1.0, 1.0, 1.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0)):
        penalty = SpectralRegularizer(6, 1.0)
        weight = weight_of_a_model(penalty)
        function, values = value_and_gradient(penalty, mode), []
        for multiplier in multipliers:
            weight.set_scale(multiplier)
            values.append(float(function(kernel)[0]))
        found.append([value for value in values if value])
    assert found[0] == found[1]
    assert found[0][0] < found[0][1] < found[0][2]


class StepLosses(keras.callbacks.Callback):
    """Keeps the loss of each step. Keras reports the mean over the epoch so far."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def on_epoch_begin(self, epoch, logs=None):
        self._sum, self._count = 0.0, 0

    def on_train_batch_end(self, batch, logs=None):
        self._count += 1
        total = float(logs["loss"]) * self._count
        self.losses.append(total - self._sum)
        self._sum = total


def still(**options):
    """A model whose optimizer does nothing. Its penalty is large."""
    options = {"optimizer": keras.optimizers.SGD(0.0)} | options
    model = penalised_model(factor=1.0)
    model.compile(loss="mse", **options)
    return model


def forget_steps(model):
    """Sets the optimizer's count of batches to 0."""
    getattr(model.optimizer, "inner_optimizer", model.optimizer)._iterations.assign(0)


def weights_of_steps(model, *callbacks, **options):
    """The weight of the penalties in each step of a training, which its loss shows."""
    penalty = sum(map(float, model.losses))
    plain, losses = StepLosses(), StepLosses()
    fit_epochs(model, plain, **options)
    forget_steps(model)
    fit_epochs(model, *callbacks, losses, **options)
    return 1 + (np.array(losses.losses) - plain.losses) / penalty


EVERY_THIRD = [3, 0, 0, 3, 0, 0, 3, 0]


@pytest.mark.parametrize(
    "options",
    [{}, {"run_eagerly": True}, {"jit_compile": True}, {"optimizer": "accumulates"}],
    ids=stable_id,
)
def test_every_third_step_has_three_times_the_weight(options):
    if "optimizer" in options:
        options = {"optimizer": keras.optimizers.SGD(0.0, gradient_accumulation_steps=2)}
    found = weights_of_steps(still(**options), LazyPenalty(3), epochs=2)
    np.testing.assert_allclose(found, EVERY_THIRD, atol=1e-4)


def test_another_n_in_a_later_training():
    model = still()
    for every in (3, 2, 3):
        forget_steps(model)
        expected = [every if step % every == 0 else 0 for step in range(8)]
        np.testing.assert_allclose(weights_of_steps(model, LazyPenalty(every), epochs=2), expected, atol=1e-4)


def test_the_other_steps_have_the_operations_of_the_model_without_penalties():
    """Except for one penalty, whose gradient is 0."""

    def operations(model, multiplier=None):
        step = tf.function(lambda x, y: model.train_step((x, y)), autograph=False)
        weight = share_weight(model, find_penalties(model, "")) if multiplier is not None else None
        with weight.in_step(multiplier) if weight else contextlib.nullcontext():
            graph = step.get_concrete_function(*map(tf.constant, data())).graph
        assert not [f for f in graph.as_graph_def().library.function if f.attr["_noinline"].b] or multiplier
        return [operation.type for operation in graph.get_operations()]

    def deep(factor):
        conv = [LAYERS.Conv2D(2, 3, padding="same") for _ in range(5)]
        model = keras.Sequential([keras.Input((8, 8, 2)), *conv, LAYERS.Flatten(), LAYERS.Dense(1)])
        if factor:
            attach_regularizers(model, factor)
        model.compile("sgd", "mse")
        return model

    plain, lazy = operations(deep(0.0)), operations(deep(0.1), 0.0)
    heavy = {"MatMul", "BatchMatMulV2", "Conv2D", "AddN", "PartitionedCall", "StatelessIf", "If", "Mul"}
    counts = [collections.Counter(kind for kind in found if kind in heavy) for found in (plain, lazy)]
    assert counts[1] - counts[0] <= collections.Counter({"AddN": 1, "Mul": 0})
    assert len(operations(deep(0.1), 2.0)) > len(lazy)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_model_whose_only_losses_are_penalties():
    """Keras refuses a step without any gradient."""
    model = keras.Sequential([keras.Input((8, 8, 2)), LAYERS.Conv2D(4, 3), LAYERS.Conv2D(4, 3)])
    attach_regularizers(model, 1.0)
    model.compile(keras.optimizers.SGD(0.0))
    penalty = sum(map(float, model.losses))
    lazy = StepLosses()
    model.fit(*data(), batch_size=8, verbose=0, callbacks=[LazyPenalty(3), lazy])
    np.testing.assert_allclose(np.array(lazy.losses) / penalty, [3, 0, 0, 3], atol=1e-4)


def test_a_step_is_an_execution():
    model = still(steps_per_execution=2)
    found = weights_of_steps(model, LazyPenalty(every=3), batch_size=4, epochs=2)
    np.testing.assert_allclose(found, EVERY_THIRD, atol=1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_mixed_precision_with_a_loss_scale():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = still()
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        found = weights_of_steps(model, LazyPenalty(3), epochs=2)
    finally:
        keras.config.set_dtype_policy("float32")
    np.testing.assert_allclose(found, EVERY_THIRD, atol=1e-2)


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "second"])
@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_a_schedule_beside_it(unit, is_first):
    """The weights are the products of the two, in either order of the callbacks."""
    schedule, lazy = FactorSchedule(lambda n: 0.5 + n, unit=unit), LazyPenalty(3)
    callbacks = [lazy, schedule] if is_first else [schedule, lazy]
    model = still()
    penalty = model.get_layer("conv").kernel_regularizer
    found = weights_of_steps(model, *callbacks, epochs=2)
    numbers = np.arange(8) if unit == "step" else np.arange(8) // 4
    np.testing.assert_allclose(found, EVERY_THIRD * (0.5 + numbers), atol=1e-3)
    assert penalty.scale == 0.5 + numbers[-1]
    assert penalty.get_config()["scale"] == penalty.scale


def data(count=32):
    random = np.random.RandomState(0)
    return random.rand(count, 8, 8, 2).astype("float32"), random.rand(count, 1).astype("float32")


def losses_of(model, *callbacks, epochs=3, batch_size=8, **options):
    """The loss of each epoch, with the validation loss beside it if there are such data."""
    x, y = options.pop("x", None), None
    if x is None:
        x, y = data()
        options |= {"batch_size": batch_size, "validation_data": (x, y)}
    options |= {"epochs": epochs, "shuffle": False, "verbose": 0, "callbacks": list(callbacks)}
    return model.fit(x, y, **options).history


@pytest.mark.parametrize(
    ("every", "options"),
    [
        *((every, {}) for every in (2, 3, 4, 5, 100)),
        (3, {"steps_per_execution": 2}),
        (4, {"steps_per_execution": 3}),
        (2, {"batch_size": 12}),
        (5, {"batch_size": 12}),
    ],
    ids=stable_id,
)
def test_the_losses_of_an_epoch_are_the_ordinary_ones(every, options):
    """Also if the steps of an epoch are no multiple of n, and if the last batch or execution is smaller."""
    options = dict(options)
    batch_size = options.pop("batch_size", 8)
    model = still(**options)
    plain = losses_of(model, batch_size=batch_size)
    forget_steps(model)
    lazy = losses_of(model, LazyPenalty(every), batch_size=batch_size)
    np.testing.assert_allclose(lazy["loss"], plain["loss"], rtol=1e-5)
    np.testing.assert_allclose(lazy["val_loss"], plain["val_loss"], rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*ran out of data")
@pytest.mark.parametrize("every", [2, 3])
def test_data_of_unknown_length(every):
    """Keras starts a step before it finds that there is no batch left."""
    x, y = data(24)
    batches = tf.data.Dataset.from_generator(
        lambda: ((x[i : i + 8], y[i : i + 8]) for i in range(0, 24, 8)),
        output_signature=(tf.TensorSpec((None, 8, 8, 2)), tf.TensorSpec((None, 1))),
    )
    model, steps = still(), StepLosses()
    plain = losses_of(model, x=batches)["loss"]
    forget_steps(model)
    np.testing.assert_allclose(
        losses_of(model, LazyPenalty(every), steps, x=batches)["loss"], plain, rtol=1e-5
    )
    counts = np.array([loss > plain[0] for loss in steps.losses])
    np.testing.assert_array_equal(counts, np.arange(9) % every == 0)


class InARegularizerOfTheUser(keras.regularizers.Regularizer):
    """Halves a penalty."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, kernel):
        return 0.5 * self.inner(kernel)


def test_the_correction_counts_the_penalty_of_a_users_class():
    x = keras.Input((8, 8, 2))
    penalty = InARegularizerOfTheUser(FrobeniusRegularizer(8, 1.0, padding="valid"))
    conv = LAYERS.Conv2D(4, 3, kernel_regularizer=penalty)(x)
    model = keras.Model(x, LAYERS.Dense(1)(LAYERS.Flatten()(conv)))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    plain = losses_of(model)["loss"]
    forget_steps(model)
    np.testing.assert_allclose(losses_of(model, LazyPenalty(3))["loss"], plain, rtol=1e-5)


def trained(*callbacks, steps=None, optimizer=None, **options):
    """The kernels after a training."""
    model = penalised_model(factor=0.3)
    model.compile(optimizer or keras.optimizers.SGD(0.01), "mse")
    fit_epochs(model, *callbacks, **options)
    return model.get_weights()


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_every_step_is_the_ordinary_training():
    plain = trained()
    assert_same(trained(LazyPenalty(1)), plain)
    assert not np.allclose(trained(LazyPenalty(4))[0], plain[0], rtol=1e-4)


def test_accumulated_gradients_have_the_mean_weight():
    """If `every` is the number of batches that are accumulated, training is the ordinary one."""
    found = [
        trained(*callbacks, optimizer=keras.optimizers.SGD(0.01, gradient_accumulation_steps=2))
        for callbacks in ((), (LazyPenalty(2),))
    ]
    assert_same(*found)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("accumulated", [None, 2])
def test_a_second_training_goes_on_in_phase(accumulated, scaled):
    optimizer = keras.optimizers.SGD(0.0, gradient_accumulation_steps=accumulated)
    model = still(optimizer=keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer)
    penalty, plain, losses = float(model.losses[0]), StepLosses(), StepLosses()
    fit_epochs(model, plain, epochs=1)
    forget_steps(model)
    for _ in range(3):  # 4 steps each
        fit_epochs(model, LazyPenalty(3), losses, epochs=1)
    found = 1 + (np.array(losses.losses) - 3 * plain.losses) / penalty
    np.testing.assert_allclose(found, [3, 0, 0] * 4, atol=1e-4)


def evaluate(model):
    return model.evaluate(*data(), verbose=0)


def test_after_training_the_penalties_are_ordinary(tmp_path):
    """The last step had no penalty."""
    model = still()
    before, config = evaluate(model), model.get_layer("conv").kernel_regularizer.get_config()
    penalty, names = float(model.losses[0]), [weight.path for weight in model.weights]
    fit_epochs(model, LazyPenalty(3), epochs=2)
    assert evaluate(model) == pytest.approx(before, rel=1e-6)
    assert float(model.losses[0]) == pytest.approx(penalty, rel=1e-6)
    assert model.get_layer("conv").kernel_regularizer.get_config() == config
    assert [weight.path for weight in model.weights] == names
    assert model.train_on_batch(*data()) == pytest.approx(before, rel=1e-5)
    model.reset_metrics()
    assert fit_epochs(model, epochs=2)["loss"] == pytest.approx([before, before], rel=1e-5)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert evaluate(loaded) == pytest.approx(before, rel=1e-6)
    assert loaded.get_layer("conv").kernel_regularizer.get_config() == config


class At(keras.callbacks.Callback):
    """Calls a function at an event of Keras, if a number is that of the event."""

    def __init__(self, event, number, function):
        super().__init__()
        setattr(self, event, lambda count, logs=None: function(self.model) if count == number else None)


def interrupt(model):
    raise KeyboardInterrupt


EVENTS = [
    ("on_train_batch_begin", 0),
    ("on_train_batch_begin", 1),
    ("on_train_batch_end", 0),
    ("on_train_batch_end", 1),
    ("on_epoch_begin", 1),
    ("on_epoch_end", 0),
]


class Watch(keras.callbacks.Callback):
    """Keeps the training function that Keras has made."""

    def on_train_begin(self, logs=None):
        self.function = self.model.train_function


def assert_ordinary(model, before, watch):
    """An interrupted training has left nothing behind."""
    assert evaluate(model) == pytest.approx(before, rel=1e-6)
    assert float(sum(model.losses)) > 0
    assert model.train_function is watch.function
    assert fit_epochs(model, epochs=1)["loss"][0] == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "second"])
@pytest.mark.parametrize(("event", "number"), EVENTS)
def test_a_callback_that_interrupts(event, number, is_first):
    model, watch = still(), Watch()
    before = evaluate(model)
    callbacks = [LazyPenalty(4), At(event, number, interrupt)]
    with pytest.raises(KeyboardInterrupt):
        fit_epochs(model, watch, *(callbacks if is_first else callbacks[::-1]))
    if (event, is_first) != ("on_train_batch_begin", True):  # the next step has its weight already
        assert_ordinary(model, before, watch)
    assert evaluate(model) == pytest.approx(before, rel=1e-6)
    fit_epochs(model, epochs=1)
    assert_ordinary(model, before, watch)


@pytest.mark.parametrize("batches", [2, 3])
def test_data_that_fail(batches):
    x, y = data(8)

    def generator():
        for _ in range(batches):
            yield x, y
        raise OSError("the disk is gone")

    model, watch = still(), Watch()
    before = evaluate(model)
    with pytest.raises(Exception, match="the disk is gone"):
        losses_of(model, watch, LazyPenalty(4), x=generator(), epochs=1, steps_per_epoch=4)
    assert_ordinary(model, before, watch)


class FailsOnce(LAYERS.Layer):
    """A layer that fails in its second call with these images."""

    calls = 0
    error = None

    def call(self, x):
        def fail(x):
            self.calls += 1
            if self.calls == 2 and self.error:
                raise self.error
            return x

        y = tf.py_function(fail, [x], x.dtype)
        y.set_shape(x.shape)
        return y


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("no more")], ids=repr)
def test_a_step_that_fails(error):
    """TensorFlow itself makes another error of it in a graph."""
    layer, watch = FailsOnce(), Watch()
    x = keras.Input((8, 8, 2))
    model = keras.Model(x, LAYERS.Dense(1)(LAYERS.Flatten()(LAYERS.Conv2D(4, 3, name="conv")(layer(x)))))
    attach_regularizers(model, 1.0, include="conv")
    model.compile(keras.optimizers.SGD(0.0), "mse", run_eagerly=isinstance(error, KeyboardInterrupt))
    before = evaluate(model)
    layer.calls, layer.error = 0, error
    with pytest.raises(BaseException, match="no more|"):
        fit_epochs(model, watch, LazyPenalty(4))
    layer.error = None
    assert_ordinary(model, before, watch)


@pytest.mark.parametrize(
    ("event", "number", "is_first"), [(*event, place % 2 == 0) for place, event in enumerate(EVENTS)]
)
def test_evaluate_within_a_callback(event, number, is_first):
    model, found = still(), []
    before = evaluate(model)
    callbacks = [LazyPenalty(4), At(event, number, lambda model: found.append(evaluate(model)))]
    fit_epochs(model, *(callbacks if is_first else callbacks[::-1]))
    assert found == pytest.approx([before] * len(found), rel=1e-6)
    assert found


def test_two_models_with_one_callback():
    lazy = LazyPenalty(3)
    models = still(), still()
    for model in (*models, models[0]):
        found = weights_of_steps(model, lazy, epochs=2)
        np.testing.assert_allclose(found, EVERY_THIRD, atol=1e-4)


def test_two_models_that_share_penalties():
    """A training of one does not change what the other one shows, whichever was trained first."""
    penalty = FrobeniusRegularizer(8, 1.0, reduction="mean")
    models = []
    for _ in range(2):
        layers = [LAYERS.Conv2D(4, 3, padding="same", kernel_regularizer=penalty), LAYERS.Flatten()]
        model = keras.Sequential([keras.Input((8, 8, 2)), *layers, LAYERS.Dense(1)])
        model.compile(keras.optimizers.SGD(0.0), "mse")
        models.append(model)
    before = [evaluate(model) for model in models]
    for model in (*models, *models):
        np.testing.assert_allclose(weights_of_steps(model, LazyPenalty(3), epochs=2), EVERY_THIRD, atol=1e-4)
        assert [evaluate(model) for model in models] == pytest.approx(before, rel=1e-6)


def test_frozen_layers_have_no_penalty():
    model = still()
    model.get_layer("conv").trainable = False
    model.compile(keras.optimizers.SGD(0.0), "mse")
    plain = losses_of(model)["loss"]
    assert losses_of(model, LazyPenalty(3))["loss"] == pytest.approx(plain, rel=1e-6)


def test_no_epoch_at_all():
    model = still()
    before = evaluate(model)
    fit_epochs(model, LazyPenalty(3), epochs=0)
    assert evaluate(model) == before


class Own(keras.Model):
    """A model of the user, with a training step of its own."""

    def __init__(self):
        super().__init__()
        self.conv = LAYERS.Conv2D(4, 3, kernel_regularizer=FrobeniusRegularizer(8, 1.0, padding="valid"))
        self.top = LAYERS.Dense(1)

    def call(self, x):
        return self.top(keras.ops.reshape(self.conv(x), (-1, 144)))


class OwnStep(Own):
    """A model whose training step reports another loss."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x) - y) ** 2) + tf.add_n(self.losses)
        optimizer = self.optimizer or self.own_optimizer
        optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {"loss": loss}


class OwnOptimizer(OwnStep):
    """A model that is compiled without an optimizer."""

    def compile(self, optimizer, loss):
        super().compile(optimizer=None, loss=loss)
        self.own_optimizer = optimizer


def test_a_model_without_optimizer():
    model, lazy = OwnOptimizer(), StepLosses()
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model(data()[0])
    fit_epochs(model, LazyPenalty(3), lazy, epochs=1)
    assert lazy.losses[0] > 1.0 > lazy.losses[1]


@pytest.mark.parametrize("kind", [Own, OwnStep])
def test_a_model_of_the_user(kind):
    model = kind()
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model(data()[0])
    penalty, plain, lazy = float(model.losses[0]), StepLosses(), StepLosses()
    fit_epochs(model, plain, epochs=1)
    forget_steps(model)
    logs = fit_epochs(model, LazyPenalty(3), lazy, epochs=1)
    if kind is Own:
        found = 1 + (np.array(lazy.losses) - plain.losses) / penalty
        np.testing.assert_allclose(found, [3, 0, 0, 3], atol=1e-4)
    assert np.isfinite(logs["loss"]).all()


@pytest.mark.parametrize(
    ("every", "error", "message"),
    [
        (0, ValueError, "every must be at least 1. Received: every=0"),
        (-4, ValueError, "every must be at least 1"),
        (2.5, TypeError, "every must be an integer. Received: every=2.5"),
        (True, TypeError, "every must be an integer"),
        ("4", TypeError, "every must be an integer"),
        (None, TypeError, "every must be an integer"),
    ],
)
def test_bad_arguments(every, error, message):
    with pytest.raises(error, match=message):
        LazyPenalty(every)


def test_n_can_be_changed_between_trainings():
    callback = LazyPenalty(2)
    callback.every = 4
    np.testing.assert_allclose(weights_of_steps(still(), callback, epochs=1), [4, 0, 0, 0], atol=1e-4)
    with pytest.raises(ValueError, match="every must be at least 1. Received: every=0"):
        callback.every = 0
    assert callback.every == 4


def test_a_model_without_penalty_is_refused():
    with pytest.raises(ValueError, match="LazyPenalty needs a model with a penalty of this package"):
        fit_epochs(penalised_model(factor=0), LazyPenalty(4))


MIRRORED = """
import keras, numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from tf_frobreg import FactorSchedule, LazyPenalty, attach_regularizers

class Keep(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        found.append(float(logs["loss"]))

found = []
def train(scope):
    with scope:
        keras.utils.set_random_seed(1)
        layers = [keras.layers.Conv2D(4, 3, strides=2, name="conv"), keras.layers.Flatten()]
        model = keras.Sequential([keras.Input((8, 8, 2)), *layers, keras.layers.Dense(1)])
        attach_regularizers(model, 0.1, alpha=2.0)
        model.compile(keras.optimizers.SGD(1e-3), "mse")
    random = np.random.RandomState(0)
    x, y = random.rand(32, 8, 8, 2).astype("float32"), random.rand(32, 1).astype("float32")
    callbacks = [FactorSchedule(lambda epoch: [1.0, 0.5, 2.0][epoch]), LazyPenalty(3), Keep()]
    history = model.fit(x, y, batch_size=16, epochs=3, shuffle=False, verbose=0, callbacks=callbacks).history
    found.extend(history["loss"] + [model.evaluate(x, y, verbose=0)])

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
train(tf.device("CPU:0"))
train(strategy.scope())
print("found", *found)
"""


@pytest.mark.slow
def test_two_devices_have_the_losses_of_one():
    done = subprocess.run([sys.executable, "-c", MIRRORED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    values = [float(text) for text in done.stdout.split("found")[1].split()]
    assert len(values) == 20
    np.testing.assert_allclose(values[10:], values[:10], rtol=1e-5)


@pytest.mark.parametrize("validation", [1, 8, 64])
def test_validation_on_another_number_of_images(validation):
    model = still()
    random = np.random.RandomState(0)
    x, y = random.rand(64, 8, 8, 2).astype("float32"), random.rand(64, 1).astype("float32")
    options = {"batch_size": 8, "shuffle": False, "verbose": 0, "epochs": 2}
    options["validation_data"] = (x[:validation], y[:validation])
    plain = model.fit(x, y, **options).history
    model.optimizer.iterations.assign(0)
    lazy = model.fit(x, y, callbacks=[LazyPenalty(3)], **options).history
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(lazy[name], plain[name], rtol=1e-5)


def test_two_lazy_penalties():
    with pytest.raises(ValueError, match="one LazyPenalty. Received: two, with every=4 and every=2"):
        fit_epochs(still(), LazyPenalty(4), LazyPenalty(2), epochs=1)


def test_a_training_that_is_restored_goes_on_in_phase(tmp_path):
    """The step is read after BackupAndRestore has set it, in either order of the callbacks."""

    class Stops(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise RuntimeError

    whole = penalised_model()
    fit_epochs(whole, LazyPenalty(3), epochs=2)
    for number, lazy_first in enumerate((True, False)):
        backup = keras.callbacks.BackupAndRestore(tmp_path / str(number))
        callbacks = [LazyPenalty(3), backup] if lazy_first else [backup, LazyPenalty(3)]
        with pytest.raises(RuntimeError):
            fit_epochs(penalised_model(), *callbacks, Stops(), epochs=2)
        model = penalised_model()
        fit_epochs(model, *callbacks, epochs=2)
        for one, other in zip(model.get_weights(), whole.get_weights(), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8)


def test_a_used_callback_can_be_pickled():
    callback = LazyPenalty(3)
    fit_epochs(penalised_model(), callback, epochs=1)
    assert pickle.loads(pickle.dumps(callback)).every == 3
