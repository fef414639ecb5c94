"""Certified radii: no perturbation within them changes the class, and for linear models a longer one does."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_frobreg import certified_radius, lipschitz_bound

L = keras.layers
ALLOWANCE = 32 * 2.0**-23  # for rounding, relative to the largest logit


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(1)


def classifier(*layers, shape=(6, 6, 1)):
    return keras.Sequential([keras.Input(shape), *layers])


def cnn(*end):
    first = L.Conv2D(4, 3, activation="relu", kernel_initializer="orthogonal")
    return classifier(first, L.MaxPooling2D(2), L.Flatten(), L.Dense(4), *end)


def images(count=50, shape=(6, 6, 1)):
    return np.random.RandomState(0).rand(count, *shape).astype("float32")


def test_a_linear_classifier_has_its_distance_to_the_nearest_border():
    model = classifier(L.Dense(4), shape=(5,))
    x = images(20, (5,))
    kernel = model.layers[0].kernel.numpy().astype(np.float64)
    logits = x @ kernel
    best = logits.argmax(axis=1)
    radii = certified_radius(model, x)
    assert radii.dtype == np.float64
    assert radii.shape == (20,)
    for row, radius in enumerate(radii):
        others = [j for j in range(4) if j != best[row]]
        directions = {j: kernel[:, j] - kernel[:, best[row]] for j in others}
        distances = {j: -(x[row] @ d) / np.linalg.norm(d) for j, d in directions.items()}
        nearest = min(distances, key=distances.get)
        assert radius <= distances[nearest]
        slack = ALLOWANCE * abs(logits[row]).max() / np.linalg.norm(directions[nearest])
        assert radius >= distances[nearest] - 1.01 * slack - 1e-6
        across = x[row] + (1.001 * radius + 2 * slack + 1e-5) * directions[nearest] / np.linalg.norm(
            directions[nearest]
        )
        assert (across @ kernel).argmax() != best[row]


def norms(batch):
    return tf.sqrt(tf.reduce_sum(batch**2, axis=(1, 2, 3), keepdims=True))


@pytest.mark.parametrize("end", [(), (L.ReLU(),), (L.Rescaling(30.0),)], ids=["head", "relu", "scaled"])
def test_an_attack_within_the_radius_fails(end):
    model = cnn(*end)
    x = images()
    radii = certified_radius(model, x)
    before = model.predict(x, verbose=0).argmax(axis=1)
    assert (radii > 0).any()
    moved = tf.constant(x)
    for _ in range(20):  # gradient ascent of the loss, projected into the ball
        with tf.GradientTape() as tape:
            tape.watch(moved)
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(before, model(moved))
        gradient = tape.gradient(loss, moved)
        step = moved + 0.3 * gradient / (norms(gradient) + 1e-12) - x
        allowed = 0.999 * tf.constant(radii[:, None, None, None], tf.float32)
        moved = x + step * tf.minimum(1.0, allowed / (norms(step) + 1e-12))
    np.testing.assert_array_equal(model.predict(moved, verbose=0).argmax(axis=1), before)


def test_the_head_is_used_and_its_scale_changes_nothing():
    model = cnn()
    bound = lipschitz_bound(model)
    x = images()
    radii = certified_radius(model, x)
    logits = np.sort(model.predict(x, verbose=0).astype(np.float64), axis=1)
    plain = (logits[:, -1] - logits[:, -2]) / (np.sqrt(2) * bound.value)
    assert (radii >= plain - 1e-5).all()
    assert radii.mean() > 1.05 * plain.mean()
    np.testing.assert_allclose(certified_radius(model, x, bound), radii)
    np.testing.assert_allclose(certified_radius(model, x, bound.value), plain, atol=1e-5)
    scaled = keras.Sequential([model, L.Rescaling(30.0, offset=3.0), L.Activation("linear")])
    scaled.build((None, 6, 6, 1))
    np.testing.assert_allclose(certified_radius(scaled, x), radii, atol=1e-4)
    head = lipschitz_bound(scaled).head
    assert head.bound == pytest.approx(bound.head.bound)
    np.testing.assert_allclose(head.kernel, 30 * bound.head.kernel)


def test_no_head_after_an_activation():
    assert lipschitz_bound(cnn(L.ReLU())).head is None
    assert lipschitz_bound(classifier(L.Flatten(), L.Dense(2, "tanh"))).head is None
    assert lipschitz_bound(cnn(L.Rescaling([1.0, 2.0, 3.0, 4.0]))).head is None


def test_a_tie_has_the_radius_0_and_a_constant_difference_none():
    model = classifier(L.Dense(2, kernel_initializer="identity"), shape=(2,))
    np.testing.assert_array_equal(certified_radius(model, np.array([[1.0, 1.0]])), [0.0])
    same = classifier(L.Dense(2, kernel_initializer="ones"), shape=(2,))
    same.layers[0].bias.assign([0.0, 1.0])
    np.testing.assert_array_equal(certified_radius(same, np.array([[1.0, 1.0]])), [np.inf])


def of_open_size():
    return classifier(L.Conv2D(3, 3), L.GlobalAveragePooling2D(), L.Dense(2), shape=(None, None, 1))


def test_an_open_size_is_that_of_the_images():
    model = of_open_size()
    radii = certified_radius(model, images(3), input_size=6)
    assert radii.shape == (3,)
    np.testing.assert_array_equal(certified_radius(model, images(3)), radii)
    np.testing.assert_array_equal(certified_radius(model, tf.constant(images(3))), radii)
    data = tf.data.Dataset.from_tensor_slices(images(3)).batch(2)
    np.testing.assert_allclose(certified_radius(model, data), radii)
    np.testing.assert_allclose(certified_radius(model, data, input_size=6), radii)


def test_another_size_than_that_of_the_images_is_refused():
    model = of_open_size()
    bound = lipschitz_bound(model, 12)
    for x in (images(3), tf.data.Dataset.from_tensor_slices(images(3)).batch(2)):
        with pytest.raises(ValueError, match=r"bound must be for the size of x.* \(None, 12, 12, 1\)"):
            certified_radius(model, x, bound)
        for given in (None, bound, 1.0):
            with pytest.raises(ValueError, match="input_size must be the size of x.* input_size=12"):
                certified_radius(model, x, given, input_size=12)
    with pytest.raises(ValueError, match="bound must be for the size of x"):
        certified_radius(cnn(), images(3), bound)
    unknown = tf.data.Dataset.from_generator(
        lambda: iter([images(3)]), output_signature=tf.TensorSpec((None, None, None, 1))
    )
    with pytest.raises(ValueError, match="bound must be for the size of x"):
        certified_radius(model, unknown, lipschitz_bound(model, 6))


def test_several_inputs():
    left, right = keras.Input((4,), name="left"), keras.Input((3,), name="right")
    model = keras.Model([left, right], L.Dense(3)(L.Concatenate()([left, right])))
    x = [images(5, (4,)), images(5, (3,))]
    radii = certified_radius(model, x)
    np.testing.assert_array_equal(certified_radius(model, {"right": x[1], "left": x[0]}), radii)
    with pytest.raises(ValueError, match=r"x must be a batch of shape \(None, 4\) and \(None, 3\)"):
        certified_radius(model, x[::-1])


def test_logits_in_a_dict():
    image = keras.Input((4,))
    logits = L.Dense(3)(image)
    x = images(5, (4,))
    expected = certified_radius(keras.Model(image, logits), x)
    np.testing.assert_array_equal(certified_radius(keras.Model(image, {"a": logits}), x), expected)


@pytest.mark.filterwarnings("ignore:.*ran out of data")
def test_no_images():
    model = cnn()
    radii = certified_radius(model, images(3)[:0])
    assert (radii.shape, radii.dtype) == ((0,), np.float64)
    with pytest.raises(ValueError, match="x must hold at least one batch"):
        certified_radius(model, tf.data.Dataset.from_tensor_slices(images(3)).batch(2).take(0))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            images(1)[0],
            ValueError,
            r"x must be a batch of shape \(None, 6, 6, 1\). Received: shape \(6, 6, 1\)",
        ),
        (images(2, (5, 6, 1)), ValueError, r"Received: shape \(2, 5, 6, 1\)"),
        (None, TypeError, r"x must be a batch of shape \(None, 6, 6, 1\). Received: x=None"),
        (images(2).tolist(), TypeError, "x must be a batch of shape"),
        ({"image": images(2)}, TypeError, "x must be a batch of shape"),
        (images(2) * 1j, TypeError, "x must hold real numbers. Received: complex64"),
        (np.full((2, 6, 6, 1), np.nan), ValueError, "x must be finite in float32"),
        (np.full((2, 6, 6, 1), -np.inf), ValueError, "x must be finite in float32"),
        (np.full((2, 6, 6, 1), 1e300), ValueError, "x must be finite in float32"),
    ],
    ids=["one image", "size", "none", "list", "dict", "complex", "nan", "infinity", "overflow"],
)
def test_refused_images(x, error, message):
    with pytest.raises(error, match=message) as caught:
        certified_radius(cnn(L.ReLU()), x)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("batch_size", "error"),
    [(-1, ValueError), (0, ValueError), (1.5, TypeError), ("a", TypeError), (True, TypeError)],
)
def test_refused_batch_sizes(batch_size, error):
    with pytest.raises(error, match="batch_size must be"):
        certified_radius(cnn(), images(2), batch_size=batch_size)


def test_less_precise_numbers_have_a_larger_allowance():
    exact = classifier(L.Dense(2, kernel_initializer="identity"), shape=(2,))
    rough = classifier(L.Dense(2, kernel_initializer="identity", dtype="mixed_float16"), shape=(2,))
    x = np.array([[1.0, 0.5]])
    assert certified_radius(exact, x) == pytest.approx(0.5 / np.sqrt(2), rel=1e-5)
    assert certified_radius(rough, x) == pytest.approx((0.5 - 32 * 2.0**-10) / np.sqrt(2), rel=1e-5)


REFUSED = {
    "ends in a softmax, in 'top'": lambda: classifier(L.Flatten(), L.Dense(3, "softmax", name="top")),
    "ends in a softmax, in 'last'": lambda: classifier(L.Flatten(), L.Dense(3), L.Softmax(name="last")),
    "ends in a softmax, in 'inner'": lambda: classifier(
        L.Flatten(), keras.Sequential([L.Dense(3), L.Activation("softmax", name="inner")])
    ),
    r"one matrix of logits, \(batch, classes\)": lambda: classifier(L.Conv2D(3, 3)),
    "at least two classes": lambda: classifier(L.Flatten(), L.Dense(1)),
    "'norm' .* cannot be bounded": lambda: classifier(
        L.Flatten(), L.LayerNormalization(name="norm"), L.Dense(3)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_models(message):
    with pytest.raises(ValueError, match=message):
        certified_radius(REFUSED[message](), images(2))


def by_operation():
    image = keras.Input((6, 6, 1))
    return keras.Model(image, 2.0 * keras.ops.softmax(L.Dense(3)(L.Flatten()(image))))


@pytest.mark.parametrize(
    "model",
    [
        lambda: classifier(L.Flatten(), L.Dense(3, "softmax")),
        lambda: classifier(L.Flatten(), L.Dense(3, "softmax"), L.Identity()),
        lambda: classifier(L.Flatten(), L.Dense(3), L.Softmax(), L.Rescaling(2.0)),
        lambda: classifier(keras.Sequential([L.Flatten(), L.Dense(3, "softmax")]), L.Dropout(0.5)),
        by_operation,
    ],
    ids=["last", "identity", "scaled", "nested", "operation"],
)
def test_a_softmax_is_refused_for_a_given_bound_too(model):
    with pytest.raises(ValueError, match="give the model without its softmax"):
        certified_radius(model(), images(2), 1.0)


def test_refused_arguments():
    model = cnn()
    with pytest.raises(TypeError, match="model must be a Keras model"):
        certified_radius(L.Dense(2), images(2))
    with pytest.raises(TypeError, match="bound must be a number"):
        certified_radius(model, images(2), "1")
    with pytest.raises(ValueError, match="bound must be a finite number"):
        certified_radius(model, images(2), -1.0)
    other = lipschitz_bound(classifier(L.Flatten(), L.Dense(7)))
    with pytest.raises(ValueError, match="bound must belong to the model"):
        certified_radius(model, images(2), other)
    large = classifier(L.Dense(2, kernel_initializer="ones"), shape=(3,))
    with pytest.raises(ValueError, match="logits of the model must be finite"):
        certified_radius(large, np.full((1, 3), 3e38))
