"""What is watched and changed while a model trains."""

import csv
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from ids import stable_id

import tf_frobreg.keras.callbacks
from tf_frobreg import (
    FactorSchedule,
    FrobeniusRegularizer,
    ReshapedRegularizer,
    SingularValueMonitor,
    SpectralRegularizer,
    SumRegularizer,
    attach_regularizers,
    frobenius_penalty,
    singular_values,
)

LAYERS = keras.layers


def small_model(factor=0.01, **options):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            LAYERS.Conv2D(4, 3, padding="same", activation="relu", name="conv"),
            LAYERS.Flatten(),
            LAYERS.Dense(1, name="top"),
        ]
    )
    if factor:
        attach_regularizers(model, factor, reduction="mean", include="conv")
    model.compile(keras.optimizers.SGD(0.01), "mse", **options)
    return model


def fit(model, *callbacks, batch_size=8, epochs=3, initial_epoch=0):
    random = np.random.RandomState(0)
    x, y = random.rand(32, 8, 8, 2).astype("float32"), random.rand(32, 1).astype("float32")
    options = {"batch_size": batch_size, "shuffle": False, "verbose": 0, "initial_epoch": initial_epoch}
    return model.fit(x, y, epochs=epochs, callbacks=list(callbacks), **options).history


def test_the_monitor_writes_into_logs(tmp_path):
    model = small_model()
    monitor = SingularValueMonitor(include="conv")
    log = keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    history = fit(model, monitor, log)
    kernel = model.get_layer("conv").kernel
    sigma = singular_values(kernel, 8)
    assert history["conv/sigma_max"][-1] == pytest.approx(sigma[0], rel=1e-4)
    assert history["conv/sigma_min"][-1] == pytest.approx(sigma[-1], rel=1e-4)
    assert history["conv/penalty"][-1] == pytest.approx(float(frobenius_penalty(kernel, 8)), rel=1e-4)
    assert "top/sigma_max" not in history
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["conv/sigma_max"]) for row in rows] == pytest.approx(history["conv/sigma_max"])
    assert monitor.history["epoch"].tolist() == [0, 1, 2, 3]
    assert len(monitor.history["conv/penalty"]) == 4


def test_epochs_without_a_measurement_are_nan():
    monitor = SingularValueMonitor(2, sigma_min=False)
    history = fit(small_model(), monitor, epochs=4)
    assert np.isfinite(history["conv/sigma_max"]).tolist() == [False, True, False, True]
    assert np.isnan(history["conv/sigma_min"]).all()
    assert monitor.history["epoch"].tolist() == [0, 2, 4]


def test_batches_can_be_counted():
    monitor = SingularValueMonitor(3, unit="batch", include="conv")
    history = fit(small_model(), monitor, epochs=3)
    assert monitor.history["epoch"].tolist() == [0, 0.75, 1.5, 2.25, 3]
    assert history["conv/sigma_max"][-1] == monitor.history["conv/sigma_max"][-1]


def test_batches_are_counted_where_several_are_executed_together():
    monitor = SingularValueMonitor(3, unit="batch", include="conv")
    fit(small_model(steps_per_execution=2), monitor, epochs=3)
    assert monitor.history["epoch"].tolist() == [0, 1, 1.5, 2.5, 3]


@pytest.mark.skipif(keras.__version__.startswith("3.0."), reason="Keras 3.0 wants full executions")
def test_batches_are_counted_where_the_last_execution_is_not_full():
    monitor = SingularValueMonitor(3, unit="batch", include="conv")
    fit(small_model(steps_per_execution=3), monitor, epochs=2)  # of 3 and 1 batches
    assert monitor.history["epoch"].tolist() == [0, 0.75, 1.75]


def test_the_monitor_goes_on_in_another_fit():
    model, monitor = small_model(), SingularValueMonitor()
    fit(model, monitor, epochs=1)
    fit(model, monitor, epochs=1)  # counts from 0 again
    fit(model, monitor, epochs=3, initial_epoch=2)
    assert monitor.history["epoch"].tolist() == [0, 1, 2, 3]


def test_epochs_between_measurements_are_counted_over_several_fits():
    model, monitor = small_model(), SingularValueMonitor(2, include="conv")
    for _ in range(3):
        fit(model, monitor, epochs=3)
    assert monitor.history["epoch"].tolist() == [0, 2, 4, 6, 8]
    monitor = SingularValueMonitor(3, unit="batch", include="conv")
    for _ in range(4):
        fit(model, monitor, epochs=1, batch_size=16)
    assert monitor.history["epoch"].tolist() == [0, 1.5, 3]


def test_the_monitor_begins_where_training_does():
    monitor = SingularValueMonitor()
    fit(small_model(), monitor, epochs=3, initial_epoch=1)
    assert monitor.history["epoch"].tolist() == [1, 2, 3]


def test_the_monitor_begins_anew_with_another_model():
    monitor = SingularValueMonitor(include=LAYERS.Conv2D)
    fit(small_model(), monitor, epochs=1)
    fit(small_model(), monitor, epochs=2)  # its layers have the same names
    assert monitor.history["epoch"].tolist() == [0, 1, 2]


def test_time_is_bounded_and_reported(monkeypatch):
    original = tf_frobreg.keras.callbacks.report_kernel

    def slow(*arguments, **options):
        time.sleep(0.05)
        return original(*arguments, **options)

    monkeypatch.setattr(tf_frobreg.keras.callbacks, "report_kernel", slow)
    monitor = SingularValueMonitor(max_seconds=0.04)
    assert monitor.cost == "no measurement"
    history = fit(small_model(), monitor, epochs=3)
    # Two kernels, one at a time: conv before training, then the other, in turn.
    assert np.isfinite(history["top/sigma_max"]).tolist() == [True, False, True]
    assert np.isfinite(history["conv/sigma_max"]).tolist() == [False, True, False]
    assert monitor.cost.startswith("4 measurements, 0.")
    assert monitor.cost.endswith("% of the training's time")
    assert (monitor.history["seconds"] >= 0.05).all()


def test_a_kernel_that_was_not_reached_comes_first_in_the_next_fit(monkeypatch):
    measured = []
    original = tf_frobreg.keras.callbacks.report_kernel

    def slow(name, *arguments, **options):
        measured.append(name)
        time.sleep(0.05)
        return original(name, *arguments, **options)

    monkeypatch.setattr(tf_frobreg.keras.callbacks, "report_kernel", slow)
    model, monitor = small_model(), SingularValueMonitor(max_seconds=0.04)
    for _ in range(2):
        fit(model, monitor, epochs=1)
    assert measured == ["conv", "top", "conv"]
    measured.clear()
    fit(small_model(), monitor, epochs=1)
    assert measured == ["conv", "top"]


def test_arguments_are_attributes():
    arguments = {
        "every": 2,
        "unit": "batch",
        "include": ["conv"],
        "exclude": ["top"],
        "alpha": 2.0,
        "accuracy": 1e-3,
        "sigma_min": False,
        "max_seconds": 5.0,
        "max_iterations": 10,
        "gradient_data": (np.ones((2, 8, 8, 2)), np.ones((2, 1))),
        "input_size": (8, 8),
    }
    monitor = SingularValueMonitor(**arguments)
    assert {name: getattr(monitor, name) for name in arguments} == arguments


def test_gradient_norms_are_those_of_the_loss():
    model = small_model(factor=0)
    random = np.random.RandomState(1)
    x, y = random.rand(8, 8, 8, 2).astype("float32"), random.rand(8, 1).astype("float32")
    monitor = SingularValueMonitor(gradient_data=(x, y))
    fit(model, monitor, epochs=1)
    kernels = [layer.kernel.value for layer in (model.get_layer("conv"), model.get_layer("top"))]
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x) - y) ** 2)
    for name, gradient in zip(("conv", "top"), tape.gradient(loss, kernels), strict=True):
        assert monitor.history[f"{name}/gradient_norm"][-1] == pytest.approx(
            float(tf.norm(gradient)), rel=1e-4
        )
    assert len(monitor.plot_gradients().axes) == 1
    assert len(monitor.plot().axes) == 2
    with pytest.raises(ValueError, match="gradient_data must be given"):
        SingularValueMonitor().plot_gradients()
    with pytest.raises(ValueError, match="gradient_data must be a batch that suits the model and its loss"):
        fit(model, SingularValueMonitor(gradient_data=(x[:, :4], y)))


def test_gradient_norms_of_frozen_kernels_and_of_lora():
    model = small_model(factor=0)
    model.get_layer("conv").trainable = False
    model.get_layer("top").enable_lora(2)
    model.compile(keras.optimizers.SGD(0.01), "mse")
    random = np.random.RandomState(1)
    batch = random.rand(8, 8, 8, 2).astype("float32"), random.rand(8, 1).astype("float32")
    monitor = SingularValueMonitor(gradient_data=batch)
    fit(model, monitor, epochs=1)
    assert (monitor.history["conv/gradient_norm"] > 0).all()
    assert np.isnan(monitor.history["top/gradient_norm"]).all()


def test_the_monitor_does_not_change_the_training():
    expected = fit(small_model())["loss"]
    random = np.random.RandomState(1)
    batch = random.rand(8, 8, 8, 2).astype("float32"), random.rand(8, 1).astype("float32")
    assert fit(small_model(), SingularValueMonitor(gradient_data=batch))["loss"] == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be at least 1"),
        ({"unit": "year"}, ValueError, "unit must be one of"),
        ({"alpha": 0}, ValueError, "alpha must be"),
        ({"accuracy": 0}, ValueError, "accuracy must be"),
        ({"accuracy": 1}, ValueError, "accuracy must be below 1"),
        ({"sigma_min": "no"}, TypeError, "sigma_min must be True or False. Received: sigma_min='no'"),
        ({"include": 5}, TypeError, "include must be a name"),
        ({"gradient_data": 5}, TypeError, "gradient_data must be .x, y., a batch of arrays. Received"),
        ({"gradient_data": (np.ones(3), None)}, TypeError, "gradient_data must be"),
        ({"gradient_data": (np.ones((3, 2)), np.ones(2))}, ValueError, "Received: 2 and 3 of them"),
        ({"gradient_data": (np.ones((0, 2)), np.ones(0))}, ValueError, "Received: 0 of them"),
        ({"gradient_data": (1, 2)}, ValueError, "gradient_data must be .*Received: numbers of them"),
        ({"max_seconds": -1}, ValueError, "max_seconds must be"),
    ],
)
def test_bad_arguments_of_the_monitor(arguments, error, message):
    with pytest.raises(error, match=message):
        SingularValueMonitor(**arguments)


def test_a_name_that_matches_nothing_is_refused_when_training_starts():
    with pytest.raises(ValueError, match="include must match a layer with a kernel"):
        fit(small_model(), SingularValueMonitor(include="cnov"))


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"jit_compile": True}], ids=stable_id)
@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_a_schedule_takes_effect(options, unit):
    """The loss of a model whose optimizer does nothing shows the factor alone."""
    model = small_model(factor=1.0, **options)
    model.optimizer.learning_rate = 0.0
    penalty = model.get_layer("conv").kernel_regularizer
    base = float(model.losses[0])
    plain = fit(model, epochs=1)["loss"][0] - base
    steps = 4 if unit == "step" else 1
    schedule = FactorSchedule(lambda n: [1.0, 3.0, 0.5, 0.0][min(n // steps, 3)], unit=unit)
    model.optimizer.iterations.assign(0)
    losses = fit(model, schedule, epochs=4)["loss"]
    np.testing.assert_allclose(losses, plain + base * np.array([1.0, 3.0, 0.5, 0.0]), rtol=1e-5)
    assert (penalty.factor, penalty.scale) == (1.0, 0.0)


def test_a_schedule_of_keras():
    warm_up = keras.optimizers.schedules.PolynomialDecay(0.0, 4, 1.0)
    model = small_model()
    fit(model, FactorSchedule(warm_up), epochs=3)
    assert model.get_layer("conv").kernel_regularizer.scale == 0.5


def test_a_schedule_reaches_a_penalty_in_a_sum_of_sums():
    model = small_model(factor=0)
    penalty = ReshapedRegularizer(0.5)
    inner = SumRegularizer([keras.regularizers.L2(0.1), penalty])
    model.get_layer("conv").kernel_regularizer = SumRegularizer([keras.regularizers.L1(0.1), inner])
    model.compile("sgd", "mse")
    fit(model, FactorSchedule(lambda epoch: 0.25), epochs=1)
    assert penalty.scale == 0.25


def test_the_scale_is_saved_and_a_plain_number_stays_plain(tmp_path):
    model = small_model()
    penalty = model.get_layer("conv").kernel_regularizer
    assert "scale" not in penalty.get_config()
    fit(model, FactorSchedule(lambda epoch: 0.25), epochs=1)
    assert penalty.get_config()["scale"] == 0.25
    assert type(penalty.factor) is float
    expected = float(model.losses[0])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert float(loaded.losses[0]) == pytest.approx(expected, rel=1e-6)
    assert loaded.get_layer("conv").kernel_regularizer.scale == 0.25
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert float(clone.losses[0]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "penalty",
    [FrobeniusRegularizer(8, 0.5), SpectralRegularizer(8, 0.5), ReshapedRegularizer(0.5)],
    ids=lambda penalty: type(penalty).__name__,
)
def test_every_penalty_has_a_scale(penalty):
    kernel = tf.constant(np.random.RandomState(0).randn(3, 3, 2, 4), tf.float32)
    half = type(penalty).from_config(penalty.get_config() | {"scale": 0.5})
    assert float(half(kernel)) == pytest.approx(0.5 * float(penalty(kernel)), rel=1e-4)
    assert penalty.make_adjustable()
    assert not penalty.make_adjustable()
    penalty.scale = 0.25
    assert penalty.get_config()["scale"] == 0.25
    with pytest.raises(ValueError, match="scale must be a finite number at least 0"):
        penalty.scale = -1


def test_bad_arguments_of_the_schedule():
    with pytest.raises(TypeError, match="schedule must be a function"):
        FactorSchedule(0.5)
    with pytest.raises(ValueError, match="unit must be one of"):
        FactorSchedule(lambda n: n, unit="batch")
    with pytest.raises(ValueError, match="FactorSchedule needs a model with a FrobeniusRegularizer"):
        fit(small_model(factor=0), FactorSchedule(lambda n: 1.0))
    with pytest.raises(ValueError, match="schedule\\(0\\) must be a finite number at least 0"):
        fit(small_model(), FactorSchedule(lambda n: -1.0))


MIRRORED = """
import sys
import keras, numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from tf_frobreg import FactorSchedule, SingularValueMonitor, attach_regularizers

def losses(scope):
    with scope:
        keras.utils.set_random_seed(1)
        layers = [keras.layers.Conv2D(4, 3, strides=2, name="conv"), keras.layers.Flatten()]
        model = keras.Sequential([keras.Input((8, 8, 2)), *layers, keras.layers.Dense(1)])
        attach_regularizers(model, 0.1, alpha=2.0)
        model.compile(keras.optimizers.SGD(1e-3), "mse")
    random = np.random.RandomState(0)
    x, y = random.rand(32, 8, 8, 2).astype("float32"), random.rand(32, 1).astype("float32")
    callbacks = [FactorSchedule(lambda epoch: [1.0, 0.5, 2.0][epoch]), SingularValueMonitor(include="conv")]
    history = model.fit(x, y, batch_size=16, epochs=3, shuffle=False, verbose=0, callbacks=callbacks).history
    return history["loss"] + history["conv/sigma_max"]

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
one, two = losses(tf.device("CPU:0")), losses(strategy.scope())
print("found", *one, *two)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    keras.__version__.startswith("3.0."), reason="Keras 3.0 itself has other losses on two devices: 1e-4 off"
)
def test_two_devices_have_the_losses_of_one():
    done = subprocess.run([sys.executable, "-c", MIRRORED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    values = [float(text) for text in done.stdout.split("found")[1].split()]
    np.testing.assert_allclose(values[6:], values[:6], rtol=1e-5)
