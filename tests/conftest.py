import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from hypothesis import settings

# Time limits would fail on a busy machine; the same examples every time make a red run reproducible.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")
