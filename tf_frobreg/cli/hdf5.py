"""Reads HDF5 files to the end in a process of its own, because damaged ones can hang or crash a process.

The process runs this file as a script, so it imports nothing of the package.
"""

import io
import math
import os
import subprocess
import sys
import zipfile
from typing import Any

SECONDS = 20  # for any file, and then for
BYTES_PER_SECOND = 1 << 24


def check_hdf5(path: str, free_memory: int) -> None:
    """Reads an HDF5 file, or the weights in a `.keras` archive.

    Args:
        path: The file.
        free_memory: Bytes that its arrays may need together.

    Raises:
        ValueError: If that fails or does not end. The message says why.
    """
    # -P: Python must not import what lies beside this file or in the current folder.
    command = [sys.executable, "-P", __file__, path, str(free_memory)]
    limit = SECONDS + os.path.getsize(path) / BYTES_PER_SECOND
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=limit)
    except subprocess.TimeoutExpired:
        raise ValueError(f"it is damaged: reading it took more than {limit:.0f} seconds") from None
    if done.returncode != 0:
        raise ValueError(done.stdout.decode("utf-8", "replace") or "it is damaged: reading it failed")


def read_all(file: Any, free_memory: float = math.inf) -> None:
    """Reads all of an open `h5py.File`, or raises ValueError if that needs more than the free memory."""
    import h5py

    needed = 0

    def read(_: str, found: Any) -> None:
        nonlocal needed
        dict(found.attrs)
        if isinstance(found, h5py.Dataset):
            needed += found.nbytes  # a few compressed bytes can stand for very many
            if needed > free_memory:
                raise ValueError(f"its arrays need {needed:,} bytes or more, but {free_memory:,} are free")
            found[()]

    read("/", file)
    file.visititems(read)


def _read(path: str, free_memory: int) -> None:
    import h5py

    if not path.endswith(".keras"):
        with h5py.File(path) as file:
            read_all(file, free_memory)
        return
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".h5"):
                with h5py.File(io.BytesIO(archive.read(name))) as file:
                    read_all(file, free_memory)


if __name__ == "__main__":
    try:
        _read(sys.argv[1], int(sys.argv[2]))
    except Exception as error:  # h5py and zipfile raise many types
        sys.stdout.buffer.write(str(error).encode("utf-8", "replace"))
        sys.exit(1)
