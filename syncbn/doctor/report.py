"""The doctor's report: a page of text, or one JSON document."""

from __future__ import annotations

import json
import math
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .checks import FAILED, OK, WARNING, Check, worst

WIDTH = 100  # at most; less in a narrower terminal
_INDENT = 19
_MOST_LINES = 32  # of a check: a job of many hosts has more than anybody reads
_MARKS = {OK: "ok", WARNING: "WARN", FAILED: "FAIL"}


@dataclass(frozen=True)
class Report:
    """All checks of one examination."""

    title: str
    checks: Sequence[Check]
    facts: dict[str, Any]

    @property
    def healthy(self) -> bool:
        return worst([check.verdict for check in self.checks]) != FAILED

    @property
    def verdict(self) -> str:
        """One line, which names the worst thing."""
        warnings = [check for check in self.checks if check.verdict == WARNING]
        failures = [check for check in self.checks if check.verdict == FAILED]
        if failures:
            more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
            return f"unhealthy: {failures[0].name}: {failures[0].summary}{more}"
        noted = f"; {len(warnings)} warning{'s' if len(warnings) > 1 else ''}, see above" if warnings else ""
        times = [check.summary.partition(" (")[0] for check in self.checks if check.name == "all-reduce"]
        return f"healthy: {', '.join([self.title, *times])}{noted}"

    def text(self) -> str:
        """As wide as the terminal, and ``WIDTH`` at most, but for the verdict."""
        width = max(_INDENT + 20, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))
        lines = [f"syncbn doctor: {self.title}", ""]
        for check in self.checks:
            head = f"{_MARKS[check.verdict]:<5}{check.name:<14}"
            lines += textwrap.wrap(head + check.summary, width, subsequent_indent=" " * _INDENT, break_on_hyphens=False)
            lines += _indented(check.lines, width)
        return "\n".join([*lines, "", self.verdict])

    def json(self) -> str:
        document = {
            "healthy": self.healthy,
            "verdict": self.verdict,
            **self.facts,
            "checks": [{k: v for k, v in asdict(check).items() if k != "lines"} for check in self.checks],
        }
        return json.dumps(_finite(document), indent=1, allow_nan=False)


def _indented(lines: Sequence[str], width: int) -> list[str]:
    """What is too wide is moved to the left, then cut, visibly."""
    more = len(lines) - _MOST_LINES
    shown = [*lines[:_MOST_LINES], *([f"and {more} more lines; --json has all"] if more > 0 else [])]
    indent = max(1, min(_INDENT, width - max(map(len, shown), default=0)))
    cut = (line if len(line) <= width - indent else f"{line[: width - indent - 1]}…" for line in shown)
    return [f"{' ' * indent}{line}".rstrip() for line in cut]


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
