"""Defines a custom penalty on the explicit transformation matrix M and differentiates it by GradientTape.

The paper's penalty moves every singular value to 1, from above and from below. A layer that only has to be
1-Lipschitz may keep its small singular values. The penalty of this script acts only on those above 1:

    P(K) = Σ max(σ² − 1, 0)²,   σ² the eigenvalues of MᵀM.

    python examples/custom_penalty.py      (a few seconds)

The script runs plain gradient descent with either penalty and prints σmax and σmin of the results.
"""

import argparse

import numpy as np
import tensorflow as tf

from tf_frobreg import frobenius_penalty, singular_values, transformation_matrix


def lipschitz_penalty(kernel, input_size):
    """Returns Σ max(σ² − 1, 0)² over the singular values σ of M."""
    matrix = tf.sparse.to_dense(transformation_matrix(kernel, input_size))
    eigenvalues = tf.linalg.eigvalsh(tf.matmul(matrix, matrix, transpose_a=True))
    return tf.reduce_sum(tf.nn.relu(eigenvalues - 1.0) ** 2)


def descend(penalty, kernel, input_size, steps, learning_rate):
    """Runs gradient descent with normalised steps that shrink as 1/√step."""
    kernel = tf.Variable(kernel)
    for step in range(steps):
        with tf.GradientTape() as tape:
            loss = penalty(kernel, input_size)
        gradient = tape.gradient(loss, kernel)
        norm = tf.norm(gradient)
        if norm == 0:
            break
        kernel.assign_sub(learning_rate / (step + 1) ** 0.5 * gradient / norm)
    return kernel.numpy()


def main():
    """Compares the two penalties on one random kernel."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input-size", type=int, default=8, help="height and width of the image (default: 8)"
    )
    parser.add_argument("--steps", type=int, default=400, help="steps of the descent (default: 400)")
    options = parser.parse_args()

    start = np.random.RandomState(1).randn(3, 3, 2, 4) / 3
    kernels = {"start": start}
    for name, penalty in [("only σ > 1", lipschitz_penalty), ("the paper's", frobenius_penalty)]:
        kernels[name] = descend(penalty, start, options.input_size, options.steps, learning_rate=0.5)
    print(f"{'penalty':12} {'σmax':>7} {'σmin':>7} {'σ > 1.01':>9}")
    for name, kernel in kernels.items():
        sigma = singular_values(kernel, options.input_size)
        print(f"{name:12} {sigma[0]:7.3f} {sigma[-1]:7.3f} {np.mean(sigma > 1.01):9.0%}")


if __name__ == "__main__":
    main()
