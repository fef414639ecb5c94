"""Penalties that a model has already: those whose geometry is not the layer's are seen and corrected."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from oracles import dense_penalty, impulse_matrix

from tf_frobreg import (
    FactorSchedule,
    FrobeniusRegularizer,
    FunctionRegularizer,
    ReshapedRegularizer,
    SpectralRegularizer,
    SumRegularizer,
    attach_regularizers,
    frobenius_penalty,
)

LAYERS = keras.layers


def small_model(n=6):
    """Three kinds of layers that see different image sizes."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((n, n, 2))
    x = LAYERS.Conv2D(3, 3, strides=2, use_bias=False, name="down")(inputs)
    x = LAYERS.Conv2DTranspose(2, 2, strides=2, use_bias=False, name="up")(x)
    x = LAYERS.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, LAYERS.Dense(3, use_bias=False, name="top")(x))


def at_size(model, n):
    """The same model for other images, with the same weights and the penalties of its configuration."""
    config = model.get_config()
    config["layers"][0]["config"]["batch_shape"] = (None, n, n, 2)
    other = keras.Model.from_config(config)
    other.set_weights(model.get_weights())
    return other


def losses(model):
    return [float(loss) for loss in model.losses]


def losses_by_impulses(model, factor, alpha):
    """factor·R_α/columns of each layer, from its answers to unit impulses of the size that it sees."""
    found = []
    for layer in model.layers:
        if layer.weights:
            *image, channels = layer.input.shape[1:]
            matrix = impulse_matrix(layer, image, channels)
            found.append(factor * dense_penalty(matrix, alpha) / matrix.shape[1])
    return pytest.approx(found, rel=1e-5)


def test_a_model_at_another_size_has_the_penalties_of_the_old_size():
    small = small_model()
    attach_regularizers(small, factor=0.5, alpha=2.0)
    assert losses(small) == losses_by_impulses(small, 0.5, 2.0)
    big = at_size(small, 9)
    before = losses(big)
    assert before != losses_by_impulses(big, 0.5, 2.0)
    report = attach_regularizers(big, factor=0.5, alpha=2.0)
    assert repr(report) == "AttachReport: attached 0, left out 0, kept 3, wrong geometry 2"
    words = {
        "down": "FrobeniusRegularizer for input_size=(6, 6) instead of (9, 9)",
        "up": "FrobeniusRegularizer for input_size=(2, 2) instead of (4, 4)",
    }
    assert report.mismatched == words
    assert report.remarks["down"] == (
        'wrong geometry, input_size=(6, 6) instead of (9, 9): existing="correct" corrects it'
    )
    assert report.kept["down"] == "it has FrobeniusRegularizer already"
    # The line names the penalty once.
    assert f"Kept: down: it has FrobeniusRegularizer already; {report.remarks['down']}\n" in str(report)
    spectral = attach_regularizers(at_size(small, 9), penalty="spectral")
    assert spectral.remarks["down"] == (
        f'wrong geometry, {words["down"]}: existing="correct" corrects it; added to FrobeniusRegularizer'
    )
    assert losses(big) == before
    report = attach_regularizers(big, factor=0.125, alpha=0.5, existing="correct")  # factor and α stay
    assert repr(report) == "AttachReport: attached 0, left out 0, kept 1, corrected 2"
    assert losses(big) == losses_by_impulses(big, 0.5, 2.0)
    assert report.kept == {"top": "it has FrobeniusRegularizer already"}
    assert report.remarks == {name: f"corrected {text}" for name, text in words.items()}
    assert [penalty.input_size for penalty in report.corrected["down"]] == [(9, 9)]
    again = attach_regularizers(big, existing="correct")
    assert (again.corrected, len(again.kept)) == ({}, 3)
    report.detach()
    assert losses(big) == before


@pytest.mark.slow
def test_a_corrected_model_is_saved_and_loaded_in_a_new_process(tmp_path):
    small = small_model()
    attach_regularizers(small, factor=0.5)
    big = at_size(small, 9)
    attach_regularizers(big, existing="correct")
    big.save(tmp_path / "model.keras")
    code = (
        "import keras, tf_frobreg\n"
        f"model = keras.saving.load_model({str(tmp_path / 'model.keras')!r})\n"
        "report = tf_frobreg.attach_regularizers(model)\n"
        "print('losses', len(report.mismatched), *(repr(float(loss)) for loss in model.losses))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mismatched, *found = (float(text) for text in done.stdout.split("losses")[1].split())
    assert mismatched == 0
    assert found == losses_by_impulses(big, 0.5, 1.0)


GEOMETRY = {"strides": 2, "padding": "valid"}
WRONG = {
    "input_size": FrobeniusRegularizer(8, **GEOMETRY),
    "strides": FrobeniusRegularizer(9, strides=3, padding="valid"),
    "padding": FrobeniusRegularizer(9, strides=2),
    "dilation_rate": FrobeniusRegularizer(9, padding="valid", dilation_rate=2),
    "groups": FrobeniusRegularizer(9, **GEOMETRY, groups=1),
    "kind": FrobeniusRegularizer(9, **GEOMETRY, kind="transpose"),
    "circular": FrobeniusRegularizer(8, strides=2, padding="circular"),
}


def layer_with(regularizer, **options):
    keras.utils.set_random_seed(1)
    layer = LAYERS.Conv2D(
        4, 3, strides=2, groups=2, use_bias=False, kernel_regularizer=regularizer, name="conv", **options
    )
    return keras.Sequential([keras.Input((9, 9, 4)), layer]), layer


@pytest.mark.parametrize("penalty", WRONG.values(), ids=WRONG)
def test_every_difference_from_the_layer_is_seen_and_corrected(penalty):
    model, layer = layer_with(penalty)
    assert list(attach_regularizers(model).mismatched) == ["conv"]
    report = attach_regularizers(model, existing="correct")
    (corrected,) = report.corrected["conv"]
    assert layer.kernel_regularizer is layer.kernel.regularizer is corrected
    if penalty.padding == "circular":  # the operator without border, of the right size
        expected = frobenius_penalty(layer.kernel, 9, strides=2, padding="circular", groups=2) / (81 * 4)
    else:
        matrix = impulse_matrix(layer, (9, 9), 4)
        expected = dense_penalty(matrix) / matrix.shape[1]
    assert losses(model) == pytest.approx([0.01 * float(expected)], rel=1e-5)
    report.detach()
    assert layer.kernel_regularizer is layer.kernel.regularizer is penalty


@pytest.mark.parametrize("padding", ["valid", "circular"])
def test_a_right_penalty_is_no_mistake(padding):
    model, _ = layer_with(FrobeniusRegularizer((9, 9), strides=(2, 2), padding=padding, groups=2))
    report = attach_regularizers(model, existing="correct")
    assert (report.kept, report.corrected, report.mismatched) == (
        {"conv": "it has FrobeniusRegularizer already"},
        {},
        {},
    )
    assert report.remarks == {}


def total(kernel, convolution):
    return tf.reduce_sum(kernel**2) * convolution.shape[1]


def test_penalties_in_sums_keep_all_but_their_geometry():
    frobenius = FrobeniusRegularizer(
        4, 0.5, 2.0, reduction="sum", method="sparse", scale=0.25, padding="same", groups=2
    )
    spectral = SpectralRegularizer(4, 0.3, 1.5, gram="smaller", power_steps=7)
    function = FunctionRegularizer(total, 4, 0.7)
    l2, reshaped = keras.regularizers.L2(0.1), ReshapedRegularizer(0.2)
    model, layer = layer_with(SumRegularizer([l2, SumRegularizer([frobenius, reshaped]), spectral, function]))
    before = losses(model)
    report = attach_regularizers(model, existing="correct")
    assert [type(part).__name__ for part in report.corrected["conv"]] == [
        "FrobeniusRegularizer",
        "SpectralRegularizer",
        "FunctionRegularizer",
    ]
    summands = layer.kernel_regularizer.regularizers
    assert (summands[0], summands[1].regularizers[1]) == (l2, reshaped)
    for new, old in zip(report.corrected["conv"], (frobenius, spectral, function), strict=True):
        geometry = {"input_size": [9, 9], "padding": "valid", "groups": 2, "kind": "conv"}
        assert new.get_config() == old.get_config() | geometry | {"strides": [2, 2], "dilation_rate": [1, 1]}
        assert old.input_size == 4
    matrix = impulse_matrix(layer, (9, 9), 4)
    kernel = np.asarray(layer.kernel)
    own = 0.125 * dense_penalty(matrix, 2.0) + 0.7 * np.sum(kernel**2) * matrix.shape[1]
    own += float(l2(layer.kernel) + reshaped(layer.kernel))
    edge = 0.3 * abs(np.linalg.svd(matrix, compute_uv=False) ** 2 - 1.5).max()
    evaluate = tf.function(lambda: model.losses)
    for _ in range(60):  # the power steps of the spectral penalty
        found = [float(loss) for loss in evaluate()]
    assert found == pytest.approx([own + edge], rel=1e-4)
    report.detach()
    assert losses(model)[0] == pytest.approx(before[0], rel=1e-2)


def test_correcting_adds_nothing():
    model, layer = layer_with(WRONG["input_size"])
    report = attach_regularizers(model, penalty="spectral", existing="correct")
    assert repr(report) == "AttachReport: attached 0, left out 0, kept 0, corrected 1"
    assert layer.kernel_regularizer is report.corrected["conv"][0]
    report.detach()
    assert layer.kernel_regularizer is WRONG["input_size"]
    plain, layer = layer_with(keras.regularizers.L2(0.1))
    with pytest.raises(ValueError, match="Left out: conv: it has no penalty to correct"):
        attach_regularizers(plain, existing="correct")
    assert isinstance(layer.kernel_regularizer, keras.regularizers.L2)


def test_another_penalty_is_added_to_a_wrong_one():
    model, _ = layer_with(WRONG["input_size"])
    report = attach_regularizers(model, penalty="spectral")
    assert list(report.mismatched) == ["conv"]
    assert 'existing="correct" corrects it; added to FrobeniusRegularizer' in report.remarks["conv"]
    assert attach_regularizers(model, existing="replace").mismatched == {}


def test_a_shared_layer_may_be_penalised_for_any_of_its_sizes():
    for size, wrong in ((8, False), (4, False), (6, True)):
        penalty = FrobeniusRegularizer(size)
        shared = LAYERS.Conv2D(2, 3, padding="same", kernel_regularizer=penalty, name="shared")
        inputs = keras.Input((8, 8, 2))
        model = keras.Model(inputs, shared(LAYERS.MaxPooling2D()(shared(inputs))))
        assert bool(attach_regularizers(model).mismatched) == wrong
        report = attach_regularizers(model, existing="correct")
        assert [new.input_size for new in report.corrected.get("shared", ())] == [(8, 8)] * wrong


@pytest.mark.parametrize("jit_compile", [False, True], ids=["plain", "jit"])
def test_a_compiled_model_trains_with_the_corrected_penalty(jit_compile):
    small = small_model()
    attach_regularizers(small, factor=0.5)
    big = at_size(small, 9)
    big.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=jit_compile)
    x, y = np.zeros((4, 9, 9, 2)), np.zeros((4, 3))
    options = {"verbose": 0, "callbacks": [FactorSchedule(lambda epoch: 0.5)]}
    assert big.fit(x, y, **options).history["loss"][0] == pytest.approx(sum(losses(big)), rel=1e-5)
    attach_regularizers(big, existing="correct")  # the scale of 0.5 stays
    right = losses_by_impulses(big, 0.25, 1.0)
    assert losses(big) == right
    assert big.fit(x, y, verbose=0).history["loss"][0] == pytest.approx(sum(losses(big)), rel=1e-5)
    big.fit(x, y, verbose=0, callbacks=[FactorSchedule(lambda epoch: 1.0)])
    assert losses(big) == losses_by_impulses(big, 0.5, 1.0)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_reports_are_detached_in_any_order(order):
    small = small_model()
    first = attach_regularizers(small)
    shared = keras.Input((9, 9, 2))
    x = shared
    for layer in small.layers[1:]:
        x = layer(x)
    big = keras.Model(shared, x)  # the same layers, on larger images
    reports = [first, attach_regularizers(big, existing="correct")]
    assert list(reports[1].corrected) == ["down", "up"]
    for number in order:
        reports[number].detach()
    assert losses(big) == []
