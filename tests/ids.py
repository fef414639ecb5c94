"""Names of parametrized tests that are the same in every process, as pytest-xdist needs."""

import re


def stable_id(value):
    """`str(value)` without the address of an object."""
    return re.sub(r" at 0x\w+", "", str(value))
