"""A small model for tests of regularizers and constraints in training."""

import keras
import numpy as np


def small_model(**options):
    """Two convolutions with these options, each with 3 filters on images of 8×8×3."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((8, 8, 3))])
    for _ in range(2):
        model.add(keras.layers.Conv2D(3, 3, padding="same", use_bias=False, **options))
    model.add(keras.layers.GlobalAveragePooling2D())
    return model


def fit(model, epochs=1, **options):
    """Trains the model on random data."""
    model.compile(keras.optimizers.SGD(0.05), "mse", **options)
    random = np.random.RandomState(0)
    model.fit(random.randn(16, 8, 8, 3), random.randn(16, 3), batch_size=4, epochs=epochs, verbose=0)
