"""The spectrum of every kernel of a model, against the layers themselves."""

import keras
import numpy as np
import pytest
from geometries import KERAS_CASES, label
from oracles import impulse_matrix

from tf_frobreg import (
    FrobeniusRegularizer,
    KernelSpectrum,
    ModelSpectrum,
    SumRegularizer,
    frobenius_penalty,
    model_spectrum,
    penalty_floor,
    singular_values,
)


def sigma_by_impulses(layer, image, channels):
    """Ends of the SVD of what the layer does to unit impulses, without bias and activation."""
    shape = (*image, channels)
    matrix = impulse_matrix(layer, image, channels) - np.asarray(layer(np.zeros((1, *shape)))).reshape(-1, 1)
    return np.linalg.svd(matrix, compute_uv=False)


@pytest.mark.parametrize("case", KERAS_CASES, ids=label)
def test_every_layer_of_the_grid_is_measured(case):
    kernel = case.kernel()
    layer = case.layer(kernel)
    inputs = keras.Input((*case.image, case.channels), dtype="float64")
    (row,) = model_spectrum(keras.Model(inputs, layer(inputs)))
    sigma = sigma_by_impulses(layer, case.image, case.channels)
    assert row.reason is None
    assert row.input_size == case.image
    assert row.extremes.sigma_max == pytest.approx(sigma[0], rel=1e-4)
    assert row.extremes.sigma_min == pytest.approx(sigma[-1], abs=1e-2 * sigma[0])
    assert row.penalty == pytest.approx(float(frobenius_penalty(kernel, case.image, **case.geometry)))
    columns = row.convolution.shape[1]
    assert row.penalty_per_column == pytest.approx(row.penalty / columns)
    assert row.penalty_floor == penalty_floor(kernel.shape, case.image, **case.geometry)
    high, low = row.extremes[:2]
    assert row.condition_number == (high / low if low else np.inf)


def test_bias_and_activation_do_not_enter():
    layer = keras.layers.Conv2D(4, 3, padding="same", activation="relu", bias_initializer="ones")
    model = keras.Sequential([keras.Input((7, 8, 2)), layer])
    (row,) = model_spectrum(model)
    sigma = singular_values(layer.kernel, (7, 8))
    assert row.extremes[:2] == pytest.approx((sigma[0], sigma[-1]), rel=1e-6)


def test_separable_convolutions_have_two_kernels():
    layer = keras.layers.SeparableConv2D(5, 3, strides=2, padding="same", use_bias=False, name="sep")
    model = keras.Sequential([keras.Input((9, 8, 3)), layer])
    rows = {row.name: row for row in model_spectrum(model)}
    assert list(rows) == ["sep/depthwise", "sep/pointwise"]
    assert rows["sep/depthwise"].input_size == (9, 8)
    assert rows["sep/pointwise"].input_size == (5, 4)
    depthwise = singular_values(layer.depthwise_kernel, (9, 8), kind="depthwise", strides=2)
    assert rows["sep/depthwise"].extremes.sigma_max == pytest.approx(depthwise[0], rel=1e-6)
    pointwise = np.linalg.svd(np.asarray(layer.pointwise_kernel)[0, 0], compute_uv=False)
    assert rows["sep/pointwise"].extremes.sigma_max == pytest.approx(pointwise[0], rel=1e-6)


def test_lora_and_float16_kernels_are_measured_as_applied():
    dense = keras.layers.Dense(4, name="dense")
    half = keras.layers.Conv2D(3, 3, name="half", dtype="float16")
    model = keras.Sequential([keras.Input((6, 6, 3)), half, dense])
    dense.enable_lora(2)
    dense.lora_kernel_b.assign(np.ones((2, 4)))
    rows = {row.name: row for row in model_spectrum(model)}
    sigma = np.linalg.svd(np.asarray(dense.kernel), compute_uv=False)
    assert rows["dense"].extremes.sigma_max == pytest.approx(sigma[0], rel=1e-5)
    sigma = singular_values(np.asarray(half.kernel).astype("float32"), 6, padding="valid")
    assert rows["half"].extremes.sigma_max == pytest.approx(sigma[0], rel=1e-4)


def test_a_start_follows_a_training():
    model = keras.Sequential([keras.Input((16, 16, 8)), keras.layers.Conv2D(8, 3, padding="same")])
    before = model_spectrum(model)
    assert before[0].extremes.vectors is not None
    kernel = model.layers[0].kernel
    kernel.assign(kernel * 1.01)
    (row,) = model_spectrum(model, start=before)
    assert row.extremes.sigma_max == pytest.approx(1.01 * before[0].extremes.sigma_max, rel=2e-4)
    (high,) = model_spectrum(model, start=before, sigma_min=False)
    assert np.isnan(high.extremes.sigma_min)
    other = keras.Sequential([keras.Input((12, 12, 8)), model.layers[0]])
    model_spectrum(other, start=before)  # of another geometry: not used


def penalised_model():
    """α is 2, 0.5 in a sum, and none. The layers are 1×1, so that R_α is that of the kernel times 64."""
    layers = {
        "two": FrobeniusRegularizer(8, alpha=2.0, padding="valid"),
        "half": SumRegularizer(["l2", FrobeniusRegularizer(8, alpha=0.5)]),
        "none": "l2",
    }
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            *(
                keras.layers.Conv2D(3, 1, kernel_regularizer=regularizer, name=name)
                for name, regularizer in layers.items()
            ),
        ]
    )


@pytest.mark.parametrize(
    ("arguments", "alphas"),
    [({}, (2.0, 0.5, 1.0)), ({"alpha": None}, (2.0, 0.5, 1.0)), ({"alpha": 3}, (3.0, 3.0, 3.0))],
)
def test_alpha_is_that_of_the_penalty_of_each_kernel(arguments, alphas):
    model = penalised_model()
    spectrum = model_spectrum(model, **arguments)
    assert tuple(row.alpha for row in spectrum) == alphas
    for row, alpha, layer in zip(spectrum, alphas, model.layers, strict=True):
        kernel = np.asarray(layer.kernel, np.float64)[0, 0]
        expected = 64 * np.sum((kernel.T @ kernel - alpha * np.eye(3)) ** 2)
        assert row.penalty == pytest.approx(expected, rel=1e-5)
    cells = str(spectrum).split("\n\n")[1].splitlines()
    assert ("α" in cells[0]) == (len(set(alphas)) > 1)
    assert str(spectrum).splitlines()[0].endswith("α = 3") == (len(set(alphas)) == 1)


def test_the_result_is_a_list_that_prints_as_a_table():
    conv = keras.layers.Conv2D(4, 1, kernel_initializer="ones", name="conv")
    causal = keras.layers.Conv1D(3, 3, padding="causal", name="causal")
    layers = [conv, keras.layers.Reshape((64, 4)), causal]
    spectrum = model_spectrum(keras.Sequential([keras.Input((8, 8, 1)), *layers]))
    assert type(spectrum) is ModelSpectrum
    assert all(type(row) is KernelSpectrum for row in spectrum)
    lines = str(spectrum).splitlines()
    assert lines[0] == "1 kernel, σ 2 … 2, α = 1, 1 not measured"
    assert lines[4].split() == ["conv", "1×1×1×4", "8×8", "2", "2", "1", "576", "9", "0"]
    assert lines[6] == f"Not measured: causal: {spectrum[1].reason}"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "model must be a Keras model or layer. Received: model=3"),
        ({"model": keras.Sequential([keras.layers.Dense(3)])}, ValueError, "model must be built"),
        ({"alpha": 0}, ValueError, "alpha must be a finite number above 0"),
        ({"accuracy": -1}, ValueError, "accuracy must be a finite number above 0"),
        ({"start": 3}, TypeError, "start must be what model_spectrum returned. Received: start=3"),
        ({"start": "abc"}, TypeError, "start must be what model_spectrum returned"),
        ({"sigma_min": "no"}, TypeError, "sigma_min must be True or False"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, error, message):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    with pytest.raises(error, match=message):
        model_spectrum(**{"model": model, **arguments})
