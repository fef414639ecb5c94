"""Trains with the penalty in several processes or on several hosts, by `MultiWorkerMirroredStrategy`.

    python examples/train_multi_worker.py                # two processes on this machine, a few seconds
    TF_CONFIG=... python examples/train_multi_worker.py  # one worker of your cluster

`fit` of Keras 3 does not run under this TensorFlow strategy, so the script calls `strategy.run` for each
step. Each replica takes its share of the batch and of the penalties. The gradients of all replicas add up
to the gradient of the whole batch and of one penalty. The first worker prints the loss of each step. With
`--save` it also saves the model.
"""

import argparse
import json
import os
import socket
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

BATCH = 32


def main():
    """Trains as a worker if TF_CONFIG is set, otherwise starts workers on this machine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2, help="processes to start here (default: 2)")
    parser.add_argument("--steps", type=int, default=20, help="training steps (default: 20)")
    parser.add_argument("--factor", type=float, default=0.01, help="weight of the penalties (default: 0.01)")
    parser.add_argument("--save", help=".keras file for the trained model; it must not exist")
    options = parser.parse_args()
    if options.workers < 1 or options.steps < 1:
        parser.error(
            f"--workers and --steps must be at least 1. Received: {options.workers}, {options.steps}"
        )
    if options.save and (not options.save.endswith(".keras") or os.path.exists(options.save)):
        parser.error(f"--save must be a .keras file that does not exist. Received: {options.save}")
    if "TF_CONFIG" in os.environ:
        train(options)
        return
    sys.exit(start_workers(options.workers))


def start_workers(count):
    """Starts this script once per worker, with the addresses of all workers. Returns the exit status."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
    workers = []
    for index in range(count):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        workers.append(
            subprocess.Popen(
                [sys.executable, *sys.argv],
                env=os.environ | {"TF_CONFIG": json.dumps(task)},
                stdout=None if index == 0 else subprocess.DEVNULL,
            )
        )
    try:
        return max(abs(worker.wait()) for worker in workers)
    finally:
        for worker in workers:
            worker.kill()


def free_ports(count):
    """Returns ports that no process uses at the moment."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def build_model(factor):
    """Returns a small network with the penalty on each convolution."""
    import keras

    from tf_frobreg import attach_regularizers

    keras.utils.set_random_seed(1)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((12, 12, 1)),
            layers.Conv2D(8, 3, padding="same", activation="relu", name="conv1"),
            layers.Conv2D(16, 3, strides=2, padding="same", activation="relu", name="conv2"),
            layers.Flatten(),
            layers.Dense(10, name="top"),
        ]
    )
    attach_regularizers(model, factor, alpha=2.0, reduction="mean", exclude="top")
    return model


def train(options):
    """Trains as one worker."""
    import keras
    import numpy as np
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    random = np.random.RandomState(0)
    x = random.rand(8 * BATCH, 12, 12, 1).astype("float32")
    y = random.randint(10, size=len(x))
    data = tf.data.Dataset.from_tensor_slices((x, y)).repeat().batch(BATCH, drop_remainder=True)
    sharding = tf.data.Options()
    sharding.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    batches = iter(strategy.experimental_distribute_dataset(data.with_options(sharding)))
    with strategy.scope():
        model = build_model(options.factor)
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.build(model.trainable_variables)
        loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")

    def replica_step(images, labels):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(loss_of(labels, model(images, training=True))) / BATCH
            loss += tf.add_n(model.losses) / strategy.num_replicas_in_sync
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)  # sums the gradients over the replicas
        return loss

    @tf.function
    def step(images, labels):
        return strategy.reduce("SUM", strategy.run(replica_step, args=(images, labels)), axis=None)

    first = strategy.cluster_resolver.task_id == 0
    for number in range(options.steps):
        loss = float(step(*next(batches)))
        if first:
            print(f"step {number + 1}: loss {loss:.7f}", flush=True)
    if options.save and first:
        model.save(options.save)


if __name__ == "__main__":
    main()
