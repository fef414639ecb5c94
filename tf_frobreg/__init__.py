"""Keeps the singular values of convolution layers near √α by penalising ‖MᵀM − αI‖²_F exactly.

`tf_frobreg.api` lists the public names. Python loads them, and TensorFlow with them, when the first one is
used. So `import tf_frobreg` and `tf-frobreg --help` do not wait for TensorFlow.
"""

import importlib
import os
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tf_frobreg.api import *  # noqa: F403

__version__ = "0.8.1"

if os.environ.get("TF_USE_LEGACY_KERAS") in ("1", "true", "True"):  # what TensorFlow accepts
    warnings.warn(
        "tf_frobreg needs Keras 3, but TF_USE_LEGACY_KERAS makes tf.keras Keras 2. Unset it, or write "
        "`import keras` in place of tf.keras.",
        stacklevel=2,
    )


def _load_api() -> ModuleType:
    return importlib.import_module("tf_frobreg.api")


if not TYPE_CHECKING:  # a type checker that saw this function would accept every name

    def __getattr__(name: str) -> Any:
        if name == "__all__" or not name.startswith("_"):  # tools look for names such as _repr_html_
            api = _load_api()
            globals().update({public: getattr(api, public) for public in api.__all__}, __all__=api.__all__)
            if name in globals():  # a public name, or a folder such as `convolution`
                return globals()[name]
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message, name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    public = _load_api().__all__
    own = [name for name in globals() if name.startswith("__") or f"{__name__}.{name}" in sys.modules]
    return sorted({*public, *own})


class _RegisterWithKeras:
    """An entry of `sys.meta_path` that loads the public names as soon as Keras is imported.

    Keras loads a saved regularizer only if its class is registered. `import tf_frobreg` must be enough for
    that, before or after `import keras`.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "keras":
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        loader: Any = spec and spec.loader
        if loader:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                loader.exec_module = execute
                execute(module)
                if not _imports_own_module():
                    _load_api()

            loader.exec_module = exec_module
        return spec


def _imports_own_module() -> bool:
    """Whether a module of this package is being imported: the public names need it complete."""
    # The stack shows it for every way of importing. pytest's, for example, does not mark the module's spec.
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if frame.f_code.co_name == "<module>" and module.startswith(f"{__name__}."):
            return True
        frame = frame.f_back
    return False


if sys.modules.get("keras"):
    _load_api()
else:
    sys.meta_path.insert(0, _RegisterWithKeras())
