"""One network of each family in keras.applications: no kernel unreported, each geometry right."""

import itertools

import keras
import numpy as np
import pytest
from oracles import same_pad

from tf_frobreg import attach_regularizers
from tf_frobreg.convolution.layer import KNOWN
from tf_frobreg.keras.read_layers import flat_layers, read_kernels

FAMILIES = {  # the smallest network of the family, at a small size that it allows
    "Xception": 71,
    "VGG16": 32,
    "ResNet50": 40,
    "ResNet50V2": 40,
    "InceptionV3": 75,
    "InceptionResNetV2": 75,
    "MobileNet": 64,
    "MobileNetV2": 64,
    "MobileNetV3Small": 64,
    "DenseNet121": 40,
    "NASNetMobile": 64,
    "EfficientNetB0": 64,
    "EfficientNetV2B0": 64,
    "ConvNeXtTiny": 64,
}


def output_entry(kernel, x, place):
    """One entry of the output, from the definition of a (depthwise) convolution and from x alone."""
    conv, k = kernel.conv, kernel.value.astype(np.float64)
    *position, filter_ = place
    if conv.kind == "depthwise":
        channels, k = [filter_ // k.shape[-1]], k.reshape(*k.shape[:-2], 1, -1)
    else:
        per_group = k.shape[-1] // conv.groups
        first = filter_ // per_group * k.shape[-2]
        channels = list(range(first, first + k.shape[-2]))
    total = 0.0
    for tap in itertools.product(*map(range, conv.kernel_size)):
        read = []
        parts = zip(
            position, tap, conv.input_size, conv.kernel_size, conv.strides, conv.dilation_rate, strict=True
        )
        for p, t, n, size, stride, dilation in parts:
            before = same_pad(n, size, stride, dilation)[1] if conv.padding == "same" else 0
            read.append(p * stride + t * dilation - before)
        if all(0 <= r < n for r, n in zip(read, conv.input_size, strict=True)):
            total += x[(*read, channels)] @ k[(*tap, slice(None), filter_)]
    return total


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_kernel_is_reported_with_the_geometry_that_the_layer_has(name):
    keras.utils.set_random_seed(1)
    size = FAMILIES[name]
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), include_top=name != "VGG16", classes=3
    )
    found = read_kernels(model)
    reported = {id(kernel.variable) for kernel in found.kernels}
    assert not found.untreated
    assert all(id(weight) in reported for weight in model.weights if len(weight.shape) > 1)
    assert len(attach_regularizers(model).attached) == len(found.kernels) == len(model.losses)

    random = np.random.RandomState(1)
    layers = [layer for layer in flat_layers(model) if isinstance(layer, KNOWN)]
    for layer in layers:
        if hasattr(layer, "activation"):
            layer.activation = keras.activations.linear
    seen = {}

    def record(layer, call):
        def recorded(x, **options):
            y = call(x, **options)
            seen[id(layer)] = np.float64(x[0]), np.float64(y[0])
            return y

        return recorded

    for layer in layers:
        vars(layer)["call"] = record(layer, layer.call)
    model(random.rand(1, size, size, 3), training=False)
    for kernel in found.kernels:
        x, y = seen[id(kernel.layer)]
        if kernel.name.endswith("/pointwise"):  # its input stays inside the layer: take the whole layer
            continue
        separable = kernel.name.endswith("/depthwise")
        if separable:
            pointwise = np.float64(kernel.layer.pointwise_kernel)[0, 0]
        shape = (*kernel.conv.output_shape[:-1], y.shape[-1])
        assert y.shape == shape if kernel.conv.input_size else y.shape[-1:] == shape
        for _ in range(6):
            place = tuple(random.randint(n) for n in y.shape)
            if not kernel.conv.input_size:
                expected = x[place[:-1]] @ kernel.value[:, place[-1]]
            elif separable:
                middle = [output_entry(kernel, x, (*place[:-1], c)) for c in range(len(pointwise))]
                expected = middle @ pointwise[:, place[-1]]
            else:
                expected = output_entry(kernel, x, place)
            np.testing.assert_allclose(y[place], expected, atol=2e-4 * np.abs(y).max() + 1e-12)
