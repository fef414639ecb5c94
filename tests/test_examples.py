"""The examples, run as a reader would run them."""

import csv
import fcntl
import gzip
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tf_frobreg.cli import main

ROOT = Path(__file__).parents[1]
STUDIES = [
    "study_deep",
    "study_generalization",
    "study_factor",
    "study_lazy",
    "study_certified",
    "study_resnet",
    "landscape",
]
RESULTS = ROOT / "examples" / "results"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
pytestmark = pytest.mark.slow
with_data = pytest.mark.skipif(
    not FASHION_MNIST.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)


def run(script, *arguments, status=0):
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done


def write_idx(path, array):
    header = struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture(params=["made up", pytest.param("real", marks=with_data)])
def data_dir(request, tmp_path):
    if request.param == "real":
        return FASHION_MNIST
    directory = tmp_path / "data"
    directory.mkdir()
    random = np.random.RandomState(0)
    for part, count in [("train", 300), ("t10k", 100)]:
        labels = random.randint(10, size=count).astype(np.uint8)
        images = (random.rand(count, 28, 28) * 25 * labels[:, None, None]).astype(np.uint8)
        write_idx(directory / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(directory / f"{part}-labels-idx1-ubyte.gz", labels)
    return directory


def test_train_fashion_mnist_and_regularize_a_kernel_from_it(data_dir, tmp_path, capfd):
    output = tmp_path / "models"
    command = ["train_fashion_mnist.py", "--quick", "--data-dir", data_dir, "--output-dir", output]
    printed = run(*command).stdout
    assert "none" in printed
    assert "frobenius" in printed
    assert sorted(path.name for path in output.iterdir()) == [
        "frobenius.keras",
        "frobenius_conv2.npy",
        "none.keras",
        "none_conv2.npy",
    ]
    assert "--output-dir is not empty. --force overwrites" in run(*command, status=1).stderr
    options = "--input-size 28 --strides 2 --learning-rate 1e-5 --max-steps 20 --output"
    new = tmp_path / "new.npy"
    assert main(["regularize", str(output / "none_conv2.npy"), *options.split(), str(new)]) == 1
    assert np.load(new).shape == (3, 3, 16, 16)


def test_train_fashion_mnist_names_a_bad_directory(tmp_path):
    done = run("train_fashion_mnist.py", "--data-dir", tmp_path, "--output-dir", tmp_path / "out", status=1)
    assert "--data-dir must hold the four .gz files" in done.stderr


def test_custom_penalty():
    lines = run("custom_penalty.py", "--steps", 100, "--input-size", 6).stdout.splitlines()
    (start_max, _), (own_max, own_min), (paper_max, paper_min) = (
        map(float, line[12:].split()[:2]) for line in lines[1:]
    )
    assert start_max > 2
    assert own_max < 1.2
    assert paper_max < 1.2
    assert paper_min > own_min + 0.2  # only the paper's penalty lifts the small ones


def test_compare_methods(tmp_path):
    output = tmp_path / "out"
    command = ["compare_methods.py", "--quick", "--output-dir", output]
    printed = run(*command).stdout
    for method in ("frobenius", "2-norm", "reshaped", "clip [0, 1]", "clip [1, 1]", "conjugate", "l-bfgs"):
        assert method in printed
    with open(output / "compare_methods.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))

    def least(method):
        return min(float(row["distance"]) for row in rows if row["method"] == method)

    assert least("conjugate") < 0.05 < least("frobenius")
    assert (output / "compare_methods.png").read_bytes().startswith(b"\x89PNG")
    assert "exists. --force overwrites it" in run(*command, status=2).stderr
    assert "--seeds must be at least 1. Received: 0" in run(*command, "--seeds", 0, status=2).stderr


def test_alpha_sweep(tmp_path):
    output = tmp_path / "out"
    printed = run("alpha_sweep.py", "--seeds", 1, "--output-dir", output).stdout
    assert "α" in printed
    with open(output / "alpha_sweep.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row]
    for alpha, _, high, _, low, _ in rows[1:6]:
        assert float(low) == pytest.approx(float(alpha) ** 0.5, abs=0.011)
        assert float(high) == pytest.approx(float(alpha) ** 0.5, abs=0.011)
    energy = {float(row[0]): float(row[3]) for row in rows[7:]}  # behind the first ReLU
    assert energy[1.0] == pytest.approx(0.5, abs=0.05)
    assert energy[2.0] == pytest.approx(1.0, abs=0.05)
    assert "exists. --force overwrites it" in run("alpha_sweep.py", "--output-dir", output, status=2).stderr


def test_custom_loop():
    printed = run("custom_loop.py", "--epochs", 3).stdout
    penalties = [float(line.rpartition(" ")[2]) for line in printed.splitlines() if line.startswith("epoch")]
    assert len(penalties) == 3
    assert penalties[-1] < penalties[0]
    assert "Left out: top: excluded" in printed


def test_two_workers_have_the_losses_of_one(tmp_path):
    losses = []
    for workers in (1, 2):
        saved = tmp_path / f"{workers}.keras"
        command = ["train_multi_worker.py", "--workers", workers, "--steps", 5, "--save", saved]
        lines = run(*command).stdout.splitlines()
        losses.append([float(line.rpartition(" ")[2]) for line in lines])
        assert saved.exists()
    assert len(losses[0]) == 5
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert "--save must be a .keras file that does not exist" in run(*command, status=2).stderr


@with_data
@pytest.mark.parametrize("study", STUDIES)
def test_studies_run_and_go_on(study, tmp_path):
    folders = ["--data-dir", FASHION_MNIST, "--output-dir", tmp_path]
    # Several tests run at a time. A second process in each would only import TensorFlow once more.
    command = [f"{study}.py", "--quick", "--processes", 1, *folders]
    printed = run(*command).stdout
    runs = (tmp_path / f"{study}_quick.csv").read_bytes()
    assert (tmp_path / f"{study}_quick.png").stat().st_size > 10_000
    assert run(*command).stdout == printed  # from the file, without a run
    assert (tmp_path / f"{study}_quick.csv").read_bytes() == runs
    if study == "landscape":
        check_quick_landscape(tmp_path / "landscape_quick.csv")


def check_quick_landscape(path):
    """Checks that the descent converges from every start, and that it does not without escapes."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    escaping = [row for row in rows if row["method"] == "escaping"]
    assert len(escaping) == 40  # 4 kinds, 5 distributions, 2 α
    assert all(row["converged"] == "1" for row in escaping)
    plain = [row for row in rows if row["method"] == "plain"]
    assert len(plain) == 4
    assert not all(row["converged"] == "1" for row in plain)


@with_data
def test_stopped_study_keeps_its_runs(tmp_path):
    script = ROOT / "examples" / "study_factor.py"
    file = tmp_path / "study_factor_quick.csv"
    study = subprocess.Popen(
        [sys.executable, script, "--quick", "--data-dir", FASHION_MNIST, "--output-dir", tmp_path],
        stderr=subprocess.PIPE,
        text=True,
        # a job in the background of a shell ignores it
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    while not file.exists() and study.poll() is None:
        time.sleep(0.05)
    study.send_signal(signal.SIGINT)
    _, stderr = study.communicate()
    assert study.returncode == 1
    with file.open(newline="") as rows:
        kept = len(list(csv.DictReader(rows)))
    assert kept
    assert f"has {kept} runs. The same command continues from there." in " ".join(stderr.split())
    assert "Traceback" not in stderr


STUDY = """
import time

from runs import run_all, study_files, study_parser


def square(data_dir, number):
    time.sleep(0.3)
    return {"square": number**2}


if __name__ == "__main__":
    options = study_parser("").parse_args()
    path, _ = study_files(options, "study")
    for row in run_all(square, [{"number": number} for number in range(20)], path, options):
        print(row)
"""


@with_data
def test_a_killed_study_goes_on_as_if_it_had_not_been(tmp_path):
    script = tmp_path / "study.py"
    script.write_text(STUDY)
    options = {"env": os.environ | {"PYTHONPATH": str(ROOT / "examples")}, "text": True}

    def command(folder):
        return [sys.executable, script, "--data-dir", FASHION_MNIST, "--output-dir", tmp_path / folder]

    printed = subprocess.run(command("whole"), capture_output=True, **options).stdout
    assert printed.count("\n") == 20
    file = tmp_path / "killed" / "study.csv"
    study = subprocess.Popen(command("killed"), stderr=subprocess.DEVNULL, start_new_session=True, **options)
    while not file.exists() and study.poll() is None:
        time.sleep(0.05)
    study.kill()
    study.wait()
    kept = len(file.read_text().splitlines()) - 1
    assert 0 < kept < 20
    for _ in range(100):  # the processes of the runs end by themselves
        try:
            os.killpg(study.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("processes of a killed study are still running")
    assert subprocess.run(command("killed"), capture_output=True, **options).stdout == printed
    rows = [sorted((tmp_path / name / file.name).read_text().splitlines()) for name in ("whole", "killed")]
    assert rows[0] == rows[1]
    assert list((tmp_path / "killed").iterdir()) == [file]


def test_study_of_fewer_seeds_replaces_no_figure(tmp_path):
    shutil.copy(RESULTS / "study_factor.csv", tmp_path)
    run("study_factor.py", "--seeds", 4, "--data-dir", tmp_path, "--output-dir", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"study_factor.csv", "study_factor_4_seeds.png"}


def test_study_says_what_is_wrong(tmp_path):
    def error(*arguments, output=tmp_path):
        return run("study_factor.py", "--quick", "--output-dir", output, *arguments, status=1).stderr

    assert "--seeds must be at least 1. Received: 0" in error("--seeds", 0)
    assert "--data-dir must hold the four .gz files" in error("--data-dir", tmp_path)
    file = tmp_path / "study_factor_quick.csv"
    header = "kind,factor,scale,seed,images,epochs,accuracy\n"
    for content, message in [
        (b"\xff\xfe\x00", "it is not text"),
        (b"name,price\nx,1\n", "it has no column kind, factor, scale, seed, images, epochs"),
        (f"{header}a,0.1,1,1,500,2,0.5\na,0.1,2\n".encode(), "line 3 has too many or too few values"),
    ]:
        file.write_bytes(content)
        assert message in error()
        assert file.read_bytes() == content
    assert "--output-dir must be a directory, or a path where one can be created" in error(output=file)
    file.unlink()
    with (tmp_path / f".{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert f"Another process is writing {file}" in error("--data-dir", FASHION_MNIST)


@pytest.mark.parametrize(
    ("study", "figure"),
    [(study, figure.name) for study in STUDIES for figure in sorted(RESULTS.glob(f"{study}*.png"))],
)
def test_results_are_of_the_study_as_it_stands(study, figure, tmp_path):
    shutil.copy(RESULTS / f"{study}.csv", tmp_path)
    runs = (tmp_path / f"{study}.csv").read_bytes()
    run(
        f"{study}.py", "--data-dir", tmp_path, "--output-dir", tmp_path
    )  # would miss the data, did it run anything
    assert (tmp_path / f"{study}.csv").read_bytes() == runs
    assert (tmp_path / figure).exists()


def test_lazy_results_follow_the_theory_of_momentum():
    """A run of SGD fails if and only if n steps of it enlarge a weight with the penalty's curvature, 8."""
    with (RESULTS / "study_lazy.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["optimizer"] == "SGD"]
    failed = {True: 0, False: 0}
    for row in rows:
        rate, factor, every = float(row["rate"]), float(row["factor"]), int(row["every"])
        free = np.array([[1, 0.9], [0, 0.9]])  # (weight, momentum) after a step without the penalty
        pressed = free - rate * factor * every * 8 * np.array([[1, 0], [1, 0]])
        steps = np.linalg.matrix_power(free, every - 1) @ pressed
        grows = bool(np.abs(np.linalg.eigvals(steps)).max() > 1 + 1e-9)
        failed[grows] += 1
        assert (row["accuracy"] == "nan") == grows, row
    assert min(failed.values()) > 10


def test_landscape_results_are_what_the_package_claims():
    with (RESULTS / "landscape.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    escaping = [row for row in rows if row["method"] == "escaping"]
    assert len(escaping) >= 1000
    assert len({row["kind"] for row in escaping}) >= 25
    assert {row["start"] for row in escaping} == {"normal", "uniform", "He", "Glorot", "trained"}
    assert all(row["converged"] == "1" for row in escaping)
    steps = [int(row["steps"]) for row in escaping]
    assert np.median(steps) <= 200
    assert max(steps) <= 800
