"""How far the parts' tensors are from the union's, tensor by tensor, each in units of its own scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .meeting import Talk
from .recording import Key
from .result import AT_THE_START, Row, label
from .unions import slices

Ranks = tuple[int, ...]
# What rounding may leave, in units of a tensor's scale. A layer that is not synchronized errs by 1e-2 and more.
_TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-3}
_OF_LESS = 0.1
_ROUNDING = 100.0  # ε, of the greatest value of all


@dataclass
class Against:
    """How tensors are compared."""

    averages: bool  # whether the union's loss is the mean of the parts' losses
    dtype: torch.dtype
    tolerance: float | None
    classes: dict[str, str]  # of all modules
    gammas: dict[str, float]  # of batch normalization layers, the greatest |γ|
    uncalled: set[str] = field(default_factory=set)  # of layers of whose calls nothing is recorded

    @property
    def within(self) -> float:
        return self.tolerance if self.tolerance is not None else _TOLERANCES.get(self.dtype, _OF_LESS)

    @property
    def floor(self) -> float:
        """The least scale, in units of the greatest value of all: what is smaller may be all rounding."""
        return _ROUNDING * torch.finfo(self.dtype).eps / self.within


class _Shape(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype


def compare(
    talk: Talk,
    group: Ranks,
    part: dict[Key, Tensor],
    union: dict[Key, Tensor] | None,
    against: Against,
    otherwise: dict[Key, Tensor] | None = None,
) -> list[Row]:
    """The rows of a group, in the process that has its union; none in the others. Collective over all processes.

    One tensor is under way at a time, so that no process holds those of all parts.

    Args:
        otherwise: tensors that would be as right as the union's.
    """
    said: list[tuple[dict[Key, _Shape], list[Key] | None]] = talk.share(
        (
            {key: _Shape(tuple(each.shape), each.dtype) for key, each in part.items()},
            None if union is None else list(union),
        )
    )
    shapes = {rank: shapes for rank, (shapes, _) in zip(talk.ranks, said, strict=True)}
    keys = said[talk.ranks.index(group[0])][1]
    assert keys is not None  # the first process of a group has its union
    if union is None:
        for key in keys:
            if key in part:
                talk.send(part[key], group[0])
        return []
    judge = _Judge(union, {rank: shapes[rank] for rank in group}, against)
    rows = []
    for key in keys:
        parts = {
            rank: part[key] if rank == talk.rank else talk.receive(*shapes[rank][key], rank)
            for rank in group
            if key in shapes[rank]
        }
        row = judge.row(key, parts, union[key])
        if row is not None and not row.ok and key in (otherwise or {}):
            row = judge.row(key, parts, (otherwise or {})[key])
        rows += [] if row is None else [row]
    return rows + judge.only_in_parts()


def merged(of_groups: Sequence[Sequence[Row]]) -> list[Row]:
    """One row for each tensor, of several groups' rows: the worst of them."""
    by_key: dict[tuple[str, int, str], Row] = {}
    for row in (row for rows in of_groups for row in rows):
        key = (row.layer, row.call, row.what)
        known = by_key.get(key)
        if known is None or (known.ok, -(known.error or 0.0)) > (row.ok, -(row.error or 0.0)):
            by_key[key] = row
    return list(by_key.values())


class _Judge:
    """Compares with the tensors of one union."""

    def __init__(self, union: dict[Key, Tensor], shapes: dict[int, dict[Key, _Shape]], against: Against) -> None:
        self._union, self._shapes, self._against = union, shapes, against
        self._greatest = {key: _greatest(each) for key, each in union.items()}
        of_calls = [(key, each) for key, each in self._greatest.items() if key.call]
        self._values = max((each for key, each in of_calls if not _is_gradient(key)), default=0.0)
        self._gradients = max((each for key, each in of_calls if _is_gradient(key)), default=0.0)
        self._of_outputs: dict[str, float] = {}  # the greatest gradient of a layer's outputs
        for key, each in of_calls:
            if key.what.startswith("grad of output"):
                self._of_outputs[key.layer] = max(each, self._of_outputs.get(key.layer, 0.0))

    def row(self, key: Key, parts: dict[int, Tensor], union: Tensor) -> Row | None:
        """None where there is nothing to compare."""
        missing = tuple(rank for rank in self._shapes if rank not in parts)
        if missing:
            whole = key.call and key.what.startswith("output")
            if not whole or key.layer in self._against.uncalled:
                return None
            on = f"on rank {', '.join(map(str, missing))}" if parts else "on the parts"
            return self._row(key._replace(what="call"), None, False, missing, f"it runs on the union, but not {on}")
        if key.call == 0 and _is_gradient(key):
            return self._of_one(key, _sum(parts), union)
        if key.call == 0:
            return self._of_each(key, parts, dict.fromkeys(parts, union))
        of_union = slices([each.shape for each in parts.values()], union)
        if of_union is not None:
            return self._of_each(key, parts, dict(zip(parts, of_union, strict=True)))
        if all(each.shape == union.shape for each in parts.values()):
            return self._of_equals(key, parts, union)
        said = ", ".join(str(list(each.shape)) for each in parts.values())
        return self._row(
            key,
            None,
            False,
            tuple(parts),
            f"not comparable: the parts' shapes are {said}, the union's {list(union.shape)}",
        )

    def only_in_parts(self) -> list[Row]:
        """Calls that the parts have and the union has not."""
        keys = dict.fromkeys(key for shapes in self._shapes.values() for key in shapes)
        missing = [key for key in keys if key not in self._union and key.what == "output"]
        return [self._row(key, None, False, (), "it runs on the parts, but not on the union") for key in missing]

    def _of_equals(self, key: Key, parts: dict[int, Tensor], union: Tensor) -> Row | None:
        """What has no samples: the same in all parts; or a loss, of which the union's is the sum or the mean."""
        if union.dim() == 0 and _is_gradient(key):
            return None  # of a loss its weight, or a sum of such: which of both is not known
        if _is_gradient(key):
            return self._of_one(key, _sum(parts), union)
        row = self._of_each(key, parts, dict.fromkeys(parts, union))
        if row.ok or union.dim() > 0:
            return row
        return self._of_one(key, _sum(parts) / (len(parts) if self._against.averages else 1), union)

    def _of_each(self, key: Key, parts: dict[int, Tensor], unions: dict[int, Tensor]) -> Row:
        scale = self._scale(key)
        errors = {rank: difference(parts[rank], unions[rank]) / scale for rank in parts}
        wrong = tuple(rank for rank, error in errors.items() if not error <= self._against.within)
        ratios = [self._ratio(key, parts[rank], unions[rank], scale) for rank in wrong]
        return self._row(key, max(errors.values()), not wrong, wrong, "", ratios)

    def _of_one(self, key: Key, total: Tensor, union: Tensor) -> Row:
        scale = self._scale(key)
        error = difference(total, union) / scale
        ok = error <= self._against.within
        return self._row(key, error, ok, (), "", [] if ok else [self._ratio(key, total, union, scale)])

    def _row(
        self, key: Key, error: float | None, ok: bool, ranks: Ranks, note: str, ratios: Sequence[float | None] = ()
    ) -> Row:
        known = tuple(ratio for ratio in ratios if ratio is not None)
        return Row(
            label(key),
            self._against.classes.get(key.layer, ""),
            key.what,
            key.call,
            error,
            ok,
            ranks,
            note,
            known if len(known) == len(ratios) else (),
        )

    def _scale(self, key: Key) -> float:
        """The greatest value of the union's tensor, but not less than what rounding could make of nothing."""
        own, against = self._greatest[key], self._against
        if key.what.endswith(AT_THE_START):
            return max(own, torch.finfo(torch.float64).tiny)
        if _is_gradient(key):
            return max(own, self._of_outputs.get(key.layer, 0.0), self._gradients * against.floor, _TINY)
        if key.call:
            # A normalization's output may be nothing but rounding, where all its input is equal.
            normalized = against.gammas.get(key.layer, 0.0) if key.what.startswith("output") else 0.0
            return max(own, normalized, self._values * against.floor, _TINY)
        if key.what == "running_mean":  # which may be 0 by itself: then the deviation is the measure
            return max(own, math.sqrt(self._greatest.get(key._replace(what="running_var"), 0.0)), _TINY)
        return max(own, _TINY)

    def _ratio(self, key: Key, part: Tensor, union: Tensor, scale: float) -> float | None:
        """How many times the union's the part's is, if that is all; for gradients."""
        if not _is_gradient(key) or part.numel() == 0:
            return None
        part, union = part.double(), union.double()
        square = (union * union).sum()
        ratio = float((part * union).sum() / square) if square > 0 else math.nan
        if not math.isfinite(ratio) or ratio == 0:
            return None
        exact = difference(part, union * ratio) <= scale * self._against.within * max(1.0, abs(ratio))
        return ratio if exact else None


def _sum(parts: dict[int, Tensor]) -> Tensor:
    return torch.stack([each.double() for each in parts.values()]).sum(0)


_TINY = torch.finfo(torch.float64).tiny


def _is_gradient(key: Key) -> bool:
    return key.what.startswith("grad of ")


def _greatest(tensor: Tensor) -> float:
    finite = tensor.double().abs()
    finite = finite[finite.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


def difference(part: Tensor, union: Tensor) -> float:
    """The greatest absolute difference; two NaNs do not differ."""
    if part.numel() == 0:
        return 0.0
    part, union = part.double(), union.double()
    same = (part == union) | (part.isnan() & union.isnan())
    return float(torch.where(same, 0.0, (part - union).abs()).nan_to_num(nan=math.inf, posinf=math.inf).max())
