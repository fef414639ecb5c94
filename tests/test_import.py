"""`import tf_frobreg` is quick, and loads its public names and registers its classes when they are needed."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import tf_frobreg

ROOT = Path(tf_frobreg.__file__).parents[1]


def run_python(*arguments, **options):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


QUICK = """
import importlib, importlib.util, sys
import tf_frobreg

for name in ("_repr_html_", "__wrapped__", "_x"):  # as tools ask
    assert not hasattr(tf_frobreg, name)
assert importlib.util.find_spec("keras").name == "keras"
assert importlib.util.find_spec("no_such_module") is None
importlib.reload(importlib.reload(tf_frobreg))
assert tf_frobreg.__version__
print({"numpy", "tensorflow", "keras", "matplotlib"} & set(sys.modules))

import keras
assert "tf_frobreg.api" in sys.modules
assert keras.__spec__.loader is keras.__loader__
importlib.reload(keras)
registered = keras.saving.get_registered_object("tf_frobreg>FrobeniusRegularizer")
print(registered is tf_frobreg.FrobeniusRegularizer)
"""


def test_the_package_alone_imports_neither_tensorflow_nor_keras():
    assert run_python("-c", QUICK).splitlines() == ["set()", "True"]


def test_keras_2_is_remarked_at_import(monkeypatch):
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "1")
    script = "import warnings; warnings.simplefilter('error'); import tf_frobreg"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        "UserWarning: tf_frobreg needs Keras 3, but TF_USE_LEGACY_KERAS makes tf.keras Keras 2" in done.stderr
    )


SCRIPT = """
import tf_frobreg

Convolution_of_the_folder = tf_frobreg.convolution.Convolution
from tf_frobreg import *

assert Convolution_of_the_folder is Convolution
assert set(tf_frobreg.__all__) <= set(globals())
assert set(tf_frobreg.__all__) | {"convolution", "__version__"} <= set(dir(tf_frobreg))
assert not {"sys", "importlib", "Any", "_load_api"} & set(dir(tf_frobreg))
print(Convolution((3, 3, 1, 1), 5).shape, len(singular_values([[[[1.0]]]], 2)))
"""


def test_a_script_with_the_name_of_the_command_gets_every_public_name(tmp_path):
    (tmp_path / "tf-frobreg").write_text(SCRIPT)
    assert run_python(tmp_path / "tf-frobreg", cwd=tmp_path) == "(25, 25) 4\n"


@pytest.mark.parametrize(
    "imports",
    [
        # test_the_package_alone_... has tf_frobreg before keras
        "import keras, tf_frobreg; from keras import regularizers",
        "import tf_frobreg; import tensorflow as tf; regularizers = tf.keras.regularizers",
        "import tensorflow as tf; import tf_frobreg; regularizers = tf.keras.regularizers",
        # a module of the package that imports Keras itself, before the public names
        "from tf_frobreg.convolution.matrix import index_set\n"
        "import tf_frobreg; assert tf_frobreg.index_set is index_set; from keras import regularizers",
    ],
)
def test_a_saved_regularizer_loads(imports):
    saved = keras.regularizers.serialize(tf_frobreg.FrobeniusRegularizer(8, alpha=2.0))
    code = f"""
import json, sys
{imports}
loaded = regularizers.deserialize(json.loads(sys.argv[1]))
print(type(loaded).__name__, loaded.alpha)
"""
    assert run_python("-c", code, json.dumps(saved)) == "FrobeniusRegularizer 2.0\n"


@pytest.mark.parametrize("name", ["trace", "whole_model"])
def test_a_module_that_a_tool_imports_from_its_file_is_complete(name):
    code = f"""
import importlib.util, sys
import tf_frobreg
path = {str(ROOT / "tf_frobreg" / "keras" / name)!r} + ".py"
spec = importlib.util.spec_from_file_location("tf_frobreg.keras.{name}", path)
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)  # as pytest does: the spec is not marked while the module is incomplete
from tf_frobreg.keras import {name}
print({name} is module, tf_frobreg.model_spectrum.__module__)
"""
    assert run_python("-c", code) == "True tf_frobreg.keras.whole_model\n"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'tf_frobreg' has no attribute 'singular_value'") as info:
        _ = tf_frobreg.singular_value
    assert (info.value.name, info.value.obj) == ("singular_value", tf_frobreg)


def test_objects_can_be_copied_and_pickled():
    regularizer = tf_frobreg.FrobeniusRegularizer(8, alpha=2.0)
    for twin in (copy.deepcopy(regularizer), pickle.loads(pickle.dumps(regularizer))):
        assert twin.get_config() == regularizer.get_config()
    assert pickle.loads(pickle.dumps(tf_frobreg.singular_values)) is tf_frobreg.singular_values


def test_a_type_checker_sees_the_public_names(tmp_path):
    (tmp_path / "project.py").write_text(
        "import tf_frobreg as fr\n"
        "from tf_frobreg import FrobeniusRegularizer\n"
        "reveal_type(fr.penalty_floor)\n"
        "reveal_type(FrobeniusRegularizer(8))\n"
        "fr.singular_value\n"
    )
    options = ["--follow-imports=silent", "--ignore-missing-imports", "--no-error-summary"]
    cache = ["--config-file=", f"--cache-dir={tmp_path / 'cache'}"]
    command = [sys.executable, "-m", "mypy", *options, *cache, "project.py"]
    # mypy finds an installed package by itself, and refuses site-packages on its path.
    path = {} if "site-packages" in ROOT.parts else {"MYPYPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=path)
    assert len(done.stdout.splitlines()) == 3, done.stdout + done.stderr
    first, second, third = done.stdout.splitlines()
    assert 'Revealed type is "def (kernel_shape: ' in first
    assert 'Revealed type is "tf_frobreg.keras.regularizers.FrobeniusRegularizer"' in second
    assert 'has no attribute "singular_value"' in third
