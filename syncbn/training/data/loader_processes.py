"""The processes that load data: how they start, and which signals are none of their business.

They are not forked from the process that trains. That one has threads, of autograd, of the communication and of the
logger, and a lock that one of them holds at that moment stays locked in the child for ever: the loader then waits for
a worker that never comes up, and all other processes wait for this one (pytorch/pytorch#75147 and #130610; Python 3.14
starts no process by fork either). A fork server has imported what is needed, has a single thread, and forks workers
from itself.
"""

import multiprocessing
import signal
import sys
from multiprocessing.context import BaseContext
from types import ModuleType

_GRACE_S = 10
_PRELOADED = f"{__name__.rpartition('.')[0]}.loader_server"


def loader_context() -> BaseContext:
    """What a DataLoader starts its workers with."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOADED, *_main_module()])
    return context


def leave_signals_to_training(*_: object) -> None:
    """Ctrl-C and SIGTERM reach all processes of a job; when it ends is for the one that trains to say.

    It still needs its data for the step or two until a checkpoint is saved. SIGTERM is also what ends a worker that
    is left over at the program's end, so that it does end it, somewhat later.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))


def _main_module() -> list[str]:
    """The program itself, if it was started as a module: each worker imports it, here once for all."""
    main: ModuleType = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", "")
    return [] if not name or name.endswith("__main__") else [name]
