"""Algorithm 3.1 on whole models."""

import json

import keras
import numpy as np
import pytest
from ids import stable_id
from small_models import named_model

from tf_frobreg import (
    DescentResult,
    FrobeniusRegularizer,
    ModelDescent,
    SpectralRegularizer,
    StopReason,
    attach_regularizers,
    model_spectrum,
    regularize_kernel,
    regularize_model,
)
from tf_frobreg.cli import main


def test_every_kernel_is_regularized_in_place():
    model = named_model()
    kernel = np.asarray(model.get_layer("strided").kernel)
    expected = regularize_kernel(kernel, (9, 8), strides=2, padding="valid", alpha=2.0, max_steps=200)
    descent = regularize_model(model, alpha=2.0)
    assert descent.converged
    assert list(descent.results) == ["conv", "strided", "top"]
    np.testing.assert_allclose(model.get_layer("strided").kernel, expected.kernel, rtol=1e-6)
    for row in model_spectrum(model):
        assert abs(row.extremes.sigma_max - 2**0.5) <= 0.0101
        assert abs(row.extremes.sigma_min - 2**0.5) <= 0.0101


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 1e-4, "direction": "conjugate"},
        {"learning_rate": "paper"},
        {"gradient_tolerance": 1e3},
        {"measure": "often"},
        {"gradient": "tape"},
        {"method": "tape"},
        {"method": "sparse"},
    ],
    ids=stable_id,
)
def test_options_reach_the_descent_of_each_kernel(options):
    model = named_model()
    kernel = np.asarray(model.get_layer("conv").kernel)
    common = {"max_steps": 3, "tolerance": 0.001, **options}
    expected = regularize_kernel(kernel, (9, 8), **common)
    found = regularize_model(model, include="conv", **common).results["conv"]
    for column, values in expected.history.items():
        np.testing.assert_array_equal(found.history[column], values)
    np.testing.assert_array_equal(model.get_layer("conv").kernel, expected.kernel)
    assert found.reason is expected.reason


def cells(descent):
    """The rows of the printed table: cells by the name of the column."""
    table = str(descent).split("\n\n")[1].replace("R before", "R_before").replace("R after", "R_after")
    header, _, *rows = (line.split() for line in table.splitlines())
    width = len(header) - 1  # the last cell may have several words
    rows = [[*row[:width], " ".join(row[width:])] for row in rows]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_a_report_has_a_summary_a_table_and_what_was_left_out():
    descent = regularize_model(named_model(), exclude="strided", max_steps=1, tolerance=0.0, measure="often")
    lines = str(descent).splitlines()
    assert lines[0] == "0 of 2 kernels converged, 1 left out"
    assert lines[-2:] == [f"max steps: {StopReason.MAX_STEPS.value}", "Left out: strided: excluded"]
    assert repr(descent) == "ModelDescent: 0 of 2 kernels converged, 1 left out"
    assert [row["kernel"] for row in cells(descent)] == ["conv", "top"]
    for row in cells(descent):
        result = descent.results[row["kernel"]]
        assert row == {
            "kernel": row["kernel"],
            "α": "1",
            "R_before": f"{result.history['penalty'][0]:.4g}",
            "R_after": f"{result.penalty:.4g}",
            "σmax": f"{result.history['sigma_max'][1]:.4f}",
            "σmin": f"{result.history['sigma_min'][1]:.4f}",
            "steps": "1",
            "escapes": "0",
            "moved": f"{descent.changes[row['kernel']]:.0%}",
            "result": "max steps",
        }


def test_html_holds_the_table_and_the_remarks():
    descent = regularize_model(named_model(), exclude="strided", max_steps=1, tolerance=0.0)
    html = descent._repr_html_()
    assert "<caption>0 of 2 kernels converged, 1 left out</caption>" in html
    assert html.count("<tr>") == 3
    for row in cells(descent):
        for cell in row.values():
            assert f">{cell}</td>" in html
    assert f"<p>max steps: {StopReason.MAX_STEPS.value}</p>" in html
    assert html.endswith("<p>Left out: strided: excluded</p>")


def test_records_are_flat_plain_values():
    descent = regularize_model(named_model(), exclude="strided", alpha=2.0)
    *done, left_out = descent.records()
    for name, record in zip(["conv", "top"], done, strict=True):
        result = descent.results[name]
        assert record == {
            "layer": name,
            "alpha": 2.0,
            "penalty_before": result.history["penalty"][0],
            **result.to_dict(),
            "change": descent.changes[name],
        }
    assert list(left_out) == list(done[0])
    assert left_out.pop("layer") == "strided"
    assert left_out.pop("reason") == "left out: excluded"
    assert set(left_out.values()) == {None}
    assert json.loads(json.dumps(done)) == done  # no arrays and no scalars of NumPy
    assert ModelDescent({}, {"a": "excluded"}).records() == [{"layer": "a", "reason": "left out: excluded"}]
    assert ModelDescent({}, {}).records() == []


def test_reports_of_nothing():
    assert str(ModelDescent({}, {})) == "0 of 0 kernels converged"
    lines = str(ModelDescent({}, {"a": "excluded", "b": "excluded"})).splitlines()
    assert lines == ["0 of 0 kernels converged, 2 left out", "", "Left out: a, b: excluded"]


def penalised_model():
    """A Frobenius penalty alone, one in a sum, another penalty, and none. α is 2 and 0.5 in the first two."""
    keras.utils.set_random_seed(1)
    regularizers = {"strided": keras.regularizers.L2(0.1), "top": SpectralRegularizer((), 0.1)}
    layers = [
        type(layer).from_config(layer.get_config() | {"kernel_regularizer": regularizers[layer.name]})
        if layer.name in regularizers
        else layer
        for layer in named_model().layers
    ]
    model = keras.Sequential([keras.Input((9, 8, 2)), *layers])
    attach_regularizers(model, alpha=2.0, include="conv")
    attach_regularizers(model, alpha=0.5, include="strided")
    return model


def test_alpha_is_that_of_the_penalty_of_each_kernel():
    model = penalised_model()
    assert isinstance(model.get_layer("conv").kernel_regularizer, FrobeniusRegularizer)
    assert type(model.get_layer("strided").kernel_regularizer).__name__ == "SumRegularizer"
    descent = regularize_model(model)
    assert descent.converged
    assert descent.alphas == {"conv": 2.0, "strided": 0.5, "top": 1.0}
    for row in model_spectrum(model):
        target = descent.alphas[row.name] ** 0.5
        assert abs(row.extremes.sigma_max - target) <= 0.0101
        assert abs(row.extremes.sigma_min - target) <= 0.0101


@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_an_alpha_that_is_given_overrides_the_penalties(alpha):
    model = penalised_model()
    descent = regularize_model(model, alpha=alpha)
    assert descent.alphas == {"conv": alpha, "strided": alpha, "top": alpha}
    for row in model_spectrum(model):
        assert abs(row.extremes.sigma_max - alpha**0.5) <= 0.0101


def test_changes_say_how_far_each_kernel_moved():
    model = named_model()
    before = {name: np.asarray(model.get_layer(name).kernel).copy() for name in ("conv", "strided", "top")}
    descent = regularize_model(model, exclude="strided")
    assert descent.changes.keys() == descent.alphas.keys() == descent.results.keys() == {"conv", "top"}
    for name, change in descent.changes.items():
        difference = np.asarray(model.get_layer(name).kernel) - before[name]
        assert change == pytest.approx((difference**2).sum() ** 0.5 / (before[name] ** 2).sum() ** 0.5)
        assert change > 0.1
    moved = {row["kernel"]: (row["moved"], row["result"]) for row in cells(descent)}
    assert moved == {name: (f"{change:.0%}", "converged") for name, change in descent.changes.items()}


def test_changes_of_kernels_that_are_zero_or_stay():
    model = named_model()
    model.get_layer("conv").kernel.assign(np.zeros((3, 3, 2, 4)))
    descent = regularize_model(model, max_steps=0)
    assert descent.changes == {"conv": 0.0, "strided": 0.0, "top": 0.0}
    assert [row["moved"] for row in cells(descent)] == ["0%", "0%", "0%"]
    descent = regularize_model(model, include="conv")  # an escape leaves 0
    assert descent.changes == {"conv": np.inf}
    assert [row["moved"] for row in cells(descent)] == ["∞"]


def test_a_result_without_changes_is_printed_too():
    descent = regularize_model(named_model(), include="top")
    (row,) = cells(ModelDescent(descent.results, {}))
    columns = ["kernel", "R_before", "R_after", "σmax", "σmin", "steps", "escapes", "result"]
    assert list(row) == columns  # neither α nor moved
    unmeasured = DescentResult(np.ones((3, 2)), 3.0, 0, StopReason.STOPPED, {})
    (row,) = cells(ModelDescent({"top": unmeasured}, {}))
    assert row == {"kernel": "top", "R_after": "3", "steps": "0", "escapes": "0", "result": "stopped"}


def test_escape_reaches_the_descent_of_each_kernel():
    def depthwise_model():
        keras.utils.set_random_seed(3)
        layer = keras.layers.DepthwiseConv2D(3, padding="same", name="depthwise")
        return keras.Sequential([keras.Input((12, 12, 8)), layer])

    escaping = regularize_model(depthwise_model()).results["depthwise"]
    assert escaping.converged
    assert escaping.escapes
    plain = regularize_model(depthwise_model(), escape=False)
    assert not plain.converged
    assert plain.results["depthwise"].escapes == ()
    with pytest.raises(TypeError, match="escape must be"):
        regularize_model(depthwise_model(), escape=1)


def test_a_kernel_out_of_reach_says_so_and_changes():
    layer = keras.layers.Conv2D(8, 3, name="conv")  # "valid", and more filters than channels
    model = keras.Sequential([keras.Input((9, 9, 4)), layer])
    descent = regularize_model(model)
    assert not descent.converged
    assert descent.results["conv"].reason is StopReason.OUT_OF_REACH
    assert "not converged: no kernel of this geometry reaches √α" in str(descent)
    np.testing.assert_array_equal(layer.kernel, descent.results["conv"].kernel)


def test_a_callback_that_does_not_stop_sees_every_kernel():
    seen = []
    descent = regularize_model(
        named_model(), max_steps=1, tolerance=0.0, callback=lambda name, step, *_: seen.append((name, step))
    )
    assert seen == [(name, step) for name in ("conv", "strided", "top") for step in (0, 1)]
    assert list(descent.results) == ["conv", "strided", "top"]


def test_selection_padding_and_callback():
    model = named_model()
    before = np.asarray(model.get_layer("top").kernel).copy()
    seen = []
    descent = regularize_model(
        model,
        exclude="top",
        padding="circular",
        max_steps=5,
        callback=lambda name, step, kernel, penalty: seen.append((name, step)) or step == 2,
    )
    assert seen == [("conv", 0), ("conv", 1), ("conv", 2)]
    assert descent.left_out == {"top": "excluded", "strided": "the callback stopped before it"}
    assert not descent.converged
    assert np.array_equal(model.get_layer("top").kernel, before)


def test_half_precision_and_lora():
    model = named_model(dtype="float16")
    model.get_layer("top").enable_lora(2)
    descent = regularize_model(model, max_steps=20, tolerance=0.0)
    assert descent.left_out == {"top": "LoRA is enabled: its kernel is frozen"}
    assert descent.results["conv"].penalty < descent.results["conv"].history["penalty"][0]
    assert model.get_layer("conv").kernel.dtype == "float16"


def test_no_kernel_changes_where_one_is_not_finite(tmp_path, capfd):
    model = named_model()
    top = model.get_layer("top").kernel
    top.assign(np.full(top.shape, np.nan))
    before = model.get_weights()
    with pytest.raises(ValueError, match="the kernel of layer 'top' must be finite. Received: NaN"):
        regularize_model(model)
    np.testing.assert_equal(model.get_weights(), before)
    model.save(tmp_path / "model.keras")
    arguments = ["regularize", tmp_path / "model.keras", "--output", tmp_path / "new.keras"]
    assert main([str(argument) for argument in arguments]) == 2
    assert "the kernel of layer 'top' must be finite" in capfd.readouterr().err
    assert regularize_model(model, exclude="top", max_steps=1).left_out == {"top": "excluded"}


def test_no_kernel_changes_where_a_border_does_not_suit():
    model = named_model()
    before = model.get_weights()
    with pytest.raises(ValueError, match="padding must be .*, for layer 'conv'"):
        regularize_model(model, padding="full")
    np.testing.assert_equal(model.get_weights(), before)


def test_bad_arguments():
    with pytest.raises(TypeError, match="callback must be a function. Received: callback=3"):
        regularize_model(named_model(), callback=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'strides'"):
        regularize_model(named_model(), strides=2)
    with pytest.raises(ValueError, match="alpha must be"):
        regularize_model(named_model(), alpha=0)
    with pytest.raises(ValueError, match="include must match a layer"):
        regularize_model(named_model(), include="x")
