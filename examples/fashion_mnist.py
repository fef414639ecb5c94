"""Fashion-MNIST, from a directory of its four .gz files or from `keras.datasets`, which downloads it."""

import gzip
from pathlib import Path

import keras
import numpy as np

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist


def read_idx(path):
    """An array from a gzipped file in the IDX format of MNIST."""
    with gzip.open(path) as file:
        content = file.read()
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", count=dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def load_data(directory=None):
    """((images, labels) to train with, (images, labels) to test with), of bytes, 28×28.

    Raises:
        FileNotFoundError: Where they are not there; the message tells where to get them.
    """
    if directory is None and DEBIAN.is_dir():
        directory = DEBIAN
    if directory is None:
        try:
            return keras.datasets.fashion_mnist.load_data()
        except Exception as error:  # Keras raises a bare Exception where it cannot download
            raise FileNotFoundError(
                f"Fashion-MNIST cannot be downloaded ({error}). Install Debian's package "
                "dataset-fashion-mnist, or name the directory of its .gz files (--data-dir)."
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
