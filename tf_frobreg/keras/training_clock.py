"""The clock of a training: epochs, batches and seconds, over one fit or several."""

import time


class TrainingClock:
    """Counts epochs, batches and seconds from the events that Keras reports to a callback.

    If a later fit numbers its epochs from 0 again, the clock adds the epochs before it.

    Attributes:
        epochs: Epochs so far. A fraction within an epoch.
        batches: Batches so far.
    """

    def __init__(self) -> None:
        self.epochs = 0.0
        self.batches = 0
        self._epochs_before: float | None = None  # this fit. None until its first epoch
        self._epoch_start = 0.0
        self._batches_of_epoch = 0
        self._seconds = 0.0  # of the fits that have ended
        self._fit_start: float | None = None

    @property
    def seconds(self) -> float:
        """Duration of all fits, without the time between them."""
        running = 0.0 if self._fit_start is None else time.perf_counter() - self._fit_start
        return self._seconds + running

    def start_fit(self) -> None:
        """Starts the first fit or a later one."""
        self._epochs_before = None
        if self._fit_start is None:  # an interrupted fit has not ended
            self._fit_start = time.perf_counter()

    def start_epoch(self, number: int) -> None:
        """Starts an epoch. `number` is what Keras calls it, from 0 or from `initial_epoch`."""
        if self._epochs_before is None:
            self._epochs_before = max(0.0, self.epochs - number)
        self.epochs = self._epoch_start = number + self._epochs_before
        self._batches_of_epoch = 0

    def count_batches(self, count: int, per_epoch: int | None) -> None:
        """Counts the batches that Keras has executed together.

        Args:
            count: Number of batches, `steps_per_execution`. The last execution of an epoch may be shorter.
            per_epoch: Number of batches in an epoch. If None, `epochs` stays whole within the epoch.
        """
        done = self._batches_of_epoch + count
        if per_epoch is not None:
            done = min(done, per_epoch)
            self.epochs = self._epoch_start + done / per_epoch
        self.batches += done - self._batches_of_epoch
        self._batches_of_epoch = done

    def end_epoch(self) -> None:
        """Ends an epoch, after its last batch or early."""
        self.epochs = self._epoch_start + 1.0

    def end_fit(self) -> None:
        """Ends a fit."""
        self._seconds, self._fit_start = self.seconds, None
