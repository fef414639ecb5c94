"""Hostile input by the thousand: damaged files, odd command lines, odd arguments, extreme numbers.

    python tests/fuzz.py --cases 20000

A case is a kind and a seed, so one line repeats it: `python tests/fuzz.py --kind npy --seed 17`. What must
not happen: a traceback on the command line, an error that names no argument, a wrong value, a lost file.
"""

import argparse
import contextlib
import io
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from oracles import dense_penalty, naive_matrix

STATUSES = {0, 1, 2}
SECONDS = 60  # a case that takes longer hangs


def kernel(rng, dtype="float64"):
    """A small random kernel of two spatial axes."""
    shape = (rng.choice([1, 2, 3]), rng.choice([1, 2, 3]), rng.choice([1, 2, 3]), rng.choice([1, 2, 4]))
    return np.random.RandomState(rng.randrange(2**32)).standard_normal(shape).astype(dtype)


def damage(rng, whole):
    """Bytes with something changed, cut off, repeated or put in."""
    whole = bytearray(whole)
    for _ in range(rng.choice([1, 1, 2, 5])):
        start = rng.randrange(len(whole) + 1)
        length = rng.choice([1, 2, 8, 64])
        change = rng.choice(["flip", "random", "cut", "drop", "insert", "zero"])
        if change == "flip" and start < len(whole):
            whole[start] ^= 1 << rng.randrange(8)
        elif change == "random":
            whole[start : start + length] = rng.randbytes(length)
        elif change == "cut":
            del whole[start:]
        elif change == "drop":
            del whole[start : start + length]
        elif change == "insert":
            whole[start:start] = rng.randbytes(length)
        elif change == "zero":
            whole[start : start + length] = bytes(length)
    return bytes(whole)


def run_command(arguments):
    """Runs a command in this process. Returns its status and what it printed on standard error."""
    from tf_frobreg.cli import main

    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
    if status in (130, 143):  # Ctrl-C or SIGTERM ends the whole run
        raise KeyboardInterrupt
    assert status in STATUSES, f"status {status}: {stderr.getvalue()}"
    if status == 2:
        assert stderr.getvalue().count("\n") == 1, stderr.getvalue()
        assert "error: " in stderr.getvalue(), stderr.getvalue()
    return status, stderr.getvalue()


def command_on(rng, path, folder):
    """Runs `spectrum` or `regularize` on a file. No file but the results may appear or change."""
    whole = path.read_bytes() if path.is_file() else None
    precious = folder / f"precious{path.suffix}"
    precious.write_bytes(b"precious")
    size = ["--input-size", rng.choice([1, 4, 5])] if path.suffix in (".npy", ".npz") else []
    if rng.random() < 0.5 or path.suffix == ".npz":
        status, _ = run_command(["spectrum", path, *size])
        assert precious.read_bytes() == b"precious"
    else:
        command = ["regularize", path, *size, "--max-steps", 2, "--output", precious]
        assert run_command(command)[0] == 2  # it exists
        status, _ = run_command([*command, "--force"])
        assert (precious.read_bytes() == b"precious") == (status == 2)
    precious.unlink()
    assert set(folder.iterdir()) <= {path}, list(folder.iterdir())
    assert whole is None or path.read_bytes() == whole
    return status


def fuzz_npy(rng, folder):
    """A damaged `.npy` file."""
    path = folder / "kernel.npy"
    content = io.BytesIO()
    np.save(content, kernel(rng, rng.choice(["float32", "float64", "int32"])))
    path.write_bytes(damage(rng, content.getvalue()))
    command_on(rng, path, folder)


def fuzz_npz(rng, folder):
    """A damaged `.npz` file."""
    path = folder / "kernels.npz"
    content = io.BytesIO()
    save = rng.choice([np.savez, np.savez_compressed])
    save(content, a=kernel(rng), b=kernel(rng, "float32"))
    path.write_bytes(damage(rng, content.getvalue()))
    command_on(rng, path, folder)


def _model(ending):
    """The bytes of a small model with a penalty, made once."""
    import keras

    from tf_frobreg import FrobeniusRegularizer

    if ending not in _MODELS:
        layer = keras.layers.Conv2D(
            2, 2, kernel_regularizer=FrobeniusRegularizer(4, padding="valid"), name="conv"
        )
        model = keras.Sequential([keras.Input((4, 4, 1)), layer])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"model{ending}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.save(path)
            _MODELS[ending] = path.read_bytes()
    return _MODELS[ending]


_MODELS = {}


def fuzz_model(rng, folder):
    """A damaged `.keras` or `.h5` file, or one with a damaged configuration."""
    ending = rng.choice([".keras", ".h5"])
    path = folder / f"model{ending}"
    whole = _model(ending)
    if ending == ".keras" and rng.random() < 0.7:
        content = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(content, "w") as new:
            names = old.namelist()
            hit = rng.choice(names)
            for name in names:
                new.writestr(name, damage(rng, old.read(name)) if name == hit else old.read(name))
        path.write_bytes(content.getvalue())
    else:
        path.write_bytes(damage(rng, whole))
    command_on(rng, path, folder)


WORDS = ["", "0", "-1", "1", "2", "3", "4", "nan", "inf", "1e308", "1e-308", "-0.0", "999999999999999999999"]
WORDS += ["2147483647", "2147483648", "x", "same", "valid", "circular", "conv", "depthwise", "transpose"]
WORDS += ["--", "-h", "a\nb", "σ", "exact", "paper", "*", "1x2", "a=3", "a=3x4", " ", "'", '"', "%s", "{0}"]
OPTIONS = ["--input-size", "--strides", "--padding", "--dilation-rate", "--groups", "--kind", "--alpha"]
REGULARIZE = ["--learning-rate", "--direction", "--tolerance", "--include", "--exclude", "--no-escape"]
SPECTRUM = ["--accuracy", "--sigma-max-only", "--plot-kind", "--model"]


def fuzz_command(rng, folder):
    """Random options, most of them with a value that does not suit."""
    path = folder / "kernel.npy"
    np.save(path, kernel(rng))
    name = rng.choice(["spectrum", "regularize"])
    arguments = [name, path, "--input-size", rng.choice(["4", "5", rng.choice(WORDS)])]
    own = REGULARIZE if name == "regularize" else SPECTRUM
    for option in rng.sample(OPTIONS + own, rng.choice([1, 1, 2, 4])):
        arguments.append(option)
        if option not in ("--no-escape", "--sigma-max-only"):
            arguments += rng.choices(WORDS, k=rng.choice([1, 1, 1, 2]))
    if name == "regularize":
        arguments += ["--output", folder / "new.npy", "--max-steps", "2"]
    run_command(arguments)
    assert set(folder.iterdir()) <= {path, folder / "new.npy"}, list(folder.iterdir())


VALUES = [None, True, 0, -1, 1, 2, 3, 2**31 - 1, 2**31, 2**63, 10**400, 0.5, 1e308, 1e-308, float("nan")]
VALUES += [float("inf"), "", "same", "valid", "σ", b"valid", (), (2,), (2, 3), [2, [3]], {}, {"a": 1}, 1j]
VALUES += [np.float32(2), np.int64(3), np.array(2), np.array([2, 3]), np.array([True]), np.bool_(True)]
VALUES += [np.array(["valid"]), np.complex64(1j), object]


def symbolic():
    """A tensor of Keras that has no values yet."""
    import keras

    return keras.KerasTensor((3, 3, 2, 2))


def indices(kernel, input_size, **options):
    """The places of M of a kernel's shape."""
    import tf_frobreg as fr

    return fr.toeplitz_indices(getattr(kernel, "shape", kernel), input_size, **options)


def floor(kernel, input_size, **options):
    """A bound on R of a kernel's shape."""
    import tf_frobreg as fr

    return fr.penalty_floor(getattr(kernel, "shape", kernel), input_size, **options)


def short_descent(kernel, input_size, **options):
    """One step of Algorithm 3.1."""
    import tf_frobreg as fr

    return fr.regularize_kernel(kernel, input_size, max_steps=1, **options)


def functions():
    """Public functions of a kernel, each with the names of its arguments."""
    import tf_frobreg as fr

    geometry = ("input_size", "strides", "padding", "dilation_rate", "groups", "kind")
    return {
        fr.frobenius_penalty: (*geometry, "alpha", "method"),
        fr.frobenius_gradient: (*geometry, "alpha"),
        fr.penalty_excess: (*geometry, "alpha"),
        fr.condition_number: geometry,
        indices: geometry,
        floor: (*geometry, "alpha"),
        short_descent: (*geometry, "alpha", "tolerance", "learning_rate", "direction", "measure", "method"),
        fr.singular_values: geometry,
        fr.extreme_singular_values: (*geometry, "accuracy"),
        fr.spectral_norm: geometry,
        fr.spectral_penalty: (*geometry, "alpha", "gram"),
        fr.reshaped_penalty: ("alpha",),
        fr.transformation_matrix: geometry,
        fr.clip_singular_values: (*geometry, "minimum", "maximum"),
        fr.FrobeniusRegularizer: (*geometry, "factor", "alpha", "reduction", "method", "scale"),
    }


def fuzz_api(rng, folder):
    """Odd arguments of public functions. The result is one, or an error that says what is wrong."""
    found = functions()
    function = rng.choice(list(found))
    first = kernel(rng) if rng.random() < 0.8 else rng.choice([*VALUES, kernel(rng, "complex64"), symbolic()])
    arguments = {"input_size": 4} if "input_size" in found[function] else {}
    for name in rng.sample(found[function], min(len(found[function]), rng.choice([1, 1, 2]))):
        arguments[name] = rng.choice(VALUES)
    try:
        if isinstance(function, type):
            function(**arguments)(first)
        else:
            function(first, **arguments)
    except (ValueError, TypeError) as error:
        text = str(error)
        names = [*arguments, "kernel", "argument", "geometry", "needs", "M is", "matrix"]
        assert any(name in text for name in names), f"{function.__name__}: {text}"
        assert len(text) < 1000, text


def fuzz_values(rng, folder):
    """R and its gradient at extreme scales: right, infinite, or refused. Never NaN, never wrong."""
    import tf_frobreg as fr

    dtype = rng.choice(["float32", "float64"])
    limit = {"float32": 37, "float64": 300}[dtype]
    exponent = rng.choice([0.0, rng.uniform(-limit, limit)])
    own = kernel(rng, dtype) * np.asarray(10.0**exponent, dtype)
    geometry = {"strides": rng.choice([1, 1, 2]), "padding": rng.choice(["same", "valid", "circular"])}
    alpha = rng.choice([1.0, 10.0 ** rng.uniform(-limit, limit)])
    size = rng.choice([3, 4, 5])
    case = f"{dtype} {own.shape} {exponent:.1f} α={alpha:g} {size} {geometry}"
    with np.errstate(all="ignore"):
        # the exact value, in units in which nothing overflows
        unit = max(np.abs(own).astype(float).max(), alpha**0.5)
        matrix = naive_matrix(own.astype(float) / unit, size, **geometry)
        scaled = dense_penalty(matrix, alpha / unit / unit)
        exact = scaled * unit * unit * unit * unit
        value = float(fr.frobenius_penalty(own, size, alpha=alpha, **geometry))
        slope = np.asarray(fr.frobenius_gradient(own, size, alpha=alpha, **geometry))
    assert not np.isnan(value), case
    assert not np.isnan(slope).any(), f"gradient: {case}"
    epsilon = np.finfo(dtype)
    size_of_terms = max(scaled, (alpha / unit / unit) ** 2 * matrix.shape[1]) * unit**2 * unit**2
    if exact > epsilon.max:
        assert value > epsilon.max / 2, f"{value} instead of {exact}: {case}"
    elif exact > epsilon.tiny * 1e3:
        error = abs(value - exact)
        assert error <= 2000 * epsilon.eps * size_of_terms or value > epsilon.max / 2, (
            f"{value} instead of {exact}: {case}"
        )


KINDS = {
    "npy": fuzz_npy,
    "npz": fuzz_npz,
    "model": fuzz_model,
    "command": fuzz_command,
    "api": fuzz_api,
    "values": fuzz_values,
}
# How often a kind is drawn: loading a model takes longest.
WEIGHTS = {"npy": 4, "npz": 3, "model": 1, "command": 4, "api": 6, "values": 6}


def run_case(kind, seed):
    """Runs one case in a folder of its own. Returns None, or what went wrong."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            KINDS[kind](random.Random(f"{kind} {seed}"), Path(folder))
        except Exception:
            return traceback.format_exc()
    seconds = time.perf_counter() - start
    return f"it took {seconds:.0f} s" if seconds > SECONDS else None


def main():
    """Runs cases and prints those that failed. The exit status is 1 if there are any."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000, help="default: 1000")
    parser.add_argument("--first-seed", type=int, default=0, help="of the first case (default: 0)")
    parser.add_argument("--kind", choices=list(KINDS), help="default: all")
    parser.add_argument("--seed", type=int, help="runs this case of --kind only")
    options = parser.parse_args()
    if options.seed is not None:
        cases = [(options.kind, options.seed)]
    else:
        names = list(KINDS) if options.kind is None else [options.kind]
        weights = [WEIGHTS[name] for name in names]
        seeds = range(options.first_seed, options.first_seed + options.cases)
        cases = [(random.Random(seed).choices(names, weights)[0], seed) for seed in seeds]
    failed = []
    for number, (kind, seed) in enumerate(cases, 1):
        if wrong := run_case(kind, seed):
            failed.append((kind, seed))
            print(f"\npython tests/fuzz.py --kind {kind} --seed {seed}\n{wrong}", flush=True)
        if number % 500 == 0:
            print(f"{number} cases, {len(failed)} failed", flush=True)
    print(f"{len(cases)} cases from seed {cases[0][1]}, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
