"""A watchdog: a process whose exchange does not come about says where all processes are, and ends.

A layer waits for every other process. Where one of them has ended, or is somewhere else for good, this wait has no end,
or one after the process group's timeout that names nobody. So one thread per process looks once a second at whether the
process has been quiet for some seconds. As long as it has not, the thread does nothing. Then it asks the job's store
whether another process has ended, and once the exchange is overdue it asks all processes where they are.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from .communicator import Communicator
from .progress import Entry
from .whereabouts import Place, in_words, place, report

EVERY_S = 1.0  # how often it looks
QUIET_S = 2.0  # no exchange has begun or ended for so long before it asks the store
ANSWERS_S = 5.0  # within which the other processes say where they are
_STORE_S = 5.0  # for one word with the store
_LAST_WORDS_S = 10.0  # to print what is to be said
_STATUS = 1

_log = logging.getLogger(__name__)

_HELP = (
    "The processes of a group must run the same layers in the same order, forward and backward; one without data runs "
    "an empty batch, and a loss that ignores a head adds 0 * head.sum(). SYNCBN_CHECK=1 in the environment compares "
    "every exchange and raises at the first that differs."
)

T = TypeVar("T")


class Watchdog:
    """That of this process. ``watch`` starts it."""

    def __init__(self) -> None:
        self._limits: weakref.WeakKeyDictionary[Communicator, float] = weakref.WeakKeyDictionary()
        self._store: Store | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._process = 0
        self._waited_for_ended: Entry | None = None

    def watch(self, communicator: Communicator, limit: timedelta) -> None:
        """Ends this process if an exchange on the communicator takes longer."""
        communicator.progress.explain = lambda error: self._explained(communicator, error)
        if self._store is None or not self._store.alive:
            self._store = Store()
        self._limits[communicator] = limit.total_seconds()
        if self._thread is None or not self._thread.is_alive():
            self._start()

    def _start(self) -> None:
        if self._process != os.getpid():
            self._process = os.getpid()
            atexit.register(self._at_exit)
            _hook_exceptions(self._publish_end)
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="syncbn watchdog", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            watched = [each for each in list(self._limits) if each.alive]
            if watched:
                try:
                    self._look(watched)
                except Exception:
                    if all(each.alive for each in watched):  # not merely destroyed in the middle of a look
                        _log.exception("syncbn's watchdog could not look at the exchanges; it will again")

    # ---- looking

    def _look(self, watched: list[Communicator]) -> None:
        quiet_for = min(each.progress.quiet_for for each in watched)
        if quiet_for < min(QUIET_S, *(self._limits[each] / 2 for each in watched)):
            return
        for each in watched:
            if each.progress.quiet_for > self._limits[each] and each.progress.under_way:
                self._end_overdue(each)
        within = [each for each in watched if each.progress.within]
        self._heed_others(within[0] if within else min(watched, key=lambda each: each.progress.quiet_for))

    def _heed_others(self, communicator: Communicator) -> None:
        store = self._store
        if store is None:
            return
        if store.has("overdue"):
            self._end_with_others(communicator)
        # Asked in this order, since the device is not to be asked while a CUDA graph may be captured.
        ended = store.ended(communicator.ranks)
        if ended is None or not communicator.progress.under_way:
            self._waited_for_ended = None
            return
        # A look later it waits still, so that it does not merely finish what the other has left behind.
        if self._waited_for_ended == communicator.progress.last:
            text = f"{_place_in_words(communicator)} waits for a process that will not come: {ended}"
            self._end(text + "\n" + self._where_all_are(communicator, seconds=EVERY_S))
        self._waited_for_ended = communicator.progress.last

    # ---- ending

    def _end_overdue(self, communicator: Communicator) -> NoReturn:
        limit = self._limits[communicator]
        text = f"{_place_in_words(communicator)} is overdue: it has taken more than {limit:.0f} s"
        store = self._store
        if store is None or not store.claim("overdue", text):
            if store is not None and store.has("overdue"):
                self._end_with_others(communicator)
            self._end(f"{text}. The job's store cannot be reached: its host has ended, or is cut off.\n{_HELP}")
        text = f"{text}\n{self._where_all_are(communicator)}\n{_HELP}"
        store.write("reported", text)
        self._end(text)

    def _end_with_others(self, communicator: Communicator) -> NoReturn:
        """Another process has found its exchange overdue: this one says where it is, and has the same end."""
        store = self._store
        assert store is not None
        self._publish_place(communicator)
        deadline = time.monotonic() + 2 * ANSWERS_S
        while (text := store.read("reported")) is None and time.monotonic() < deadline and store.reachable:
            time.sleep(EVERY_S / 5)
        text = text or "another process has found an exchange overdue"
        # One of each host says all of it, where many write to one place.
        self._end(text if os.environ.get("LOCAL_RANK", "0") == "0" else text.partition("\n")[0])

    def _end(self, text: str) -> NoReturn:
        _leave(f"{text}\nrank {dist.get_rank()} ends with status {_STATUS}.")

    # ---- what the processes say of themselves

    def _publish_place(self, communicator: Communicator) -> Place:
        own = _own_place(communicator)
        if self._store is not None:
            self._store.write(f"at/{own.rank}", own.packed())
        return own

    def _where_all_are(self, communicator: Communicator, seconds: float = ANSWERS_S) -> str:
        """In words, those that answer in time."""
        places = {dist.get_rank(): self._publish_place(communicator)}
        ranks, store = communicator.ranks, self._store
        deadline = time.monotonic() + seconds
        while store is not None and store.reachable and len(places) < len(ranks):
            for rank in [rank for rank in ranks if rank not in places]:
                if time.monotonic() > deadline:  # of thousands, on a store that all ask
                    break
                text = store.read(f"at/{rank}")
                if text is not None:
                    places[rank] = Place.unpacked(text)
            if time.monotonic() > deadline:
                break
            time.sleep(EVERY_S / 5)
        return report(places.values(), ranks)

    def _explained(self, communicator: Communicator, error: Exception) -> Exception:
        """An exchange has failed on the host: the process group has lost a process, or its patience."""
        where = self._where_all_are(communicator, seconds=2 * EVERY_S)
        ended = self._store.ended(communicator.ranks) if self._store is not None else None
        said = f" since {ended}" if ended else ""
        kind = type(error) if isinstance(error, dist.DistError) else RuntimeError  # which programs may ask for
        return kind(f"{_place_in_words(communicator)} failed{said}: {error}\n{where}")

    def _publish_end(self, how: str) -> None:
        if self._store is not None and self._process == os.getpid() and self._limits:
            self._store.write_ended(how)

    def _at_exit(self) -> None:
        if self._process != os.getpid():
            return
        rank = self._store.rank if self._store is not None else "?"
        self._publish_end(f"rank {rank} has ended")
        self._stop.set()
        if self._thread is not None:
            self._thread.join(2 * EVERY_S)


class Store:
    """The job's own store, by a connection that nobody else waits on, and never for longer than a few seconds."""

    def __init__(self) -> None:
        store = dist.distributed_c10d._get_default_store()
        self._world = weakref.ref(dist.group.WORLD)
        self.rank = dist.get_rank()
        self._ended: dict[int, str] = {}  # of those heard of, what they have said
        self._heard = 0
        # A file's store counts its users, and has no connection that could be busy.
        if isinstance(_underlying(store), dist.TCPStore):
            store = store.clone()
            store.set_timeout(timedelta(seconds=_STORE_S))
        self._store = dist.PrefixStore("syncbn/watchdog", store)
        self._stuck: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        """Whether it is that of the present process group."""
        return dist.is_initialized() and self._world() is dist.group.WORLD

    @property
    def reachable(self) -> bool:
        return self._stuck is None or not self._stuck.is_alive()

    def has(self, key: str) -> bool:
        return bool(self._ask(lambda: self._store.check([key])))

    def read(self, key: str) -> str | None:
        """None where there is no such key, or no store any more."""
        return self._ask(lambda: self._store.get(key).decode() if self._store.check([key]) else None)

    def write(self, key: str, text: str) -> None:
        self._ask(lambda: self._store.set(key, text))

    def claim(self, key: str, text: str) -> bool:
        """Writes the key unless another process has done so. Whether it is this process's text, unlike any other's."""
        return self._ask(lambda: self._store.compare_set(key, "", text).decode() == text) or False

    def write_ended(self, how: str) -> None:
        """Lets the others know that this process ends; the first word stays."""

        def write() -> None:
            self._store.set(f"ended/{self._store.add('ended', 1)}", json.dumps([self.rank, how]))

        self._ask(write)

    def ended(self, ranks: Collection[int]) -> str | None:
        """What the first of these processes to end has said; None while none of them has.

        Others may have ended in peace. What they have said is read once, so that thousands of them are no load.
        """
        for number in range(self._heard + 1, int(self._ask(self._count_ended) or 0) + 1):
            text = self.read(f"ended/{number}")
            if text is None:
                break  # not written yet
            rank, how = json.loads(text)
            self._ended.setdefault(rank, how)
            self._heard = number
        return next((how for rank, how in self._ended.items() if rank in ranks), None)

    def _count_ended(self) -> int:
        return self._store.add("ended", 0) if self._store.check(["ended"]) else 0

    def _ask(self, question: Callable[[], T]) -> T | None:
        """The answer; None where there is none in time: a connection that was cut off is silent for ever."""
        if not self.reachable:
            return None
        answers: list[T] = []

        def ask() -> None:
            with suppress(RuntimeError):  # its host has ended
                answers.append(question())

        thread = threading.Thread(target=ask, name="syncbn store", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # from Python 3.12 on there are no new threads at a program's end
            ask()
            return answers[0] if answers else None
        thread.join(_STORE_S)
        self._stuck = thread if thread.is_alive() else None
        return answers[0] if answers else None


def _underlying(store: Any) -> Any:
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store


def _own_place(communicator: Communicator) -> Place:
    progress = communicator.progress
    last, waiting = progress.last, progress.under_way
    return place(dist.get_rank(), last, in_words(last, communicator.layer_name), waiting, progress.quiet_for)


def _place_in_words(communicator: Communicator) -> str:
    last = communicator.progress.last
    return f"syncbn: exchange {last.number} of rank {dist.get_rank()} ({in_words(last, communicator.layer_name)})"


def _hook_exceptions(publish: Callable[[str], None]) -> None:
    """Lets the other processes know of an exception that ends this one."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else os.environ.get("RANK", "?")
        publish(f"rank {rank} has raised {kind.__name__}: {str(error)[:500]}")
        before(kind, error, trace)

    sys.excepthook = hook


def _leave(text: str) -> NoReturn:
    """Ends the process while its main thread waits for what will not come: no exception can reach it there."""
    late = threading.Timer(_LAST_WORDS_S, os._exit, (_STATUS,))  # a pipe or a disk may be stuck,
    late.daemon = True
    late.start()
    try:
        print(text, file=sys.stderr, flush=True)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # what torchrun shows as the cause
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(RuntimeError(text))
        logging.shutdown()
        sys.stdout.flush()
    finally:  # or closed
        os._exit(_STATUS)


watchdog = Watchdog()
