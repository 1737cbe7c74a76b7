"""What the doctor has looked at, and what it thinks of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

OK, WARNING, FAILED = "ok", "warning", "failed"
_SEVERITY = (OK, WARNING, FAILED)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at on every process."""

    name: str
    verdict: str  # OK, WARNING or FAILED
    summary: str  # one line; names the rank that is at fault
    per_rank: list[Any] = field(default_factory=list)  # values of JSON's types, by rank
    lines: list[str] = field(default_factory=list)  # more, for the report


def worst(verdicts: Sequence[str]) -> str:
    return max(verdicts, key=_SEVERITY.index, default=OK)


def ranks_in_words(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 1, 4", "ranks 0 to 7, 12"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(words)}"


def by_text(found: Sequence[tuple[int, str]]) -> str:
    """ "rank 1: ...; ranks 8 to 15: ...": what was found on each rank, once for all that have the same."""
    ranks: dict[str, list[int]] = {}
    for rank, text in found:
        ranks.setdefault(text, []).append(rank)
    return "; ".join(f"{ranks_in_words(each)}: {text}" for text, each in ranks.items())


def by_value(values: Sequence[Any]) -> dict[Any, list[int]]:
    """The ranks that have each value, in order of the first."""
    ranks: dict[Any, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return ranks


def those_who_differ(values: Sequence[Any]) -> list[int]:
    """The ranks that are not with most of the others."""
    ranks = by_value(values)
    most = max(ranks.values(), key=len)
    return [rank for each in ranks.values() if each is not most for rank in each]


def spelled(values: Sequence[Any]) -> str:
    """ "2.15.0 on rank 0, 2.14.1 on rank 1"; the value itself where all have the same."""
    ranks = by_value(values)
    if len(ranks) == 1:
        return str(values[0])
    return ", ".join(f"{value} on {ranks_in_words(each)}" for value, each in ranks.items())
