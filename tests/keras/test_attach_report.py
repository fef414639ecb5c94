"""The report of attach_regularizers: its first line, its table and its records."""

import html
import json
import re

import keras
import numpy as np
import pytest
from small_models import named_model

from tf_frobreg import ReshapedRegularizer, attach_regularizers

LAYERS = keras.layers


def small_model():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            LAYERS.Conv2D(4, 3, strides=2, padding="same", kernel_regularizer="l2", name="down"),
            LAYERS.Conv2D(4, 3, groups=2, dilation_rate=2, padding="same", name="wide"),
            LAYERS.Conv2D(2, 1, kernel_regularizer=ReshapedRegularizer(0.5), name="last"),
            LAYERS.Flatten(),
            LAYERS.Dense(3, name="top"),
            LAYERS.Dense(2, name="out"),
        ]
    )


def test_the_table_shows_what_each_penalty_is_and_what_was_there():
    report = attach_regularizers(small_model(), exclude="out", overrides={"wide": {"reduction": "sum"}})
    first, empty, head, rule, *rows, blank, left_out = str(report).splitlines()
    assert first == "attached 4, left out 1, kept 0"
    assert (empty, blank, left_out) == ("", "", "Left out: out: excluded")
    assert head.split() == ["kernel", "factor", "α", "reduction", "image", "geometry", "remark"]
    assert set(rule) == {"─"}
    assert [re.split(r"  +", row) for row in rows] == [
        ["down", "0.01", "1", "mean", "8×8", "same, strides 2×2", "added to L2"],
        ["wide", "0.01", "1", "sum", "4×4", "same, dilation_rate 2×2, 2 groups", "-"],
        ["last", "0.01", "1", "mean", "4×4", "valid", "added to ReshapedRegularizer"],
        ["top", "0.01", "1", "mean", "-", "Dense", "-"],
    ]


@keras.saving.register_keras_serializable(package="tests")
def own(kernel, convolution):
    return keras.ops.sum(kernel)


@pytest.mark.parametrize(
    ("penalty", "head", "row"),
    [
        ("spectral", "kernel penalty factor α image geometry", ["wide", "spectral", "0.01", "1", "4×4"]),
        ("reshaped", "kernel penalty factor α", ["wide", "reshaped", "0.01", "1"]),
        (own, "kernel penalty factor image geometry", ["wide", "own", "0.01", "4×4"]),
    ],
)
def test_columns_of_other_penalties(penalty, head, row):
    report = attach_regularizers(small_model(), penalty=penalty, include=["wide", "top"])
    lines = str(report).splitlines()
    assert lines[2].split() == head.split()
    assert re.split(r"  +", lines[4])[: len(row)] == row


def test_the_first_line_says_that_nothing_was_new():
    model = small_model()
    attach_regularizers(model, include="wide", factor=1.0)
    report = attach_regularizers(model, include=["wide", "down"], existing="keep")
    assert str(report).splitlines() == [
        "attached 0, left out 3, kept 2",
        "",
        "Kept: down: it has L2 already",
        "Kept: wide: it has FrobeniusRegularizer already",
        "Left out: last, top, out: not included",
    ]
    assert repr(report) == "AttachReport: attached 0, left out 3, kept 2"


def test_the_notebook_shows_the_same_as_html():
    report = attach_regularizers(small_model(), exclude="out")
    text = report._repr_html_()
    cells = [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", text)]
    assert cells[:7] == ["down", "0.01", "1", "mean", "8×8", "same, strides 2×2", "added to L2"]
    assert "attached 4, left out 1, kept 0" in text
    assert "Left out: out: excluded" in text


def test_records_are_flat_and_plain():
    report = attach_regularizers(small_model(), exclude="out", existing="keep")
    records = report.records()
    assert [(record["layer"], record["status"]) for record in records] == [
        ("wide", "attached"),
        ("top", "attached"),
        ("down", "kept"),
        ("last", "kept"),
        ("out", "left out"),
    ]
    assert len({tuple(record) for record in records}) == 1  # all have the same keys
    assert records[0] | {"remark": "", "input_size": 0} == {
        "layer": "wide",
        "status": "attached",
        "penalty": "frobenius",
        "factor": 0.01,
        "scale": 1.0,
        "alpha": 1.0,
        "reduction": "mean",
        "input_size": 0,
        "strides": (1, 1),
        "padding": "same",
        "dilation_rate": (2, 2),
        "groups": 2,
        "kind": "conv",
        "remark": "",
        "reason": None,
    }
    assert (records[0]["input_size"], records[0]["remark"]) == ((4, 4), None)
    assert (records[2]["reason"], records[2]["factor"]) == ("it has L2 already", None)
    assert json.loads(json.dumps(records))[4]["reason"] == "excluded"


class TwoBranches(keras.Model):
    """A model that leaves out one of its layers when it is called."""

    def __init__(self):
        super().__init__()
        self.used = LAYERS.Conv2D(2, 3, name="used")
        self.spare = LAYERS.Conv2D(2, 3, name="spare")

    def build(self, shape):
        self.used.build(shape)
        self.spare.build((None, 5, 5, 1))

    def call(self, x):
        return self.used(x)


def test_a_size_of_an_earlier_call_is_remarked():
    model = TwoBranches()
    model(np.zeros((1, 6, 6, 1)))
    with pytest.warns(UserWarning, match="The image size of spare is that of an earlier call"):
        report = attach_regularizers(model, existing="replace")
    remark = "size of an earlier call"
    assert report.remarks["spare"].startswith(remark)
    assert remark not in report.remarks["used"]
    with pytest.warns(UserWarning, match="spare"):
        reshaped = attach_regularizers(model, penalty="reshaped", existing="replace")
    assert remark not in reshaped.remarks["spare"]  # it takes no size


def test_a_factor_that_a_schedule_has_changed_is_shown():
    model = small_model()
    penalty = attach_regularizers(model, 0.5, include="wide").attached["wide"]
    penalty.scale, penalty.input_size = 0.25, (6, 6)
    report = attach_regularizers(model, include="wide", existing="correct")
    assert "0.5 × 0.25" in str(report)
    assert report.records()[0]["scale"] == 0.25


def test_what_is_kept_is_described():
    model = named_model()
    attach_regularizers(model, 7.0, 2.0, include="conv")
    for existing in ("add", "keep", "correct"):
        report = attach_regularizers(model, 5.0, include="conv", existing=existing)
        assert report.kept["conv"].startswith("it has FrobeniusRegularizer already")
        if existing == "add":
            expected = 'with factor 7 instead of 5, α 2 instead of 1: existing="replace" takes the new one'
            assert report.kept["conv"].endswith(expected)
        (record,) = (record for record in report.records() if record["layer"] == "conv")
        assert (record["status"], record["penalty"], record["factor"]) == ("kept", "frobenius", 7.0)
        assert (record["alpha"], record["input_size"]) == (2.0, (9, 8))


def test_a_report_detaches_its_own_penalty_from_a_sum():
    model = named_model()
    first = attach_regularizers(model, include="conv")
    second = attach_regularizers(model, penalty="spectral", include="conv")
    first.detach()
    conv = model.get_layer("conv")
    assert [type(part).__name__ for part in conv.kernel_regularizer.regularizers] == ["SpectralRegularizer"]
    assert conv.kernel.regularizer is conv.kernel_regularizer
    assert len(model.losses) == 1
    second.detach()
    assert conv.kernel_regularizer is None
    assert not model.losses


def test_sizes_of_the_building_are_noted():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.conv = keras.layers.Conv2D(2, 3, name="conv")

        def call(self, x):
            return self.conv(x)

    model = Own()
    model(np.zeros((1, 9, 9, 1)))
    model(np.zeros((1, 20, 20, 1)))
    report = attach_regularizers(model)
    assert report.attached["conv"].input_size == (9, 9)
    assert "The image sizes are those for which the model was built" in str(report)
    assert not attach_regularizers(model, input_size=20, existing="correct").notes
    assert model.conv.kernel_regularizer.input_size == (20, 20)
    assert not attach_regularizers(named_model()).notes
