"""torchrun's agent: starts a node's processes, watches them, and starts all of them again when one fails."""

import logging
import os
import signal
import sys
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from syncbn.training.errors import USER_ERROR_STATUS
from syncbn.training.rendezvous import Rendezvous
from syncbn.training.worker import LAUNCHER_VARIABLE, STARTS_VARIABLE

_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
_GRACE_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
_GRACE_S = 30
# Rank 0 may have something left to do when the processes of the other nodes have ended.
_LAST_NODE_S = 3600


class RendezvousLostError(Exception):
    """The rendezvous cannot be reached any more; the processes of this node have been stopped."""

    def __init__(self, restarts_left: int) -> None:
        super().__init__(restarts_left)
        self.restarts_left = restarts_left


class Agent(LocalElasticAgent):
    """torchrun's, with these differences:

    - It says in one line why processes are started again.
    - A user's mistake is not tried again.
    - SIGUSR1, with which schedulers announce the end of a job, is SIGTERM to the processes.
    - A rendezvous may know that another node is lost (its method `lost`): that counts as a failure.
    """

    def __init__(self, spec: WorkerSpec, rendezvous: Rendezvous) -> None:
        super().__init__(spec, DefaultLogsSpecs(), exit_barrier_timeout=_LAST_NODE_S)
        self._meeting = rendezvous
        self._failure: ProcessFailure | None = None
        self._failed_rank = -1
        self._lost: str | None = None

    @property
    def restarts_left(self) -> int:
        return int(self._remaining_restarts)

    def reason(self) -> str:
        """Why the processes have been stopped."""
        if self._lost:
            return self._lost
        if self._failure:
            return f"process {self._failed_rank} {_end(self._failure)}"
        return "the processes are not well"

    def status(self) -> int:
        """The exit status for processes that have failed for good. Says why if none of them can have said it."""
        if self._failure is None:
            say(f"error: {self.reason()}")
            return 1
        if self._failure.exitcode >= 0:
            return int(self._failure.exitcode)
        # A signal leaves a process no time for a word of its own.
        say(f"error: {self.reason()}")
        return 128 - int(self._failure.exitcode)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed() and result.failures:
            self._failed_rank = min(result.failures, key=lambda rank: result.failures[rank].timestamp)
            self._failure = result.failures[self._failed_rank]
            if self._failure.exitcode == USER_ERROR_STATUS:
                self._remaining_restarts = 0
        elif result.state == WorkerState.HEALTHY:
            self._lost = self._meeting.lost()
            if self._lost:
                return RunResult(state=WorkerState.UNHEALTHY)
        return result

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        os.environ[STARTS_VARIABLE] = str(self._meeting.starts_before)
        started: dict[int, Any] = super()._start_workers(worker_group)
        return started

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        again = "starting all processes again"
        if self._failure or self._lost:
            allowed = worker_group.spec.max_restarts
            say(f"{self.reason()}: {again}, restart {allowed - self.restarts_left} of {allowed}")
        else:
            say(f"the nodes of the job have changed: {again}")
        super()._restart_workers(worker_group)
        self._failure = self._lost = None

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, *_: Any, **__: Any) -> None:
        if death_sig == signal.SIGUSR1:
            death_sig = signal.SIGTERM
        if self._lost:  # the processes wait for that node and cannot listen
            death_sig = signal.SIGKILL
        if self._pcontext:
            self._pcontext.close(death_sig, int(os.environ.get(_GRACE_VARIABLE, _GRACE_S)))
        super()._shutdown(death_sig)


def run_agent(handler: Rendezvous, processes: int, module: str, arguments: list[str], max_restarts: int = 0) -> int:
    """Runs the processes of this node until they have ended; returns the exit status.

    Args:
        handler: where this node meets the others.
        processes: how many to start here.
        module: what each of them runs, with `arguments`.
        max_restarts: how often all are started again after one has failed.

    Raises:
        RendezvousLostError: the rendezvous cannot be reached any more.
        RendezvousError: there was none.
    """
    # Its log repeats, at length, what the processes themselves have said. Theirs is not affected.
    logging.disable(logging.CRITICAL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = _SIGNALS
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    spec = WorkerSpec(
        role="default",
        local_world_size=processes,
        entrypoint=sys.executable,
        args=("-u", "-m", "syncbn.training.worker", module, *arguments),
        rdzv_handler=handler,
        max_restarts=max_restarts,
    )
    agent = Agent(spec, handler)
    try:
        result = agent.run()
    except SignalException as error:
        return 128 + int(error.sigval)  # the rendezvous stays open: this node may come back
    except KeyboardInterrupt:  # before there were any processes
        return 128 + int(signal.SIGINT)
    except (RendezvousConnectionError, DistError) as error:
        raise RendezvousLostError(agent.restarts_left) from error
    handler.shutdown()
    if result is None or result.state == WorkerState.SUCCEEDED:
        return 0
    return agent.status()


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _end(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return f"was ended by {signal.Signals(-failure.exitcode).name}"
    return f"ended with status {failure.exitcode}"
