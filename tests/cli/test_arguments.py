"""How the words of a command are read."""

import subprocess
import sys

import pytest

import tf_frobreg
from tf_frobreg.cli.arguments import RegularizeOptions, ReproduceOptions, SpectrumOptions, parse_arguments


@pytest.mark.parametrize(
    "arguments", [["--help"], ["reproduce", "--help"], ["regularize", "--help"], ["nonsense"]]
)
def test_help_does_not_wait_for_tensorflow(arguments):
    command = [sys.executable, "-X", "importtime", "-m", "tf_frobreg", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (2 if arguments == ["nonsense"] else 0)
    assert "tf_frobreg.cli" in done.stderr
    assert "tensorflow" not in done.stderr
    assert "numpy" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["spectrum", "missing.npy", "--input-size", "8"],
        ["spectrum", "model.keras", "--alpha", "-1"],
        ["regularize", "missing.npy", "--input-size", "8", "--output", "new.npy"],
        ["reproduce", "--seed", "-1"],
    ],
)
def test_bad_input_does_not_wait_for_tensorflow(arguments, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "tf_frobreg", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "tensorflow" not in done.stderr


def test_version(run):
    status, printed = run("--version")
    assert status == 0
    assert printed.out.strip() == tf_frobreg.__version__


def test_only_the_geometry_that_was_given_reaches_a_command():
    options = parse_arguments(["spectrum", "kernel.npy"])
    assert isinstance(options, SpectrumOptions)
    assert (options.geometry, options.input_size) == ({}, None)
    words = "--strides 2 --dilation-rate 1 2 --groups 3 --padding circular --kind conv --input-size 8 9"
    options = parse_arguments(["regularize", "kernel.npy", "--output", "new.npy", *words.split()])
    assert isinstance(options, RegularizeOptions)
    assert options.input_size == [8, 9]
    assert options.geometry == {
        "strides": 2,
        "padding": "circular",
        "dilation_rate": [1, 2],
        "groups": 3,
        "kind": "conv",
    }


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ("8", 8),
        ("8 9", [8, 9]),
        ("8x9", [8, 9]),
        ("left=32 right=64x48", {"left": 32, "right": [64, 48]}),
        ("a=b=7", {"a=b": 7}),
    ],
)
def test_sizes_of_the_image(words, size):
    options = parse_arguments(["spectrum", "model.keras", "--input-size", *words.split()])
    assert options.input_size == size


@pytest.mark.parametrize("words", ["big", "left=", "8 left=9", "8x"])
def test_wrong_sizes_of_the_image(words, run):
    status, printed = run("spectrum", "model.keras", "--input-size", *words.split())
    assert status == 2
    assert (
        f"must be N, one N per axis, or NAME=N or NAME=NxN for each input. Received: '{words}'" in printed.err
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("left=8 right=9 left=7", "must have each name once. Received: 'left' in 'left=8 right=9 left=7'"),
        ("left=8 left=8", "must have each name once. Received: 'left'"),
        ("left=8 --input-size right=9", "give it once, followed by all sizes"),
        ("8 --input-size 9", "give it once, followed by all sizes"),
    ],
)
def test_no_size_of_an_image_is_dropped(words, message, run):
    status, printed = run("spectrum", "model.keras", "--input-size", *words.split())
    assert status == 2
    assert f"error: argument --input-size: {message}" in printed.err
    assert printed.err.count("\n") == 1


def test_the_options_of_reproduce_have_defaults():
    assert parse_arguments(["reproduce"]) == ReproduceOptions(
        command="reproduce",
        distribution="normal",
        seed=1,
        output_dir=".",
        max_steps=2000,
        tolerance=0.01,
        force=False,
    )


@pytest.mark.parametrize(("words", "value"), [("exact", "exact"), ("paper", "paper"), ("1e-3", 1e-3)])
def test_learning_rates(words, value):
    options = parse_arguments(["regularize", "k.npy", "--output", "n.npy", "--learning-rate", words])
    assert options.learning_rate == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["regularize", "kernel.npy"], "the following arguments are required: --output"),
        (["spectrum", "kernel.npy", "--groups", "2.5"], "argument --groups: invalid int value: '2.5'"),
        (["spectrum", "kernel.npy", "--plot-kind", "3d"], "argument --plot-kind: invalid choice: '3d'"),
        (["reproduce", "--padding", "same"], "unrecognized arguments: --padding same"),
    ],
)
def test_bad_words_get_one_line(words, message, run):
    status, printed = run(*words)
    assert status == 2
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("tf-frobreg")
