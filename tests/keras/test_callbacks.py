"""What is watched while a model trains."""

import csv
import itertools
import subprocess
import sys
import time
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from oracles import dense_penalty, impulse_matrix, naive_matrix
from small_models import fit_epochs, penalised_model

import tf_frobreg.keras.callbacks
from tf_frobreg import (
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


def test_the_monitor_writes_into_logs(tmp_path):
    model = penalised_model()
    monitor = SingularValueMonitor(include="conv", per_kernel=True)
    log = keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    history = fit_epochs(model, monitor, log)
    kernel = model.get_layer("conv").kernel
    sigma = singular_values(kernel, 8)
    assert history["conv/sigma_max"][-1] == pytest.approx(sigma[0], rel=1e-4)
    assert history["conv/sigma_min"][-1] == pytest.approx(sigma[-1], rel=1e-4)
    per_column = float(frobenius_penalty(kernel, 8)) / 128
    assert history["conv/penalty"][-1] == pytest.approx(per_column, rel=1e-4)
    assert "top/sigma_max" not in history
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["conv/sigma_max"]) for row in rows] == pytest.approx(history["conv/sigma_max"])
    assert monitor.history["epoch"].tolist() == [0, 1, 2, 3]
    assert len(monitor.history["conv/penalty"]) == 4


def test_epochs_without_a_measurement_are_nan():
    monitor = SingularValueMonitor(2, sigma_min=False, per_kernel=True)
    history = fit_epochs(penalised_model(), monitor, epochs=4)
    assert np.isfinite(history["conv/sigma_max"]).tolist() == [False, True, False, True]
    assert np.isfinite(history["sigma_max"]).tolist() == [False, True, False, True]
    assert np.isnan(monitor.history["conv/sigma_min"]).all()
    assert np.isnan(monitor.history["sigma_min"]).all()
    assert monitor.history["epoch"].tolist() == [0, 2, 4]


def test_batches_can_be_counted():
    monitor = SingularValueMonitor(3, unit="batch", include="conv")
    history = fit_epochs(penalised_model(), monitor, epochs=3)
    assert monitor.history["epoch"].tolist() == [0, 0.75, 1.5, 2.25, 3]
    assert history["sigma_max"][-1] == monitor.history["conv/sigma_max"][-1]


def test_batches_are_counted_where_several_are_executed_together():
    monitor = SingularValueMonitor(3, unit="batch", include="conv")
    fit_epochs(penalised_model(steps_per_execution=2), monitor, epochs=3)
    assert monitor.history["epoch"].tolist() == [0, 1, 1.5, 2.5, 3]


def test_batches_are_counted_where_the_last_execution_is_not_full():
    monitor = SingularValueMonitor(3, unit="batch", include="conv")
    fit_epochs(penalised_model(steps_per_execution=3), monitor, epochs=2)  # of 3 and 1 batches
    assert monitor.history["epoch"].tolist() == [0, 0.75, 1.75]


def test_the_monitor_goes_on_in_another_fit():
    model, monitor = penalised_model(), SingularValueMonitor()
    fit_epochs(model, monitor, epochs=1)
    fit_epochs(model, monitor, epochs=1)  # counts from 0 again
    fit_epochs(model, monitor, epochs=3, initial_epoch=2)
    assert monitor.history["epoch"].tolist() == [0, 1, 2, 3]


def test_epochs_between_measurements_are_counted_over_several_fits():
    model, monitor = penalised_model(), SingularValueMonitor(2, include="conv")
    for _ in range(3):
        fit_epochs(model, monitor, epochs=3)
    assert monitor.history["epoch"].tolist() == [0, 2, 4, 6, 8]
    monitor = SingularValueMonitor(3, unit="batch", include="conv")
    for _ in range(4):
        fit_epochs(model, monitor, epochs=1, batch_size=16)
    assert monitor.history["epoch"].tolist() == [0, 1.5, 3]


def test_the_monitor_begins_where_training_does():
    monitor = SingularValueMonitor()
    fit_epochs(penalised_model(), monitor, epochs=3, initial_epoch=1)
    assert monitor.history["epoch"].tolist() == [1, 2, 3]


def test_the_monitor_begins_anew_with_another_model():
    monitor = SingularValueMonitor(include=LAYERS.Conv2D)
    fit_epochs(penalised_model(), monitor, epochs=1)
    fit_epochs(penalised_model(), monitor, epochs=2)  # its layers have the same names
    assert monitor.history["epoch"].tolist() == [0, 1, 2]


def test_time_is_bounded_and_reported(monkeypatch):
    original = tf_frobreg.keras.callbacks.report_kernel

    def slow(*arguments, **options):
        time.sleep(0.05)
        return original(*arguments, **options)

    monkeypatch.setattr(tf_frobreg.keras.callbacks, "report_kernel", slow)
    monitor = SingularValueMonitor(max_seconds=0.04, per_kernel=True)
    assert monitor.cost == "no measurement"
    history = fit_epochs(penalised_model(), monitor, epochs=3)
    # Two kernels, one at a time: conv before training, then the other, in turn.
    assert np.isfinite(history["top/sigma_max"]).tolist() == [True, False, True]
    assert np.isfinite(history["conv/sigma_max"]).tolist() == [False, True, False]
    # The whole model has the latest value of each.
    columns = np.array([history["conv/sigma_max"], history["top/sigma_max"]])
    latest = np.fmax(columns, np.roll(columns, 1, axis=1))[:, 1:]
    np.testing.assert_array_equal(history["sigma_max"][1:], latest.max(axis=0))
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
    model, monitor = penalised_model(), SingularValueMonitor(max_seconds=0.04)
    for _ in range(2):
        fit_epochs(model, monitor, epochs=1)
    assert measured == ["conv", "top", "conv"]
    measured.clear()
    fit_epochs(penalised_model(), monitor, epochs=1)
    assert measured == ["conv", "top"]


def measured(model, **options):
    """The first row that a monitor records."""
    monitor = SingularValueMonitor(**options)
    monitor.set_model(model)
    monitor.on_train_begin()
    monitor.on_epoch_begin(0)
    return {name: column[0] for name, column in monitor.history.items()}


def own_model(**penalties):
    """Layers with their own penalties, on images of 6×6×2."""
    keras.utils.set_random_seed(1)
    options = {"use_bias": False}
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            LAYERS.Conv2D(
                3, 3, padding="same", kernel_regularizer=penalties.get("same"), name="same", **options
            ),
            LAYERS.Conv2D(4, 3, 2, kernel_regularizer=penalties.get("down"), name="down", **options),
            LAYERS.Flatten(),
            LAYERS.Dense(2, kernel_regularizer=penalties.get("top"), name="top", **options),
        ]
    )


def true_matrices(model):
    """M of each layer by unit impulses."""
    same, down, _, top = model.layers
    return {
        "same": impulse_matrix(same, (6, 6), 2),
        "down": impulse_matrix(down, (6, 6), 3),
        "top": impulse_matrix(top, (), 16),
    }


def check_row(row, matrices, alphas):
    """Compares a row with σ and R_α per column of these matrices."""
    sigma = {name: np.linalg.svd(matrix, compute_uv=False) for name, matrix in matrices.items()}
    penalty = {
        name: dense_penalty(matrix, alphas[name]) / matrix.shape[1] for name, matrix in matrices.items()
    }
    for name in matrices:
        assert row[f"{name}/sigma_max"] == pytest.approx(sigma[name][0], rel=1e-3)
        assert row[f"{name}/sigma_min"] == pytest.approx(sigma[name][-1], rel=1e-2, abs=1e-3)
        assert row[f"{name}/penalty"] == pytest.approx(penalty[name], rel=1e-4)
    assert row["sigma_max"] == pytest.approx(max(values[0] for values in sigma.values()), rel=1e-3)
    lowest = min(values[-1] for values in sigma.values())
    assert row["sigma_min"] == pytest.approx(lowest, rel=1e-2, abs=1e-3)
    assert row["penalty"] == pytest.approx(sum(penalty.values()), rel=1e-4)


def test_without_penalties_alpha_is_1():
    model = own_model()
    matrices = true_matrices(model)
    check_row(measured(model), matrices, dict.fromkeys(matrices, 1.0))
    check_row(measured(model, alpha=3.0), matrices, dict.fromkeys(matrices, 3.0))


def test_each_kernel_is_measured_as_its_own_penalty_says():
    nested = SumRegularizer([SumRegularizer(["l2", FrobeniusRegularizer((), 0.1, 0.5, reduction="mean")])])
    model = own_model(
        same=FrobeniusRegularizer(6, 0.1, 2.0, padding="circular", reduction="sum"),
        down=FrobeniusRegularizer(6, 0.1, 3.0, strides=2, padding="valid", reduction="sum"),
        top=nested,
    )
    matrices = true_matrices(model)
    matrices["same"] = naive_matrix(model.layers[0].kernel.numpy(), 6, padding="circular")
    check_row(measured(model), matrices, {"same": 2.0, "down": 3.0, "top": 0.5})
    check_row(measured(model, alpha=1.5), matrices, dict.fromkeys(matrices, 1.5))


def penalty_function(kernel, conv):
    return tf.reduce_sum(kernel**2)


def test_kernels_with_other_penalties_are_measured_the_same_way():
    model = own_model(
        same=SpectralRegularizer(6, 0.1, 2.0, padding="circular"), down=ReshapedRegularizer(0.1, 3.0)
    )
    attach_regularizers(model, include="top", penalty=penalty_function)
    matrices = true_matrices(model)
    matrices["same"] = naive_matrix(model.layers[0].kernel.numpy(), 6, padding="circular")
    check_row(measured(model), matrices, {"same": 2.0, "down": 3.0, "top": 1.0})


def test_a_smallest_singular_value_that_is_noise_is_recorded_as_its_bound():
    model = own_model()
    kernel = model.layers[-1].kernel
    kernel.assign(np.outer(np.arange(1, 17), [1, 3]))  # of rank 1
    found = measured(model, include="top")
    assert found["top/sigma_max"] == pytest.approx(np.linalg.norm(kernel), rel=1e-6)
    assert found["top/sigma_max"] * 1e-15 < found["top/sigma_min"] < found["top/sigma_max"] * 1e-12


def test_figures_before_training_are_refused():
    monitor = SingularValueMonitor(gradient_data=(np.ones((1, 6, 6, 2)), np.ones(1)))
    for draw in (monitor.plot, monitor.plot_gradients):
        with pytest.raises(
            ValueError, match=r"nothing was measured yet: .* after model.fit\(\.\.\., callbacks="
        ):
            draw()


def test_the_penalty_on_the_variable_decides():
    """A regularizer that was set on the layer after building has no effect."""
    model = own_model(top=FrobeniusRegularizer((), 0.1, 2.0, reduction="sum"))
    model.layers[-1].kernel_regularizer = FrobeniusRegularizer((), 0.1, 5.0, reduction="mean")
    expected = dense_penalty(model.layers[-1].kernel.numpy().T, 2.0) / 16
    assert measured(model, include="top")["penalty"] == pytest.approx(expected, rel=1e-4)


def test_logs_hold_three_numbers_of_the_whole_model():
    model, monitor = penalised_model(), SingularValueMonitor()
    history = fit_epochs(model, monitor, epochs=1)
    assert list(history) == ["loss", "sigma_max", "sigma_min", "penalty"]
    kernels = [f"{layer}/{name}" for layer in ("conv", "top") for name in list(history)[1:]]
    assert list(monitor.history) == ["epoch", "seconds", *list(history)[1:], *kernels]
    everything = fit_epochs(model, SingularValueMonitor(per_kernel=True), epochs=1)
    assert list(everything) == [*history, *kernels]


def test_a_penalty_for_another_geometry_is_remarked_and_the_layer_measured():
    model = own_model(
        same=FrobeniusRegularizer(16, 0.1, 2.0, reduction="mean"),
        down=FrobeniusRegularizer(6, 0.1, padding="valid", reduction="mean"),
        top=FrobeniusRegularizer((), 0.1, reduction="mean"),
    )
    matrices = true_matrices(model)
    with pytest.warns(UserWarning, match="Penalties are not for the geometry") as caught:
        row = measured(model)
    (message,) = (str(warning.message) for warning in caught)
    assert "'same' has input_size=(16, 16) instead of (6, 6); 'down' has strides=(1, 1)" in message
    assert "instead of (2, 2). " in message
    assert "'top'" not in message
    assert 'attach_regularizers(model, existing="correct")' in message
    check_row(row, matrices, {"same": 2.0, "down": 1.0, "top": 1.0})


def test_a_model_rebuilt_at_another_size_is_remarked_once():
    x = keras.Input((16, 16, 3))
    small = keras.Model(x, LAYERS.Conv2D(4, 3, strides=2, use_bias=False, name="down")(x))
    attach_regularizers(small, 0.1, reduction="mean")
    config = small.get_config()
    config["layers"][0]["config"]["batch_shape"] = (None, 10, 10, 3)
    big = keras.Model.from_config(config)
    big.compile("sgd", "mse")
    monitor = SingularValueMonitor()
    data = np.ones((2, 10, 10, 3)), np.ones((2, 4, 4, 4))
    with pytest.warns(UserWarning, match="'down' has input_size=.16, 16. instead of .10, 10."):
        big.fit(*data, epochs=1, verbose=0, callbacks=[monitor])
    big.fit(*data, epochs=1, verbose=0, callbacks=[monitor])  # a second warning would be an error
    matrix = impulse_matrix(big.get_layer("down"), (10, 10), 3)
    sigma = np.linalg.svd(matrix, compute_uv=False)
    assert monitor.history["sigma_max"][-1] == pytest.approx(sigma[0], rel=1e-3)
    assert monitor.history["penalty"][-1] == pytest.approx(dense_penalty(matrix) / 300, rel=1e-4)


def test_a_shared_layer_is_measured_at_the_size_of_its_penalty():
    conv = LAYERS.Conv2D(
        3, 3, use_bias=False, kernel_regularizer=FrobeniusRegularizer(5, padding="valid", reduction="sum")
    )
    first, second = keras.Input((8, 8, 2)), keras.Input((5, 5, 2))
    row = measured(keras.Model([first, second], [conv(first), conv(second)]))
    assert row["penalty"] == pytest.approx(dense_penalty(impulse_matrix(conv, (5, 5), 2)) / 50, rel=1e-4)


def test_the_padding_of_a_kernel_of_one_tap_does_not_matter():
    model = keras.Sequential(
        [keras.Input((6, 6, 2)), LAYERS.Conv2D(3, 1, kernel_regularizer=FrobeniusRegularizer(6))]
    )
    assert np.isfinite(measured(model)["penalty"])  # without a warning


def test_the_size_can_be_given_by_name():
    images, rest = keras.Input((None, None, 2), name="images"), keras.Input((3,), name="rest")
    conv = LAYERS.Conv2D(3, 3, use_bias=False, name="conv")
    pooled = LAYERS.GlobalAveragePooling2D()(conv(images))
    model = keras.Model([images, rest], LAYERS.Dense(1)(LAYERS.Concatenate()([pooled, rest])))
    row = measured(model, input_size={"images": 7})
    sigma = np.linalg.svd(impulse_matrix(conv, (7, 7), 2), compute_uv=False)
    assert row["conv/sigma_max"] == pytest.approx(sigma[0], rel=1e-3)


def test_what_was_not_measured_is_left_out_of_the_whole():
    model = penalised_model(factor=0)
    model.get_layer("conv").kernel.assign(np.full((3, 3, 2, 4), np.nan))
    row = measured(model)
    assert np.isnan(row["conv/sigma_max"])
    assert [row[name] for name in ("sigma_max", "penalty")] == [row["top/sigma_max"], row["top/penalty"]]
    assert np.isnan(measured(model, include="conv")["penalty"])


class FakeClock:
    """Seconds that pass only when a test says so."""

    def __init__(self, monkeypatch, *, per_kernel):
        self.now = 0.0
        original = tf_frobreg.keras.callbacks.report_kernel

        def slow(*arguments, **options):
            self.now += next(per_kernel)
            return original(*arguments, **options)

        monkeypatch.setattr(tf_frobreg.keras.callbacks, "report_kernel", slow)
        for module in ("callbacks", "training_clock"):
            fake = types.SimpleNamespace(perf_counter=lambda: self.now)
            monkeypatch.setattr(f"tf_frobreg.keras.{module}.time", fake)

    def passing(self, seconds):
        """A callback with which every batch takes some seconds."""

        def wait(batch, logs=None):
            self.now += seconds

        return keras.callbacks.LambdaCallback(on_train_batch_end=wait)


def test_a_long_first_measurement_is_remarked(monkeypatch):
    clock = FakeClock(monkeypatch, per_kernel=iter([12.0, 3.0] + [0.01] * 10))
    with pytest.warns(UserWarning, match="The first measurement took 15 s") as caught:
        fit_epochs(penalised_model(), SingularValueMonitor(), clock.passing(1.0), epochs=3)
    (message,) = (str(warning.message) for warning in caught)
    assert message.startswith("SingularValueMonitor measures 2 kernels. The first")
    assert "To save time use a larger every, include=, sigma_min=False or a smaller" in message


def test_a_large_share_is_remarked_once(monkeypatch):
    clock = FakeClock(monkeypatch, per_kernel=itertools.repeat(1.0))
    model, monitor = penalised_model(), SingularValueMonitor(include="conv")
    with pytest.warns(UserWarning, match="1 kernel. 1.0 s per measurement are 33% of the training's time"):
        fit_epochs(model, clock.passing(0.5), monitor, epochs=6)
    fit_epochs(model, clock.passing(0.5), monitor, epochs=6)  # a second warning would be an error


@pytest.mark.parametrize(
    ("kernel", "batch", "epochs"),
    [(1.0, 0.5, 3), (1.0, 1.1, 9), (9.9, 100.0, 1)],
    ids=["short", "cheap", "quick"],
)
def test_small_costs_are_not_remarked(monkeypatch, kernel, batch, epochs):
    clock = FakeClock(monkeypatch, per_kernel=itertools.repeat(kernel))
    fit_epochs(penalised_model(), clock.passing(batch), SingularValueMonitor(include="conv"), epochs=epochs)


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
        "input_size": {"conv": (8, 8)},
        "per_kernel": True,
    }
    monitor = SingularValueMonitor(**arguments)
    assert {name: getattr(monitor, name) for name in arguments} == arguments


def test_gradient_norms_are_those_of_the_loss():
    model = penalised_model(factor=0)
    random = np.random.RandomState(1)
    x, y = random.rand(8, 8, 8, 2).astype("float32"), random.rand(8, 1).astype("float32")
    monitor = SingularValueMonitor(gradient_data=(x, y))
    fit_epochs(model, monitor, epochs=1)
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
        fit_epochs(model, SingularValueMonitor(gradient_data=(x[:, :4], y)))


def test_gradient_norms_of_frozen_kernels_and_of_lora():
    model = penalised_model(factor=0)
    model.get_layer("conv").trainable = False
    model.get_layer("top").enable_lora(2)
    model.compile(keras.optimizers.SGD(0.01), "mse")
    random = np.random.RandomState(1)
    batch = random.rand(8, 8, 8, 2).astype("float32"), random.rand(8, 1).astype("float32")
    monitor = SingularValueMonitor(gradient_data=batch)
    fit_epochs(model, monitor, epochs=1)
    assert (monitor.history["conv/gradient_norm"] > 0).all()
    assert np.isnan(monitor.history["top/gradient_norm"]).all()


def test_the_monitor_does_not_change_the_training():
    expected = fit_epochs(penalised_model())["loss"]
    random = np.random.RandomState(1)
    batch = random.rand(8, 8, 8, 2).astype("float32"), random.rand(8, 1).astype("float32")
    assert fit_epochs(penalised_model(), SingularValueMonitor(gradient_data=batch))["loss"] == expected


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
        ({"input_size": "junk"}, TypeError, "input_size must be an integer. Received: input_size='junk'"),
        ({"input_size": -3}, ValueError, "input_size must be at least 1"),
        ({"input_size": {5: 8}}, TypeError, "input_size must have names of inputs or layers as its keys"),
        ({"input_size": {"image": (8, 0)}}, ValueError, "input_size must be at least 1. Received: "),
        ({"per_kernel": 1}, TypeError, "per_kernel must be True or False"),
    ],
)
def test_bad_arguments_of_the_monitor(arguments, error, message):
    with pytest.raises(error, match=message):
        SingularValueMonitor(**arguments)


def test_a_name_that_matches_nothing_is_refused_when_training_starts():
    with pytest.raises(ValueError, match="include must match a layer with a kernel"):
        fit_epochs(penalised_model(), SingularValueMonitor(include="cnov"))


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
    return history["loss"] + history["sigma_max"]

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
one, two = losses(tf.device("CPU:0")), losses(strategy.scope())
print("found", *one, *two)
"""


@pytest.mark.slow
def test_two_devices_have_the_losses_of_one():
    done = subprocess.run([sys.executable, "-c", MIRRORED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    values = [float(text) for text in done.stdout.split("found")[1].split()]
    np.testing.assert_allclose(values[6:], values[:6], rtol=1e-5)


class BuiltByItsFirstStep(keras.Model):
    """`build` of this model creates no layer."""

    def __init__(self, layers):
        super().__init__()
        self.parts = layers

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


@pytest.mark.filterwarnings("ignore:`build\\(\\)` was called on layer")
def test_layers_that_the_first_step_builds_are_measured():
    model = BuiltByItsFirstStep([keras.layers.Conv2D(2, 3, name="conv")])
    model.build((None, 6, 6, 1))
    model.compile("sgd", "mse", run_eagerly=True)
    monitor = SingularValueMonitor()
    model.fit(np.ones((2, 6, 6, 1)), np.ones((2, 4, 4, 2)), verbose=0, epochs=2, callbacks=[monitor])
    assert monitor.history["conv/sigma_max"][-1] > 0


def test_a_model_without_kernels_is_remarked():
    model = keras.Sequential([keras.Input((3,)), keras.layers.LayerNormalization()])
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="SingularValueMonitor found no kernel that it can measure"):
        model.fit(np.ones((2, 3)), np.ones((2, 3)), verbose=0, callbacks=[SingularValueMonitor()])


def test_logs_hold_no_sigma_min_that_is_not_measured():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="top")])
    model.compile("sgd", "mse")
    monitor = SingularValueMonitor(sigma_min=False, per_kernel=True)
    logs = model.fit(np.ones((2, 4)), np.ones((2, 2)), verbose=0, callbacks=[monitor]).history
    assert list(logs) == ["loss", "sigma_max", "penalty", "top/sigma_max", "top/penalty"]
