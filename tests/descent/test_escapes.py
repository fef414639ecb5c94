"""Escapes: descents from every start converge, the history says how, and what cannot converge says so."""

import hashlib
import math
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from ids import stable_id
from oracles import dense_penalty, naive_matrix

import tf_frobreg.descent.stopping
from tf_frobreg import (
    DescentResult,
    Escape,
    StopReason,
    frobenius_penalty,
    penalty_excess,
    penalty_floor,
    regularize_kernel,
    singular_values,
)
from tf_frobreg.convolution.geometry import Convolution
from tf_frobreg.convolution.isometric_patch import isometric_patch
from tf_frobreg.descent.escapes import EscapePlan
from tf_frobreg.descent.step_rules import step_rule
from tf_frobreg.penalties.frobenius import FrobeniusPenalty
from tf_frobreg.spectrum.extremes import ExtremesFinder

LADDER = (0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.0)
CIRCULAR, VALID = {"padding": "circular"}, {"padding": "valid"}
DEPTHWISE, TRANSPOSE = {"kind": "depthwise"}, {"kind": "transpose"}

KINDS = {
    "one channel": ((3, 3, 1, 1), 20, {}),
    "two channels": ((3, 3, 2, 2), 12, {}),
    "two channels, 5×5": ((5, 5, 2, 2), 12, {}),
    "four channels": ((3, 3, 4, 4), 12, {}),
    "eight channels": ((3, 3, 8, 8), 12, {}),
    "sixteen channels": ((3, 3, 16, 16), 10, {}),
    "circular, one channel": ((3, 3, 1, 1), 20, CIRCULAR),
    "circular, four channels": ((3, 3, 4, 4), 12, CIRCULAR),
    "circular, sixteen channels": ((3, 3, 16, 16), 10, CIRCULAR),
    "valid, four channels": ((3, 3, 4, 4), 12, VALID),
    "valid, sixteen channels": ((3, 3, 16, 16), 10, VALID),
    "valid, fewer filters": ((3, 3, 6, 3), 10, VALID),
    "depthwise": ((3, 3, 8, 1), 16, DEPTHWISE),
    "depthwise, 5×5": ((5, 5, 4, 1), 12, DEPTHWISE),
    "depthwise, valid": ((3, 3, 4, 1), 12, DEPTHWISE | VALID),
    "depthwise, circular": ((3, 3, 4, 1), 9, DEPTHWISE | CIRCULAR),
    "depthwise, strides": ((3, 3, 8, 1), 16, DEPTHWISE | {"strides": 2}),
    "depthwise, multiplier": ((3, 3, 4, 2), 12, DEPTHWISE),
    "groups": ((3, 3, 2, 8), 12, {"groups": 4}),
    "groups, circular": ((3, 3, 3, 6), 9, {"groups": 2} | CIRCULAR),
    "Conv1D": ((5, 4, 4), 32, {}),
    "Conv1D, even": ((4, 3, 3), 24, {}),
    "Conv1D, strides": ((4, 4, 8), 32, {"strides": 2}),
    "Conv3D": ((3, 3, 3, 2, 2), 5, {}),
    "strides": ((3, 3, 4, 16), 16, {"strides": 2}),
    "strides, fewer filters": ((3, 3, 4, 8), 16, {"strides": 2}),
    "strides, valid": ((2, 2, 4, 16), 12, {"strides": 2} | VALID),
    "stem": ((7, 7, 3, 16), 16, {"strides": 2}),
    "dilation": ((3, 3, 4, 4), 12, {"dilation_rate": 2}),
    "transposed": ((3, 3, 4, 4), 10, TRANSPOSE),
    "transposed, strides": ((4, 4, 4, 16), 6, TRANSPOSE | {"strides": 2}),
    "even": ((2, 2, 4, 4), 12, {}),
    "rectangular": ((3, 3, 3, 6), 12, {}),
    "nearly square": ((3, 3, 8, 9), 10, {}),
    "one tap": ((1, 1, 8, 8), 12, {}),
    "Dense": ((16, 16), (), {}),
    "small image": ((3, 3, 4, 4), 4, {}),
    "uneven image": ((3, 5, 2, 2), (7, 11), {}),
}
# The seeds whose quick descents escape, if there is one among the first three.
SEEDS = {
    "four channels": 1,
    "circular, four channels": 2,
    "valid, four channels": 2,
    "Conv1D, even": 2,
    "dilation": 1,
}
SEEDS |= {"depthwise, multiplier": 2, "transposed": 1, "two channels, 5×5": 2}

OUT_OF_REACH = {
    "valid, more filters": ((3, 3, 4, 8), 10, VALID),
    "valid, Conv1D": ((3, 1, 2), 20, VALID),
    "skipped pixels": ((1, 1, 4, 8), 8, {"strides": 2}),
    "even, dilation": ((2, 2, 4, 4), 10, {"dilation_rate": 2}),
    "odd image": ((3, 3, 3, 4), 15, {"strides": 2}),
    "depthwise, valid, multiplier": ((3, 3, 4, 2), 10, DEPTHWISE | VALID),
    "transposed, valid": ((3, 3, 2, 4), 8, TRANSPOSE | VALID),
}


def start(shape, seed=0, dtype="float64", distribution="normal"):
    """A kernel with σ of about 1."""
    random = np.random.RandomState(seed)
    fan_in, fan_out = (np.prod(shape[:-2]) * channels for channels in shape[-2:])
    draw = {
        "normal": lambda: random.standard_normal(shape) / max(fan_in, fan_out) ** 0.5,
        "uniform": lambda: random.random_sample(shape) / max(fan_in, fan_out) ** 0.5,
        "he": lambda: random.standard_normal(shape) * (2 / fan_in) ** 0.5,
        "glorot": lambda: random.uniform(-1, 1, shape) * (6 / (fan_in + fan_out)) ** 0.5,
    }[distribution]
    return draw().astype(dtype)


def descend(kernel, image, geometry, **options):
    """Returns the result and the kernel of every row."""
    kernels = []
    result = regularize_kernel(
        kernel, image, callback=lambda step, kernel, penalty: kernels.append(kernel), **options, **geometry
    )
    return result, kernels


def shifted(shape, group_taps, seed=0):
    """A depthwise kernel with one tap in each channel, and some noise."""
    kernel = 0.01 * np.random.RandomState(seed).standard_normal(shape)
    for channel, tap in enumerate(group_taps):
        kernel[(*tap, channel)] += 1.0
    return kernel


def nearest_isometry(kernel, conv, alpha):
    """By hand at stride 1: the polar factor of the sum of all taps, at the centre tap of an odd kernel."""
    found = isometric_patch(conv).nearest_isometry(kernel, alpha)
    if (
        max(conv.strides, default=1) > 1
        or conv.groups > 1
        or min(np.mod(conv.kernel_size, 2), default=1) == 0
    ):
        return found
    by_hand = np.zeros(kernel.shape)
    centre = tuple(k // 2 for k in conv.kernel_size)
    total = kernel.astype(float).sum(axis=tuple(range(len(centre))))
    for matrix in total[:, None] if conv.kind == "depthwise" else [total]:
        left, _, right = np.linalg.svd(matrix, full_matrices=False)
        matrix[:] = alpha**0.5 * left @ right
    by_hand[centre] = total
    np.testing.assert_allclose(found, by_hand, atol=1e-12 if kernel.dtype == "float64" else 1e-5)
    return by_hand


def check_history(result, kernels, image, geometry, alpha=1.0):
    """Checks the history against the escapes, and each escape against its definition."""
    kernel = result.kernel
    conv = Convolution.of(kernel.shape, image, geometry)
    tolerance = 1e-10 if kernel.dtype == "float64" else 1e-4
    history, steps = result.history, sorted({escape.step for escape in result.escapes})
    assert len(kernels) == result.num_steps + 1
    assert {len(column) for column in history.values()} == {result.num_steps + 1}
    assert np.array_equal(history["step"], np.arange(result.num_steps + 1))
    # R rises at an escape and nowhere else. λ is NaN there and in the last row, and nowhere else.
    assert set(np.flatnonzero(np.diff(history["penalty"]) > 0)) <= set(steps)
    assert np.flatnonzero(np.isnan(history["learning_rate"])).tolist() == [*steps, result.num_steps]
    assert [escape.step for escape in result.escapes] == sorted(escape.step for escape in result.escapes)
    groups = conv.blocks[0]
    for group in range(groups):
        ts = [escape.t for escape in result.escapes if group in escape.groups]
        assert tuple(ts) == LADDER[: len(ts)]
    penalty = FrobeniusPenalty(conv, alpha)
    for step in steps:
        t = np.zeros(groups)
        for escape in result.escapes:
            if escape.step == step:
                assert not t[list(escape.groups)].any()
                t[list(escape.groups)] = escape.t
        before, after = (conv.by_group(kernels[row], np) for row in (step, step + 1))
        nearest = conv.by_group(nearest_isometry(kernels[step], conv, alpha), np)
        assert np.array_equal(before[..., t == 0, :, :], after[..., t == 0, :, :])
        mixed = (1 - t[:, None, None]) * before + t[:, None, None] * nearest
        np.testing.assert_allclose(after, mixed, rtol=0, atol=1e-12 if kernel.dtype == "float64" else 1e-5)
        assert (penalty.excess_by_group(tf.constant(kernels[step])).numpy()[t > 0] > 0.1 * alpha**2).all()
        mixed = conv.from_groups(mixed, np)
        expected = frobenius_penalty(mixed, image, alpha=alpha, **geometry).numpy()
        assert history["penalty"][step + 1] == pytest.approx(expected, rel=tolerance)
    for row in (0, result.num_steps):
        expected = frobenius_penalty(kernels[row], image, alpha=alpha, **geometry).numpy()
        assert history["penalty"][row] == pytest.approx(expected, rel=tolerance, abs=1e-5)
    assert np.array_equal(kernels[-1], kernel)


def check_convergence(result, image, geometry, alpha=1.0):
    assert result.reason is StopReason.CONVERGED
    assert result.num_steps <= 800
    if min(Convolution.of(result.kernel.shape, image, geometry).shape) <= 1000:
        sigma = singular_values(result.kernel, image, **geometry)
        assert np.abs(sigma - alpha**0.5).max() <= 0.0101
    history = result.history
    assert abs(history["sigma_max"][-1] - alpha**0.5) <= 0.0101
    assert abs(history["sigma_min"][-1] - alpha**0.5) <= 0.0101


@pytest.mark.parametrize("kind", [kind for number, kind in enumerate(KINDS) if number % 5 < 2])
def test_a_descent_converges(kind):
    shape, image, geometry = KINDS[kind]
    number = list(KINDS).index(kind)
    alpha, dtype = (1.0, 2.0)[number % 2], ("float64", "float32")[number // 2 % 2]
    kernel = start(shape, SEEDS.get(kind, 0), dtype)
    result, kernels = descend(kernel, image, geometry, alpha=alpha, max_steps=800)
    check_history(result, kernels, image, geometry, alpha)
    check_convergence(result, image, geometry, alpha)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_descents_from_many_starts_converge(kind, alpha):
    shape, image, geometry = KINDS[kind]
    steps = []
    for seed, distribution in enumerate(("normal", "uniform", "he", "glorot") * 2):
        dtype = ("float32", "float64")[seed % 2]
        result, kernels = descend(
            start(shape, seed, dtype, distribution), image, geometry, alpha=alpha, max_steps=800
        )
        check_history(result, kernels, image, geometry, alpha)
        check_convergence(result, image, geometry, alpha)
        steps.append(result.num_steps)
    assert np.median(steps) <= 250


@pytest.mark.slow
def test_the_median_descent_takes_at_most_200_steps():
    steps = []
    for kind in (
        "one channel",
        "two channels",
        "four channels",
        "depthwise",
        "Conv1D",
        "strides",
        "circular, four channels",
    ):
        shape, image, geometry = KINDS[kind]
        for seed in range(4):
            result = regularize_kernel(start(shape, seed), image, measure="never", max_steps=800, **geometry)
            assert result.converged
            steps.append(result.num_steps)
    assert np.median(steps) <= 200


def expected_escapes(history, floor, alpha):
    """The rows and t of the escapes of one group by the rule of 5 % in 20 steps, from the history alone."""
    excess, rows, since = history["penalty"] - floor, [], 0
    for row in range(len(excess) - 1):
        stuck = excess[row] > 0.1 * alpha**2 and excess[row] > 0.95 * excess[row - 20]
        if row - since >= 20 and stuck and len(rows) < len(LADDER):
            rows.append(row)
            since = row + 1
    return [(row, LADDER[number]) for number, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("kind", "seed", "alpha"),
    [
        ("one channel", 1, 1.0),
        ("four channels", 1, 2.0),
        ("sixteen channels", 1, 1.0),
        ("Conv1D", 0, 2.0),
        ("valid, four channels", 0, 1.0),
    ],
)
def test_an_escape_follows_20_steps_without_progress(kind, seed, alpha):
    shape, image, geometry = KINDS[kind]
    kernel = alpha**0.5 * start(shape, seed)
    result = regularize_kernel(kernel, image, alpha=alpha, **geometry)
    floor = penalty_floor(shape, image, alpha=alpha, **geometry)
    assert result.escapes
    assert [(e.step, e.t) for e in result.escapes] == expected_escapes(result.history, floor, alpha)
    assert all(escape.groups == (0,) for escape in result.escapes)


CENTRE, BESIDE, CORNER = (1, 1), (0, 1), (2, 0)


@pytest.mark.parametrize("padding", ["same", "valid", "circular"])
def test_only_the_stuck_channels_jump(padding):
    # A tap beside the centre loses border pixels with "same" only.
    taps = [CENTRE, CENTRE, BESIDE, CENTRE, CORNER, CENTRE]
    kernel, geometry = shifted((3, 3, 6, 1), taps), DEPTHWISE | {"padding": padding}
    result, kernels = descend(kernel, 10, geometry)
    check_history(result, kernels, 10, geometry)
    assert result.converged
    jumped = {group for escape in result.escapes for group in escape.groups}
    assert jumped == ({2, 4} if padding == "same" else set())
    # The other channels stay near their start.
    change = np.abs(result.kernel - kernel).max(axis=(0, 1, 3))
    assert (change[[0, 1, 3, 5]] < 0.1).all()


def watched(plan, *excess_by_group):
    """The plan after 21 points, at which the excess of each group goes evenly from the first to the last."""
    for share in np.linspace(0, 1, 21):
        plan.watch(np.array([(1 - share) * first + share * last for first, last in excess_by_group]))
    return plan


def test_stuck_channels_wait_until_the_others_are_no_more_than_half_of_r():
    def plan():
        return EscapePlan(FrobeniusPenalty(Convolution((3, 3, 2, 1), 8, kind="depthwise"), 1.0), 0.01)

    assert watched(plan(), (50, 5.1), (5, 5)).progresses
    assert not watched(plan(), (50, 4.9), (5, 5)).progresses
    assert watched(plan(), (50, 40), (0.09, 0.09)).progresses  # below 0.1 α²
    assert watched(plan(), (5, 4.74), (0.05, 0.05)).progresses  # falls by more than 5 %
    assert not watched(plan(), (5, 4.76), (0.05, 0.05)).progresses
    early = plan()
    for _ in range(20):
        early.watch(np.array([5.0, 5.0]))
        assert early.progresses
    early.watch(np.array([5.0, 5.0]))
    assert not early.progresses


def test_after_each_escape_the_check_begins_again(monkeypatch):
    calls, original = [], tf_frobreg.descent.stopping.ConvergenceCheck.restart
    monkeypatch.setattr(
        tf_frobreg.descent.stopping.ConvergenceCheck,
        "restart",
        lambda check: calls.append(1) or original(check),
    )
    shape, image, geometry = KINDS["depthwise"]
    result = regularize_kernel(start(shape), image, **geometry)
    assert len(calls) == 1 + len({escape.step for escape in result.escapes}) > 2


def test_channels_that_are_stuck_again_jump_farther_alone():
    shape, image, geometry = KINDS["depthwise"]
    result = regularize_kernel(start(shape), image, **geometry)
    farther = [escape for escape in result.escapes if escape.t > 0.1]
    assert len({escape.groups for escape in result.escapes}) > 1
    assert farther
    for escape in farther:
        previous = LADDER[LADDER.index(escape.t) - 1]
        earlier = [e for e in result.escapes if e.step < escape.step and e.t == previous]
        assert set(escape.groups) <= {group for e in earlier for group in e.groups}


@pytest.mark.parametrize(("kind", "seed"), [("four channels", 1), ("depthwise", 0), ("Conv1D, strides", 0)])
def test_without_escapes_the_descent_is_that_of_plain_exact_steps(kind, seed):
    shape, image, geometry = KINDS[kind]
    plain, kernels = descend(start(shape, seed), image, geometry, escape=False, max_steps=60, tolerance=0.0)
    assert plain.escapes == ()
    assert (np.diff(plain.history["penalty"]) <= 0).all()
    check_history(plain, kernels, image, geometry)
    rule = step_rule(FrobeniusPenalty(Convolution.of(shape, image, geometry), 1.0), "exact", None, tape=False)
    point = rule.start(kernels[0])
    for step in range(60):
        assert (
            point.scalars.excess + penalty_floor(shape, image, **geometry) == plain.history["penalty"][step]
        )
        point, rate = rule.next(point, step)
        assert plain.history["learning_rate"][step] == rate
    assert np.array_equal(point.kernel, plain.kernel)
    # Up to the first escape both are the same.
    escaping = regularize_kernel(start(shape, seed), image, max_steps=60, tolerance=0.0, **geometry)
    first = escaping.escapes[0].step if escaping.escapes else 60
    assert first >= 20
    for column in ("penalty", "gradient_norm"):
        assert np.array_equal(escaping.history[column][: first + 1], plain.history[column][: first + 1])


@pytest.mark.parametrize(
    "learning_rate",
    ["paper", 1e-4, lambda step: 1e-4, keras.optimizers.Adam(1e-3), keras.optimizers.SGD(1e-4)],
    ids=stable_id,
)
def test_other_step_rules_never_escape(learning_rate):
    kernel = shifted((3, 3, 2, 1), [CENTRE, BESIDE])
    options = {"max_steps": 150, "kind": "depthwise"}
    result = regularize_kernel(kernel, 8, learning_rate=learning_rate, **options)
    same = regularize_kernel(kernel, 8, learning_rate=learning_rate, escape=False, **options)
    assert result.escapes == same.escapes == ()
    assert np.array_equal(result.kernel, same.kernel)
    assert result.reason is StopReason.MAX_STEPS
    assert regularize_kernel(kernel, 8, **options).escapes  # exact steps do


def digest(result):
    """A hash of all bits of a result."""
    parts = [result.kernel.tobytes(), repr(result.escapes).encode()]
    parts += [column.tobytes() for column in result.history.values()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


REPEATED = [
    ("eight channels", 0, "float32"),
    ("depthwise", 0, "float64"),
]


@pytest.mark.parametrize(("kind", "seed", "dtype"), REPEATED)
def test_the_same_input_gives_the_same_output_bit_for_bit(kind, seed, dtype):
    shape, image, geometry = KINDS[kind]
    first, second = (regularize_kernel(start(shape, seed, dtype), image, **geometry) for _ in range(2))
    assert first.escapes
    assert digest(first) == digest(second)


@pytest.mark.slow
def test_another_process_gives_the_same_output_bit_for_bit():
    here = os.path.dirname(__file__)
    program = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from test_escapes import KINDS, REPEATED, digest, regularize_kernel, start\n"
        "for kind, seed, dtype in REPEATED:\n"
        "    shape, image, geometry = KINDS[kind]\n"
        "    print(digest(regularize_kernel(start(shape, seed, dtype), image, **geometry)))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, here, os.path.dirname(here)],
        capture_output=True,
        text=True,
        check=True,
    )
    expected = []
    for kind, seed, dtype in REPEATED:
        shape, image, geometry = KINDS[kind]
        expected.append(digest(regularize_kernel(start(shape, seed, dtype), image, **geometry)))
    assert found.stdout.split() == expected


@pytest.mark.parametrize(("kind", "seed"), [("eight channels", 0), ("groups", 0), ("Conv1D, strides", 0)])
def test_a_descent_in_pieces_of_7_steps_is_the_whole_one(kind, seed):
    shape, image, geometry = KINDS[kind]
    whole = regularize_kernel(start(shape, seed), image, max_steps=105, tolerance=0.0, **geometry)
    assert len(whole.escapes) > 1
    part = regularize_kernel(start(shape, seed), image, max_steps=0, tolerance=0.0, **geometry)
    for _ in range(15):
        part = regularize_kernel(part, image, max_steps=7, tolerance=0.0, **geometry)
        assert part.escapes == tuple(escape for escape in whole.escapes if escape.step < part.num_steps)
    assert np.array_equal(part.kernel, whole.kernel)
    np.testing.assert_equal(part.history, whole.history)


def test_a_descent_that_was_stopped_at_an_escape_goes_on_like_the_whole_one():
    shape, image, geometry = KINDS["depthwise"]
    whole = regularize_kernel(start(shape), image, max_steps=100, tolerance=0.0, **geometry)
    for row in (whole.escapes[0].step, whole.escapes[0].step + 1):
        part = regularize_kernel(
            start(shape), image, callback=lambda step, *_, row=row: step == row, tolerance=0.0, **geometry
        )
        assert (part.reason, part.num_steps) == (StopReason.STOPPED, row)
        assert bool(part.escapes) == (row > whole.escapes[0].step)
        rest = regularize_kernel(part, image, max_steps=100 - row, tolerance=0.0, **geometry)
        assert rest.escapes == whole.escapes
        assert np.array_equal(rest.kernel, whole.kernel)


def test_a_result_made_by_hand_goes_on_up_the_ladder():
    shape, image, geometry = KINDS["valid, four channels"]
    whole = regularize_kernel(start(shape), image, **geometry)
    assert [escape.t for escape in whole.escapes][:2] == [0.1, 0.2]
    stop = whole.escapes[0].step + 3
    first = regularize_kernel(start(shape), image, callback=lambda step, *_: step == stop, **geometry)
    fields = (first.kernel, first.penalty, first.num_steps, first.reason, first.history)
    for escapes, expected in [
        (first.escapes, 0.2),
        ((), 0.1),
        ([Escape(5, t, (0,)) for t in LADDER[:4]], 0.7),
    ]:
        rest = regularize_kernel(DescentResult(*fields, escapes), image, **geometry)
        assert rest.escapes[: len(escapes)] == tuple(escapes)
        assert rest.escapes[len(escapes)].t == expected
        assert rest.escapes[len(escapes)].step >= stop + 20
    used_up = DescentResult(*fields, [Escape(5, t, (0,)) for t in LADDER])
    rest = regularize_kernel(used_up, image, max_steps=200, **geometry)
    assert rest.escapes == used_up.escapes
    assert not rest.converged


def test_escapes_are_kept_by_a_descent_that_goes_on_without_them():
    shape, image, geometry = KINDS["one channel"]
    first = regularize_kernel(start(shape), image, **geometry)
    assert first.escapes
    for options in ({"escape": False}, {"learning_rate": "paper"}, {"learning_rate": 1e-5}):
        rest = regularize_kernel(first, image, max_steps=3, tolerance=0.0, **options, **geometry)
        assert rest.escapes == first.escapes
        assert rest.num_steps == first.num_steps + 3


@pytest.mark.parametrize(
    ("kind", "alpha"),
    [("two channels", 1.0), ("rectangular", 2.0), ("depthwise", 2.0), ("circular, four channels", 1.0)],
)
def test_the_limit_of_precision_is_no_local_minimum(kind, alpha):
    shape, image, geometry = KINDS[kind]
    conv = Convolution.of(shape, image, geometry)
    nearest = isometric_patch(conv).nearest_isometry(start(shape, dtype="float32"), alpha)
    kernel = nearest + 0.03 * start(shape, 1, "float32")
    result = regularize_kernel(kernel, image, alpha=alpha, tolerance=1e-6, max_steps=600, **geometry)
    assert result.escapes == ()
    assert (np.diff(result.history["penalty"]) <= 0).all()
    excess = penalty_excess(result.kernel.astype("float64"), image, alpha=alpha, **geometry).numpy()
    assert excess < 1e-3


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("four channels", "float32"),
        ("rectangular", "float64"),
        ("depthwise", "float32"),
        ("groups", "float64"),
        ("strides", "float32"),
        ("Dense", "float64"),
    ],
)
def test_the_zero_kernel_converges(kind, dtype):
    shape, image, geometry = KINDS[kind]
    result, kernels = descend(np.zeros(shape, dtype), image, geometry)
    assert result.escapes[0][:2] == (0, 0.1)
    check_history(result, kernels, image, geometry)
    check_convergence(result, image, geometry)


def test_a_kernel_with_a_zero_channel_converges():
    depthwise, full = start((3, 3, 4, 1)), start((3, 3, 4, 4))
    depthwise[:, :, 2] = full[..., 1] = 0.0
    for kernel, geometry in [(depthwise, DEPTHWISE), (full, {})]:
        result, kernels = descend(kernel, 9, geometry)
        check_history(result, kernels, 9, geometry)
        check_convergence(result, 9, geometry)


@pytest.mark.parametrize("kind", OUT_OF_REACH)
def test_what_is_out_of_reach_gives_up_near_the_lowest_r(kind):
    shape, image, geometry = OUT_OF_REACH[kind]
    result, kernels = descend(start(shape), image, geometry)
    assert result.reason is StopReason.OUT_OF_REACH
    assert not result.converged
    assert "no kernel of this geometry reaches √α" in str(result)
    assert result.escapes == ()
    check_history(result, kernels, image, geometry)
    # It gives up within 100 steps of the last progress, and not before.
    excess = result.history["penalty"] - penalty_floor(shape, image, **geometry)
    falls = excess[100:] <= 0.999 * excess[:-100]
    assert falls[:-1].all()
    plain = regularize_kernel(start(shape), image, escape=False, max_steps=1500, **geometry)
    assert plain.reason is StopReason.OUT_OF_REACH
    assert plain.num_steps >= result.num_steps
    assert result.penalty <= 1.01 * plain.penalty
    sigma = singular_values(result.kernel, image, **geometry)
    assert np.abs(sigma - 1).max() > 0.01


def test_without_a_tolerance_a_descent_never_gives_up():
    shape, image, geometry = OUT_OF_REACH["odd image"]
    given_up = regularize_kernel(start(shape), image, **geometry)
    longer = given_up.num_steps + 50
    result = regularize_kernel(start(shape), image, max_steps=longer, tolerance=0.0, **geometry)
    assert (result.reason, result.num_steps) == (StopReason.MAX_STEPS, longer)
    assert result.penalty <= given_up.penalty


@pytest.mark.parametrize("learning_rate", ["exact", 1e-5])
def test_out_of_steps_is_out_of_reach_if_no_kernel_reaches_it(learning_rate):
    shape, image, geometry = OUT_OF_REACH["valid, more filters"]
    options = {"max_steps": 3, "learning_rate": learning_rate, **geometry}
    assert regularize_kernel(start(shape), image, **options).reason is StopReason.OUT_OF_REACH
    assert regularize_kernel(start(shape), image, tolerance=0.0, **options).reason is StopReason.MAX_STEPS


@pytest.mark.parametrize("measure", ["rarely", "never"])
@pytest.mark.parametrize("noise", [2e-4, 0.1])
def test_a_kernel_within_the_tolerance_has_converged_even_if_the_steps_are_used_up(
    monkeypatch, noise, measure
):
    # As if no look had been due on the way.
    monkeypatch.setattr(
        tf_frobreg.descent.stopping.ConvergenceCheck,
        "__call__",
        lambda *_: tf_frobreg.descent.stopping.Verdict(),
    )
    kernel = noise * np.random.RandomState(0).standard_normal((3, 3, 2, 2))
    kernel[1, 1] += np.eye(2)
    result = regularize_kernel(kernel, 8, max_steps=0, measure=measure)
    assert result.reason is (StopReason.CONVERGED if noise < 0.01 else StopReason.MAX_STEPS)
    assert np.isnan(result.history["sigma_max"][-1]) == (measure == "never")


@pytest.mark.parametrize(
    ("kind", "alpha"),
    [("four channels", 2.0), ("depthwise", 1.0), ("strides", 2.0), ("valid, fewer filters", 1.0)],
)
def test_a_descent_that_never_measures_sigma_converges_all_the_same(monkeypatch, kind, alpha):
    def measured(*_):
        raise AssertionError("σ was measured")

    monkeypatch.setattr(ExtremesFinder, "__call__", measured)
    shape, image, geometry = KINDS[kind]
    result, kernels = descend(start(shape), image, geometry, alpha=alpha, measure="never")
    assert result.reason is StopReason.CONVERGED
    check_history(result, kernels, image, geometry, alpha)
    assert np.isnan([result.history["sigma_max"], result.history["sigma_min"]]).all()
    sigma = singular_values(result.kernel, image, **geometry)
    assert np.abs(sigma - alpha**0.5).max() <= 0.01


def test_sigma_of_a_large_layer_is_measured_once(monkeypatch):
    monkeypatch.setattr(tf_frobreg.descent.stopping, "SEARCHED_ROWS", 100)
    calls, original = [], ExtremesFinder.__call__
    monkeypatch.setattr(ExtremesFinder, "__call__", lambda *args: calls.append(1) or original(*args))
    shape, image, geometry = KINDS["four channels"]
    result = regularize_kernel(start(shape), image, **geometry)
    assert result.reason is StopReason.CONVERGED
    assert np.flatnonzero(np.isfinite(result.history["sigma_max"])).tolist() == [result.num_steps]
    assert len(calls) == 1
    check_convergence(result, image, geometry)


def test_escapes_may_raise_r_by_their_definition_only():
    """One channel, by hand: the polar factor is a sign, and the slow twin gives M."""
    kernel = -0.05 * start((3, 3, 1, 1))
    kernel[0, 1] -= 1.0  # a shift, which loses border pixels
    result, kernels = descend(kernel, 7, {})
    assert result.converged
    assert result.escapes
    for escape in result.escapes:
        total = kernels[escape.step].sum()
        mixed = (1 - escape.t) * kernels[escape.step]
        mixed[1, 1] += escape.t * math.copysign(1.0, total)
        np.testing.assert_allclose(kernels[escape.step + 1], mixed, atol=1e-14)
        expected = dense_penalty(naive_matrix(mixed, (7, 7)))
        assert result.history["penalty"][escape.step + 1] == pytest.approx(expected, rel=1e-12)
