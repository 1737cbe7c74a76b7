"""Which classes of layers can be synchronized, and how: a table of the known ones, and a check of all others.

The check reads a subclass's code: where its ``forward`` leaves the normalization to ``super().forward``, a
synchronized class can be put in between. A class that copies the normalization needs a recipe, or is refused.
Classes of other packages are recognized by name, so that none of these packages is imported.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from .layer import SyncBatchNorm


class Plain(SyncBatchNorm):
    """For layers that only normalize."""

    forward = SyncBatchNorm.forward


class DropAct(SyncBatchNorm):
    """For timm's layers: normalization, dropout, activation. timm sets both from outside in some of them."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = SyncBatchNorm.forward(self, input, *args, **kwargs)
        y = self.drop(y) if "drop" in self._modules else y
        return self.act(y) if "act" in self._modules else y


class Apex(SyncBatchNorm):
    """For apex's layers: channels may be last, ``z`` is added, a ReLU may follow."""

    channel_last: bool
    fuse_relu: bool

    def forward(self, input: Tensor, z: Tensor | None = None) -> Tensor:  # type: ignore[override]
        channel_last = vars(self).get("channel_last", False)
        y = SyncBatchNorm.forward(self, input.movedim(-1, 1) if channel_last else input)
        y = y.movedim(1, -1) if channel_last else y
        y = y if z is None else y + z
        return y.relu() if vars(self).get("fuse_relu", False) else y


@dataclass(frozen=True)
class Refusal:
    """An option of a known class that cannot be followed."""

    applies: Callable[[nn.Module], bool]
    why: str
    settled_by_group: bool = False  # the user says over whom, so that the layer's own answer does not matter


@dataclass(frozen=True)
class Recipe:
    """How the layers of one known class are synchronized."""

    forward: type[SyncBatchNorm] = SyncBatchNorm  # what they do instead of their own forward
    fundamental: bool = False  # one of torch's own, on which all others build
    stays: bool = True  # whether a converted layer is still an instance of the class
    group: str | None = None  # the attribute that holds the layer's process group
    refusals: tuple[Refusal, ...] = ()


_BATCH_STATISTICS_IN_EVAL = Refusal(
    lambda layer: not getattr(layer, "track_running_stats", True),
    "it has no running statistics and exchanges the batch's even in eval, where syncbn exchanges nothing",
)
_WEIGHTED_BY_IMAGES = Refusal(
    lambda layer: getattr(layer, "_stats_mode", "") == "N",
    'its stats_mode="N" weights images, not values, equally; to weight values (the same where all images '
    'have one size, and processes without images are fine), set its _stats_mode to ""',
)
_SOME_DEVICES = Refusal(
    lambda layer: not getattr(layer, "global_sync", False),
    "it synchronizes over num_sync_devices of one machine: pass convert(process_group=...) with that group",
    settled_by_group=True,
)

_APEX = Recipe(Apex, group="process_group", refusals=(_BATCH_STATISTICS_IN_EVAL,))
_NAIVE_LOCAL = Recipe(Plain, refusals=(_SOME_DEVICES,))

RECIPES: dict[str, Recipe] = {
    "torch.nn.modules.batchnorm._BatchNorm": Recipe(fundamental=True),
    "torch.nn.modules.batchnorm.BatchNorm1d": Recipe(fundamental=True),
    "torch.nn.modules.batchnorm.BatchNorm2d": Recipe(fundamental=True),
    "torch.nn.modules.batchnorm.BatchNorm3d": Recipe(fundamental=True),
    # DistributedDataParallel refuses instances of this one on a CPU.
    "torch.nn.modules.batchnorm.SyncBatchNorm": Recipe(fundamental=True, stays=False, group="process_group"),
    "timm.layers.norm_act.BatchNormAct2d": Recipe(DropAct),
    "timm.models.layers.norm_act.BatchNormAct2d": Recipe(DropAct),
    "timm.layers.norm_act.SyncBatchNormAct": Recipe(DropAct, stays=False, group="process_group"),
    "timm.models.layers.norm_act.SyncBatchNormAct": Recipe(DropAct, stays=False, group="process_group"),
    "mmcv.ops.sync_bn.SyncBatchNorm": Recipe(stays=False, group="group", refusals=(_BATCH_STATISTICS_IN_EVAL,)),
    "detectron2.layers.batch_norm.NaiveSyncBatchNorm": Recipe(Plain, refusals=(_WEIGHTED_BY_IMAGES,)),
    "pytorchvideo.layers.batch_norm.NaiveSyncBatchNorm1d": _NAIVE_LOCAL,
    "pytorchvideo.layers.batch_norm.NaiveSyncBatchNorm2d": _NAIVE_LOCAL,
    "pytorchvideo.layers.batch_norm.NaiveSyncBatchNorm3d": _NAIVE_LOCAL,
    "fairscale.experimental.nn.sync_batchnorm.SyncBatchNorm": Recipe(Plain, group="_process_group"),
    "apex.parallel.optimized_sync_batchnorm.SyncBatchNorm": _APEX,
    "apex.parallel.sync_batchnorm.SyncBatchNorm": _APEX,
}


def recipe_of(cls: type) -> Recipe | None:
    """The recipe for exactly this class."""
    return RECIPES.get(f"{cls.__module__}.{cls.__qualname__}")


def anchor_of(cls: type) -> type | None:
    """The nearest known class among ``cls`` and its bases; None where it is no batch normalization."""
    return next((base for base in cls.__mro__ if recipe_of(base) is not None), None)


def is_frozen(layer: nn.Module) -> bool:
    """Whether the layer's class keeps its statistics fixed, as FrozenBatchNorm2d does in several packages."""
    return any("Frozen" in base.__name__ and "Norm" in base.__name__ for base in type(layer).__mro__)


def is_scripted(layer: nn.Module) -> bool:
    """Whether the layer is a batch normalization that TorchScript has compiled."""
    return isinstance(layer, torch.jit.ScriptModule) and "BatchNorm" in layer.original_name


def is_exported(module: nn.Module) -> bool:
    """Whether the module is a graph in which batch normalizations have become operations."""
    return isinstance(module, torch.fx.GraphModule) and any(
        node.op == "call_function" and "batch_norm" in str(node.target) for node in module.graph.nodes
    )


def is_batch_norm(layer: nn.Module) -> bool:
    """Whether the layer forms batch statistics, so that it could be synchronized or must be refused."""
    return (anchor_of(type(layer)) is not None and not is_frozen(layer)) or is_scripted(layer) or is_exported(layer)


def why_not(layer: nn.Module, group_given: bool) -> str | None:
    """Why the layer cannot be synchronized, in words; None where it can.

    Args:
        layer: any for which ``is_batch_norm`` is true.
        group_given: whether the user says over whom to form the statistics.
    """
    if isinstance(layer, SyncBatchNorm):
        return None
    return _why_not_object(layer) or _why_not_options(layer, group_given) or why_not_followed(type(layer))


def _why_not_object(layer: nn.Module) -> str | None:
    """What was done to this one object."""
    if is_scripted(layer):
        return "it is compiled by TorchScript: convert the model before torch.jit.script or torch.jit.trace"
    if is_exported(layer):
        return "it is a traced GraphModule with batch_norm operations in place of layers: convert before tracing"
    if "forward" in vars(layer):
        return (
            "a forward was set on this one object (some hook libraries do that), which would go on calling "
            "the unsynchronized one: convert before the hooks are put on, or remove them first"
        )
    if "parametrizations" in layer._modules:
        return (
            "torch.nn.utils.parametrize has changed its class, and would change it back without the "
            "synchronization: convert first, then parametrize"
        )
    return None


def _why_not_options(layer: nn.Module, group_given: bool) -> str | None:
    recipe = recipe_of(anchor_of(type(layer)) or type(layer)) or Recipe()
    return next(
        (
            refusal.why
            for refusal in recipe.refusals
            if not (refusal.settled_by_group and group_given) and refusal.applies(layer)
        ),
        None,
    )


_METHODS = ("forward", "__call__")
_OWN_NORMALIZATION = {
    "batch_norm",
    "native_batch_norm",
    "batch_norm_stats",
    "running_mean",
    "running_var",
    "all_reduce",
    "all_gather",
}


def why_not_followed(cls: type) -> str | None:
    """Why ``cls`` or a base normalizes otherwise than by ``super().forward(x)``; None where none does."""
    anchor = anchor_of(cls)
    between = cls.__mro__[: cls.__mro__.index(anchor)] if anchor is not None else ()
    return next(
        (
            f"{base.__name__}.{method} {why}"
            for base in between
            for method in _METHODS
            if method in vars(base) and (why := _why_not_method(base, method))
        ),
        None,
    )


def _why_not_method(cls: type, method: str) -> str | None:
    function = inspect.unwrap(vars(cls)[method])
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return "has no Python code to read"
    steps = list(_steps(code))
    if by_name := _called_by_name(steps, method, cls, function):
        return f"calls {by_name}.{method} by name, which passes by the synchronized one: call super().{method}"
    if not _calls_super(steps, method):
        return f"never calls super().{method}, so that its normalization cannot be followed"
    own = sorted(_OWN_NORMALIZATION & {step.argval for step in steps if isinstance(step.argval, str)})
    return f"calls super().{method}, but also normalizes by itself ({', '.join(own)})" if own else None


def _steps(code: CodeType) -> Iterator[dis.Instruction]:
    """The instructions of a function and of all inside it. Bytecode is there where source may not be."""
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _steps(constant)


_FROM_SUPER_TO_METHOD = 8  # instructions at most: super, its two arguments, the call, the method


def _calls_super(steps: list[dis.Instruction], method: str) -> bool:
    return any(
        step.argval == "super" and any(_gets(later, method) for later in steps[i : i + _FROM_SUPER_TO_METHOD])
        for i, step in enumerate(steps)
    )


def _called_by_name(steps: list[dis.Instruction], method: str, cls: type, function: Any) -> str | None:
    """The class whose method is called as ``nn.BatchNorm2d.forward(self, x)``, or None."""
    bases = {base.__name__ for base in cls.__mro__}
    named = getattr(function, "__globals__", {})
    return next(
        (
            step.argval
            for step, later in pairwise(steps)
            if _gets(later, method)
            and isinstance(step.argval, str)
            and (step.argval in bases or isinstance(named.get(step.argval), type))
        ),
        None,
    )


def _gets(step: dis.Instruction, attribute: str) -> bool:
    return step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER")) and step.argval == attribute
