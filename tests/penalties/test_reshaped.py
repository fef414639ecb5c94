"""The penalty on the reshaped kernel against plain NumPy."""

import numpy as np
import pytest
from geometries import normal

from tf_frobreg import reshaped_penalty


@pytest.mark.parametrize("shape", [(3, 3, 2, 3), (1, 1, 2, 5), (3, 2, 4), (4, 3), (2, 2, 2, 2, 40)])
def test_reshaped_penalty(shape):
    kernel, alpha = normal(*shape), 1.5
    matrix = kernel.reshape(-1, shape[-1]).T
    expected = np.sum((matrix.T @ matrix - alpha * np.eye(matrix.shape[1])) ** 2)
    assert reshaped_penalty(kernel, alpha=alpha).numpy() == pytest.approx(expected, rel=1e-12)


KERNEL = np.ones((3, 3, 1, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reshaped_penalty(np.nan * KERNEL), "kernel must be finite"),
        (lambda: reshaped_penalty(np.ones(3)), "kernel must have"),
        (lambda: reshaped_penalty(KERNEL, alpha=-1), "alpha must be"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
