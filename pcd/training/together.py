"""Several trainings side by side on one read of the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager

from pcd.errors import PcdError
from pcd.training.loop import EpochReport, Loop
from pcd.training.sources import Placed

OnEpoch = Callable[[Loop, EpochReport], None]
OnError = Callable[[Loop, PcdError], None]


def run_together(loops: Iterable[Loop], placed: Placed, on_epoch: OnEpoch, on_error: OnError) -> None:
    """Train all loops until each is finished; each ends with the weights it would have alone, bit for bit.

    Their rows must have the same order, and `placed` the columns that any of their heads reads: a batch is read once and every
    loop that is at this epoch takes its step on it. Loops that were interrupted earlier than the others catch up first. A loop
    that fails with an error of pcd is handed to `on_error` and left out; the others go on.
    """
    going = [loop for loop in loops if not loop.finished]
    while going:
        epoch = min(loop.epoch for loop in going)
        group = Group([loop for loop in going if loop.epoch == epoch], on_error)
        group.epoch(epoch, placed, on_epoch)
        going = [loop for loop in going if loop not in group.failed and not loop.finished]


class Group:
    """Loops at the same epoch."""

    def __init__(self, loops: Sequence[Loop], on_error: OnError) -> None:
        self.failed: list[Loop] = []
        self._loops = list(loops)
        self._on_error = on_error

    def epoch(self, epoch: int, placed: Placed, on_epoch: OnEpoch) -> None:
        """One epoch of all of them."""
        for loop in self._whole():
            with self._guard(loop):
                loop.begin()
        if learning := [loop for loop in self._whole() if loop.trains]:
            self._learn(learning, epoch, placed)
        for loop in self._whole():
            with self._guard(loop):
                on_epoch(loop, loop.end())

    def _learn(self, loops: Sequence[Loop], epoch: int, placed: Placed) -> None:
        """All batches of an epoch; each is read once."""
        targets = [target for loop in loops for target in loop.rows.streamed]
        with closing(loops[0].rows.read(epoch, placed, targets)) as found:
            for loaded in found:
                for loop in loops:
                    if loop not in self.failed:
                        with self._guard(loop), loop.randomness():
                            loop.learn(loop.rows.batch(loaded))

    def _whole(self) -> list[Loop]:
        return [loop for loop in self._loops if loop not in self.failed]

    @contextmanager
    def _guard(self, loop: Loop) -> Iterator[None]:
        try:
            yield
        except PcdError as error:
            self.failed.append(loop)
            self._on_error(loop, error)
