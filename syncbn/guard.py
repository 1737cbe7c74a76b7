"""What keeps an exchange from waiting for ever: how long it may take, who watches it, and who compares its callers."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from . import check
from .communicator import SLACK, Communicator
from .watchdog import watchdog

TIMEOUT_VARIABLE = "SYNCBN_TIMEOUT"
# Long enough for most of what a process does between two exchanges, short enough to be waited for.
_TIMEOUT_OF_CHECK = timedelta(seconds=60)


@contextmanager
def meeting(communicator: Communicator, timeout: timedelta | None) -> Iterator[None]:
    """A block in which the processes of a communicator meet before a model's first exchange: it is watched, too."""
    if len(communicator.ranks) > 1:
        if not communicator.guarded:
            _watch(communicator, timeout)
        with communicator.progress.of_meeting():
            yield
    else:
        yield


def guard(communicator: Communicator, timeout: timedelta | None) -> None:
    """Watches a communicator from now on; of several models, the first one's timeout counts. Collective if checking.

    Args:
        timeout: the Exchange's.
    """
    if communicator.guarded or len(communicator.ranks) == 1:
        return
    communicator.guarded = True
    if check.asked_for():
        communicator.progress.compare = check.comparison(communicator)
    _watch(communicator, timeout)


def _watch(communicator: Communicator, timeout: timedelta | None) -> None:
    watchdog.watch(communicator, limit(timeout, communicator.timeout, SLACK if communicator.made_here else None))


def asked_timeout(timeout: timedelta | None) -> timedelta | None:
    """How long an exchange may take by the environment, the code or the check; None where none of them says.

    Raises:
        ValueError: the environment's is no number of seconds.
    """
    value = os.environ.get(TIMEOUT_VARIABLE)
    if not value:
        return timeout or (_TIMEOUT_OF_CHECK if check.asked_for() else None)
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not seconds > 0 or math.isinf(seconds):
        raise ValueError(f"expected {TIMEOUT_VARIABLE} to be a number of seconds greater than 0, got {value!r}")
    return timedelta(seconds=seconds)


def limit(timeout: timedelta | None, of_group: timedelta, slack: timedelta | None = None) -> timedelta:
    """After how long the watchdog ends the process: before the process group itself gives up, which names nobody.

    Args:
        timeout: the Exchange's.
        of_group: the process group's.
        slack: how much longer that is than it was asked for; None for a group that somebody else has made.
    """
    before = of_group - (of_group / 10 if slack is None else slack)
    return min(asked_timeout(timeout) or before, before)
