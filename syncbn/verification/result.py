"""What ``verify`` has found: a row for each tensor that was compared, a table, and what may be the cause, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .recording import Key

AT_THE_START = "at the start"


@dataclass(frozen=True)
class Row:
    """One tensor of one layer: what several processes make of it, against one process with the union."""

    layer: str  # qualified; "the model" for the model's own output
    class_name: str
    what: str  # "output", "grad of input", "grad of weight", "running_var", "weight at the start", ...
    call: int  # of the layer, from 1 on; 0 for what belongs to no call
    error: float | None  # the greatest difference, in units of the tensor's own scale; None where none can be formed
    ok: bool
    ranks: tuple[int, ...] = ()  # whose part disagrees; empty where it is a sum over processes
    note: str = ""
    # How many times too large it is on each of ``ranks``, if that is all that is wrong.
    ratios: tuple[float, ...] = ()

    @property
    def where(self) -> str:
        """In words: "bn1, output, 2nd call"."""
        call = f", call {self.call}" if self.call > 1 else ""
        return f"{self.layer}, {self.what}{call}"


@dataclass(frozen=True)
class Standing:
    """How a layer is synchronized, by rank: status, over, reason, as ``describe`` has them; over how many processes."""

    by_rank: dict[int, tuple[str, str, str, int]]

    @property
    def differs(self) -> bool:
        return len(set(self.by_rank.values())) > 1

    def __str__(self) -> str:
        if self.differs:
            return "; ".join(f"rank {rank}: {_standing(*each)}" for rank, each in self.by_rank.items())
        return _standing(*next(iter(self.by_rank.values())))


def _standing(status: str, over: str, reason: str, _: int) -> str:
    return f"{status}{f' over {over}' if over else ''}{f' ({reason})' if reason else ''}"


@dataclass(frozen=True)
class Verification:
    """What ``verify`` has found. ``print`` shows a table with a line for each call of a layer, and a summary."""

    rows: tuple[Row, ...]  # in the order in which a step computes them
    groups: tuple[tuple[int, ...], ...]  # the ranks whose parts have formed a union each
    samples: tuple[int | None, ...]  # of each process, as far as they can be counted
    dtype: str
    tolerance: float
    causes: tuple[str, ...] = ()  # of the first disagreement, the likeliest first
    notes: tuple[str, ...] = ()
    order: tuple[tuple[str, int], ...] = field(default=(), repr=False)  # calls in forward order

    @property
    def ok(self) -> bool:
        """Whether all agrees."""
        return all(row.ok for row in self.rows)

    @property
    def first(self) -> Row | None:
        """The first row that disagrees, in the order in which a step computes them: outputs from the first layer to the
        last, then gradients from the last to the first. What comes after it may be wrong because of it."""
        return next((row for row in self.rows if not row.ok), None)

    @property
    def worst(self) -> Row | None:
        """The row with the greatest error."""
        return max((row for row in self.rows if row.error is not None), key=lambda row: row.error or 0.0, default=None)

    @property
    def summary(self) -> str:
        """One line."""
        layers = len({row.layer for row in self.rows})
        processes = sum(map(len, self.groups))
        over = f"{processes} process{'es' if processes > 1 else ''}"
        if len(self.groups) > 1:
            over += f" in {len(self.groups)} groups"
        first = self.first
        if first is None:
            worst = self.worst
            error = f", greatest error {worst.error:.1e} ({worst.where})" if worst is not None else ""
            return f"OK: {layers} layers on {over} do what one process does with all inputs ({self.dtype}){error}."
        error = f" (error {first.error:.1e})" if first.error is not None else ""
        disagreeing = len({row.layer for row in self.rows if not row.ok})
        return f"NOT OK: {disagreeing} of {layers} layers disagree on {over}; the first is {first.where}{error}."

    def __str__(self) -> str:
        parts = [_table(self)]
        first = self.first
        if first is not None:
            on = f" on rank {', '.join(map(str, first.ranks))}" if first.ranks else ""
            parts += ["", f"First disagreement: {first.where}{on}{': ' + first.note if first.note else ''}"]
            parts += [f"  - {cause}" for cause in self.causes]
        if self.notes:
            parts += ["", *(f"Note: {note}" for note in self.notes)]
        return "\n".join([*parts, "", self.summary]).lstrip("\n")


# ---- the table

_COLUMNS = ("call", "input", "output", "grad of output", "grad of input", "parameters", "statistics", "start")


def _table(found: Verification) -> str:
    """A line for each call of a layer, in forward order; what belongs to no call stands with the first one."""
    cells: dict[tuple[str, int], dict[str, list[Row]]] = {call: {} for call in found.order}
    classes: dict[str, str] = {}
    for row in found.rows:
        line = cells.setdefault((row.layer, max(row.call, 1)), {})
        line.setdefault(_column(row.what), []).append(row)
        classes[row.layer] = row.class_name
    used = [column for column in _COLUMNS if any(column in line for line in cells.values())]
    if not used:
        return ""
    table = [["layer", "class", *used]]
    for (layer, call), line in cells.items():
        if line:
            name = f"{layer} ({call})" if call > 1 else layer
            table.append([name, classes[layer], *(_cell(line.get(column, [])) for column in used)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in table]
    return "\n".join(line.rstrip() for line in lines)


def _column(what: str) -> str:
    if what.endswith(AT_THE_START):
        return "start"
    plain = what.partition("[")[0]
    if plain in _COLUMNS:
        return plain
    return "parameters" if plain.startswith("grad of ") else "statistics"


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    wrong = [row for row in rows if not row.ok]
    errors = [row.error for row in wrong or rows if row.error is not None]
    text = f"{max(errors):.0e}" if errors else "-"
    return f"{text} WRONG" if wrong else text


# ---- causes


@dataclass(frozen=True)
class Facts:
    """What is known besides the rows."""

    standings: dict[str, Standing]  # of all normalization layers
    expected: int  # over how many processes each layer is to be synchronized
    samples: tuple[int | None, ...]
    reduction: str
    own_loss: bool
    draws_random_numbers: bool
    before: dict[tuple[str, int], str]  # which layer ran before this call
    parted: dict[str, list[int]] | None = None  # where the processes were that did not meet


def causes(first: Row, facts: Facts) -> list[str]:
    """Why ``first`` may disagree, the likeliest first."""
    return list(dict.fromkeys(_causes(first, facts)))


def _causes(first: Row, facts: Facts) -> Iterable[str]:
    if first.what.endswith(AT_THE_START):
        yield (
            "different weights on the processes to begin with: wrap the model in DistributedDataParallel, which "
            "broadcasts those of rank 0, or load the same checkpoint (or draw with the same seed) on every process"
        )
        return
    if facts.parted is not None:
        places = "; ".join(f"rank {_numbers(ranks)} {place}" for place, ranks in facts.parted.items())
        yield f"the processes do not run the same synchronized layers in the same order: {places}"
        yield from (
            f"{name} is not the same on all processes: {each}" for name, each in facts.standings.items() if each.differs
        )
        yield "in training, such a step waits for ever, or until the timeout of the process group"
        return
    if first.ratios and first.what.startswith("grad of output"):
        yield from _of_scale(first, facts)
        return
    standing = facts.standings.get(first.layer)
    suspicious = standing is not None and _is_suspicious(standing, facts.expected)
    if standing is not None and suspicious:
        yield f"{first.layer} is {standing}"
        yield from _of_standing(standing)
    if "not comparable" in first.note:
        yield (
            "the model's shapes depend on who else is in the batch (images padded to the largest of it, for one), so "
            "that one process with all inputs does something else: pass inputs of one size"
        )
    if facts.draws_random_numbers:
        yield (
            "the model draws random numbers (noise, stochastic depth, sampling of proposals), which differ between the "
            "runs: switch that off for the comparison"
        )
    if not suspicious:
        yield from _of_kind(first, facts, standing)


def _of_scale(first: Row, facts: Facts) -> Iterable[str]:
    times = ", ".join(f"{ratio:.4g}" for ratio in first.ratios)
    whose = "the loss" if facts.own_loss else "the model's own loss"
    yield (
        f"the gradient is {times} times that of the union: {whose} divides by the local number of samples (a mean), so "
        f"that the parts' sum is not the union's"
    )
    if len({count for count in facts.samples if count is not None}) > 1:
        yield (
            f"the processes have unequal numbers of samples ({_numbers(facts.samples)}), so that means over them weigh "
            f"samples differently: see syncbn.even_batches(loader).weigh"
        )
    elif facts.reduction == "sum":
        yield 'pass reduction="mean", if the gradients of a mean loss are averaged over the processes, as DDP does'


def _is_suspicious(standing: Standing, expected: int) -> bool:
    return standing.differs or any(
        status in ("local", "foreign")
        or (status == "frozen" and "in eval mode while" in reason)
        or (status == "synchronized" and size != expected)
        for status, _, reason, size in standing.by_rank.values()
    )


def _of_standing(standing: Standing) -> Iterable[str]:
    status, over, reason, _ = next(iter(standing.by_rank.values()))
    if status == "synchronized":
        yield f"another group than the other layers': its statistics are formed over {over}"
    elif status in ("local", "foreign"):
        yield "its statistics are those of each process's own batch: convert it, or exclude it knowingly"
    elif "in eval mode" in reason:
        yield "if it is to stay in eval mode, say so by syncbn.freeze, and it is compared as frozen"


def _of_kind(first: Row, facts: Facts, standing: Standing | None) -> Iterable[str]:
    before = facts.before.get((first.layer, max(first.call, 1)))
    between = f"what the model's code does between {before} and {first.layer}" if before else "the inputs"
    mixing = "mixes samples or depends on the process (a mean over the batch, a loss in the model, its rank)"
    if first.what.startswith("input"):
        yield f"{between} {mixing}"
    elif first.what == "call":
        yield f"whether {first.layer} runs depends on the batch"
    elif first.what.startswith("output"):
        yield f"{first.layer} itself {mixing}" if standing is None else f"the forward of {first.layer} does more"
    elif first.what.startswith("grad of output"):
        yield "what uses this output, after the last layer that agrees, has a wrong backward, or the loss mixes samples"
        yield "the loss divides by something of this process alone, such as its number of samples"
    elif first.what.startswith("grad of input"):
        yield (
            f"the backward of {first.layer} is wrong over several processes: its output and its output's gradient "
            f"agree, the gradient that it makes of them does not (a custom autograd.Function or a backward hook)"
        )
    elif first.what.startswith("grad of "):
        yield f"the backward of {first.layer} for this parameter, or a hook on it that scales or averages gradients"
    elif standing is not None:
        yield f"{first.layer} moves its running statistics by another rule than nn.BatchNorm (momentum, correction)"
    else:
        yield f"{first.layer} moves this buffer by what one process has seen"


def _numbers(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def label(key: Key) -> str:
    return key.layer or "the model"
