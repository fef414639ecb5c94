"""The geometry that regularizers, the initializer and the constraint keep."""

import keras
import numpy as np
import pytest

from tf_frobreg import Convolution, FrobeniusRegularizer
from tf_frobreg.keras.layer_geometry import TakesGeometry


def taken(input_size, **geometry):
    holder = TakesGeometry()
    holder.take_geometry(input_size, geometry)
    return holder


def test_every_argument_is_an_attribute_and_the_others_have_defaults():
    holder = taken(np.array([8, 9]), strides=[1, 2], groups=np.int64(2))
    assert (holder.input_size, holder.strides) == ((8, 9), (1, 2))
    assert (holder.padding, holder.dilation_rate, holder.groups, holder.kind) == ("same", 1, 2, "conv")
    assert holder.geometry == {
        "strides": (1, 2),
        "padding": "same",
        "dilation_rate": 1,
        "groups": 2,
        "kind": "conv",
    }


def test_one_int_stands_for_every_axis_of_any_kernel():
    holder = taken(8, padding="valid")
    assert holder.convolution((3, 3, 1, 4)) == Convolution((3, 3, 1, 4), (8, 8), padding="valid")
    assert holder.convolution((3, 1, 4)) == Convolution((3, 1, 4), (8,), padding="valid")


def test_the_config_has_lists_and_is_taken_again():
    config = taken((8, 9), dilation_rate=(1, 2)).geometry_config()
    assert config == {
        "input_size": [8, 9],
        "strides": 1,
        "padding": "same",
        "dilation_rate": [1, 2],
        "groups": 1,
        "kind": "conv",
    }
    assert taken(**config).geometry_config() == config


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_size": 0}, ValueError, "input_size must be at least 1"),
        ({"input_size": "8"}, TypeError, "input_size must be an integer"),
        ({"input_size": (None, 28, 28, 1)}, TypeError, "per spatial axis, without batch and channels"),
        ({"input_size": (5, 28, 28, 1)}, ValueError, "at most 3 entries, .* without batch and channels"),
        ({"input_size": (8, 8), "strides": (1, 1, 1)}, ValueError, "strides must be an int or 2 ints"),
        ({"input_size": 8, "stride": 2}, TypeError, "unknown argument 'stride'"),
        ({"input_size": (), "kind": "depthwise"}, ValueError, "kind='depthwise' needs a spatial axis"),
    ],
)
def test_bad_arguments_are_refused_before_the_kernel_is_known(arguments, error, message):
    with pytest.raises(error, match=message):
        taken(**arguments)


def test_a_kernel_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="input_size must be an int or 1 ints"):
        taken((8, 8)).convolution((3, 3, 3))


def test_an_image_size_with_channels_is_refused_in_losses_and_in_training():
    layer = keras.layers.Conv2D(4, 3, kernel_regularizer=FrobeniusRegularizer((28, 28, 1)))
    model = keras.Sequential([keras.Input((28, 28, 1)), layer, keras.layers.GlobalMaxPooling2D()])
    model.compile("sgd", "mse")
    message = r"Received: input_size=\(28, 28, 1\) \(write \(28, 28\), without channels\)"
    with pytest.raises(ValueError, match=message):
        sum(layer.losses)
    with pytest.raises(ValueError, match=message):
        model.fit(np.ones((2, 28, 28, 1)), np.ones((2, 4)), verbose=0)
