"""What a model's layers take and give in one step, and the gradients of that: kept on the host, in order."""

from __future__ import annotations

import ctypes
import weakref
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..recipes import is_batch_norm


class Key(NamedTuple):
    """Which tensor it is."""

    layer: str  # qualified, "" for the model itself
    call: int  # of this layer, from 1 on; 0 for what belongs to no call
    what: str  # "input", "output", "grad of output", "grad of weight", "running_mean"


def on_host(tensor: Tensor) -> Tensor:
    """A copy that nobody else writes to, contiguous."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def bytes_of(tensor: Tensor) -> bytes:
    """Those of a contiguous tensor on the host."""
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.numel() else b""


class Recorder:
    """A ``with`` block in which the leaves of a model, its batch normalization and its own output are recorded.

    An input that is another layer's output as it was recorded is not recorded again. Its gradient is: that which this
    layer contributes, while the gradient of the output is the sum of what all contribute who use it. Layers whose input
    may be written to in place are left out of that.

    Calls in backward, which activation checkpointing makes, are repetitions: ``in_backward`` is to be set before.

    The hooks are those for all modules, since ``normalize_together`` refuses layers with hooks of their own.

    Args:
        model: nothing of it is changed.
        without: names of layers and "input" or "output", which are not recorded, nor their gradients.
    """

    def __init__(self, model: nn.Module, without: Collection[tuple[str, str]] = ()) -> None:
        # By identity: a module may have an __eq__ of its own.
        self._names = {id(each): name for name, each in model.named_modules() if _is_recorded(name, each)}
        self._without = without
        self._open: list[tuple[str, int]] = []
        self._given: dict[int, tuple[Callable[[], Tensor | None], int]] = {}  # outputs by id, and their version
        self._hooks = ExitStack()
        self.in_backward = False
        self.calls: Counter[str] = Counter()
        self.order: list[tuple[str, int]] = []  # of calls, as they began
        self.tensors: dict[Key, Tensor] = {}

    def __enter__(self) -> Self:
        before: Any = self._before  # may return other arguments, which the annotation there does not know
        self._hooks.callback(register_module_forward_pre_hook(before).remove)
        self._hooks.callback(register_module_forward_hook(self._after).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        name = self._names.get(id(module))
        if name is None or self.in_backward:
            return None
        self.calls[name] += 1
        self._open.append((name, self.calls[name]))
        self.order.append(self._open[-1])
        if (name == "" and module._modules) or (name, "input") in self._without:
            return None
        leaves, spec = tree_flatten(args)
        follows = torch.is_grad_enabled() and not getattr(module, "inplace", False)
        followed = []
        for place, what in _named("input", leaves):
            if not self._is_known(leaves[place]):
                self._keep(what, leaves[place])
            if follows and leaves[place].requires_grad:
                leaves[place] = leaves[place].view_as(leaves[place])
                self._keep_gradient(what, leaves[place])
                followed.append(place)
        return tree_unflatten(leaves, spec) if followed else None

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        name = self._names.get(id(module))
        if name is None or self.in_backward:
            return
        while self._open[-1][0] != name:  # calls inside of this one that an exception has ended
            self._open.pop()
        leaves, _ = tree_flatten(output)
        for place, what in _named("output", leaves):
            if (name, "output") not in self._without:
                self._keep(what, leaves[place])
                if torch.is_grad_enabled() and leaves[place].requires_grad:
                    self._keep_gradient(what, leaves[place])
                self._given[id(leaves[place])] = weakref.ref(leaves[place]), leaves[place]._version
        self._open.pop()

    def _is_known(self, tensor: Tensor) -> bool:
        reference, version = self._given.get(id(tensor), (lambda: None, 0))
        return reference() is tensor and tensor._version == version

    def _keep(self, what: str, tensor: Tensor) -> None:
        self.tensors[Key(*self._open[-1], what)] = on_host(tensor)

    def _keep_gradient(self, what: str, tensor: Tensor) -> None:
        key = Key(*self._open[-1], f"grad of {what}")

        def keep(gradient: Tensor) -> None:
            self.tensors[key] = on_host(gradient)

        tensor.register_hook(keep)


def _is_recorded(name: str, module: nn.Module) -> bool:
    return name == "" or not module._modules or is_batch_norm(module)


def _named(what: str, leaves: list[Any]) -> list[tuple[int, str]]:
    """The places of floating tensors, and what they are called: "output", "output[1]" and so on."""
    places = [i for i, each in enumerate(leaves) if isinstance(each, Tensor) and each.is_floating_point()]
    return [(place, f"{what}[{n}]" if n else what) for n, place in enumerate(places)]
