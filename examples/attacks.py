"""Attacks of classifiers: small changes of images that a network then classifies wrongly."""

import keras
import numpy as np
import tensorflow as tf

BATCH = 500


def fgsm(model: keras.Model, x: np.ndarray, y: np.ndarray, size: float) -> np.ndarray:
    """Returns the images moved by `size` along the sign of the gradient: FGSM, Goodfellow et al., 2015."""
    moved = []
    for images, labels in _batches(x, y):
        with tf.GradientTape() as tape:
            tape.watch(images)
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(labels, model(images))
        moved.append(tf.clip_by_value(images + size * tf.sign(tape.gradient(loss, images)), 0, 1).numpy())
    return np.concatenate(moved)


def pgd(model: keras.Model, x: np.ndarray, y: np.ndarray, radius: float, steps: int) -> np.ndarray:
    """Returns the images after projected gradient ascent within an L2 ball: PGD, Madry et al., 2018.

    The ascent raises the margin: the greatest wrong logit minus the right one. Cross-entropy would be flat
    where the logits are large.
    """
    step = tf.function(_step, reduce_retracing=True)
    length = tf.constant(2.5 * radius / steps)
    moved = []
    for number, (images, labels) in enumerate(_batches(x, y)):
        noise = tf.random.stateless_normal(images.shape, (number, 0))
        place = images + radius * noise / _norms(noise)
        for _ in range(steps):
            place = step(model, images, place, labels, tf.constant(radius), length)
        moved.append(place.numpy())
    return np.concatenate(moved)


def _batches(x, y):
    for start in range(0, len(x), BATCH):
        yield tf.constant(x[start : start + BATCH]), tf.constant(y[start : start + BATCH])


def _step(model, images, place, labels, radius, length):
    with tf.GradientTape() as tape:
        tape.watch(place)
        logits = model(place)
        right = tf.one_hot(labels, logits.shape[-1]) > 0
        least = logits.dtype.min
        best_wrong = tf.reduce_max(tf.where(right, least, logits), -1)
        margin = best_wrong - tf.reduce_max(tf.where(right, logits, least), -1)
    slope = tape.gradient(margin, place)
    away = place + length * slope / _norms(slope) - images
    return tf.clip_by_value(images + away * tf.minimum(radius / _norms(away), 1.0), 0.0, 1.0)


def _norms(images):
    """The L2 norm of each image, at least 1e-12, so that one can divide by it."""
    return tf.maximum(tf.sqrt(tf.reduce_sum(images**2, axis=(1, 2, 3), keepdims=True)), 1e-12)
