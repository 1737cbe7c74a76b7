"""Several processes take their batches in step, whoever still has some.

Before each step every process says whether it has a batch and how many samples are in it. The row for a step is posted
when the step before it is handed out, so that it travels while that one is trained; a batch is only handed out once
all rows for its step are there. A process whose loader has raised says so in its row, and all stop before that step.
"""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, Literal, NamedTuple

from .communicator import initialized
from .exchange import Exchange
from .host import HostCommunicator, Posted, host_communicators
from .samples import Layout, count, layout_of, pack, take, unpack
from .steps import Run, Step


class Reader:
    """What is to be known of a loader's batches: how many samples one has, and what stands in for none."""

    def __init__(
        self,
        loader: Any,
        empty: Literal["dummy"] | Callable[[Any], Any] | None,
        size: Callable[[Any], int] | None,
        layout: Layout | None,
    ) -> None:
        self._loader, self._empty, self._size, self._layout = loader, empty, size, layout

    @property
    def replaces_empty(self) -> bool:
        """Whether a batch without samples is not to be handed out, even if it is the loader's own."""
        return self._empty is not None

    def samples(self, batch: Any) -> int:
        """How many samples the batch has."""
        if self._layout is None and not (self._size is not None and callable(self._empty)):
            self._layout = layout_of(self._loader, batch)
        if self._size is None:
            assert self._layout is not None
            return count(batch, self._layout)
        samples = operator.index(self._size(batch))
        if samples < 0:
            raise ValueError(f"expected size() to return how many samples a batch has, at least 0, got {samples}")
        return samples

    def can_stand_in(self, samples: int) -> bool:
        """Whether a stand-in can be made from a batch of so many samples."""
        return samples > 0 or self._empty is None

    def stand_in(self, batch: Any) -> Any:
        """What stands in for no batch, made from one."""
        if callable(self._empty):
            return self._empty(batch)
        assert self._layout is not None
        return take(batch, self._layout, 1 if self._empty == "dummy" else 0)


class _State(IntEnum):
    HAS_A_BATCH = 0
    IS_DONE = 1
    HAS_FAILED = 2


class _StandIn(IntEnum):
    CAN_GIVE = 0
    WANTED = 1


class _Row(NamedTuple):
    """What a process says before a step."""

    conversation: int
    epoch: int
    step: int
    state: int = _State.HAS_A_BATCH
    samples: int = 0
    stand_in: int = _StandIn.CAN_GIVE
    length: int = -1  # of the loader, -1 where it has none


class _Fetched(NamedTuple):
    """What came of asking the loader for a batch."""

    state: _State
    batch: Any = None
    samples: int = 0
    stand_in: _StandIn = _StandIn.CAN_GIVE
    error: Exception | None = None


class Lockstep:
    """The steps of a loader's epochs, the same number on all processes of a group."""

    def __init__(self, loader: Iterable[Any], exchange: Exchange, reader: Reader) -> None:
        self.loader, self._exchange, self._reader = loader, exchange, reader
        self._host: HostCommunicator | None = None
        self._conversation = self._epoch = 0
        self._length = -1
        self._template: Any = None  # what stands in for no batch, to be copied for each step
        self._has_template = False

    def meet(self) -> None:
        """Finds the other processes and agrees with them on the length. Collective; a second call does nothing."""
        if not initialized():
            self._host = None
            return
        if self._host is not None and self._host.alive:
            return
        self._host, group = None, self._exchange._group()
        if group is None and self._exchange.alone:
            return
        host = host_communicators.of(group)
        if len(host.ranks) == 1:
            return
        self._host, self._conversation, self._epoch = host, host.open(), 0
        self._require_all_here(host)
        nothing = _Fetched(_State.IS_DONE)
        with _explained(nothing):
            posted = host.post(list(_Row(self._conversation, 0, -1, length=self._own_length())))
        self._length = _greatest_length(self._settle(posted, nothing))

    def __len__(self) -> int:
        self.meet()
        if self._host is None:
            return len(self.loader)  # type: ignore[arg-type]
        if self._length < 0:
            raise TypeError("the number of steps is not known: on some process the loader has no length")
        return self._length

    def steps(self, run: Run) -> Iterator[tuple[Step, Any]]:
        """One epoch: the numbers of each step and this process's batch."""
        self.meet()
        return self._alone(run) if self._host is None else self._together(run, self._host)

    def _alone(self, run: Run) -> Iterator[tuple[Step, Any]]:
        for batch in self.loader:
            try:
                samples: int | Exception = self._reader.samples(batch)
            except (TypeError, ValueError) as error:  # which matters to those alone who ask
                samples = error
            yield Step(run, samples, processes=1), batch

    def _together(self, run: Run, host: HostCommunicator) -> Iterator[tuple[Step, Any]]:
        self._require_all_here(host)
        self._epoch += 1
        row = _Row(self._conversation, self._epoch, 0, length=self._own_length())
        source = self._fetch()
        fetched, posted = self._announce(source, host, row)
        while True:
            rows = self._settle(posted, fetched)
            self._length = _greatest_length(rows)
            if _all_done(rows):
                return
            stands_in = self._needs_stand_in(fetched)
            batch = copy.deepcopy(self._template) if stands_in else fetched.batch
            # A batch without samples needs nobody to keep it out of the statistics.
            is_dummy = stands_in and self._reader.replaces_empty
            step = Step(run, fetched.samples, len(rows), sum(each.samples for each in rows), is_dummy)
            row = row._replace(step=row.step + 1)
            fetched, posted = self._announce(source, host, row)
            yield step, batch

    def _announce(self, source: Iterator[_Fetched], host: HostCommunicator, row: _Row) -> tuple[_Fetched, Posted]:
        """Fetches this process's batch for the row's step and tells the others."""
        fetched = next(source)
        row = row._replace(state=fetched.state, samples=fetched.samples, stand_in=fetched.stand_in)
        with _explained(fetched):
            return fetched, host.post(list(row))

    def _own_length(self) -> int:
        try:
            return len(self.loader)  # type: ignore[arg-type]
        except Exception:  # streams have no length; whatever else is wrong must not keep the others waiting
            return -1

    # ---- the loader

    def _fetch(self) -> Iterator[_Fetched]:
        """One batch after the other, then that there is none, for ever. It raises nothing: the others must be told."""
        try:
            end = yield from self._fetch_from_loader()
        except Exception as error:
            end = _Fetched(_State.HAS_FAILED, error=error)
        while True:
            yield end

    def _fetch_from_loader(self) -> Generator[_Fetched, None, _Fetched]:
        last: _Fetched | None = None  # from which a stand-in can be made
        for batch in self.loader:
            fetched = _Fetched(_State.HAS_A_BATCH, batch, self._reader.samples(batch))
            if self._reader.can_stand_in(fetched.samples):
                last = fetched
            yield self._with_stand_in(fetched, last)
        return self._with_stand_in(_Fetched(_State.IS_DONE), last)

    def _needs_stand_in(self, fetched: _Fetched) -> bool:
        return fetched.state is _State.IS_DONE or (fetched.samples == 0 and self._reader.replaces_empty)

    def _with_stand_in(self, fetched: _Fetched, last: _Fetched | None) -> _Fetched:
        """Made while the batch is still as it came from the loader, and before anything is promised to the others."""
        if last is not None and self._needs_stand_in(fetched):
            self._template, self._has_template = self._reader.stand_in(last.batch), True
        known = self._has_template or last is not None
        return fetched._replace(stand_in=_StandIn.CAN_GIVE if known else _StandIn.WANTED)

    # ---- the other processes

    def _require_all_here(self, host: HostCommunicator) -> None:
        """A loop that was left early has announced a step that it never came to: so must those of the others."""
        with _explained(_Fetched(_State.IS_DONE)):
            rows = [_Row(*numbers) for numbers in host.read()]
        _require_one_place(rows, host.ranks)

    def _settle(self, posted: Posted, fetched: _Fetched) -> list[_Row]:
        """The rows of all processes, once it is sure that the step can be run."""
        assert self._host is not None
        with _explained(fetched):
            rows = [_Row(*numbers) for numbers in self._host.read(posted)]
        _require_one_place(rows, self._host.ranks)
        if any(row.state == _State.HAS_FAILED for row in rows):
            self._raise_failure(fetched.error)
        if any(row.stand_in == _StandIn.WANTED for row in rows) and not _all_done(rows):
            self._spread_template(rows, fetched)
        return rows

    def _raise_failure(self, error: Exception | None) -> None:
        assert self._host is not None
        texts = self._host.tell(None if error is None else _in_words(error))
        if error is not None:
            raise error
        raise _failure_of_others(self._host.ranks, texts)

    def _spread_template(self, rows: list[_Row], fetched: _Fetched) -> None:
        """Processes that never had a batch learn what stands in for one from the first process that can say."""
        assert self._host is not None
        givers = [place for place, row in enumerate(rows) if row.stand_in == _StandIn.CAN_GIVE]
        if not givers:
            raise RuntimeError(
                "no process has had a sample yet from which even_batches could make what a process without data gets: "
                "every process's first batch is empty"
            )
        place = givers[0]
        message, error = None, None
        if self._host.ranks[place] == self._host.own_rank:
            try:
                if not self._has_template:
                    self._template, self._has_template = self._reader.stand_in(fetched.batch), True
                message = pickle.dumps((True, pack(self._template)))
            except Exception as raised:
                error = raised
                message = pickle.dumps((False, _in_words(raised)))
        made, template = pickle.loads(self._host.send(message, place))
        if error is not None:
            raise error
        if not made:
            raise _failure_of_others(self._host.ranks[place : place + 1], [template])
        if not self._has_template:
            self._template, self._has_template = unpack(template), True

    def __getstate__(self) -> dict[str, Any]:
        """All but what lives in this process only."""
        return self.__dict__ | {"_host": None, "_conversation": 0, "_epoch": 0, "_length": -1}


@contextmanager
def _explained(fetched: _Fetched) -> Iterator[None]:
    """What a message that does not get through means. This process's own error comes first."""
    try:
        yield
    except RuntimeError as error:
        if fetched.error is not None:
            raise fetched.error from error
        raise RuntimeError(
            "even_batches waited in vain for what another process has to say of the next step. That process may have "
            "ended, left the loop before the others, or needed longer than the process group's timeout for its batch"
        ) from error


def _all_done(rows: list[_Row]) -> bool:
    return all(row.state == _State.IS_DONE for row in rows)


def _greatest_length(rows: list[_Row]) -> int:
    lengths = [row.length for row in rows]
    return -1 if min(lengths) < 0 else max(lengths)


def _require_one_place(rows: list[_Row], ranks: list[int]) -> None:
    for rank, row in zip(ranks, rows, strict=False):  # there may be no rows yet
        first = rows[0]
        if row[:3] != first[:3]:
            raise RuntimeError(
                f"the processes are not in the same step of the same loop over even_batches: rank {ranks[0]} is "
                f"{_place(first)}, rank {rank} is {_place(row)}. Every process must make its even_batches in the same "
                f"order, run the same loops, and leave a loop after the same step"
            )


def _place(row: _Row) -> str:
    if row.step < 0:
        return f"making even_batches number {row.conversation}"
    return f"at step {row.step} of loop {row.epoch} over even_batches number {row.conversation}"


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:2000]}"


def _failure_of_others(ranks: list[int], texts: list[str | None]) -> RuntimeError:
    failed = [f"rank {rank}: {text}" for rank, text in zip(ranks, texts, strict=True) if text is not None]
    return RuntimeError(
        "even_batches stops on every process, since there is no next batch for all of them. The loader, or what reads "
        "its batches, raised on " + "\n".join(failed)
    )
