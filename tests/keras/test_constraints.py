"""SingularValueClip in the models of Keras users."""

import keras
import numpy as np
import pytest
from ids import stable_id
from small_models import fit, small_model

from tf_frobreg import SingularValueClip, singular_values


@pytest.mark.parametrize("mode", [{}, {"run_eagerly": True}], ids=stable_id)
def test_the_projection_as_a_constraint(mode):
    model = small_model(kernel_constraint=SingularValueClip(8, high=0.5))
    before = [singular_values(layer.kernel, 8, padding="circular")[0] for layer in model.layers[:2]]
    fit(model, epochs=20, **mode)
    for layer, start in zip(model.layers, before, strict=False):
        assert singular_values(layer.kernel, 8, padding="circular")[0] < 0.6 < start


def test_saved_models_come_back(tmp_path):
    constraint, path = SingularValueClip(8, 0.1, 0.9), tmp_path / "model.keras"
    small_model(kernel_constraint=constraint).save(path)
    loaded = keras.models.load_model(path)
    again = loaded.layers[0].kernel_constraint
    assert type(again) is SingularValueClip
    assert again.get_config() == constraint.get_config()
    assert SingularValueClip.from_config(constraint.get_config()).get_config() == constraint.get_config()
    fit(loaded)


KERNEL = np.ones((3, 3, 1, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SingularValueClip(8, low=-1), "low must be a finite number at least 0"),
        (lambda: SingularValueClip(8, strides=(1, 2)), "strides must be 1 for the projection"),
        (lambda: SingularValueClip(2)(KERNEL), "input_size must be at least"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
