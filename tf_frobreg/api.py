"""The public names."""

from tf_frobreg.convolution.geometry import Convolution, Geometry
from tf_frobreg.convolution.matrix import ToeplitzIndices, index_set, toeplitz_indices, transformation_matrix
from tf_frobreg.descent.algorithm_3_1 import DescentResult, StopReason, regularize_kernel
from tf_frobreg.descent.escapes import Escape
from tf_frobreg.descent.step_rules import paper_schedule
from tf_frobreg.keras.attach import attach_regularizers, detach_regularizers
from tf_frobreg.keras.attach_report import AttachReport
from tf_frobreg.keras.callbacks import SingularValueMonitor
from tf_frobreg.keras.certificate import certified_radius
from tf_frobreg.keras.constraints import SingularValueClip
from tf_frobreg.keras.factor_schedule import FactorSchedule
from tf_frobreg.keras.function_regularizer import FunctionRegularizer
from tf_frobreg.keras.initializers import FrobeniusInitializer
from tf_frobreg.keras.lazy_penalty import LazyPenalty
from tf_frobreg.keras.lipschitz import lipschitz_bound
from tf_frobreg.keras.lipschitz_report import LipschitzBound
from tf_frobreg.keras.regularizers import (
    FrobeniusRegularizer,
    ReshapedRegularizer,
    SpectralRegularizer,
)
from tf_frobreg.keras.sum_regularizer import SumRegularizer
from tf_frobreg.keras.whole_model import ModelDescent, model_spectrum, regularize_model
from tf_frobreg.penalties.frobenius import (
    frobenius_gradient,
    frobenius_penalty,
    penalty_excess,
    penalty_floor,
)
from tf_frobreg.penalties.projection import clip_singular_values
from tf_frobreg.penalties.reshaped import reshaped_penalty
from tf_frobreg.penalties.two_norm import spectral_penalty
from tf_frobreg.plotting.descents import plot_convergence
from tf_frobreg.plotting.spectra import plot_spectrum
from tf_frobreg.plotting.trainings import plot_gradient_norms, plot_training
from tf_frobreg.spectrum.all_values import singular_values
from tf_frobreg.spectrum.extremes import (
    ExtremeSingularValues,
    condition_number,
    extreme_singular_values,
    spectral_norm,
)
from tf_frobreg.spectrum.kernel_report import KernelSpectrum, ModelSpectrum

__all__ = [
    "AttachReport",
    "Convolution",
    "DescentResult",
    "Escape",
    "ExtremeSingularValues",
    "FactorSchedule",
    "FrobeniusInitializer",
    "FrobeniusRegularizer",
    "FunctionRegularizer",
    "Geometry",
    "KernelSpectrum",
    "LazyPenalty",
    "LipschitzBound",
    "ModelDescent",
    "ModelSpectrum",
    "ReshapedRegularizer",
    "SingularValueClip",
    "SingularValueMonitor",
    "SpectralRegularizer",
    "StopReason",
    "SumRegularizer",
    "ToeplitzIndices",
    "attach_regularizers",
    "certified_radius",
    "clip_singular_values",
    "condition_number",
    "detach_regularizers",
    "extreme_singular_values",
    "frobenius_gradient",
    "frobenius_penalty",
    "index_set",
    "lipschitz_bound",
    "model_spectrum",
    "paper_schedule",
    "penalty_excess",
    "penalty_floor",
    "plot_convergence",
    "plot_gradient_norms",
    "plot_spectrum",
    "plot_training",
    "regularize_kernel",
    "regularize_model",
    "reshaped_penalty",
    "singular_values",
    "spectral_norm",
    "spectral_penalty",
    "toeplitz_indices",
    "transformation_matrix",
]
