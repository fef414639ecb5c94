"""Keeps the singular values of convolution layers near √α by penalising ‖MᵀM − αI‖²_F exactly.

The public names are listed in `tf_frobreg.api`. They are imported at their first use, and TensorFlow with
them, so that `tf-frobreg --help` answers at once.
"""

import importlib
import importlib.abc
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tf_frobreg.api import *  # noqa: F403

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__all__":  # asked for by tools, which must not load TensorFlow
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    api = importlib.import_module("tf_frobreg.api")
    if not hasattr(api, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})


class _RegisterOnceKerasIsImported(importlib.abc.MetaPathFinder):
    """Imports the public names as soon as Keras has been imported.

    Keras can load a saved regularizer only if its class has been registered, and `import tf_frobreg` alone
    must be enough for that.
    """

    def find_spec(self, fullname, path, target=None):
        if fullname != "keras":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                sys.meta_path.remove(self)
                importlib.import_module("tf_frobreg.api")

            spec.loader.exec_module = exec_module
        return spec


if "keras" in sys.modules:
    importlib.import_module("tf_frobreg.api")
else:
    sys.meta_path.insert(0, _RegisterOnceKerasIsImported())
