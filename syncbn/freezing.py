"""``freeze``: normalization by fixed statistics, whatever ``train()`` says."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from .layer import SyncBatchNorm, describe_layer
from .recipes import is_exported, is_scripted
from .selection import Found, Selection, batch_norms, divide

Module = TypeVar("Module", bound=nn.Module)


def freeze(module: Module, include: Selection = None, exclude: Selection = None, *, affine: bool = False) -> Module:
    """Keeps batch normalization layers of ``module`` in eval mode, in place, until ``unfreeze``.

    They normalize by their running statistics, which no longer move, and exchange nothing. ``train()``, of the layer or
    of any module around it, goes on to reach everything else. Layers stay the same objects with the same state_dict; a
    layer may be frozen before or after ``convert``, ``fuse`` and ``revert``, and stays so in copies and pickles.

    All processes must freeze the same layers.

    Args:
        module: the model, or a single layer.
        include: which layers; None for all. See ``syncbn.convert``.
        exclude: which of these to leave as they are.
        affine: whether γ and β stop learning, too (``requires_grad=False``), as in torchvision's FrozenBatchNorm2d. To
            be said before DistributedDataParallel and the optimizer are given the parameters.

    Returns:
        ``module`` itself.

    Raises:
        ValueError: a name or a pattern matches no layer, there is no layer to freeze, or one has no running statistics.
        TypeError: a layer is compiled. In both cases nothing is changed.
    """
    found = _chosen(module, include, exclude)
    _require_freezable(found)
    for each in found:
        layer = each.layer
        stay = _stay_of(layer) or _StayInEval(layer)
        vars(layer)[_TRAIN] = stay
        layer.training = False
        if affine:
            stay.hold_parameters()
        _describe_again(layer)
    return module


def unfreeze(module: Module, include: Selection = None, exclude: Selection = None) -> Module:
    """Undoes ``freeze``: each layer is in the mode again that ``train()`` or ``eval()`` has last asked of it.

    γ and β learn again where ``freeze`` has stopped them. Layers that are not frozen are left alone.

    Args:
        module: the model, or a single layer.
        include: which layers; None for all. See ``syncbn.convert``.
        exclude: which of these to leave frozen.

    Returns:
        ``module`` itself.

    Raises:
        ValueError: a name or a pattern matches no layer.
    """
    for each in divide(batch_norms(module), include, exclude)[0]:
        stay = _stay_of(each.layer)
        if stay is None:
            continue
        del vars(each.layer)[_TRAIN]
        each.layer.training = stay.mode
        stay.release_parameters()
        _describe_again(each.layer)
    return module


def is_held(layer: nn.Module) -> bool:
    """Whether ``freeze`` keeps the layer in eval mode."""
    return _stay_of(layer) is not None


# A module's train() calls its children's train(), which is looked up at the layer before its class: so this one
# attribute is all that freezing takes. A hook would run at every call, and would keep `fuse` from the layer; another
# class would stand in the way of `convert` and `revert`.
_TRAIN = "train"


class _StayInEval:
    """A frozen layer's ``train``. A class, so that copies and pickles of the layer have one of their own."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.mode = layer.training  # that is asked of the layer
        self.held: list[str] = []  # parameters that were learning

    def __call__(self, mode: bool = True) -> nn.Module:
        type(self.layer).train(self.layer, mode)  # modules inside of it, and what a subclass does, follow
        self.mode, self.layer.training = mode, False
        return self.layer

    def hold_parameters(self) -> None:
        for name, parameter in self.layer.named_parameters(recurse=False):
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self.held.append(name)

    def release_parameters(self) -> None:
        for name, parameter in self.layer.named_parameters(recurse=False):
            if name in self.held:
                parameter.requires_grad_(True)


def _stay_of(layer: nn.Module) -> _StayInEval | None:
    train = vars(layer).get(_TRAIN)
    return train if isinstance(train, _StayInEval) else None


def _chosen(module: nn.Module, include: Selection, exclude: Selection) -> list[Found]:
    found = divide(batch_norms(module), include, exclude)[0]
    if not found:
        raise ValueError(f"there is no batch normalization layer to freeze in the {type(module).__name__}")
    return found


def _require_freezable(found: list[Found]) -> None:
    compiled = [each.name or "the module" for each in found if is_scripted(each.layer) or is_exported(each.layer)]
    if compiled:
        raise TypeError(
            f"cannot freeze {', '.join(compiled)}, compiled or traced already: freeze the model before that. Nothing "
            f"has been changed. Pass exclude= with these names to leave them as they are"
        )
    without = [each.name or "the module" for each in found if getattr(each.layer, "running_mean", None) is None]
    if without:
        raise ValueError(
            f"cannot freeze {', '.join(without)}, which have no running statistics to normalize by "
            f"(track_running_stats=False). Nothing has been changed. Pass exclude= with these names to leave them as "
            f"they are"
        )


def _describe_again(layer: nn.Module) -> None:
    """The processes compare which layers are frozen: one that exchanges would wait for one that does not."""
    if isinstance(layer, SyncBatchNorm):
        name, _, _ = layer._exchange._layers[layer._index].partition("(")
        layer._exchange.describe_again(layer._index, describe_layer(layer, name))
