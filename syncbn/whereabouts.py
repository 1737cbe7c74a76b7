"""Where each process is, in words: what is printed when an exchange does not come about."""

from __future__ import annotations

import gc
import json
import socket
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from .progress import OF_MEETING, Entry

_LIBRARIES = tuple(str(Path(sysconfig.get_paths()[name])) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_OWN = str(Path(__file__).parent)


class Place(NamedTuple):
    """Where one process is.

    Attributes:
        number, tag, size: of its last exchange, see ``Entry``.
        what: that exchange in words.
        waiting: whether it is still in it.
        seconds: since it began, or ended if it has.
        code: where its main thread is, and what of it matters.
    """

    rank: int
    host: str
    number: int
    tag: int
    size: int
    what: str
    waiting: bool
    seconds: float
    code: str

    def packed(self) -> str:
        return json.dumps(self)

    @classmethod
    def unpacked(cls, text: str | bytes) -> Place:
        return cls(*json.loads(text))


def place(rank: int, last: Entry, what: str, waiting: bool, seconds: float) -> Place:
    """That of this process, whose main thread may be anywhere."""
    return Place(rank, socket.gethostname(), *last[:3], what, waiting, seconds, _code() + _modes())


def in_words(last: Entry, name: Callable[[int], str]) -> str:
    """Which layer and direction an exchange belongs to; ``name`` is the communicator's for the number of a layer."""
    if last.number == 0:
        return "none"
    if last.tag == OF_MEETING:
        return "the first of a model, before which the processes compare their layers"
    if last.tag == 0:
        return f"a sum of no layer, {last.size} numbers"
    number, backward = divmod(last.tag, 2)
    direction = "backward" if backward else "forward"
    further = " where gradients are to be differentiated again" if last.differentiable else ""
    return f"{direction} of {name(number)!r}{further}, {last.size} numbers"


def report(places: Collection[Place], ranks: Sequence[int]) -> str:
    """A line for all processes that are at the same place; those of ``ranks`` that are nowhere come last."""
    by_line: dict[str, list[int]] = {}
    slowest: dict[str, float] = {}
    hosts = {each.rank: each.host for each in places}
    several_hosts = len(set(hosts.values())) > 1
    for each in sorted(places):
        line = _line(each)
        by_line.setdefault(line, []).append(each.rank)
        slowest[line] = max(slowest.get(line, 0.0), each.seconds)
    lines = [
        f"  {ranks_in_words(of, hosts if several_hosts else None)}: {line.format(f'{slowest[line]:.0f} s')}"
        for line, of in by_line.items()
    ]
    if absent := [rank for rank in ranks if rank not in hosts]:
        why = "ended, stopped, cut off, or not yet at a synchronized layer"
        lines.append(f"  {ranks_in_words(absent)}: no answer: {why}")
    return "\n".join(lines)


def _line(place: Place) -> str:
    """With one gap, for the time."""
    code = place.code.replace("{", "{{").replace("}", "}}")
    what = place.what.replace("{", "{{").replace("}", "}}")
    if place.waiting:
        return f"waiting for {{}} in exchange {place.number} ({what})"
    last = f"its last was {place.number} ({what}), {{}} ago" if place.number else "it has had none for {}"
    return f"in no exchange; {last}. It is at {code}"


def ranks_in_words(ranks: Sequence[int], hosts: dict[int, str] | None = None) -> str:
    """ "rank 3 (node7)", "ranks 0-2, 5": a single one with its host, if that is given."""
    if len(ranks) == 1:
        host = (hosts or {}).get(ranks[0])
        return f"rank {ranks[0]}" + (f" ({host})" if host else "")
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return "ranks " + ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _code() -> str:
    """The innermost line of the main thread that is the user's, and the innermost of all."""
    frame = sys._current_frames().get(threading.main_thread().ident or -1)
    if frame is None:
        return "an unknown place"
    stack = [each for each in traceback.extract_stack(frame) if not each.filename.startswith("<")]
    if not stack:
        return "an unknown place"
    innermost = stack[-1]
    users = next((each for each in reversed(stack) if not each.filename.startswith((*_LIBRARIES, _OWN))), innermost)
    text = _line_of_code(users)
    return text if users is innermost else f"{text}, inside of it {_line_of_code(innermost)}"


def _line_of_code(frame: traceback.FrameSummary) -> str:
    return f"{frame.filename}:{frame.lineno} in {frame.name}"


def _modes() -> str:
    """How many of the synchronized layers are in eval mode, in which they exchange nothing, if any is.

    The process is about to end, so that it may look at all of its objects; nobody has to keep a list.
    """
    from .layer import SyncBatchNorm

    # Not isinstance, which asks objects for their class, and some of them warn then.
    layers = [each for each in gc.get_objects() if issubclass(type(each), SyncBatchNorm)]
    in_eval = sum(not layer.training for layer in layers)
    return f"; {in_eval} of its {len(layers)} synchronized layers are in eval mode" if in_eval else ""
