"""One process of a job: runs a module, and ends when its launcher does.

    python -m syncbn.training.worker syncbn.training.train norm=local

A launcher that is killed with SIGKILL cannot take its processes with it. Left alone they would keep their GPUs, and
write checkpoints beside the job that a new launcher starts.
"""

import ctypes
import os
import runpy
import signal
import sys

# Set by the launcher to its own process id.
LAUNCHER_VARIABLE = "SYNCBN_LAUNCHER"
# Set by the launcher: how often the job's processes have been started before, on whatever nodes.
STARTS_VARIABLE = "SYNCBN_STARTS_BEFORE"
_TORCHRUNS_COUNT = "TORCHELASTIC_RESTART_COUNT"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    end_with_the_launcher()
    count_all_starts()
    module = sys.argv[1]
    sys.argv = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def end_with_the_launcher() -> None:
    """Asks the kernel for SIGKILL at the launcher's death (Linux; nothing elsewhere)."""
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it was faster
        os._exit(1)


def count_all_starts() -> None:
    """Makes torchrun's count of restarts that of the job: torchrun itself counts those for which a node's own process
    was the cause, so that the nodes disagree, and one that has joined anew begins at 0."""
    counts = [os.environ.get(name, "0") for name in (_TORCHRUNS_COUNT, STARTS_VARIABLE)]
    os.environ[_TORCHRUNS_COUNT] = str(max(int(count) for count in counts))


if __name__ == "__main__":
    main()
