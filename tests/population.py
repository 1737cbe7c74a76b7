"""The judge of pooled statistics: the plain model in one process, and all that has come into its layers, together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def running(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in model.named_buffers() if "running" in name}


def population(model: nn.Module, unions: list[Tensor], frozen: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """What one process makes of the unions: the plain model, its layers normalizing by each union's own statistics."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args: seen.setdefault(name, []).append(args[0].detach())

    model.eval()
    for name, each in model.named_modules():
        if isinstance(each, nn.modules.batchnorm._BatchNorm) and name not in frozen:
            each.train().register_forward_pre_hook(keep(name))
    with torch.no_grad():
        for union in unions:
            model(union)
    result = {}
    for name, inputs in seen.items():
        values = torch.cat([x.transpose(0, 1).flatten(1) for x in inputs], dim=1)
        result[f"{name}.running_mean"], result[f"{name}.running_var"] = values.mean(1), values.var(1)
    return result
