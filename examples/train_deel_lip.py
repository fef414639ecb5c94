"""Trains the network of study_certified.py from deel-lip's layers, which need Keras 2 in a process apart.

    TF_USE_LEGACY_KERAS=1 python examples/train_deel_lip.py IMAGES.npz WEIGHTS.npz STRENGTH SCALE EPOCHS SEED

Reads the arrays x and y, and writes the weights that usual layers need to compute the same. The loss is
`TauCategoricalCrossentropy` with τ = scale if the strength is 0. Otherwise it is `MulticlassHKR` with the
strength as its factor and scale/10 as the margin.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from deel.lip.activations import GroupSort2
from deel.lip.layers import SpectralConv2D, SpectralDense
from deel.lip.losses import MulticlassHKR, TauCategoricalCrossentropy
from deel.lip.model import Sequential

LAYERS = ((16, 1), (32, 2), (64, 2))  # filters and stride of the convolutions
RATE, BATCH = 3e-3, 128


def main():
    """Trains one network on one core."""
    source, target = sys.argv[1:3]
    strength, scale = map(float, sys.argv[3:5])
    epochs, seed = map(int, sys.argv[5:7])
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    with np.load(source) as data:
        x, y = data["x"], data["y"]
    keras = tf.keras
    keras.utils.set_random_seed(seed)
    layers = [SpectralConv2D(n, 3, strides=stride, activation=GroupSort2()) for n, stride in LAYERS]
    model = Sequential([keras.layers.Input(x.shape[1:]), *layers, keras.layers.Flatten(), SpectralDense(10)])
    loss = MulticlassHKR(strength, scale / 10) if strength else TauCategoricalCrossentropy(scale)
    rate = keras.optimizers.schedules.CosineDecay(RATE, epochs * -(-len(x) // BATCH))
    model.compile(keras.optimizers.Adam(rate), loss)
    model.fit(x, keras.utils.to_categorical(y, 10), epochs=epochs, batch_size=BATCH, verbose=0)
    usual = model.vanilla_export()
    logits = usual.predict(x[:100], verbose=0)
    np.savez(target, *usual.get_weights(), logits=logits)


if __name__ == "__main__":
    main()
