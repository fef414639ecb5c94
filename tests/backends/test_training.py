"""Training with penalties under Keras' backend: the same losses as under TensorFlow, in every mode."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import reference
from calculus import to_float

import tf_frobreg
from tf_frobreg import (
    FactorSchedule,
    FrobeniusInitializer,
    LazyPenalty,
    SingularValueClip,
    SingularValueMonitor,
    SpectralRegularizer,
    attach_regularizers,
    detach_regularizers,
    extreme_singular_values,
    model_spectrum,
    regularize_model,
)

BACKEND = keras.config.backend()


def run_under(backend, folder, **environment):
    """What `reference.py` finds under another backend, in a process of its own."""
    subprocess.run(
        [sys.executable, Path(reference.__file__), folder],
        env=os.environ | {"KERAS_BACKEND": backend} | environment,
        check=True,
        capture_output=True,
    )
    return json.loads((folder / f"{backend}.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def here(folder):
    """What `reference.py` finds in this process."""
    reference.main(folder)
    return json.loads((folder / f"{BACKEND}.json").read_text())


@pytest.fixture(scope="module")
def under_tensorflow(here, folder):
    """What it finds under TensorFlow, after the model of this process was saved."""
    return run_under("tensorflow", folder) if BACKEND != "tensorflow" else here


@pytest.mark.parametrize("penalty", ["frobenius", "reshaped"])
def test_ten_steps_are_those_of_tensorflow(here, under_tensorflow, penalty):
    np.testing.assert_allclose(here[penalty]["before"], under_tensorflow[penalty]["before"], rtol=1e-5)
    np.testing.assert_allclose(here[penalty]["losses"], under_tensorflow[penalty]["losses"], rtol=1e-4)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="this is the reference")
def test_a_schedule_gives_the_losses_of_tensorflow(here, under_tensorflow):
    np.testing.assert_allclose(here["scheduled"], under_tensorflow["scheduled"], rtol=1e-4)


@pytest.mark.skipif(BACKEND != "jax", reason="the other backends have strategies of their own")
def test_two_devices_of_jax_give_the_losses_of_one(here, tmp_path):
    two = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "DATA_PARALLEL": "1"}
    found = run_under("jax", tmp_path, **two)
    for name in reference.PENALTIES:
        np.testing.assert_allclose(found[name]["losses"], here[name]["losses"], rtol=1e-5)
    np.testing.assert_allclose(found["scheduled"], here["scheduled"], rtol=1e-5)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="the tests under the other backends save and load")
def test_files_have_the_same_losses_under_the_other_backend(here, under_tensorflow, folder):
    np.testing.assert_allclose(under_tensorflow["loaded"][BACKEND], here["after"], rtol=1e-5)
    loaded = keras.saving.load_model(folder / "tensorflow.keras")
    np.testing.assert_allclose(reference.penalties(loaded), under_tensorflow["after"], rtol=1e-5)
    assert np.isfinite(reference.train(loaded, steps=1)).all()


MODES = [{"jit_compile": True}, {"jit_compile": False}, {"run_eagerly": True}]
CASES = [("frobenius", mode) for mode in MODES] + [("reshaped", {}), ("spectral", {})]


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of much
@pytest.mark.parametrize(("penalty", "options"), CASES, ids=str)
def test_the_penalty_is_part_of_the_gradient(penalty, options):
    """A large factor draws σmax towards 1. Without the penalty it stays."""
    found = []
    for factor in (0.0, 0.1):
        model = reference.start(penalty, factor, **options)
        losses = reference.train(model, steps=15)
        assert np.isfinite(losses).all()
        found.append(max(row.extremes.sigma_max for row in model_spectrum(model)))
    assert found[1] < found[0] - 0.1


@pytest.mark.skipif(BACKEND == "tensorflow", reason="its tensors are those of TensorFlow")
@pytest.mark.parametrize("penalty", reference.PENALTIES)
def test_a_step_makes_no_tensor_of_tensorflow(penalty, monkeypatch):
    import tensorflow as tf

    def refuse(*arguments, **options):
        raise AssertionError("a tensor of TensorFlow was made")

    model = reference.start(penalty)
    for name in ("convert_to_tensor", "constant", "zeros", "cast", "reshape", "function"):
        monkeypatch.setattr(tf, name, refuse)
    assert np.isfinite(reference.train(model, [FactorSchedule(lambda epoch: 0.5)], steps=2)).all()


def test_penalties_are_shown_by_evaluate():
    model = reference.start()
    x, y = reference.data()
    with_penalty = model.evaluate(x, y, verbose=0)
    total = sum(reference.penalties(model))
    detach_regularizers(model)
    model.compile("sgd", "mse")
    assert with_penalty - model.evaluate(x, y, verbose=0) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_a_schedule_takes_effect(unit):
    """The losses of a model whose optimizer does nothing show the factor alone."""
    model = reference.start()
    model.optimizer.learning_rate = 0.0
    names = [weight.path for weight in model.weights]
    total = sum(reference.penalties(model))
    plain = reference.train(model, steps=1)[0] - total
    model.optimizer.iterations.assign(0)
    schedule = FactorSchedule(lambda n: [1.0, 3.0, 0.5, 0.0][n], unit=unit)
    losses = reference.train(model, [schedule], steps=4)
    np.testing.assert_allclose(losses, plain + total * np.array([1.0, 3.0, 0.5, 0.0]), rtol=1e-5)
    assert model.get_layer("conv").kernel_regularizer.scale == 0.0
    assert [weight.path for weight in model.weights] == names  # what is saved does not change
    again = reference.train(model, [FactorSchedule(lambda n: 2.0)], steps=1)
    assert again[0] == pytest.approx(plain + 2 * total, rel=1e-5)


class Watch(keras.callbacks.Callback):
    """Keeps the loss of each step, and evaluates the model after the second one."""

    def __init__(self):
        super().__init__()
        self.losses, self.evaluated = [], []

    def on_epoch_begin(self, epoch, logs=None):
        self._sum, self._count = 0.0, 0

    def on_train_batch_end(self, batch, logs=None):
        self._count += 1
        self.losses.append(self._count * float(logs["loss"]) - self._sum)
        self._sum += self.losses[-1]
        if len(self.losses) == 2:
            self.evaluated = reference.penalties(self.model)


def still(penalty="frobenius", **options):
    """A model whose optimizer does nothing."""
    model = reference.start(penalty, 0.1, **options)
    model.optimizer.learning_rate = 0.0
    return model


def lazy_losses(model, *callbacks, batch_size=4, epochs=2):
    """The losses of steps and epochs, of 16 images."""
    watch = Watch()
    options = {"batch_size": batch_size, "epochs": epochs, "shuffle": False, "verbose": 0}
    history = model.fit(*reference.data(), callbacks=[*callbacks, watch], **options).history
    return np.array(watch.losses), history["loss"], watch.evaluated


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of much
@pytest.mark.parametrize(
    ("penalty", "options"),
    [*(("frobenius", mode) for mode in MODES), ("reshaped", {}), ("frobenius", {"steps_per_execution": 2})],
    ids=str,
)
def test_every_third_step_has_the_penalties(penalty, options):
    """The losses of a model whose optimizer does nothing show the weights. Elsewhere they are ordinary."""
    if BACKEND == "torch" and "steps_per_execution" in options:
        pytest.skip("Keras has no such option with PyTorch")
    model = still(penalty, **options)
    total, before = reference.penalties(model), model.evaluate(*reference.data(), verbose=0)
    size = 16 // (4 * options.get("steps_per_execution", 1))  # of the batches, for four steps
    plain, epochs, _ = lazy_losses(model, batch_size=size, epochs=2)
    model.optimizer.iterations.assign(0)
    lazy, again, seen = lazy_losses(model, LazyPenalty(3), batch_size=size, epochs=2)
    np.testing.assert_allclose(1 + (lazy - plain) / sum(total), [3, 0, 0, 3, 0, 0, 3, 0], atol=1e-3)
    np.testing.assert_allclose(again, epochs, rtol=1e-5)
    np.testing.assert_allclose(seen, total, rtol=1e-6)
    assert model.evaluate(*reference.data(), verbose=0) == pytest.approx(before, rel=1e-6)


def test_another_n_in_a_later_training():
    model = still()
    total, plain = sum(reference.penalties(model)), lazy_losses(model)[0]
    for every in (3, 2):
        model.optimizer.iterations.assign(0)
        weights = 1 + (lazy_losses(model, LazyPenalty(every))[0] - plain) / total
        expected = [every if step % every == 0 else 0 for step in range(8)]
        np.testing.assert_allclose(weights, expected, atol=1e-3)


def test_batches_of_unequal_size():
    model = still()
    _, epochs, _ = lazy_losses(model, batch_size=6)
    model.optimizer.iterations.assign(0)
    np.testing.assert_allclose(lazy_losses(model, LazyPenalty(2), batch_size=6)[1], epochs, rtol=1e-5)


def test_a_schedule_beside_a_lazy_penalty():
    model = still()
    total = sum(reference.penalties(model))
    plain = lazy_losses(model)[0]
    model.optimizer.iterations.assign(0)
    schedule = FactorSchedule(lambda step: 0.5 + step, unit="step")
    lazy = lazy_losses(model, LazyPenalty(3), schedule)[0]
    expected = np.array([3, 0, 0, 3, 0, 0, 3, 0]) * (0.5 + np.arange(8))
    np.testing.assert_allclose(1 + (lazy - plain) / total, expected, atol=1e-2)
    assert model.get_layer("conv").kernel_regularizer.scale == 7.5


def test_every_step_is_the_ordinary_training():
    plain, lazy = reference.start(), reference.start()
    np.testing.assert_allclose(reference.train(lazy, [LazyPenalty(1)]), reference.train(plain), rtol=1e-6)
    for left, right in zip(plain.get_weights(), lazy.get_weights(), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-7)


class Interrupts(keras.callbacks.Callback):
    """Interrupts the training after a step."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        if batch == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [0, 1])
def test_an_interruption_leaves_the_ordinary_penalties(step):
    model = still()
    before = model.evaluate(*reference.data(), verbose=0)
    with pytest.raises(KeyboardInterrupt):
        lazy_losses(model, LazyPenalty(3), Interrupts(step))
    assert model.evaluate(*reference.data(), verbose=0) == pytest.approx(before, rel=1e-6)
    assert reference.train(model, steps=1)[0] == pytest.approx(before, rel=1e-5)


def test_a_monitor_sees_the_kernels_of_each_step():
    model = reference.start()
    x, y = reference.data()
    monitor = SingularValueMonitor(unit="batch", gradient_data=(x, y))
    before = extreme_singular_values(model.get_layer("conv")).sigma_max
    reference.train(model, [monitor], steps=3)
    sigma = monitor.history["conv/sigma_max"]
    assert sigma[0] == pytest.approx(before, rel=1e-3)
    assert sigma[-1] == pytest.approx(extreme_singular_values(model.get_layer("conv")).sigma_max, rel=1e-3)
    assert len(set(sigma)) == 4
    norms = monitor.history["conv/gradient_norm"]
    assert np.isfinite(norms).all()
    assert norms[0] > 0


@pytest.mark.skipif(BACKEND == "tensorflow", reason="it is about tensors of another backend")
def test_a_function_must_stay_in_the_backend():
    def by_tensorflow(kernel, convolution):
        matrix = tf_frobreg.transformation_matrix(kernel, convolution.input_size, **convolution.geometry)
        return matrix.values[0]

    kernel = keras.Variable(np.ones((3, 3, 1, 1), "float32"))
    with pytest.raises(ValueError, match="function by_tensorflow must return a tensor of Keras' backend"):
        tf_frobreg.FunctionRegularizer(by_tensorflow, 5)(kernel)


@pytest.mark.skipif(BACKEND != "torch", reason="it is about PyTorch")
def test_the_inference_mode_of_torch_does_no_harm():
    import torch

    model = reference.start("spectral")
    with torch.inference_mode():
        reference.penalties(model)
    assert np.isfinite(reference.train(model, steps=2)).all()


def test_whole_models():
    model = reference.start(None)
    report = attach_regularizers(model, 0.1, 1.5)
    assert list(report.attached) == ["conv", "depthwise", "transpose", "top"]
    descent = regularize_model(model, include=["conv", "top"], max_steps=200)
    for row in model_spectrum(model):
        if row.name in descent.results:
            assert row.alpha == 1.5
            assert row.extremes.sigma_max == pytest.approx(1.5**0.5, rel=0.02)
    report.detach()
    assert not model.losses


def test_an_open_model_is_read_at_the_size_that_is_given():
    inputs = keras.Input((None, None, 2))
    conv = keras.layers.Conv2D(3, 3, strides=2, padding="same", name="first")(inputs)
    model = keras.Model(inputs, keras.layers.Conv2D(3, 3, name="second")(conv))
    with pytest.raises(ValueError, match="input_size"):
        attach_regularizers(model)
    report = attach_regularizers(model, input_size=(20, 15))
    sizes = {name: penalty.input_size for name, penalty in report.attached.items()}
    assert sizes == {"first": (20, 15), "second": (10, 8)}


def test_mixed_precision():
    """The penalty is that of the kernels in float32."""
    expected = reference.penalties(reference.start())
    keras.config.set_dtype_policy("mixed_float16" if BACKEND == "tensorflow" else "mixed_bfloat16")
    try:
        model = reference.start()
    finally:
        keras.config.set_dtype_policy("float32")
    np.testing.assert_allclose(reference.penalties(model), expected, rtol=1e-5)
    assert np.isfinite(reference.train(model, steps=2)).all()


def test_the_constraint_and_the_initializer():
    layer = keras.layers.Conv2D(
        4,
        3,
        padding="same",
        kernel_initializer=FrobeniusInitializer(8, seed=1),
        kernel_constraint=SingularValueClip(8, high=0.5),
        name="conv",
    )
    model = keras.Sequential([keras.Input((8, 8, 4)), layer])
    assert abs(extreme_singular_values(layer).sigma_max - 1) < 0.06
    assert keras.ops.is_tensor(FrobeniusInitializer(8, seed=1)((3, 3, 4, 4)))
    # XLA of TensorFlow has no decomposition of complex matrices.
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    images = np.ones((4, 8, 8, 4), "float32")
    model.fit(images, images, epochs=8, verbose=0)
    assert extreme_singular_values(layer, padding="circular").sigma_max < 0.55


def test_a_loop_in_the_manner_of_the_backend():
    """One step by hand moves the kernels as `fit` does."""
    fitted, by_hand = reference.start(), reference.start()
    x, y = reference.data()
    reference.train(fitted, steps=1)
    _STEPS[BACKEND](by_hand, x, y)
    for left, right in zip(fitted.get_weights(), by_hand.get_weights(), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)


def _tensorflow_step(model, x, y):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x, training=True) - y) ** 2) + sum(model.losses)
    model.optimizer.apply(tape.gradient(loss, model.trainable_weights), model.trainable_weights)


def _jax_step(model, x, y):
    import jax

    @jax.jit
    def step(trained, others, state):
        def loss_of(trained):
            predicted, _, losses = model.stateless_call(trained, others, x, training=True, return_losses=True)
            return jax.numpy.mean((predicted - y) ** 2) + sum(losses)

        gradients = jax.grad(loss_of)(trained)
        return model.optimizer.stateless_apply(state, gradients, trained)

    model.optimizer.build(model.trainable_variables)
    trained, _ = step(
        [variable.value for variable in model.trainable_variables],
        [variable.value for variable in model.non_trainable_variables],
        [variable.value for variable in model.optimizer.variables],
    )
    for variable, value in zip(model.trainable_variables, trained, strict=True):
        variable.assign(value)


def _torch_step(model, x, y):
    import torch

    loss = ((model(torch.tensor(x), training=True) - torch.tensor(y)) ** 2).mean() + sum(model.losses)
    loss.backward()
    model.optimizer.apply(
        [variable.value.grad for variable in model.trainable_weights], model.trainable_weights
    )


_STEPS = {"tensorflow": _tensorflow_step, "jax": _jax_step, "torch": _torch_step}


def test_the_two_norm_needs_no_state_under_jax():
    """Under JAX each evaluation gives the same value. Elsewhere the next one goes on from the last vector."""
    kernel = keras.Variable(np.random.RandomState(0).standard_normal((3, 3, 2, 4)).astype("float32"))
    regularizer = SpectralRegularizer(8, 1.0)
    values = [to_float(regularizer(kernel)) for _ in range(3)]
    sigma = tf_frobreg.singular_values(kernel, 8)
    largest = abs(sigma**2 - 1).max()
    assert values[2] <= largest * (1 + 1e-5)
    if BACKEND == "jax":
        assert values[0] == values[2] > 0.95 * largest
    else:
        assert values[2] > values[0]
