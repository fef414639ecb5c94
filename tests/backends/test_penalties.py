"""Penalties and their derivatives under Keras' backend, against the definition."""

import keras
import numpy as np
import pytest
from calculus import has_float64, hessian_vector_product, value_and_gradient
from geometries import CIRCULAR_CASES, KERAS_CASES, Case, label
from oracles import dense_penalty, matrix_function

from tf_frobreg import (
    certified_radius,
    clip_singular_values,
    frobenius_gradient,
    frobenius_penalty,
    lipschitz_bound,
    penalty_excess,
    penalty_floor,
    regularize_kernel,
    reshaped_penalty,
    singular_values,
    spectral_penalty,
    transformation_matrix,
)

ALPHA = 1.3
CASES = [*KERAS_CASES[::5], CIRCULAR_CASES[5], Case((2, 1, 1, 1), (1, 1), dilation_rate=2)]
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


def definition(case, kernel):
    """R_α and its gradient."""
    matrix_of = matrix_function(case)
    matrix = matrix_of(kernel)
    residual = matrix.T @ matrix - ALPHA * np.eye(matrix.shape[1])
    gradient = np.zeros(kernel.shape)
    for place in np.ndindex(kernel.shape):
        unit = np.zeros(kernel.shape)
        unit[place] = 1
        gradient[place] = 4 * np.sum((matrix @ residual) * matrix_of(unit))
    return dense_penalty(matrix, ALPHA), gradient


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_value_and_gradient_are_those_of_the_definition(case, dtype, compiled):
    if dtype == "float64" and not has_float64():
        pytest.skip("JAX has float64 only with jax_enable_x64")
    kernel = 0.5 * case.kernel()
    value, gradient = definition(case, kernel)
    found = value_and_gradient(
        lambda k: frobenius_penalty(k, case.image, alpha=ALPHA, **case.geometry),
        kernel.astype(dtype),
        compiled=compiled,
    )
    assert [one.dtype for one in found] == [dtype, dtype]
    np.testing.assert_allclose(found[0], value, rtol=TOLERANCE[dtype])
    np.testing.assert_allclose(found[1], gradient, atol=TOLERANCE[dtype] * max(1, abs(gradient).max()))
    directly = frobenius_gradient(kernel.astype(dtype), case.image, alpha=ALPHA, **case.geometry)
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(directly), found[1], atol=TOLERANCE[dtype] * max(1, abs(gradient).max())
    )


@pytest.mark.parametrize("case", CASES[:4], ids=label)
def test_second_derivatives(case):
    dtype = "float64" if has_float64() else "float32"
    kernel, direction = case.kernel(dtype=dtype), case.kernel(1, dtype=dtype)
    found = hessian_vector_product(
        lambda k: penalty_excess(k, case.image, alpha=ALPHA, **case.geometry), kernel, direction
    )
    step = 1e-5
    ahead, behind = (
        definition(case, kernel.astype("float64") + sign * step * direction)[1] for sign in (1, -1)
    )
    expected = (ahead - behind) / (2 * step)
    np.testing.assert_allclose(found, expected, atol=1e-5 * abs(expected).max())


def test_the_other_penalties():
    kernel = Case((3, 3, 2, 3), (5, 6)).kernel(dtype="float32")
    sigma = singular_values(kernel, (5, 6))
    value, gradient = value_and_gradient(lambda k: spectral_penalty(k, (5, 6), power_steps=2000), kernel)
    assert value == pytest.approx(abs(sigma**2 - 1).max(), rel=1e-4)
    step = 1e-3 * gradient / np.linalg.norm(gradient)
    slope = (
        float(keras.ops.convert_to_numpy(spectral_penalty(kernel + step, (5, 6), power_steps=2000))) - value
    )
    assert slope == pytest.approx(1e-3 * np.linalg.norm(gradient), rel=0.05)
    flat = kernel.reshape(-1, 3).astype("float64")
    value, gradient = value_and_gradient(reshaped_penalty, kernel)
    assert value == pytest.approx(np.sum((flat @ flat.T - np.eye(18)) ** 2), rel=1e-5)
    expected = 4 * (flat @ flat.T - np.eye(18)) @ flat
    np.testing.assert_allclose(gradient.reshape(-1, 3), expected, rtol=1e-4, atol=1e-4)


def test_kernels_of_every_kind_are_accepted():
    """Arrays, variables and tensors give the same values, also if they are of another backend."""
    kernel = Case((3, 3, 2, 3), (5, 6)).kernel(dtype="float32")
    import tensorflow as tf

    given = [kernel, keras.Variable(kernel), keras.ops.convert_to_tensor(kernel), tf.constant(kernel)]
    for module, convert in (("jax", "numpy.asarray"), ("torch", "tensor")):
        try:
            imported = __import__(module)
        except ImportError:
            continue
        for name in convert.split("."):
            imported = getattr(imported, name)
        given.append(imported(kernel))
    expected = penalty_floor(kernel.shape, (5, 6)) + float(
        keras.ops.convert_to_numpy(penalty_excess(kernel, (5, 6)))
    )
    descent = regularize_kernel(kernel, (5, 6), max_steps=3).kernel
    for one in given:
        value = frobenius_penalty(one, (5, 6))
        assert keras.ops.is_tensor(value)
        assert float(keras.ops.convert_to_numpy(value)) == pytest.approx(expected, rel=1e-6)
        np.testing.assert_allclose(
            singular_values(one, (5, 6)), singular_values(kernel, (5, 6)), rtol=1e-6, atol=1e-6
        )
        np.testing.assert_array_equal(regularize_kernel(one, (5, 6), max_steps=3).kernel, descent)
        assert transformation_matrix(one, (5, 6)).dtype == tf.float32
        assert keras.ops.is_tensor(clip_singular_values(one, (5, 6)))


@pytest.mark.skipif(keras.config.backend() != "torch", reason="it is about PyTorch")
@pytest.mark.filterwarnings("ignore")  # torch.func warns of parts of itself
def test_the_transforms_of_torch():
    import torch

    kernel = torch.tensor(Case((3, 3, 2, 2), (5, 5)).kernel())
    penalty = lambda k: frobenius_penalty(k, 5)  # noqa: E731
    gradient = frobenius_gradient(kernel, 5)
    torch.testing.assert_close(torch.func.grad(penalty)(kernel), gradient)
    torch.testing.assert_close(
        torch.func.hessian(penalty)(kernel), torch.autograd.functional.hessian(penalty, kernel)
    )
    both = torch.vmap(penalty)(torch.stack([kernel, 2 * kernel]))
    torch.testing.assert_close(both, torch.stack([penalty(kernel), penalty(2 * kernel)]))


@pytest.mark.skipif(keras.config.backend() != "torch", reason="it is about PyTorch")
@pytest.mark.parametrize("penalty", [frobenius_penalty, spectral_penalty, lambda k, _: reshaped_penalty(k)])
def test_autocast_leaves_the_penalty_in_float32(penalty):
    import torch

    kernel = torch.tensor(Case((3, 3, 2, 2), (5, 5)).kernel(dtype="float32"), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        value = penalty(kernel, 5)
    torch.testing.assert_close(value, penalty(kernel, 5))
    value.backward()
    assert torch.isfinite(kernel.grad).all()


def test_sparse_kernels_are_refused():
    import tensorflow as tf

    given = [tf.sparse.from_dense(np.eye(3))]
    if keras.config.backend() == "jax":
        from jax.experimental import sparse

        given.append(sparse.BCOO.fromdense(np.eye(3)))
    elif keras.config.backend() == "torch":
        given.append(keras.ops.eye(3).to_sparse())
    for kernel in given:
        with pytest.raises(TypeError, match="^kernel must be a dense array. Received: a "):
            frobenius_penalty(kernel)
    for kernel in (object(), "text", np.array(["a"])):
        with pytest.raises(TypeError, match="^kernel must be (an array of )?float32 or float64. Received: "):
            frobenius_penalty(kernel)


@pytest.mark.skipif(keras.config.backend() != "jax", reason="it is about the functions that JAX traces")
@pytest.mark.parametrize("function", [singular_values, regularize_kernel, transformation_matrix])
def test_what_tensorflow_computes_cannot_be_traced(function):
    import jax

    with pytest.raises(TypeError, match="^kernel must have known values"):
        jax.jit(lambda kernel: function(kernel, 5))(np.ones((3, 3, 1, 1)))


def test_the_explicit_matrix_is_one_of_tensorflow():
    kernel = Case((3, 3, 2, 3), (5, 6)).kernel(dtype="float32")
    if keras.config.backend() == "tensorflow":
        value = frobenius_penalty(kernel, (5, 6), method="sparse")
        assert float(value) == pytest.approx(float(frobenius_penalty(kernel, (5, 6))), rel=1e-5)
    else:
        for function in (frobenius_penalty, frobenius_gradient):
            with pytest.raises(ValueError, match='^method="sparse" needs TensorFlow as the backend of Keras'):
                function(kernel, (5, 6), method="sparse")


def test_a_certificate_of_a_network_with_a_known_constant():
    """The layers stretch by 1, 2, 1/4 and 1, for every input."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((4, 4, 3)),
            keras.layers.Conv2D(3, 1, activation="relu", kernel_initializer="orthogonal"),
            keras.layers.Rescaling(2.0),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3, kernel_initializer="orthogonal"),
        ]
    )
    bound = lipschitz_bound(model)
    assert float(bound) == pytest.approx(0.5, rel=1e-5)
    x = np.random.RandomState(0).rand(5, 4, 4, 3).astype("float32")
    logits = np.sort(model.predict(x, verbose=0), axis=1)
    expected = (logits[:, -1] - logits[:, -2]) / (0.5 * np.sqrt(2))
    found = certified_radius(model, x, bound)
    assert (found <= expected).all()
    # It allows for rounding: 4e-6 of the largest logit, which is below 1, divided by the constant.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
