"""``python -m syncbn.bench MODE``: see ``--help``."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from . import processes
from .errors import UserError, fail
from .options import parse
from .report import Report, write


def main(arguments: list[str] | None = None) -> None:
    """Runs a mode, prints its tables and writes what was asked for. A user's mistake ends in one line, status 2."""
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        mode: Any = importlib.import_module(f".{options.mode}", __package__)
        report: Report | None = mode.run(options)
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        processes.leave()
    if report is not None:  # on rank 0 only, where torchrun has started several of these
        try:
            write(report, options.json, options.plot)
        except OSError as error:
            fail(f"{error}: the tables above are all that is left; give another path")


if __name__ == "__main__":
    main()
