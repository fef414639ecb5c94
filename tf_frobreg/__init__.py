"""Keeps the singular values of convolution layers near √α by penalising ‖MᵀM − αI‖²_F exactly."""

import os
import sys

__version__ = "0.1.0"

# The command line answers --help without waiting seconds for TensorFlow. Everybody else gets the whole
# package at once: Keras can load a saved regularizer only where its class has been imported.
_run_as_module = sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] == __name__
_run_as_script = os.path.basename(sys.argv[0] if sys.argv else "").removesuffix(".exe") == "tf-frobreg"

if not (_run_as_module or _run_as_script):
    from tf_frobreg.attach import AttachReport, attach_regularizers, detach_regularizers
    from tf_frobreg.callbacks import FactorSchedule, SingularValueMonitor
    from tf_frobreg.descent import DescentResult, StopReason, regularize_kernel
    from tf_frobreg.extremes import condition_number, extreme_singular_values, spectral_norm
    from tf_frobreg.initializers import FrobeniusInitializer
    from tf_frobreg.models import KernelSpectrum, ModelDescent, model_spectrum, regularize_model
    from tf_frobreg.penalty import frobenius_gradient, frobenius_penalty, penalty_excess, penalty_floor
    from tf_frobreg.plotting import plot_convergence, plot_spectrum
    from tf_frobreg.projection import SingularValueClip, clip_singular_values
    from tf_frobreg.regularizers import (
        FrobeniusRegularizer,
        ReshapedRegularizer,
        SpectralRegularizer,
        SumRegularizer,
    )
    from tf_frobreg.reshaped import reshaped_penalty
    from tf_frobreg.search import ExtremeSingularValues
    from tf_frobreg.spectral import spectral_penalty
    from tf_frobreg.spectrum import singular_values
    from tf_frobreg.steps import paper_schedule
    from tf_frobreg.toeplitz import index_set, toeplitz_indices, transformation_matrix

__all__ = [
    "AttachReport",
    "DescentResult",
    "ExtremeSingularValues",
    "FactorSchedule",
    "FrobeniusInitializer",
    "FrobeniusRegularizer",
    "KernelSpectrum",
    "ModelDescent",
    "ReshapedRegularizer",
    "SingularValueClip",
    "SingularValueMonitor",
    "SpectralRegularizer",
    "StopReason",
    "SumRegularizer",
    "attach_regularizers",
    "clip_singular_values",
    "condition_number",
    "detach_regularizers",
    "extreme_singular_values",
    "frobenius_gradient",
    "frobenius_penalty",
    "index_set",
    "model_spectrum",
    "paper_schedule",
    "penalty_excess",
    "penalty_floor",
    "plot_convergence",
    "plot_spectrum",
    "regularize_kernel",
    "regularize_model",
    "reshaped_penalty",
    "singular_values",
    "spectral_norm",
    "spectral_penalty",
    "toeplitz_indices",
    "transformation_matrix",
]
