"""Experiments of many runs, several at a time: a row of a CSV file each; what is there is not run again."""

import argparse
import csv
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fashion_mnist import load_data
from rich.console import Console
from rich.progress import Progress


def study_parser(description: str) -> argparse.ArgumentParser:
    """The options that all studies have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="for the runs' .csv and the figure")
    parser.add_argument("--data-dir", help="directory of Fashion-MNIST's .gz files; else keras.datasets")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind (default: 5)")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="runs at a time (default: one per core)"
    )
    parser.add_argument("--quick", action="store_true", help="a few short runs, to see it work")
    return parser


def study_files(options: argparse.Namespace, name: str) -> tuple[Path, Path]:
    """(the file of the runs, that of the figure); the directory is made."""
    for number in ("seeds", "processes"):
        if getattr(options, number) < 1:
            raise SystemExit(f"--{number} must be at least 1. Received: {getattr(options, number)}")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    stem = f"{name}_quick" if options.quick else name
    return options.output_dir / f"{stem}.csv", options.output_dir / f"{stem}.png"


def run_all(
    function: Callable, jobs: list[dict], path: Path, options: argparse.Namespace
) -> list[dict[str, str]]:
    """Runs `function(data_dir, **job)` for each job that has no row in the file, and returns the rows of all.

    A row holds the job and what the function returned, a dict, as text. The file is whole at any time: a
    study that was stopped goes on where it was.
    """
    rows = _read(path)
    todo = [job for job in jobs if _row_of(job, rows) is None]
    if not todo:
        return [_row_of(job, rows) for job in jobs]
    try:
        load_data(options.data_dir)  # before many processes do: it may have to be downloaded
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(path.stem, total=len(jobs), completed=len(jobs) - len(todo))
        # Each run on a core of its own takes less time than one run on all of them; new processes now and
        # then, as Keras leaves a little of each model behind.
        context = multiprocessing.get_context("spawn")
        with context.Pool(options.processes, _on_one_core, maxtasksperchild=20) as pool:
            tasks = [(function, options.data_dir, job) for job in todo]
            for job, result in pool.imap_unordered(_call, tasks):
                rows.append(_texts(job | result))
                _write(path, rows)
                progress.advance(task)
    return [_row_of(job, rows) for job in jobs]


def values(rows: list[dict[str, str]], column: str, **wanted) -> np.ndarray:
    """A column of the rows of one kind."""
    return np.array([float(row[column]) for row in rows if _texts(wanted).items() <= row.items()])


def in_points(differences: np.ndarray) -> str:
    """Mean ± standard deviation of differences of shares between runs of the same seeds, in points."""
    return f"{100 * differences.mean():+.2f} ± {100 * differences.std():.2f}"


def _call(task):
    function, data_dir, job = task
    return job, function(data_dir, **job)


def _on_one_core():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def _texts(values):
    return {name: str(value) for name, value in values.items()}


def _row_of(job, rows):
    wanted = _texts(job)
    return next((row for row in rows if wanted.items() <= row.items()), None)


def _read(path):
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write(path, rows):
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)
