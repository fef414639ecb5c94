"""The linear map of one layer: its geometry, its matrix M, and its products with images."""

from tf_frobreg.convolution.geometry import Convolution, Geometry

__all__ = ["Convolution", "Geometry"]
