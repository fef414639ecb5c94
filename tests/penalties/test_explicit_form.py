"""The penalty from the explicit matrix."""

import numpy as np
import pytest

from tf_frobreg import frobenius_penalty


def test_explicit_method_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r'method="sparse" needs M.*Use method="closed_form"'):
        frobenius_penalty(np.ones((3, 3, 64, 64)), 64, method="sparse")
