"""``normalize_together``: one all-reduce for layers that do not depend on each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from .functional import (
    Frame,
    Saved,
    begin,
    begin_backward,
    begin_forward,
    differentiable,
    distinct,
    moments_again,
    operands,
)
from .layer import SyncBatchNorm
from .observed import named, sum_of
from .traffic import Direction


def normalize_together(layers: Iterable[nn.Module], inputs: Iterable[Tensor]) -> list[Tensor]:
    """``[layer(x) for layer, x in zip(layers, inputs)]``, with one all-reduce forward and one backward for all of them.

    For layers whose inputs are there at the same time, such as those of a detector's pyramid levels. Outputs,
    gradients, running statistics and ``num_batches_tracked`` are those of calling the layers one after another; a layer
    may be there several times.

    A few details are taken care of here:

    - An output that the loss does not use takes part in backward like the others, with a gradient of zeros. So
      processes whose losses use different outputs do not wait for each other for ever.
    - Layers of different process groups have a message for each group.
    - Blocks such as ``valid_region`` see each layer's call by itself.
    - Layers in eval mode, and all that is no SyncBatchNorm, are called as they are.

    Args:
        layers: as many as inputs.
        inputs: one for each layer, of any sizes.

    Returns:
        The outputs, in the order of the layers.

    Raises:
        ValueError: there are not as many layers as inputs.
        TypeError: a layer does more in training than a SyncBatchNorm: it has a forward of its own, hooks, or such
            layers inside. It is named, and nothing has been run. (Hooks for all modules, which PyTorch calls global,
            are not called for a layer here.)
    """
    layers, inputs = list(layers), _as_list(inputs)
    if len(layers) != len(inputs):
        raise ValueError(f"expected one input for each layer, got {len(layers)} layers and {len(inputs)} inputs")
    if torch.compiler.is_exporting():  # each layer says what can be exported, see ``exported``
        return [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    together = [i for i, layer in enumerate(layers) if _goes_together(layer, i)]
    ys: list[Any] = [None if i in together else layer(inputs[i]) for i, layer in enumerate(layers)]
    for i, y in zip(together, _normalize([(layers[i], inputs[i]) for i in together]), strict=True):
        ys[i] = y
    return ys


class BatchNormList(nn.ModuleList):
    """An ``nn.ModuleList`` of batch normalization layers that is called with a list of inputs, one for each of them.

    ``head.norms = BatchNormList(head.norms)`` keeps the layers and the ``state_dict`` keys. Before ``syncbn.convert``
    and after ``syncbn.revert`` it calls one layer after another; in between it is ``normalize_together``.

    Shape:
        A list of inputs, as many as layers, each in its layer's shape; so is the output.
    """

    def forward(self, inputs: Iterable[Tensor]) -> list[Tensor]:
        return normalize_together(self, inputs)


# ---- which layers


def _as_list(inputs: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(inputs, Tensor):
        raise TypeError("expected a list of inputs, one for each layer, got one tensor")
    return list(inputs)


def _goes_together(layer: nn.Module, place: int) -> bool:
    """Whether the layer's statistics are to be formed together with the others'. If not, it is called."""
    if isinstance(layer, SyncBatchNorm) and not layer.training:
        return False
    if (why := _why_not(layer)) is not None:
        raise TypeError(f"layer {place} ({type(layer).__name__}) cannot be normalized together with others: {why}")
    return isinstance(layer, SyncBatchNorm)


def _why_not(layer: nn.Module) -> str | None:
    """What of the layer would be left out, in words; None where nothing would."""
    if not isinstance(layer, nn.Module):
        return "expected an nn.Module"
    if not isinstance(layer, SyncBatchNorm):
        return _why_not_called(layer)
    if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():
        return "it has not seen an input yet, from which it learns its size: call it once by itself"
    if type(layer).forward is not SyncBatchNorm.forward or "forward" in vars(layer):
        return "it has a forward of its own, which would not run: call it by itself, or use one that only normalizes"
    if type(layer).__call__ is not nn.Module.__call__:
        return "its class has a __call__ of its own, which would not run: call it by itself"
    if layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks:
        return "it has hooks, which would not run: remove them, or put them on the module around it"
    return None


def _why_not_called(layer: nn.Module) -> str | None:
    inside = [name for name, each in layer.named_modules() if isinstance(each, SyncBatchNorm) and each.training]
    if not inside:
        return None
    return f"it would exchange by itself, since it has synchronized layers inside ({', '.join(inside)}): pass these"


# ---- the calls


def _normalize(pairs: Sequence[tuple[Any, Tensor]]) -> Sequence[Tensor]:
    """The outputs of SyncBatchNorm layers in training."""
    if not pairs:
        return []
    calls = []
    for layer, x in pairs:
        layer._check_input_dim(x)
        layer._check_channels(x)
        calls.append(begin(x, None, None, *layer._in_training()))
    each = [operands(call) for call in calls]
    return _NormalizeTogether.apply(
        tuple(frame for *_, frame in each), *distinct(_flat([tensors for *tensors, _ in each]))
    )


_TENSORS = 5  # of one call: x, residual, γ, β and the mask


def _flat(each: Iterable[Sequence[Any]]) -> list[Any]:
    """As arguments of autograd, the last call's first.

    A tensor that several calls have gets the sum of their gradients in this order: the one in which autograd comes by
    when they have run one after another.
    """
    return list(chain.from_iterable(reversed(list(each))))


def _by_call(flat: Sequence[Any]) -> list[Sequence[Any]]:
    """The inverse."""
    return [flat[i : i + _TENSORS] for i in reversed(range(0, len(flat), _TENSORS))]


class _NormalizeTogether(torch.autograd.Function):
    """Several calls, whose halves ``functional`` has: between these, their messages are summed as one."""

    @staticmethod
    def forward(ctx: Any, frames: tuple[Frame, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        with named("forward", *frames):
            begun = [begin_forward(frame, *each) for frame, each in zip(frames, _by_call(tensors), strict=True)]
            messages = _summed("forward", frames, [message for message, _ in begun])
            ended = [outputs(message) for (_, outputs), message in zip(begun, messages, strict=True)]
        ys = tuple(y for y, _ in ended)
        ctx.save_for_backward(*chain.from_iterable(saved for _, saved in ended))
        ctx.lengths = [len(saved) for _, saved in ended]
        ctx.frames = frames
        needs = _by_call(ctx.needs_input_grad[1:])
        ctx.mark_non_differentiable(*[y for y, each in zip(ys, needs, strict=True) if not any(each)])
        return ys

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        frames, saved, needs = ctx.frames, _split(ctx.saved_tensors, ctx.lengths), _by_call(ctx.needs_input_grad[1:])
        gradients: list[Sequence[Tensor | None]] = [[None] * _TENSORS for _ in frames]
        asked = [i for i, each in enumerate(needs) if any(each)]
        parts = [(frames[i], saved[i]) for i in asked]
        with named("backward", *(frames[i] for i in asked)):
            if torch.is_grad_enabled():  # gradients of these gradients will be asked for
                parts = _differentiable(parts)
            begun = [begin_backward(*part, dys[i], needs[i]) for i, part in zip(asked, parts, strict=True)]
            messages = [message for message, _ in begun]
            exchanged = [k for k, i in enumerate(asked) if needs[i][0]]
            sums = _summed("backward", [parts[k][0] for k in exchanged], [messages[k] for k in exchanged])
            for k, message in zip(exchanged, sums, strict=True):
                messages[k] = message
            for i, (_, of), message in zip(asked, begun, messages, strict=True):
                gradients[i] = of(message)
        return None, *_flat(gradients)


def _split(saved: Sequence[Any], lengths: list[int]) -> list[Saved]:
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [tuple(saved[end - length : end]) for end, length in zip(ends, lengths, strict=True)]


def _differentiable(parts: list[tuple[Frame, Saved]]) -> list[tuple[Frame, Saved]]:
    messages = _summed("forward", [frame for frame, _ in parts], [moments_again(*part) for part in parts])
    return [differentiable(*part, message) for part, message in zip(parts, messages, strict=True)]


# ---- the exchange


def _summed(direction: Direction, frames: Sequence[Frame], messages: list[Tensor]) -> list[Tensor]:
    """Each message summed over its peers: laid end to end, those of whom it is known that one sum does for all."""
    groups: dict[Any, list[int]] = {}
    for i, (frame, message) in enumerate(zip(frames, messages, strict=True)):
        joint = getattr(frame.peers, "joint", None)
        groups.setdefault(i if joint is None else (joint, message.device), []).append(i)
    summed = list(messages)
    for places in groups.values():
        calls = [frames[i] for i in places]
        if len(places) == 1:
            summed[places[0]] = sum_of(direction, calls, messages[places[0]])
            continue
        parts = [messages[i] for i in places]
        total = sum_of(direction, calls, torch.cat(parts))
        for i, part in zip(places, total.split([part.numel() for part in parts]), strict=True):
            summed[i] = part
    return summed
