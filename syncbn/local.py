"""``local``: what one process does alone with a model that the others do not run at that moment."""

from __future__ import annotations

import copy
from datetime import timedelta
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from .exchange import Exchange
from .layer import SyncBatchNorm
from .peers import Alone
from .recipes import anchor_of, is_exported, is_scripted
from .selection import Found, batch_norms


class local:  # noqa: N801, used like a function
    """A block in which the model's layers exchange nothing and move no running statistics.

    For what one process alone does in training mode: tracing, profiling, counting, drawing. Without it, the layers wait
    for the other processes, which are elsewhere::

        if rank == 0:
            with syncbn.local(model):
                writer.add_graph(model.module, images)

    Layers normalize by this process's batch. One value per channel is legal, as it is in training. A copy that is made
    inside of the block stays local. A block may stand in another; what was called outside of it has its backward as
    before.

    Args:
        model: whose layers, also those that are not converted. In a DistributedDataParallel, only its module may be
            called inside of the block: it exchanges by itself.

    Raises:
        TypeError: a layer of another package synchronizes by itself; or the model is sharded, so that one process alone
            cannot run it. Nothing is changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._entered: list[list[nn.Module]] = []
        self._guards: list[list[RemovableHandle]] = []

    def __enter__(self) -> None:
        _require_runnable_alone(self._model)
        layers = [each.layer for each in batch_norms(self._model)]
        for layer in layers:
            _isolate(layer)
        self._entered.append(layers)
        self._guards.append(
            [
                module.register_forward_pre_hook(_refuse, prepend=True)
                for module in self._model.modules()
                if isinstance(module, DistributedDataParallel)
            ]
        )

    def __exit__(self, *_: Any) -> None:
        for handle in self._guards.pop():
            handle.remove()
        for layer in self._entered.pop():
            _rejoin(layer)


# This process, and another one without data, whom nothing is asked: so that one value per channel is legal.
WITH_NOBODY = Alone(world_size=2)


class _LocalExchange(Exchange):
    """Stands in for a layer's Exchange. What concerns the layers' registration goes to that one."""

    def __init__(self, instead_of: Exchange) -> None:
        super().__init__()
        self._instead_of = instead_of
        self._layers = instead_of._layers

    def peers(self, index: int, x: Tensor) -> Alone:
        return WITH_NOBODY

    @property
    def world_size(self) -> int:
        return 1

    def connect(self, device: torch.device, batch_size: int | None = None) -> None:
        pass

    def all_reduce(self, message: Tensor, tag: int = 0) -> None:
        pass

    def differentiable_all_reduce(self, message: Tensor, tag: int = 0) -> Tensor:
        return message

    def register(self, description: str) -> int:
        return self._instead_of.register(description)

    def describe_again(self, index: int, description: str) -> None:
        self._instead_of.describe_again(index, description)

    def renewed(self, timeout: timedelta | None = None) -> Exchange:
        return self._instead_of.renewed(timeout)

    def __deepcopy__(self, memo: dict[int, Any]) -> _LocalExchange:
        local = memo[id(self)] = _LocalExchange(copy.deepcopy(self._instead_of, memo))
        return local


class _Before(NamedTuple):
    """What of a layer a block has replaced, and in how many blocks it is: they may end in any order."""

    blocks: int
    attributes: dict[str, Any]


_isolated: WeakKeyDictionary[nn.Module, _Before] = WeakKeyDictionary()


def _isolate(layer: nn.Module) -> None:
    if layer in _isolated:
        _isolated[layer] = _isolated[layer]._replace(blocks=_isolated[layer].blocks + 1)
        return
    replaced: dict[str, Any] = {"track_running_stats": False}
    if isinstance(layer, SyncBatchNorm):
        replaced["_exchange"] = _LocalExchange(layer._exchange)
    _isolated[layer] = _Before(1, {name: vars(layer)[name] for name in replaced})
    vars(layer).update(replaced)


def _rejoin(layer: nn.Module) -> None:
    before = _isolated[layer]
    if before.blocks > 1:
        _isolated[layer] = before._replace(blocks=before.blocks - 1)
        return
    attributes = _isolated.pop(layer).attributes
    if not isinstance(layer, SyncBatchNorm):  # reverted inside of the block
        attributes.pop("_exchange", None)
    vars(layer).update(attributes)


def _refuse(*_: Any) -> None:
    raise RuntimeError(
        "a DistributedDataParallel was called inside of syncbn.local, where it would wait for the other processes: "
        "call its module, model.module"
    )


def _require_runnable_alone(model: nn.Module) -> None:
    sharded = {"FullyShardedDataParallel", "FSDPModule"}
    for name, module in model.named_modules():
        if sharded & {base.__name__ for base in type(module).__mro__}:
            raise TypeError(
                f"{name or 'the model'} is sharded over the processes, so that one of them alone cannot run it: run it "
                f"on all processes, or a copy that is not sharded"
            )
    faults = [
        f"{each.name or 'the model'} ({type(each.layer).__name__}): {why}"
        for each in batch_norms(model)
        if (why := _why_not_alone(each)) is not None
    ]
    if faults:
        raise TypeError("syncbn.local cannot run these layers alone:\n  " + "\n  ".join(faults))


def _why_not_alone(each: Found) -> str | None:
    if is_scripted(each.layer) or is_exported(each.layer):
        return "it is compiled or traced already, so that its running statistics would move: do that after the block"
    if not isinstance(each.layer, SyncBatchNorm) and "Sync" in getattr(anchor_of(type(each.layer)), "__name__", ""):
        return "another package synchronizes it, and waits for the other processes: call syncbn.convert(model) first"
    return None
