"""Runs the trainings of a study, several at a time, and keeps the results in a CSV file.

Each run is one row of the file. A run that has a row already is not repeated.
"""

import argparse
import contextlib
import csv
import fcntl
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from fashion_mnist import load_data
from rich.console import Console
from rich.progress import Progress

SEEDS = 5


def study_parser(description: str, seeds: int = SEEDS) -> argparse.ArgumentParser:
    """Returns a parser with the options that all studies have. `seeds` is the default of --seeds."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="directory for the runs (.csv) and the figures"
    )
    parser.add_argument(
        "--data-dir", help="directory with the .gz files of Fashion-MNIST (default: keras.datasets)"
    )
    parser.add_argument("--seeds", type=int, help=f"runs per setting (default: {seeds}; 1 with --quick)")
    parser.set_defaults(usual_seeds=seeds)
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="runs at the same time (default: one per core)"
    )
    parser.add_argument("--quick", action="store_true", help="only a few short runs, as a check")
    return parser


def study_files(options: argparse.Namespace, name: str) -> tuple[Path, Path]:
    """Returns the paths of the runs' .csv file and of the figure.

    Checks the options and creates the directory.
    """
    usual = 1 if options.quick else options.usual_seeds
    options.seeds = usual if options.seeds is None else options.seeds
    for number in ("seeds", "processes"):
        if getattr(options, number) < 1:
            raise SystemExit(f"--{number} must be at least 1. Received: {getattr(options, number)}")
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(
            f"--output-dir must be a directory, or a path where one can be created ({error.strerror}). "
            f"Received: {options.output_dir}"
        ) from error
    stem = f"{name}_quick" if options.quick else name
    # All numbers of seeds share one file of runs. A figure of fewer seeds must not replace one of more.
    of_seeds = "" if options.seeds == usual else f"_{options.seeds}_seeds"
    return options.output_dir / f"{stem}.csv", options.output_dir / f"{stem}{of_seeds}.png"


def run_all(
    function: Callable,
    jobs: list[dict],
    path: Path,
    options: argparse.Namespace,
    runs_per_process: int = 20,
) -> list[dict[str, str]]:
    """Runs `function(data_dir, **job)` for each job without a row in the file. Returns the rows of all jobs.

    A row holds the job and the dict that the function returned, as text. The file is complete after every
    run, so a study that was stopped continues with the next run.
    """
    with _alone(path):
        return _run_missing(function, jobs, path, options, runs_per_process)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """A context that one process at a time can be in for a file. Two would lose each other's runs.

    Raises:
        SystemExit: If another process is in it.
    """
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it however the process ends
        except BlockingIOError:
            raise SystemExit(
                f"Another process is writing {path}. Wait for it, or choose another directory."
            ) from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _run_missing(
    function: Callable, jobs: list[dict], path: Path, options: argparse.Namespace, runs_per_process: int
) -> list[dict[str, str]]:
    rows = _read(path, jobs[0] if jobs else {})
    todo = [job for job in jobs if _row_of(job, rows) is None]
    if not todo:
        return [_row_of(job, rows) for job in jobs]
    try:
        load_data(options.data_dir)  # once, before the processes do: this may download the data
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(path.stem, total=len(jobs), completed=len(jobs) - len(todo))
        # One run per core takes less time than one run on all cores. Processes are replaced after some runs
        # because Keras keeps a little memory of each model.
        context = multiprocessing.get_context("spawn")
        with context.Pool(options.processes, _on_one_core, maxtasksperchild=runs_per_process) as pool:
            tasks = [(function, options.data_dir, job) for job in todo]
            try:
                for job, result in pool.imap_unordered(_call, tasks):
                    rows.append(_texts(job | result))
                    _write(path, rows)
                    progress.advance(task)
            except KeyboardInterrupt:
                if rows:
                    _write(path, rows)  # the interrupt may have stopped the last write halfway
                message = f"Stopped. {path} has {len(rows)} runs. The same command continues from there."
                raise SystemExit(message) from None
    return [_row_of(job, rows) for job in jobs]


def values(rows: list[dict[str, str]], column: str, **wanted) -> np.ndarray:
    """Returns a column as numbers, of the rows that have the `wanted` values."""
    return np.array([float(row[column]) for row in rows if _texts(wanted).items() <= row.items()])


def in_points(differences: np.ndarray) -> str:
    """Returns mean ± standard deviation of differences between shares, in percentage points."""
    return f"{100 * differences.mean():+.2f} ± {100 * differences.std():.2f}"


def _call(task):
    function, data_dir, job = task
    return job, function(data_dir, **job)


def _on_one_core():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C must reach only the process that holds the results
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def _end_with_parent():
    """Ends this process if the one that holds the results was killed. It would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _texts(values):
    return {name: str(value) for name, value in values.items()}


def _row_of(job, rows):
    wanted = _texts(job)
    return next((row for row in rows if wanted.items() <= row.items()), None)


def _read(path, job):
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except UnicodeDecodeError:
        raise _unfit(path, "it is not text") from None
    missing = [name for name in job if name not in (reader.fieldnames or ())]
    if missing:
        raise _unfit(path, f"it has no column {', '.join(missing)}")
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise _unfit(path, f"line {number} has too many or too few values")
    return rows


def _unfit(path, problem):
    return SystemExit(
        f"{path} does not hold the runs of this study: {problem}. Repair the file or move it away."
    )


def _write(path, rows):
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)
