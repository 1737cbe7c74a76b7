"""What the fork server of the loading processes imports, and nobody else: it changes the process that imports it."""

import signal
import warnings

import syncbn.training.data  # noqa: F401, so that no worker needs to

# It ends when nobody is left who could ask it for a process.
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)

# Each worker runs the program's main module, which the server has imported for all of them: runpy warns of that.
warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
