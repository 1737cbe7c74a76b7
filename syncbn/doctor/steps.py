"""Steps that all processes take together, none of which can hang.

The processes talk through the store by which they have met, not by collectives: so that what is wrong with collectives
can be said. A step's work runs on a thread of its own, while this one looks at the clock.
"""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from .checks import ranks_in_words

_POLL_S = 0.02
_AT_FULL_RATE = 64  # processes; where there are more, each asks less often, since one store answers all of them
SLACK_S = 3.0


@dataclass(frozen=True)
class Answer:
    """What a step has come to on one process."""

    value: Any = None  # of JSON's types
    error: str | None = None


class Missing(Exception):  # noqa: N818, the processes are missing, not this one
    """Processes that did not come within a step's time."""

    def __init__(self, ranks: Sequence[int], step: str, began: bool, seconds: float) -> None:
        self.ranks = list(ranks)
        does = "finish" if began else "come to"
        super().__init__(f"{ranks_in_words(ranks)} did not {does} the step '{step}' within {seconds:.0f} s")


class Steps:
    """This process's part in the steps.

    Args:
        store: of torch.distributed; where it does not answer, its errors are raised.
        limit: seconds for a process to come to a step, and to do its work there.
    """

    def __init__(self, store: Any, rank: int, world_size: int, limit: float) -> None:
        self.store, self.rank, self.world_size, self.limit = store, rank, world_size, limit
        self.alive = time.monotonic()  # when this process was last seen to go on
        self._poll_s = _POLL_S * max(1.0, world_size / _AT_FULL_RATE)

    def take(self, name: str, work: Callable[[], Any]) -> list[Answer]:
        """Every process's answer, by rank.

        Raises:
            Missing: a process did not come, or did not answer.
        """
        self._say(f"{name}/begins", "")
        self._wait(name, began=False)
        answer = self._work(work)
        self._say(f"{name}/answers", json.dumps([answer.value, answer.error]))
        self._wait(name, began=True)
        said = self.store.multi_get([f"{name}/answers/{rank}" for rank in range(self.world_size)])
        return [Answer(*json.loads(each)) for each in said]

    def part(self, ranks: Sequence[int]) -> None:
        """Waits a moment for those who are still there: the store may end with this process."""
        self._say("parts", "")
        keys = [f"parts/{rank}" for rank in ranks]
        deadline = time.monotonic() + 2 * SLACK_S
        while time.monotonic() < deadline and not self.store.check(keys):
            time.sleep(self._poll_s)

    def _say(self, key: str, text: str) -> None:
        """The last one to say it says so: the others ask for one key, not for as many as there are processes."""
        self.store.set(f"{key}/{self.rank}", text)
        if self.store.add(f"{key}/count", 1) == self.world_size:
            self.store.set(f"{key}/all", "")
        self.alive = time.monotonic()

    def _wait(self, name: str, began: bool) -> None:
        key = f"{name}/{'answers' if began else 'begins'}"
        seconds = self.limit + (SLACK_S if began else 0.0)
        deadline = time.monotonic() + seconds
        while not self.store.check([f"{key}/all"]):
            self.alive = time.monotonic()
            if time.monotonic() > deadline:
                missing = [rank for rank in range(self.world_size) if not self.store.check([f"{key}/{rank}"])]
                if missing:
                    raise Missing(missing, name, began, seconds)
                break
            time.sleep(self._poll_s)
        self.alive = time.monotonic()

    def _work(self, work: Callable[[], Any]) -> Answer:
        answers: list[Answer] = []

        def run() -> None:
            try:
                answers.append(Answer(work()))
            except Exception as error:
                answers.append(Answer(error=_in_words(error)))

        thread = threading.Thread(target=run, name="syncbn doctor", daemon=True)
        thread.start()
        deadline = time.monotonic() + self.limit
        while thread.is_alive() and time.monotonic() < deadline:
            thread.join(_POLL_S)
            self.alive = time.monotonic()
        return answers[0] if answers else Answer(error=f"it has not ended within {self.limit:.0f} s")


def timeout_of(limit: float) -> timedelta:
    """A process group's, and that of the watchdog of layers: so long that they do not end what a step is to report."""
    return timedelta(seconds=4 * limit + 60)


def _in_words(error: Exception) -> str:
    """The last line that says something: what PyTorch raises may have a stack in it."""
    text = "".join(traceback.format_exception_only(error)).strip()
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return first if len(first) <= 300 else f"{first[:300]}..."
