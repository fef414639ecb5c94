"""Which kernels of a model a name, a layer, a class or a function selects."""

import keras
import pytest
from ids import stable_id

from tf_frobreg.keras.select_kernels import select_kernels

LAYERS = keras.layers


def small_model():
    return keras.Sequential(
        [
            keras.Input((10, 9, 2)),
            LAYERS.Conv2D(4, 3, name="first"),
            LAYERS.ReLU(),
            LAYERS.SeparableConv2D(4, 3, strides=2, name="separable"),
            LAYERS.Conv2DTranspose(3, 2, strides=2, name="up"),
            LAYERS.Flatten(),
            LAYERS.Dense(5, name="top"),
        ]
    )


def select(model, include=None, exclude=None, input_size=None):
    return select_kernels(model, include, exclude, input_size)


def names_of(selected):
    return [kernel.name for kernel in selected.kernels]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"include": "first"}, ["first"]),
        ({"include": "separable"}, ["separable/depthwise", "separable/pointwise"]),
        ({"include": "sep*/point*"}, ["separable/pointwise"]),
        ({"include": LAYERS.Dense}, ["top"]),
        ({"include": [LAYERS.Dense, "up"]}, ["up", "top"]),
        ({"include": lambda layer: layer.name.startswith("u")}, ["up"]),
        ({"exclude": [LAYERS.SeparableConv2D, "top"]}, ["first", "up"]),
        ({"exclude": "flatten*"}, ["first", "separable/depthwise", "separable/pointwise", "up", "top"]),
        ({"include": []}, []),
    ],
    ids=stable_id,
)
def test_include_and_exclude(arguments, names):
    assert names_of(select(small_model(), **arguments)) == names


def test_include_and_exclude_take_layers():
    model = small_model()
    up, top = model.get_layer("up"), model.get_layer("top")
    assert names_of(select(model, include=[up, top], exclude=top)) == ["up"]


def test_what_is_left_out_has_a_reason():
    selected = select(small_model(), include=["first", "separable"], exclude="*/pointwise")
    assert names_of(selected) == ["first", "separable/depthwise"]
    assert selected.left_out == {
        "separable/pointwise": "excluded",
        "up": "not included",
        "top": "not included",
    }


@pytest.mark.parametrize(
    "pattern",
    [lambda layer: False, [], {"first"}, frozenset(["first"]), ("first",)],
    ids=["function", "empty", "set", "frozenset", "tuple"],
)
def test_a_function_may_match_nothing_and_every_kind_of_list_is_taken(pattern):
    expected = ["first"] if pattern and not callable(pattern) else []
    assert names_of(select(small_model(), include=pattern)) == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"include": "frist"},
            ValueError,
            r"include must match a layer with a kernel. Received: include='frist' \(did you mean 'first'\?\)"
            r"\. Names: first, separable/depthwise, separable/pointwise, up, top$",
        ),
        ({"include": "tpo"}, ValueError, r"include='tpo' \(did you mean 'top'\?\)"),
        ({"include": "re_lu*"}, ValueError, "include must match a layer with a kernel"),
        ({"exclude": ["top", "x"]}, ValueError, "exclude must match a layer .*Received: exclude='x'"),
        ({"include": LAYERS.LSTM}, ValueError, "include must match a layer .*LSTM"),
        ({"exclude": LAYERS.Dense(3)}, ValueError, "exclude must match a layer .*Dense"),
        ({"include": 3}, TypeError, "include must be a name, a layer, a layer class, a function"),
        ({"exclude": ["top", 3]}, TypeError, "exclude must be a name, a layer, a layer class, a function"),
    ],
    ids=stable_id,
)
def test_bad_patterns_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        select(small_model(), **arguments)


def test_an_unknown_image_size_matters_only_for_selected_layers():
    layers = [LAYERS.Conv2D(2, 3, name="conv"), LAYERS.GlobalMaxPooling2D(), LAYERS.Dense(2, name="top")]
    model = keras.Sequential([keras.Input((None, None, 2)), *layers])
    message = r"layer 'conv' cannot be treated: .*exclude='conv'. Received: input_size=None"
    with pytest.raises(ValueError, match=message):
        select(model)
    assert select(model, exclude="conv").left_out == {"conv": "excluded"}
    assert names_of(select(model, input_size=8)) == ["conv", "top"]


def test_a_layer_by_itself_is_not_excluded_but_given_a_size():
    layer = LAYERS.Conv2D(2, 3, name="conv")
    layer.build((None, None, None, 2))
    message = r"layer 'conv' cannot be treated: .*give input_size, or a model of fixed size\. Received"
    with pytest.raises(ValueError, match=message):
        select(layer)
    assert [kernel.conv.input_size for kernel in select(layer, input_size=8).kernels] == [(8, 8)]


def test_a_long_list_of_names_is_shortened():
    layers = [LAYERS.Dense(2, name=f"layer_{n}") for n in range(30)]
    with pytest.raises(ValueError, match=r"'layer_(\d+)'\?\)\. Names: layer_0, .*, layer_7 and 22 others$"):
        select(keras.Sequential([keras.Input((2,)), *layers]), include="layer99")


@pytest.mark.parametrize(("strides", "ending"), [(1, ""), (2, "; penalised only with the geometry of 'a'")])
def test_a_shared_kernel_of_another_geometry_is_named(strides, ending):
    a, b = LAYERS.Conv2D(2, 3, name="a"), LAYERS.Conv2D(2, 3, strides=strides, name="b")
    inputs = keras.Input((8, 8, 2))
    model = keras.Model(inputs, [a(inputs), b(inputs)])
    b._tracker.unlock()
    b._kernel = a._kernel
    reasons = [kernel.reason_to_skip() for kernel in select(model).kernels]
    assert reasons == [None, f"it shares its kernel with 'a'{ending}"]


def test_selection_lists_what_cannot_be_treated():
    inputs = keras.Input((8, 2))
    x = LAYERS.Conv1D(2, 3, padding="causal", name="causal")(inputs)
    model = keras.Model(inputs, LAYERS.LSTM(3, name="lstm")(x))
    kernels, left_out = select(model)
    assert kernels == []
    assert "padding='causal'" in left_out["causal"]
    assert left_out["lstm_cell"] == "LSTMCell is neither a convolution nor Dense"
