"""The union of several processes' parts of a batch, and where in it each part's tensors are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def union_of(parts: Sequence[Any], where: str = "inputs") -> Any:
    """What one process would be given that has all parts.

    Tensors are laid end to end along dimension 0 and lists end to end, sample by sample; tuples and dicts are taken
    apart. What has no samples (numbers, tensors without dimensions, None) must be the same in all parts.

    Raises:
        TypeError: the parts are not of one structure.
        ValueError: what must be the same is not, or shapes do not fit.
    """
    first = parts[0]
    kinds = {type(part).__name__ for part in parts}
    if len(kinds) > 1:
        raise TypeError(f"{where}: the processes pass different types, {' and '.join(sorted(kinds))}")
    if isinstance(first, Tensor) and first.dim() > 0:
        return _tensors(parts, where)
    if isinstance(first, list):
        return list(itertools.chain.from_iterable(parts))
    if isinstance(first, tuple):
        _require_equal([len(part) for part in parts], f"the length of {where}")
        values = [union_of(each, f"{where}[{i}]") for i, each in enumerate(zip(*parts, strict=True))]
        return type(first)(*values) if hasattr(first, "_fields") else tuple(values)
    if isinstance(first, dict):
        _require_equal([sorted(map(str, part)) for part in parts], f"the keys of {where}")
        return {key: union_of([part[key] for part in parts], f"{where}[{key!r}]") for key in first}
    if isinstance(first, Tensor):
        _require_equal([part.tolist() for part in parts], where)
    elif isinstance(first, (int, float, str, bytes, bool, type(None))):
        _require_equal(list(parts), where)
    return first


def _tensors(parts: Sequence[Tensor], where: str) -> Tensor:
    device = parts[0].device
    try:
        return torch.cat([part.detach().to(device) for part in parts]).requires_grad_(parts[0].requires_grad)
    except RuntimeError as error:
        shapes = ", ".join(str(list(part.shape)) for part in parts)
        raise ValueError(
            f"{where}: expected tensors that can be laid end to end along dimension 0, got {shapes} ({error}). Images "
            f"of different sizes: pass a list of them, if the model takes one"
        ) from None


def _require_equal(values: list[Any], where: str) -> None:
    different = next((value for value in values if value != values[0]), None)
    if different is not None:
        raise ValueError(
            f"{where}: expected the same on all processes, since it has no samples to lay end to end, got "
            f"{values[0]!r} and {different!r}"
        )


def samples_in(inputs: Any) -> int | None:
    """How many samples a process's part has: the length of the first tensor or list in it; None where there is none."""
    if isinstance(inputs, Tensor):
        return inputs.shape[0] if inputs.dim() > 0 else None
    if isinstance(inputs, list):
        return len(inputs)
    values = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else ()
    return next((count for count in map(samples_in, values) if count is not None), None)


def slices(shapes: Sequence[Sequence[int]], union: Tensor) -> list[Tensor] | None:
    """Each part's place in the union's tensor, by the shapes of the parts; None where they are no parts of it."""
    for dim in range(union.dim()):
        if all(_rest(shape, dim) == _rest(union.shape, dim) for shape in shapes):
            sizes = [shape[dim] for shape in shapes]
            if sum(sizes) == union.shape[dim]:
                return list(union.split(sizes, dim))
    return None


def _rest(shape: Sequence[int], dim: int) -> tuple[int, ...] | None:
    return (len(shape), *shape[:dim], *shape[dim + 1 :]) if dim < len(shape) else None
