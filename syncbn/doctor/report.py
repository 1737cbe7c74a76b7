"""The doctor's report: a page of text, or one JSON document."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .checks import FAILED, OK, WARNING, Check, worst

WIDTH = 100
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
        """At most ``WIDTH`` wide, but for the verdict."""
        lines = [f"syncbn doctor: {self.title}", ""]
        for check in self.checks:
            head = f"{_MARKS[check.verdict]:<5}{check.name:<14}"
            lines += textwrap.wrap(head + check.summary, WIDTH, subsequent_indent=" " * 19, break_on_hyphens=False)
            lines += [(" " * 19 + line)[:WIDTH].rstrip() for line in check.lines]
        return "\n".join([*lines, "", self.verdict])

    def json(self) -> str:
        document = {
            "healthy": self.healthy,
            "verdict": self.verdict,
            **self.facts,
            "checks": [{k: v for k, v in asdict(check).items() if k != "lines"} for check in self.checks],
        }
        return json.dumps(document, indent=1)
