"""Loads Fashion-MNIST from a directory with its four .gz files, or through `keras.datasets`.

`keras.datasets` downloads the data at the first use.
"""

import gzip
from pathlib import Path

import keras
import numpy as np

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist installs it


def read_idx(path):
    """Returns the array in a gzipped file of MNIST's IDX format."""
    with gzip.open(path) as file:
        content = file.read()
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", count=dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def load_data(directory=None):
    """Returns ((images, labels) for training, (images, labels) for testing).

    The images are bytes, 28×28. Without `directory`, Debian's package is used if it is installed, and
    `keras.datasets` otherwise.

    Raises:
        FileNotFoundError: If the data cannot be found. The message says where to get them.
    """
    if directory is None and DEBIAN.is_dir():
        directory = DEBIAN
    if directory is None:
        try:
            return keras.datasets.fashion_mnist.load_data()
        except Exception as error:  # Keras raises a bare Exception if the download fails
            raise FileNotFoundError(
                f"Fashion-MNIST cannot be downloaded ({error}). Install Debian's package "
                "dataset-fashion-mnist, or give the directory with its .gz files (--data-dir)."
            ) from error
    try:
        return tuple(
            tuple(
                read_idx(Path(directory, f"{part}-{kind}-ubyte.gz"))
                for kind in ("images-idx3", "labels-idx1")
            )
            for part in ("train", "t10k")
        )
    except (OSError, EOFError, ValueError) as error:
        raise FileNotFoundError(
            f"--data-dir must hold the four .gz files of Fashion-MNIST. Received: {directory} ({error})"
        ) from error
