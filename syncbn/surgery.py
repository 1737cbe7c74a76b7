"""``convert`` and ``revert``: synchronizing the batch normalization layers of a model, and undoing it.

Layers are not rebuilt: each stays the same object and gets another class, made once per original class.
Optimizers, hooks, buffers and whatever else refers to a layer go on to be right.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from .exchange import Exchange
from .fusion import unfuse
from .groups import grouping
from .layer import SyncBatchNorm, describe_layer
from .recipes import anchor_of, recipe_of, why_not, why_not_followed
from .selection import Found, Selection, batch_norms, forget_leaving, remember_leaving, select

Module = TypeVar("Module", bound=nn.Module)


def convert(
    module: Module,
    process_group: Any = None,
    include: Selection = None,
    exclude: Selection = None,
    *,
    group_size: int | Literal["node"] | None = None,
    statistics_batch: int | None = None,
    timeout: timedelta | None = None,
) -> Module:
    """Synchronizes the batch normalization layers of ``module``, in place, over all processes.

    Every ``BatchNorm1d/2d/3d``, and every ``torch.nn.SyncBatchNorm`` or relative of it in other packages,
    becomes a ``SyncBatchNorm``: the same object, still an instance of its own class, with the same
    parameters, buffers, hooks and options. A subclass keeps what it adds. It may come before or after the
    optimizer, ``init_process_group`` and DistributedDataParallel; a second time does no harm.
    ``revert`` undoes it.

    Args:
        module: the model, or a single layer.
        process_group: over whom to form the statistics: a ProcessGroup, a one-dimensional DeviceMesh, or an
            Exchange; None for all processes, except where a layer has a group already: it keeps that.
        include: which layers to convert; None for all. A qualified name such as "backbone.bn1", a pattern
            such as "backbone.*" (see fnmatch), a module class, or several of these. Naming a container means
            all that it contains.
        exclude: which of these to leave as they are; named likewise.
        group_size: in place of a process group, how many processes form their statistics together: groups of
            consecutive ranks, which need not be made before. "node" for the processes of each node.
        statistics_batch: in place of these, how many samples the statistics shall see, whatever the number of
            processes: groups of consecutive ranks whose batches come nearest to it.
        timeout: how long an exchange may take before the process says where all processes are, and ends; None for
            the process group's timeout. See ``Exchange``, which has its own.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: a layer cannot be synchronized without changing what it does. It is named, and nothing is
            changed.
        ValueError: a name or a pattern matches no layer, or this process is not in ``process_group``, or
            ``group_size`` does not divide the number of processes, or two options say over whom, or ``timeout`` is
            not positive, or there is one beside an Exchange.
    """
    found = batch_norms(module)
    chosen, left = select(found, include, exclude)
    given = _given_exchange(process_group, group_size, statistics_batch, timeout)
    _require_convertible(module, chosen, given is not None)
    exchanges = _exchanges(chosen, given, timeout)
    _swap_classes([each.layer for each in chosen])
    for each, exchange in zip(chosen, exchanges, strict=True):
        _synchronize(each.layer, exchange, each.name)
    remember_leaving(left)
    return module


def revert(module: Module) -> Module:
    """Gives every layer that ``convert`` has changed its own class back, in place, and undoes ``fuse``.

    What was learned, and the running statistics, stay. Layers that were built as ``SyncBatchNorm`` are left
    alone.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: another library has changed a layer's class since. It is named, and nothing is changed.
        ValueError: a layer in ``module`` is fused with modules outside of it. Nothing is changed.
    """
    converted = [(name, layer) for name, layer in module.named_modules() if _converted_class(type(layer)) is not None]
    covered = [
        f"{name or 'the module'} ({type(layer).__name__})"
        for name, layer in converted
        if original_class(type(layer)) is None
    ]
    if covered:
        raise TypeError(
            f"cannot revert {', '.join(covered)}: another library has changed the class after syncbn.convert "
            f"did. Undo that first"
        )
    unfuse(module)
    for _, layer in converted:
        revert_layer(layer)
    for each in batch_norms(module):
        forget_leaving(each.layer)
    return module


_ADDED = ("_exchange", "_index", "_lazy_name", "_fused_activation", "_fused_slope")  # to a layer's own attributes


def revert_layer(layer: nn.Module) -> None:
    """Gives one layer its own class back."""
    original = original_class(type(layer))
    if original is None:
        return
    object.__setattr__(layer, "__class__", original)
    for name in _ADDED:
        vars(layer).pop(name, None)


def display_name(each: Found) -> str:
    """The layer's name in messages; a model that is a layer itself has none of its own."""
    return each.name or original_name(type(each.layer))


# ---- what must be so before anything is changed


def _require_convertible(module: nn.Module, chosen: list[Found], group_given: bool) -> None:
    """Raises, naming all layers at fault and each one's reason, unless all can be synchronized."""
    _require_no_threads(module)
    faults = [
        f"{display_name(each)} ({type(each.layer).__name__}): {why}"
        for each in chosen
        if (why := why_unconvertible(each.layer, group_given)) is not None
    ]
    if faults:
        raise TypeError(
            "cannot synchronize these layers without changing what they do:\n  "
            + "\n  ".join(faults)
            + "\nNothing has been changed. Pass exclude= with their names to leave them as they are"
        )


def why_unconvertible(layer: nn.Module, group_given: bool = False) -> str | None:
    """Why ``convert`` would refuse the layer, in words; None where it would not."""
    if isinstance(layer, SyncBatchNorm):
        return None
    if (why := why_not(layer, group_given)) is not None:
        return why
    try:
        synchronized_class(type(layer))
    except TypeError as error:
        return str(error)
    return None


def _require_no_threads(module: nn.Module) -> None:
    for each in module.modules():
        if isinstance(each, nn.DataParallel) and len(each.device_ids) > 1:
            raise TypeError(
                "the model is in a DataParallel over several devices, which are threads of one process, but "
                "syncbn synchronizes processes: use DistributedDataParallel, with one process for each device"
            )


# ---- through which exchange


def _given_exchange(
    process_group: Any, group_size: Any, statistics_batch: Any, timeout: timedelta | None
) -> Exchange | None:
    """The exchange that the user's options mean; None where each layer has its own say."""
    if isinstance(process_group, Exchange):
        grouping(process_group, group_size, statistics_batch)  # takes no second option
        if timeout is not None:
            raise ValueError("expected an Exchange or a timeout, got both: pass Exchange(timeout=...)")
        return process_group
    if process_group is group_size is statistics_batch is None:
        return None
    return Exchange(process_group, timeout=timeout, group_size=group_size, statistics_batch=statistics_batch)


def _exchanges(chosen: list[Found], given: Exchange | None, timeout: timedelta | None) -> list[Exchange]:
    """Each layer's exchange: one for all layers with the same processes."""
    if given is not None:
        return [given for _ in chosen]
    by_options: dict[tuple[Any, ...], Exchange] = {}
    own = [_own_exchange(each.layer, timeout) for each in chosen]
    return [by_options.setdefault(each.options, each) for each in own]


def _own_exchange(layer: nn.Module, timeout: timedelta | None) -> Exchange:
    """An exchange over the processes that the layer itself asks for."""
    if isinstance(layer, SyncBatchNorm):
        return layer._exchange.renewed(timeout)
    recipe = recipe_of(anchor_of(type(layer)) or type(layer))
    group = vars(layer).get(recipe.group) if recipe is not None and recipe.group is not None else None
    return Exchange(group, timeout=timeout)


def _synchronize(layer: nn.Module, exchange: Exchange, name: str) -> None:
    """Registers a layer whose class has been changed; one that is registered already only gets its name."""
    if not isinstance(layer, SyncBatchNorm):
        raise TypeError(f"expected a SyncBatchNorm, got {type(layer).__name__}")
    name = name or original_name(type(layer))
    if vars(layer).get("_exchange") is exchange:
        exchange.describe_again(layer._index, describe_layer(layer, name))
    else:
        layer.synchronize(exchange, name)


# ---- the classes


def _once_per_class(make: Callable[[type], type]) -> Callable[[type], type]:
    """Like functools.cache, whose types do not take classes for hashable."""
    made: dict[type, type] = {}

    @wraps(make)
    def once(original: type) -> type:
        if original not in made:
            made[original] = make(original)
        return made[original]

    return once


def _swap_classes(layers: list[nn.Module]) -> None:
    """Gives each layer its synchronized class; if one cannot have it, all keep their own."""
    swapped: list[tuple[nn.Module, type]] = []
    for layer in layers:
        if isinstance(layer, SyncBatchNorm):
            continue
        original = type(layer)
        try:
            object.__setattr__(layer, "__class__", synchronized_class(original))
        except (TypeError, AttributeError) as error:
            for former, its_class in swapped:
                object.__setattr__(former, "__class__", its_class)
            raise TypeError(
                f"Python cannot change the class of a {original.__name__} ({error}), which is how syncbn "
                f"synchronizes a layer. Nothing has been changed. Pass exclude={original.__name__} to leave "
                f"such layers as they are"
            ) from error
        swapped.append((layer, original))


@_once_per_class
def synchronized_class(original: type) -> type:
    """The class that layers of class ``original`` get: one and the same each time.

    Raises:
        TypeError: there cannot be one; says why.
    """
    if (why := why_not_followed(original)) is not None:
        raise TypeError(why)
    anchor = anchor_of(original)
    if anchor is None:
        raise TypeError(f"{original.__name__} is no batch normalization")
    bases = _bases_for_known(original) if anchor is original else (original, _carrier(anchor))
    if issubclass(original, LazyModuleMixin):
        return _new_class(original, (_Lazy, *bases), {"cls_to_become": _materialized(original)})
    return _new_class(original, bases)


def _bases_for_known(known: type) -> tuple[type, ...]:
    """The bases of a known class's counterpart, as its recipe says."""
    recipe = recipe_of(known)
    if recipe is None or not recipe.stays:
        return (recipe.forward if recipe is not None else SyncBatchNorm,)
    if recipe.fundamental:
        return recipe.forward, known
    inherited = next(base for base in known.__mro__[1:] if recipe_of(base) is not None)
    return recipe.forward, known, synchronized_class(inherited)


@_once_per_class
def _carrier(anchor: type) -> type:
    """What brings the synchronized forward into a subclass of ``anchor``, which stays a subclass of it."""
    recipe = recipe_of(anchor)
    if recipe is None or recipe.stays:
        return synchronized_class(anchor)
    return _new_class(anchor, (recipe.forward, anchor))


def _materialized(original: type) -> type | None:
    """What a lazy layer becomes when it has seen its first input."""
    becomes = getattr(original, "cls_to_become", None)
    return None if becomes is None else synchronized_class(becomes)


_INPUT_CHECKS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _new_class(original: type, bases: tuple[type, ...], also: dict[str, Any] | None = None) -> type:
    members = {
        "__module__": __name__,
        "__qualname__": _name_for(original),
        "__doc__": f"``{original.__qualname__}`` whose statistics are formed over all processes.",
        "__reduce_ex__": _reduce,
        _ORIGINAL: original,
    } | (also or {})
    if original in _INPUT_CHECKS:
        members["_check_input_dim"] = original._check_input_dim
    return types.new_class(_name_for(original), bases, exec_body=lambda namespace: namespace.update(members))


def _name_for(original: type) -> str:
    return original.__name__ if "Sync" in original.__name__ else f"Sync{original.__name__}"


_ORIGINAL = "_syncbn_original"


def _converted_class(cls: type) -> type | None:
    """The nearest class that ``convert`` has made, among ``cls`` and its bases."""
    return next((base for base in cls.__mro__ if _ORIGINAL in vars(base)), None)


def original_class(cls: type) -> type | None:
    """The class that ``convert`` has replaced by ``cls``; None if it has not made ``cls``."""
    return vars(cls).get(_ORIGINAL)


def original_name(cls: type) -> str:
    return (original_class(cls) or cls).__name__


class _Lazy(SyncBatchNorm):
    """For layers that learn the number of channels from their first input."""

    _lazy_name: str

    def synchronize(self, exchange: Exchange, name: str = "SyncBatchNorm") -> None:
        super().synchronize(exchange, name)
        self._lazy_name = name

    def initialize_parameters(self, input: torch.Tensor) -> None:
        super().initialize_parameters(input)  # type: ignore[misc]
        self.num_features = input.shape[1]  # torch leaves it 0 where a state_dict has brought the parameters
        self._exchange.describe_again(self._index, describe_layer(self, vars(self).pop("_lazy_name")))


# ---- copies and pickles


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """Pickles the layer as one of its original class, which another process can import."""
    converted = type(self)
    original = original_class(converted)
    if original is None:
        return object.__reduce_ex__(self, protocol)
    reduce: Any = original.__reduce_ex__  # called as a function: the layer need not be an instance of it now
    make, arguments, *rest = reduce(self, protocol)
    return rebuild, (original, make, tuple(original if a is converted else a for a in arguments)), *rest


def rebuild(original: type, make: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    """The inverse: pickles and checkpoints call it by this name."""
    layer = make(*arguments)
    object.__setattr__(layer, "__class__", synchronized_class(original))
    return layer


SyncBatchNorm1d = synchronized_class(nn.BatchNorm1d)
SyncBatchNorm2d = synchronized_class(nn.BatchNorm2d)
SyncBatchNorm3d = synchronized_class(nn.BatchNorm3d)
