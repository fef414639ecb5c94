"""What the tests of the commands share: files, and a way to run a command."""

import keras
import numpy as np
import pytest

from tf_frobreg.cli import main


@pytest.fixture
def run(capfd):
    """Runs a command as a user types it. Returns its exit status and what it printed."""

    def run(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        printed = capfd.readouterr()
        assert "tensorflow" not in printed.err.lower()
        assert "0000 00:00" not in printed.err  # the head of TensorFlow's own messages
        return status, printed

    return run


@pytest.fixture
def kernel(tmp_path):
    path = tmp_path / "kernel.npy"
    np.save(path, np.random.RandomState(1).randn(3, 3, 1, 3))
    return path


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """A kernel, several, a model in every format, and files that are neither."""
    path = tmp_path_factory.mktemp("spectrum")
    normal = {shape: np.random.RandomState(1).randn(*shape) for shape in [(3, 3, 2, 4), (5, 3)]}
    np.save(path / "kernel.npy", normal[3, 3, 2, 4])
    np.savez(path / "kernels.npz", conv=normal[3, 3, 2, 4], bias=np.zeros(4), dense=normal[5, 3])
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Conv2D(4, 3, padding="same", activation="relu", name="first")]
    layers += [keras.layers.Conv2D(4, 3, strides=2, name="second"), keras.layers.Flatten()]
    layers += [keras.layers.Reshape((-1, 4)), keras.layers.Conv1D(3, 3, padding="causal", name="causal")]
    model = keras.Sequential([keras.Input((8, 9, 2)), *layers])
    model.save(path / "model.keras")
    model.save(path / "model.h5")
    model.save_weights(path / "model.weights.h5")
    (path / "model.json").write_text(model.to_json(), encoding="utf-8")
    open_layers = [keras.Input((None, None, 2)), keras.layers.Conv2D(4, 3, name="first")]
    keras.Sequential(open_layers).save(path / "open.keras")
    keras.Sequential([keras.Input((8, 9, 2)), keras.layers.Conv2D(5, 3)]).save(path / "other.keras")
    for name in ("lambda.keras", "lambda.h5"):
        keras.Sequential([keras.Input((3,)), keras.layers.Lambda(lambda x: 2 * x)]).save(path / name)
    (path / "junk.keras").write_bytes(b"junk")
    (path / "junk.h5").write_bytes(b"junk")
    (path / "junk.npz").write_bytes(b"junk")
    (path / "text.txt").write_text("text")
    np.savez(path / "empty.npz")
    np.savez(path / "bias.npz", np.zeros(3), np.zeros(4))
    np.save(path / "dense.npy", normal[5, 3])
    (path / "folder.keras").mkdir()
    return path
