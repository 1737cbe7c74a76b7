"""Which step is under way: the numbers of the batch that is being trained, not of the one that was fetched last."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from .calls import Call, Surrounding


class NothingCounts(Surrounding):
    """A block in which no layer's statistics see anything, whatever masks are given inside of it."""

    def changed(self, call: Call) -> Call:
        return call._replace(mask=torch.zeros((), dtype=torch.bool, device=call.x.device))


class Run:
    """One iteration over the batches. ``open`` until it has been left or has come to its end."""

    open = True


@dataclass
class Step:
    """One batch of each process."""

    run: Run
    count: int | Exception  # this process's samples, or why that cannot be told
    processes: int
    total: int = 0  # all processes' samples, where there are several
    is_dummy: bool = False  # whether this process's batch has samples which are not to count
    ended: bool = False


class Steps:
    """A step begins when its batch is handed out; with ``defer``, when the trainer says so, which may be later."""

    def __init__(self) -> None:
        self._current: Step | None = None
        self._block: NothingCounts | None = None
        self._deferred = False
        self._waiting: deque[Step] = deque()

    @property
    def current(self) -> Step:
        """The step under way, or the last one of a loop that was left early.

        Raises:
            RuntimeError: there is none.
        """
        if self._current is None:
            raise RuntimeError(
                "no batch of even_batches is being trained: its numbers belong to the body of the loop over it. Where "
                "something fetches batches ahead (as a Lightning Trainer does if a loader has no length), the step "
                "must be told: pass Trainer(callbacks=[syncbn.lightning.EvenBatchesCallback()])"
            )
        return self._current

    def hand_out(self, step: Step) -> None:
        """The step's batch is about to be yielded."""
        if self._deferred:
            self._waiting.append(step)
        else:
            self._begin(step)

    def _begin(self, step: Step) -> None:
        self.end()
        self._current, step.ended = step, False
        if step.is_dummy:
            self._block = NothingCounts()
            self._block.__enter__()

    def end(self) -> None:
        """The body is left; the numbers stay, for what comes after it or for a loop that is left early."""
        if self._current is not None:
            self._current.ended = True
        if self._block is not None:
            block, self._block = self._block, None
            block.__exit__(None, None, None)

    def came_back(self, run: Run) -> None:
        """The loop asks for its next batch."""
        if not self._deferred and self._current is not None and self._current.run is run:
            self.end()

    def finish(self, run: Run, exhausted: bool) -> None:
        """A run has come to its end, or was left."""
        run.open = False
        self.came_back(run)
        if not exhausted:  # what was fetched from it and not begun is thrown away with it
            self._waiting = deque(step for step in self._waiting if step.run is not run)
        elif not self._deferred and self._current is not None and self._current.run is run:
            self._current = None

    # ---- for a trainer that fetches batches ahead

    def defer(self) -> None:
        """From now on a step begins with ``begin_next``, also that of a batch which has been fetched already."""
        if self._deferred:
            return
        if self._current is not None and self._current.run.open and not self._current.ended:
            self._waiting.append(self._current)
        self.end()
        self._deferred, self._current = True, None

    def begin_next(self) -> None:
        """The first step that has not begun begins. If no batch was fetched, the step itself will fetch it."""
        if self._waiting:
            self._begin(self._waiting.popleft())
        else:
            self._deferred = False

    def release(self) -> None:
        """Steps begin with their batches again."""
        self.end()
        self._deferred = False
        self._current = None
        self._waiting.clear()
