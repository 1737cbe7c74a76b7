"""``python -m syncbn.doctor``: see ``--help``."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from .examination import examine
from .options import parse
from .own_processes import launched, start


def main(arguments: list[str] | None = None) -> NoReturn:
    """Examines, prints the report and ends with status 0 (healthy) or 1, on every process; 2 for wrong options."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if not launched():
        raise SystemExit(start(options))
    status = examine(options)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by way of the interpreter's end, where what hangs, or NCCL's and gloo's threads, would hold the process.
    os._exit(status)


if __name__ == "__main__":
    main()
