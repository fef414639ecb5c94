"""Uses the penalties in a custom training loop, which adds `model.losses` to the loss.

    python examples/custom_loop.py      (a few seconds)

The script trains a small network on scikit-learn's digits if scikit-learn is installed, otherwise on noise.
It prints loss and penalty after each epoch, and σmax of each layer before and after training. With --every n
the penalties count at every n-th step only, with n times their weight, as with the callback LazyPenalty.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from tf_frobreg import attach_regularizers, model_spectrum


def load_data():
    """Returns 8×8 images of digits and their labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        random = np.random.RandomState(0)
        return random.rand(512, 8, 8, 1).astype("float32"), random.randint(10, size=512)
    digits = load_digits()
    return digits.images[..., None].astype("float32") / 16, digits.target


def main():
    """Trains the network and prints the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=5, help="number of epochs (default: 5)")
    parser.add_argument("--factor", type=float, default=0.1, help="weight of the penalties (default: 0.1)")
    parser.add_argument("--every", type=int, default=4, help="steps per use of the penalties (default: 4)")
    options = parser.parse_args()
    if options.every < 1:
        parser.error(f"--every must be at least 1. Received: {options.every}")
    keras.utils.set_random_seed(1)
    x, y = load_data()
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input(x.shape[1:]),
            layers.Conv2D(16, 3, padding="same", activation="relu", name="conv1"),
            layers.Conv2D(32, 3, strides=2, padding="same", activation="relu", name="conv2"),
            layers.Flatten(),
            layers.Dense(10, name="top"),
        ]
    )
    print(attach_regularizers(model, options.factor, alpha=2.0, reduction="mean", exclude="top"))
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.Adam()

    # TensorFlow traces a function for each of the two weights. The one for 0 has no penalty in it.
    @tf.function
    def step(images, labels, weight):
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(images, training=True))
            total = loss + weight * tf.add_n(model.losses) if weight else loss
        optimizer.apply(tape.gradient(total, model.trainable_variables), model.trainable_variables)
        return loss

    before = model_spectrum(model, alpha=2.0)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=1).batch(64)
    number = 0
    for epoch in range(options.epochs):
        losses = []
        for images, labels in batches:
            losses.append(step(images, labels, 0 if number % options.every else options.every))
            number += 1
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.4f}, penalty {tf.add_n(model.losses):.4f}")
    for first, last in zip(before, model_spectrum(model, alpha=2.0, start=before), strict=True):
        print(f"{last.name}: σmax {first.extremes.sigma_max:.2f} → {last.extremes.sigma_max:.2f}")


if __name__ == "__main__":
    main()
