"""What can be typed after ``python -m syncbn.doctor``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

_EPILOG = """
Alone it starts processes on this machine, which talk over the loopback interface. To examine a job, start the doctor as
you start the job: `torchrun ... -m syncbn.doctor`. The last line is the verdict; exit status 0 is healthy, 1 is not.
"""


@dataclass(frozen=True)
class Options:
    """The command line."""

    processes: int | None  # None: as many as there are GPUs, at least 2
    device: str | None  # None: cuda, if every process of a host can have a GPU
    timeout: float
    folder: Path
    json: bool
    store: str | None  # of processes that the doctor has started itself

    def command(self) -> list[str]:
        """The arguments for a process that the doctor starts."""
        given = ["--timeout", str(self.timeout), "--folder", str(self.folder)]
        given += ["--device", self.device] if self.device else []
        return [*given, *(["--json"] if self.json else [])]


def parse(arguments: list[str]) -> Options:
    """Ends the program with status 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m syncbn.doctor",
        description="Whether the processes of a job can train together, and if not, what is wrong and where.",
        epilog=_EPILOG,
    )
    parser.add_argument("--processes", type=_at_least_1, metavar="N", help="how many to start, where torchrun has not")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where messages are; default: cuda, if there is one")
    parser.add_argument(
        "--timeout", type=_seconds, default=60.0, metavar="S", help="how many seconds a step may take (default: 60)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("."), metavar="DIR", help="where runs are written, whose disk is looked at"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.add_argument("--store", help=argparse.SUPPRESS)
    return Options(**vars(parser.parse_args(arguments)))


def _at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"expected a number of seconds from 1 to 86400, got {text}")
    return seconds
