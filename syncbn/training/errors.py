"""A user's mistake, told in one line."""

import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

USER_ERROR_STATUS = 2


class UserError(Exception):
    """Something the user can put right: a key, a value, a file. The message says what, in one line."""


def built(key: str, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What ``make`` makes of the values under a configuration key.

    Raises:
        UserError: it refuses them; says the key and why.
    """
    try:
        return make(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: {error}") from error


def fail(message: str, rank: int = 0) -> NoReturn:
    """Ends the process with status 2 and, on rank 0, one line on stderr."""
    if rank == 0:
        print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    raise SystemExit(USER_ERROR_STATUS)


def one_line(message: str) -> str:
    return "; ".join(line.strip() for line in message.splitlines() if line.strip())


def few(names: Sequence[object]) -> str:
    """The first three, for a message that cannot hold them all."""
    return ", ".join([*map(str, names[:3]), *(["..."] if len(names) > 3 else [])])


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """ " Did you mean ...?", or nothing if no choice is close."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""
