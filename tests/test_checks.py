"""Argument checks."""

import builtins
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from ids import stable_id

import tf_frobreg.checks
from tf_frobreg.checks import (
    check_accuracy,
    check_choice,
    check_flag,
    check_integer,
    check_memory,
    check_number,
    did_you_mean,
    enumeration,
    free_memory,
)


@pytest.mark.parametrize("value", [np.float32(0.5), np.int64(2), 3, 0.25])
def test_numbers_may_be_numpy_scalars(value):
    assert check_number("alpha", value) == value
    assert type(check_number("alpha", value)) is float


@pytest.mark.parametrize("value", [np.array(2), tf.constant(2.0), np.float16(2)])
def test_numbers_may_be_arrays_and_tensors_of_one_number(value):
    assert check_number("alpha", value) == 2.0


NO_NUMBERS = [True, np.True_, "1", None, [1.0, 2.0], 1j, float("nan"), float("inf"), -1, np.array(True)]
NO_NUMBERS += [np.array([True]), np.complex64(1), np.array("1"), tf.constant("1"), tf.constant(1j), 10**400]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=stable_id)
def test_what_is_no_number_is_refused_by_name(value):
    with pytest.raises((ValueError, TypeError), match="alpha must be .*Received: alpha="):
        check_number("alpha", value)


@pytest.mark.parametrize("value", [1, np.int8(1), np.uint64(2**31 - 1)])
def test_integers_may_be_numpy_scalars(value):
    assert check_integer("groups", value) == value
    assert type(check_integer("groups", value)) is int


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "groups must be an integer. Received: groups=True"),
        (np.False_, "groups must be an integer"),
        (1.0, "groups must be an integer. Received: groups=1.0"),
        ("1", "groups must be an integer. Received: groups='1'"),
        (None, "groups must be an integer"),
        (0, "groups must be at least 1. Received: groups=0"),
        (2**31, "groups must be at most 2147483647"),
    ],
)
def test_what_is_no_integer_is_refused_by_name(value, message):
    with pytest.raises((ValueError, TypeError), match=message):
        check_integer("groups", value)


def test_accuracies_are_between_0_and_1():
    assert check_accuracy(1e-3) == 1e-3
    for value in (0, 1, -1, 2.0):
        with pytest.raises(ValueError, match="accuracy must be"):
            check_accuracy(value)


def test_flags_are_booleans():
    assert check_flag("half", np.True_) is True
    assert check_flag("half", False) is False
    for value in (1, None, "yes"):
        with pytest.raises(TypeError, match="half must be True or False. Received: half="):
            check_flag("half", value)


def test_choices_are_strings_of_the_list():
    assert check_choice("side", "input", ("input", "output")) == "input"
    for value in ("rows", None, ["input"], np.array(["input"])):
        with pytest.raises(ValueError, match=r"side must be one of \('input', 'output'\). Received: side="):
            check_choice("side", value, ("input", "output"))
    with pytest.raises(ValueError, match=r"Received: side='ouptut' \(did you mean 'output'\?\)$"):
        check_choice("side", "ouptut", ("input", "output"))


def test_long_values_are_shortened_in_messages():
    with pytest.raises(TypeError) as error:
        check_number("alpha", list(range(10**4)))
    assert len(str(error.value)) < 100


def test_memory_is_checked_against_what_is_free(monkeypatch):
    monkeypatch.setattr(tf_frobreg.checks, "free_memory", lambda: 10**9)
    check_memory(10**9, "a matrix", "a smaller one")
    with pytest.raises(
        ValueError,
        match="a matrix: this needs 1,000,000,001 bytes, but 1,000,000,000 are free. Use a smaller one.",
    ):
        check_memory(10**9 + 1, "a matrix", "a smaller one")


def test_free_memory_does_not_need_linux(monkeypatch):
    assert free_memory() > 1 << 24

    def no_such_file(*_):
        raise FileNotFoundError

    monkeypatch.setattr(builtins, "open", no_such_file)
    assert free_memory() > 1 << 24


@pytest.mark.parametrize(
    ("folder", "limit", "used"), tf_frobreg.checks.CONTAINERS, ids=["version_2", "version_1"]
)
def test_free_memory_heeds_the_limit_of_a_container(folder, limit, used, monkeypatch, tmp_path):
    monkeypatch.setattr(tf_frobreg.checks, "CONTAINERS", [(tmp_path, limit, used)])
    (tmp_path / "memory.stat").write_text("file 9000\ninactive_file 3000\n")
    (tmp_path / used).write_text("40000\n")
    (tmp_path / limit).write_text("50000\n")
    assert free_memory() == 13000
    (tmp_path / limit).write_text("max\n")
    assert free_memory() > 1 << 24


LIMITED = """
import resource
from tf_frobreg.checks import check_memory, free_memory
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.RLIM_INFINITY))
assert free_memory() < 4 << 30
check_memory(5 << 30, "a matrix", "a smaller one")
"""


def test_free_memory_heeds_the_limit_of_the_process():
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True)
    assert "ValueError: a matrix: this needs 5,368,709,120 bytes, but" in done.stderr


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("vaild", " (did you mean 'valid'?)"),
        ("SAME", " (did you mean 'same'?)"),
        ("tpo", " (did you mean 'top'?)"),
        ("pot", ""),
        ("full", ""),
        (7, ""),
        ("", ""),
    ],
)
def test_a_name_that_is_almost_known_gets_a_hint(name, hint):
    assert did_you_mean(name, ("same", "valid", "circular", "top")) == hint


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, ""),
        (2, "0, 1"),
        (10, "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        (11, "0, 1, 2, 3, 4, 5, 6, 7 and 3 others"),
    ],
)
def test_long_lists_of_names_are_shortened(number, text):
    assert enumeration([str(n) for n in range(number)]) == text
