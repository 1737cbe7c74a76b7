"""Parameter groups, the learning rate for the global batch, and learning-rate schedules, for any task."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

_NORMALIZATION = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def parameter_groups(
    module: nn.Module, backbone: nn.Module | None = None, backbone_lr_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer: what weight decay acts on, and what it must leave alone.

    Decay of a normalization layer's scale changes nothing but the effective learning rate of the layer before it, and
    a decayed shift or bias is a prior for zero that nobody asked for: parameters of normalization layers and all
    vectors and scalars go without.

    Args:
        module: whose parameters; those that require no gradient are left out.
        backbone: a part of it whose parameters get groups of their own,
        backbone_lr_factor: with this under `lr_factor` (see `scale_learning_rates`). 1: no groups of their own.
    """
    of_normalization = {
        id(parameter)
        for layer in module.modules()
        if isinstance(layer, _NORMALIZATION)
        for parameter in layer.parameters(recurse=False)
    }
    apart = backbone is not None and backbone_lr_factor != 1
    of_backbone = {id(parameter) for parameter in backbone.parameters()} if backbone is not None and apart else set()
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for in_backbone in (False, True):
        factor = {"lr_factor": backbone_lr_factor} if in_backbone else {}
        groups[in_backbone, False] = {"params": [], **factor}
        groups[in_backbone, True] = {"params": [], "weight_decay": 0.0, **factor}
    for parameter in module.parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim <= 1 or id(parameter) in of_normalization
            groups[id(parameter) in of_backbone, exempt]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def scale_learning_rates(optimizer: Optimizer, factor: float) -> None:
    """Multiplies each group's learning rate by `factor`, and by the group's own `lr_factor`, which is used up."""
    for group in optimizer.param_groups:
        group["lr"] *= factor * group.pop("lr_factor", 1.0)


def linear_scale(global_batch: int, base_batch_size: int | None) -> float:
    """By what to multiply the learning rate that was found with `base_batch_size`: the linear scaling rule.

    A step on k times as many images is to do what k steps did (Goyal et al. 2017, "Accurate, Large Minibatch SGD";
    for detectors Peng et al. 2018, "MegDet"). None: 1.
    """
    return 1.0 if base_batch_size is None else global_batch / base_batch_size


def make_schedule(make: Callable[..., LRScheduler], optimizer: Optimizer, **length: Any) -> LRScheduler:
    """Calls `make` with the optimizer and with what it has parameters for of `length`.

    So torch's own schedules, which know of none of it, can stand beside those below.
    """
    parameters = inspect.signature(make).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return make(optimizer, **{name: value for name, value in length.items() if takes_all or name in parameters})


# The schedules. None of them has its length in its state: a run that is resumed with more steps follows the longer
# schedule instead of failing at the old end.


def one_cycle(
    optimizer: Optimizer,
    total_steps: int,
    warmup: float = 0.25,
    initial: float = 0.1,
    final: float = 0.001,
) -> LambdaLR:
    """Cosine from `initial` up to 1 and down to `final`, as fractions of the optimizer's learning rate.

    `warmup` is the fraction of `total_steps` that the way up takes.

    Raises:
        ValueError: a fraction is outside 0 to 1, or `total_steps` is below 1.
    """
    _require_steps(total_steps)
    _require_fractions(warmup=warmup, initial=initial, final=final)
    top = warmup * total_steps

    def factor(step: int) -> float:
        if step < top:
            return _cosine(initial, 1.0, step / top)
        return _cosine(1.0, final, min(1.0, (step - top) / max(total_steps - top, 1)))

    return LambdaLR(optimizer, factor)


def multistep(
    optimizer: Optimizer,
    total_steps: int,
    steps_per_epoch: int | None = None,
    lr_scale: float = 1.0,
    milestones: Sequence[float] = (16, 22),
    gamma: float = 0.1,
    warmup_steps: int = 0,
    warmup_epochs: float = 0.0,
    warmup_start: float | None = 0.001,
) -> LambdaLR:
    """Times `gamma` at each of the `milestones`, which are epochs, as in the reference recipes for detection.

    Args:
        optimizer: its learning rates are what the factors are of.
        total_steps: length of the run. The milestones do not depend on it.
        steps_per_epoch: optimizer steps; None where an epoch has no known length.
        lr_scale: what the learning rates have been multiplied by for the global batch.
        milestones: epochs; fractions of epochs are allowed.
        gamma: the factor at each.
        warmup_steps: the learning rate rises linearly over so many steps,
        warmup_epochs: or over so many epochs; the longer of the two counts.
        warmup_start: from this fraction; None: from the learning rate before linear scaling, as in MegDet.

    Raises:
        ValueError: a value is outside its range, or epochs are asked for and their length is not known.
    """
    _require_steps(total_steps)
    if gamma <= 0:
        raise ValueError(f"gamma must be above 0, got {gamma}")
    if any(epoch < 0 for epoch in milestones) or list(milestones) != sorted(milestones):
        raise ValueError(f"milestones must be ascending epochs of at least 0, got {list(milestones)}")
    at = [_steps_of(epoch, steps_per_epoch, "milestones") for epoch in milestones]
    warmup = _Warmup(warmup_steps, warmup_epochs, warmup_start, steps_per_epoch, lr_scale)
    return LambdaLR(optimizer, lambda step: warmup.factor(step) * gamma ** sum(step >= each for each in at))


def cosine(
    optimizer: Optimizer,
    total_steps: int,
    steps_per_epoch: int | None = None,
    lr_scale: float = 1.0,
    final: float = 0.0,
    warmup_steps: int = 0,
    warmup_epochs: float = 0.0,
    warmup_start: float | None = 0.001,
) -> LambdaLR:
    """Half a cosine from 1 down to `final` over what the warm-up leaves of the run; see `multistep` for the rest.

    Raises:
        ValueError: a value is outside its range, or epochs are asked for and their length is not known.
    """
    _require_steps(total_steps)
    _require_fractions(final=final)
    warmup = _Warmup(warmup_steps, warmup_epochs, warmup_start, steps_per_epoch, lr_scale)
    return LambdaLR(
        optimizer, lambda step: warmup.factor(step) * _cosine(1.0, final, warmup.progress_after(step, total_steps))
    )


def poly(
    optimizer: Optimizer,
    total_steps: int,
    steps_per_epoch: int | None = None,
    lr_scale: float = 1.0,
    power: float = 0.9,
    warmup_steps: int = 0,
    warmup_epochs: float = 0.0,
    warmup_start: float | None = 0.001,
) -> LambdaLR:
    """(1 - progress) ** power, the schedule of much segmentation work, where progress is that after the warm-up.

    See `multistep` for the rest.

    Raises:
        ValueError: a value is outside its range, or epochs are asked for and their length is not known.
    """
    _require_steps(total_steps)
    if power <= 0:
        raise ValueError(f"power must be above 0, got {power}")
    warmup = _Warmup(warmup_steps, warmup_epochs, warmup_start, steps_per_epoch, lr_scale)
    return LambdaLR(
        optimizer, lambda step: warmup.factor(step) * (1 - warmup.progress_after(step, total_steps)) ** power
    )


class _Warmup:
    """A linear way up at the start of a schedule; see `multistep` for the arguments."""

    def __init__(
        self, steps: int, epochs: float, start: float | None, steps_per_epoch: int | None, lr_scale: float
    ) -> None:
        if steps < 0 or epochs < 0:
            raise ValueError(f"warmup_steps and warmup_epochs must be 0 or more, got {steps} and {epochs}")
        if start is not None:
            _require_fractions(warmup_start=start)
        # A run on less than the base batch is scaled down: there is nothing to warm up to.
        self._start = min(1.0, 1 / lr_scale) if start is None else start
        self._steps = max(steps, _steps_of(epochs, steps_per_epoch, "warmup_epochs"))

    def factor(self, step: int) -> float:
        if step >= self._steps:
            return 1.0
        return self._start + (1 - self._start) * step / self._steps

    def progress_after(self, step: int, total_steps: int) -> float:
        """From 0, at the end of the warm-up, to 1, at that of the run."""
        return min(max(step - self._steps, 0) / max(total_steps - self._steps, 1), 1.0)


def _steps_of(epochs: float, steps_per_epoch: int | None, name: str) -> int:
    if epochs == 0:
        return 0
    if steps_per_epoch is None:
        raise ValueError(f"{name} are epochs, but the length of an epoch is not known: the loader has no length")
    return round(epochs * steps_per_epoch)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _require_steps(total_steps: int) -> None:
    if total_steps < 1:
        raise ValueError(f"a schedule needs at least 1 step, got total_steps={total_steps}")


def _require_fractions(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be a fraction from 0 to 1, got {value}")
