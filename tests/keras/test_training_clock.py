"""The clock counts what Keras reports, over one fit or several."""

import pytest

import tf_frobreg.keras.training_clock
from tf_frobreg.keras.training_clock import TrainingClock


def run_epoch(clock, number, batches=4, together=1, per_epoch=4):
    """The epochs so far after each execution, and after the epoch."""
    clock.start_epoch(number)
    seen = [clock.epochs]
    for _ in range(0, batches, together):
        clock.count_batches(together, per_epoch)
        seen.append(clock.epochs)
    clock.end_epoch()
    return [*seen, clock.epochs]


def run_fit(clock, epochs, initial_epoch=0, **options):
    """The epochs so far at the end of each epoch."""
    clock.start_fit()
    ends = [run_epoch(clock, number, **options)[-1] for number in range(initial_epoch, epochs)]
    clock.end_fit()
    return ends


def test_a_new_clock_is_at_zero():
    clock = TrainingClock()
    assert (clock.epochs, clock.batches, clock.seconds) == (0, 0, 0)


def test_an_epoch_is_a_fraction_between_batches():
    clock = TrainingClock()
    clock.start_fit()
    assert run_epoch(clock, 0) == [0, 0.25, 0.5, 0.75, 1, 1]
    assert run_epoch(clock, 1) == [1, 1.25, 1.5, 1.75, 2, 2]
    assert clock.batches == 8


def test_fractions_do_not_add_up_rounding_errors():
    clock = TrainingClock()
    clock.start_fit()
    for number in range(100):
        run_epoch(clock, number, batches=3, per_epoch=3)
    assert clock.epochs == 100
    assert clock.batches == 300


@pytest.mark.parametrize(
    ("together", "seen"), [(2, [0, 0.5, 1, 1]), (3, [0, 0.75, 1, 1]), (4, [0, 1, 1]), (9, [0, 1, 1])]
)
def test_batches_that_are_executed_together(together, seen):
    """The last execution of an epoch may be shorter."""
    clock = TrainingClock()
    clock.start_fit()
    assert run_epoch(clock, 0, together=together) == seen
    assert clock.batches == 4


def test_an_epoch_of_unknown_length():
    clock = TrainingClock()
    clock.start_fit()
    assert run_epoch(clock, 0, batches=3, per_epoch=None) == [0, 0, 0, 0, 1]
    assert clock.batches == 3


def test_an_epoch_that_ends_early_counts_whole():
    clock = TrainingClock()
    clock.start_fit()
    assert run_epoch(clock, 0, batches=1) == [0, 0.25, 1]
    assert run_epoch(clock, 1)[0] == 1
    assert clock.batches == 5


def test_a_fit_from_epoch_0_counts_on():
    clock = TrainingClock()
    assert run_fit(clock, 2) == [1, 2]
    assert run_fit(clock, 3) == [3, 4, 5]
    assert clock.batches == 20


def test_a_fit_from_the_epoch_where_the_last_one_stopped_counts_on():
    clock = TrainingClock()
    assert run_fit(clock, 2) == [1, 2]
    assert run_fit(clock, 4, initial_epoch=2) == [3, 4]


def test_a_fit_from_a_later_epoch_starts_there():
    clock = TrainingClock()
    assert run_fit(clock, 7, initial_epoch=5) == [6, 7]
    assert run_fit(clock, 1) == [8]
    assert run_fit(clock, 11, initial_epoch=10) == [11]


def test_a_fit_from_an_epoch_in_between_counts_on():
    clock = TrainingClock()
    assert run_fit(clock, 3) == [1, 2, 3]
    assert run_fit(clock, 3, initial_epoch=1) == [4, 5]


def test_an_interrupted_fit_counts_up_to_its_last_batch():
    clock = TrainingClock()
    clock.start_fit()
    clock.start_epoch(0)
    clock.count_batches(1, 4)
    assert run_fit(clock, 2) == [1.25, 2.25]
    assert clock.batches == 9


def test_seconds_leave_out_the_time_between_fits(monkeypatch):
    now = 10.0
    monkeypatch.setattr(tf_frobreg.keras.training_clock.time, "perf_counter", lambda: now)
    clock = TrainingClock()
    clock.start_fit()
    now = 13.0
    assert clock.seconds == 3
    clock.end_fit()
    now = 100.0
    assert clock.seconds == 3
    clock.start_fit()
    now = 102.0
    assert clock.seconds == 5
    clock.start_fit()  # the fit before was interrupted: it has no end
    now = 103.0
    clock.end_fit()
    assert clock.seconds == 6
