"""What version 0.1 saved still loads, and a saved model loads in any order of imports."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from oracles import dense_penalty, naive_matrix

import tf_frobreg

# Version 0.1 had its modules at the top of the package. These are the texts that it saved.
OLD = {
    "FrobeniusRegularizer": (
        "regularizers",
        {
            "factor": 0.5,
            "alpha": 2.0,
            "reduction": "mean",
            "method": "closed_form",
            "input_size": [8, 9],
            "strides": [1, 2],
            "padding": "valid",
            "dilation_rate": [1, 1],
            "groups": 2,
            "kind": "conv",
        },
    ),
    "SpectralRegularizer": (
        "regularizers",
        {
            "factor": 0.1,
            "alpha": 1.5,
            "gram": "smaller",
            "power_steps": 3,
            "input_size": 8,
            "strides": 1,
            "padding": "same",
            "dilation_rate": [2, 2],
            "groups": 1,
            "kind": "depthwise",
        },
    ),
    "ReshapedRegularizer": ("regularizers", {"factor": 0.25, "scale": 0.5, "alpha": 1.0}),
    "SumRegularizer": (
        "regularizers",
        {
            "regularizers": [
                {
                    "module": "keras.regularizers",
                    "class_name": "L2",
                    "config": {"l2": 0.25},
                    "registered_name": None,
                },
                {
                    "module": "tf_frobreg.regularizers",
                    "class_name": "ReshapedRegularizer",
                    "config": {"factor": 0.5, "alpha": 1.0},
                    "registered_name": "tf_frobreg>ReshapedRegularizer",
                },
            ]
        },
    ),
    "FrobeniusInitializer": (
        "initializers",
        {
            "alpha": 2.0,
            "noise": 0.5,
            "tolerance": 0.1,
            "max_steps": 20,
            "seed": 3,
            "input_size": [8, 8],
            "strides": 1,
            "padding": "same",
            "dilation_rate": 1,
            "groups": 1,
            "kind": "conv",
        },
    ),
    "SingularValueClip": (
        "projection",
        {
            "low": 0.25,
            "high": 0.5,
            "input_size": [6, 6],
            "strides": [1, 1],
            "padding": "same",
            "dilation_rate": 1,
            "groups": 1,
            "kind": "conv",
        },
    ),
}


def old_text(name):
    module, config = OLD[name]
    return {
        "module": f"tf_frobreg.{module}",
        "class_name": name,
        "config": config,
        "registered_name": f"tf_frobreg>{name}",
    }


@pytest.mark.parametrize("name", OLD)
def test_what_version_0_1_saved_loads(name):
    loaded = keras.saving.deserialize_keras_object(old_text(name))
    assert type(loaded) is getattr(tf_frobreg, name)
    config = loaded.get_config()
    if name == "SumRegularizer":  # the parts are saved with the module that they have now
        assert [part["class_name"] for part in config["regularizers"]] == ["L2", "ReshapedRegularizer"]
        assert [part["config"] for part in config["regularizers"]] == [
            part["config"] for part in OLD[name][1]["regularizers"]
        ]
    else:
        assert config == OLD[name][1]


@pytest.mark.parametrize("get", [keras.regularizers.deserialize, keras.regularizers.get])
def test_old_regularizers_have_the_values_they_had(get):
    kernel = tf.constant(np.random.RandomState(0).randn(3, 3, 1, 4), tf.float64)
    penalty = tf_frobreg.frobenius_penalty(
        kernel, (8, 9), alpha=2.0, strides=(1, 2), padding="valid", groups=2
    )
    columns = 8 * 9 * 2
    found = get(old_text("FrobeniusRegularizer"))(kernel)
    assert float(found) == pytest.approx(0.5 * float(penalty) / columns, rel=1e-12)
    both = 0.25 * tf.reduce_sum(kernel**2) + 0.5 * tf_frobreg.reshaped_penalty(kernel)
    assert float(get(old_text("SumRegularizer"))(kernel)) == pytest.approx(float(both), rel=1e-6)
    scaled = 0.25 * 0.5 * tf_frobreg.reshaped_penalty(kernel)
    assert float(get(old_text("ReshapedRegularizer"))(kernel)) == pytest.approx(float(scaled), rel=1e-12)


def test_an_old_sum_stays_a_sum():
    """The defaults are "mean" and 0.01 now. Every text that was saved holds both values."""
    config = OLD["FrobeniusRegularizer"][1] | {"reduction": "sum", "factor": 1e-4}
    text = old_text("FrobeniusRegularizer") | {"config": config}
    kernel = np.random.RandomState(0).randn(3, 3, 1, 4)
    matrix = naive_matrix(kernel, (8, 9), (1, 2), "valid", groups=2)
    found = keras.regularizers.get(text)(kernel)
    assert float(found) == pytest.approx(1e-4 * dense_penalty(matrix, 2.0), rel=1e-12)


def test_an_old_initializer_and_constraint_work():
    kernel = keras.initializers.get(old_text("FrobeniusInitializer"))((3, 3, 2, 4))
    again = tf_frobreg.FrobeniusInitializer((8, 8), 2.0, noise=0.5, tolerance=0.1, max_steps=20, seed=3)
    np.testing.assert_array_equal(kernel, again((3, 3, 2, 4)))
    clipped = keras.constraints.get(old_text("SingularValueClip"))(kernel)
    expected = tf_frobreg.clip_singular_values(kernel, 6, low=0.25, high=0.5)
    np.testing.assert_array_equal(clipped, expected)


def saved_model(path):
    """Saves a model with every class that Keras has to find, and returns its losses."""
    keras.utils.set_random_seed(1)
    both = tf_frobreg.SumRegularizer(["l2", tf_frobreg.SpectralRegularizer(8, 0.1)])
    model = keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            keras.layers.Conv2D(
                2,
                3,
                padding="same",
                kernel_initializer=tf_frobreg.FrobeniusInitializer(8, noise=0.0, seed=1),
                kernel_constraint=tf_frobreg.SingularValueClip(8),
                kernel_regularizer=tf_frobreg.ReshapedRegularizer(0.1),
                name="first",
            ),
            keras.layers.Conv2D(2, 3, padding="same", kernel_regularizer=both, name="second"),
            keras.layers.Dense(3, name="top"),
        ]
    )
    tf_frobreg.attach_regularizers(model, 0.5, include="top")
    model.save(path)
    return [float(loss) for loss in model.losses]


IMPORTS = {
    "package first": "import tf_frobreg; import keras",
    "keras first": "import keras; import tf_frobreg",
    "tensorflow first": "import tensorflow; import tf_frobreg; keras = tensorflow.keras",
}


@pytest.mark.slow
@pytest.mark.parametrize("imports", IMPORTS.values(), ids=IMPORTS)
def test_a_saved_model_loads_in_any_order_of_imports(imports, tmp_path):
    path = tmp_path / "model.keras"
    first, second, top = saved_model(path)
    code = f"{imports}\nmodel = keras.models.load_model({str(path)!r})\nprint(*map(float, model.losses))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [float(text) for text in done.stdout.split()]
    assert [found[0], found[2]] == pytest.approx([first, top], rel=1e-6)
    # The power steps of SpectralRegularizer start from a random vector again.
    assert 0 < found[1] < 2 * second
    assert len(found) == 3
