"""What a model keeps between forward and backward, and what it costs to keep less."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from . import step
from .implementations import Implementation
from .options import DTYPES, Options
from .report import Column, Report, Row, Table
from .timing import Clock

TABLE = Table(
    Column("model and input", 28),
    Column("layout", 13),
    Column("dtype", 8),
    Column("impl", 16),
    Column("saved MB", 8, 1),
    Column("fwd ms", 8, 1),
    Column("bwd ms", 8, 1),
    Column("total ms", 8, 1),
    Column("peak MB", 7, 1),
)
KEYS = ("case", "layout", "dtype", "impl", "saved_mb", "fwd_ms", "bwd_ms", "total_ms", "peak_mb")


def run(options: Options) -> Report | None:
    """Measures, prints the table; the report on rank 0, None elsewhere."""
    return step.run(options, MEMORY)


def measure_model(
    name: str, layout: str, dtype: str, chosen: list[Implementation], clock: Clock, options: Options
) -> list[Row]:
    """The rows of a training step, each with what has been saved."""
    rows = step.measure_model(name, layout, dtype, chosen, clock, options)
    for each, row in zip(chosen, rows, strict=True):
        assert each.convert is not None  # chosen for having one
        model, images = step.model_and_images(name, layout, clock.device, options.shrink)
        loss = partial(step.RECIPES[name].loss, each.convert(model), images)
        with step.autocast(clock.device, DTYPES[dtype]):
            row["saved_mb"] = saved_bytes(loss) / 1e6
    return rows


MEMORY = step.Kind(
    TABLE,
    KEYS,
    (
        "saved: what the forward has made and is still there after it.",
        "peak: device memory beyond what was held before the step; not known on a CPU.",
    ),
    measure_model,
)


def saved_bytes(forward: Callable[[], Any]) -> int:
    """The memory that ``forward`` has made and that is still there as long as what it returns is: counted once each."""
    with _Made() as made:
        held = forward()
    gc.collect()
    total = sum(storage.nbytes() for storage in made.storages)
    del held
    return total


class _Made(TorchDispatchMode):
    """Notes the memory of every tensor that an operation returns, without keeping it."""

    def __init__(self) -> None:
        super().__init__()
        self.storages = WeakIdKeyDictionary()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        given = {id(each.untyped_storage()) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and id(each.untyped_storage()) not in given:
                self.storages[each.untyped_storage()] = True
        return result
