"""Parameter groups and learning-rate schedules, for any task."""

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

_NORMALIZATION = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups for an optimizer: what weight decay acts on, and what it must leave alone.

    Decay of a normalization layer's scale changes nothing but the effective learning rate of the layer
    before it, and
    a decayed shift or bias is a prior for zero that nobody asked for: parameters of normalization layers
    and all vectors and scalars go without.
    """
    of_normalization = {
        id(parameter)
        for layer in module.modules()
        if isinstance(layer, _NORMALIZATION)
        for parameter in layer.parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim <= 1 or id(parameter) in of_normalization
        (kept if exempt else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def one_cycle(
    optimizer: Optimizer,
    total_steps: int,
    warmup: float = 0.25,
    initial: float = 0.1,
    final: float = 0.001,
) -> LambdaLR:
    """Cosine from `initial` up to 1 and down to `final`, as fractions of the optimizer's learning rate.

    `warmup` is the fraction of `total_steps` that the way up takes. Unlike torch's OneCycleLR the length is
    no part
    of the state: a run that is resumed with more steps follows the longer cycle instead of failing at the
    old end.

    Raises:
        ValueError: a fraction is outside 0 to 1, or `total_steps` is below 1.
    """
    _require_steps(total_steps)
    for name, value in {"warmup": warmup, "initial": initial, "final": final}.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be a fraction from 0 to 1, got {value}")
    top = warmup * total_steps

    def factor(step: int) -> float:
        if step < top:
            return _cosine(initial, 1.0, step / top)
        return _cosine(1.0, final, min(1.0, (step - top) / max(total_steps - top, 1)))

    return LambdaLR(optimizer, factor)


def poly(optimizer: Optimizer, total_steps: int, power: float = 0.9) -> LambdaLR:
    """(1 - step / total_steps) ** power, the schedule of much segmentation work.

    Raises:
        ValueError: `power` is not positive, or `total_steps` is below 1.
    """
    _require_steps(total_steps)
    if power <= 0:
        raise ValueError(f"power must be above 0, got {power}")
    return LambdaLR(optimizer, lambda step: (1 - min(step / total_steps, 1.0)) ** power)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _require_steps(total_steps: int) -> None:
    if total_steps < 1:
        raise ValueError(f"a schedule needs at least 1 step, got total_steps={total_steps}")
