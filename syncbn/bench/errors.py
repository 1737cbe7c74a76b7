"""A user's mistake, told in one line before anything is measured."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

STATUS = 2


class UserError(Exception):
    """Something the user can put right. The message says in one line what was expected, what came and what to do."""


def fail(message: str) -> NoReturn:
    """Ends the process with ``STATUS``; where torchrun has started several, only the first one speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(STATUS)
