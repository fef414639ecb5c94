import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# One thread per process: pytest-xdist already uses all cores, and sums have the same order on every machine.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_ENABLE_X64", "1")  # for the tests in float64, if Keras has JAX as its backend

import contextlib
import signal

from hypothesis import settings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job in the background of a shell
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)

collect_ignore = ["mutants.py"]  # it needs Cosmic Ray, which no test does

# Time limits would fail on a busy machine. The same examples every time make a failure reproducible.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")
