"""The penalty and its gradient from the explicit matrix M, as equations (2.1), (3.1) and (3.2) state them."""

import tensorflow as tf

from tf_frobreg.checks import check_memory
from tf_frobreg.convolution.geometry import Convolution
from tf_frobreg.convolution.matrix import toeplitz_indices, transformation_matrix


def penalty(kernel: tf.Tensor, conv: Convolution, alpha: float) -> tf.Tensor:
    """Returns ‖MᵀM − αI‖²_F, computed from the smaller of MᵀM and MMᵀ."""
    matrix = _dense_matrix(kernel, conv)
    gram = tf.matmul(matrix, matrix, transpose_a=not conv.wide, transpose_b=conv.wide)
    rows, columns = conv.shape
    residual = gram - alpha * tf.eye(min(rows, columns), dtype=kernel.dtype)
    # MᵀM has columns − rows zero eigenvalues that MMᵀ lacks. If there are none, α² must not enter the sum: it
    # can be infinite, and 0·∞ is NaN.
    missing = (columns - rows) * alpha * alpha if conv.wide else 0.0
    return tf.reduce_sum(residual**2) + missing


def penalty_and_gradient(kernel: tf.Tensor, conv: Convolution, alpha: float) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns ‖MᵀM − αI‖²_F and its derivative in the kernel, by Theorem 3.1.

    For each (i, j) of Ω the two sums of (3.2) are the entries of M Eᵀ and M E, with E = MᵀM − αI.
    """
    matrix = _dense_matrix(kernel, conv)
    residual = tf.matmul(matrix, matrix, transpose_a=True) - alpha * tf.eye(conv.shape[1], dtype=kernel.dtype)
    sums = tf.matmul(matrix, residual, transpose_b=True) + tf.matmul(matrix, residual)
    index = toeplitz_indices(kernel.shape, conv.input_size, **conv.geometry)
    half = tf.math.unsorted_segment_sum(
        tf.gather_nd(sums, index.positions), index.kernel_index, kernel.shape.num_elements()
    )
    return tf.reduce_sum(residual**2), 2.0 * tf.reshape(half, kernel.shape)


def _dense_matrix(kernel: tf.Tensor, conv: Convolution) -> tf.Tensor:
    """Returns M as a dense matrix, or raises an error if M and its Gram matrix do not fit in memory."""
    rows, columns = conv.shape
    check_memory(
        4 * max(rows, columns) * (rows + columns) * kernel.dtype.size,
        f'method="sparse" needs M of shape {rows} × {columns} and its Gram matrix as dense matrices',
        'method="closed_form" instead',
    )
    return tf.sparse.to_dense(transformation_matrix(kernel, conv.input_size, **conv.geometry))
