"""How far the statistics of one process's batch are from those of all processes' batches, layer by layer.

This is what a layer that is not synchronized normalizes by, against what a synchronized one does.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .calls import Call, surrounded
from .communicator import initialized
from .kernels import Layer, reference
from .layer import SyncBatchNorm
from .moments import TAGS
from .peers import ALONE
from .selection import Found, batch_norms

_OF_LAYER = 2  # numbers beside those of the channels: n, and whether this process has any value


class Strays(NamedTuple):
    """What ``StrayWatch.measure`` has found. A row for each layer, in module order; all float64, on the device.

    With M_c and V_c the mean and the biased variance of channel c over all values of all P processes, m_pc and v_pc
    those over the values of process p, and ε the layer's own, so that dead channels count as little as they matter:

        mean = √( 1/(P·C) · Σ_p Σ_c (m_pc − M_c)² / (V_c + ε) )

        var  = √( 1/(P·C) · Σ_p Σ_c ln²( (v_pc + ε) / (V_c + ε) ) )

    Both are 0 where every process's batch has the statistics of the union. mean = 0.5 says that a process's means are
    typically half a standard deviation off; var = 0.69 that its variances are off by a factor of 2. Processes without
    a value in a layer are left out of its P. NaN where no process has one.
    """

    mean: Tensor  # [layers]
    var: Tensor  # [layers]
    values: Tensor  # [layers], how many values each channel has, over all processes


class StrayWatch:
    """A ``with`` block in which the local moments of every batch normalization in training are collected.

    Inside of it each layer's input is read once more, in float64. Nothing else changes: no bit of what the model
    computes, no random state. Outside it costs nothing. It works for layers that are synchronized and for those that
    are not; what ``valid_region`` or a layer's own ``mask`` leaves out does not count in the synchronized ones, as it
    does not there. Several calls of a layer are taken as one batch.

    Args:
        model: or a part of it. Lazy layers that have not seen an input yet are left out. What has been compiled
            already is not seen, as if it had no value.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [each for each in batch_norms(model) if _is_measurable(each.layer)]
        self.names = [each.name for each in self._layers]
        self._sums: dict[nn.Module, Tensor] = {}
        self._hooks = ExitStack()

    @property
    def channels(self) -> list[int]:
        """Of each layer."""
        return [each.layer.num_features for each in self._layers]  # type: ignore[misc]

    def __enter__(self) -> Self:
        self._sums = {}
        for each in self._layers:
            self._hooks.callback(each.layer.register_forward_pre_hook(self._add, with_kwargs=True).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()

    def measure(self) -> Strays:
        """How far each process's statistics were from all processes' in the block that has ended.

        Collective: every process of the default group calls it, whatever its layers have seen; one all-reduce for
        all layers together. Nothing is read on the host.
        """
        if not self._layers:
            nothing = torch.zeros(0, dtype=torch.float64)
            return Strays(nothing, nothing, nothing)
        own = [_message(self._sums.get(each.layer), each.layer) for each in self._layers]
        several = initialized() and dist.get_world_size() > 1
        union = torch.cat(own)
        if several:
            dist.all_reduce(union)
        messages = union.split([len(message) for message in own])
        pairs = zip(messages, self._layers, strict=True)
        return Strays(*(torch.stack(found) for found in zip(*(_strays(*pair) for pair in pairs), strict=True)))

    def _add(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not layer.training:
            return
        with torch.no_grad():
            sums = _sums(layer, args[0] if args else kwargs["input"], kwargs.get("mask"))
            self._sums[layer] = self._sums[layer] + sums if layer in self._sums else sums


def _is_measurable(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and layer.num_features > 0


def _sums(layer: _BatchNorm, x: Tensor, mask: Tensor | None) -> Tensor:
    """Σx | Σx² | n of this process's batch, [2C+1] float64, of the places that count in the layer."""
    x = x.detach()
    x = x.movedim(-1, 1) if getattr(layer, "channel_last", False) else x  # apex's
    if isinstance(layer, SyncBatchNorm):
        options = Layer(None, None, layer.eps, None, 0.0)
        mask = surrounded(Call(x, None, mask, options, None, reference, ALONE, 0)).mask
    mask = None if mask is None else mask.expand(x.shape[0], 1, *x.shape[2:])
    return reference.moments(x, mask, 0)[0][:-TAGS]


def _message(sums: Tensor | None, layer: Any) -> Tensor:
    """What a process says of a layer: Σx | Σx² | m | m² | ln(v+ε) | ln²(v+ε) | n | 1, [6C+2]; zeros without a value.

    The sum over processes has the union's moments, and enough of each process's to say how far these are from them
    on average, so that one all-reduce suffices. float64 leaves about (M²/V)·1e-16 of the squares.
    """
    C = layer.num_features
    if sums is None:
        return torch.zeros(6 * C + _OF_LAYER, dtype=torch.float64, device=_device(layer))
    mean_C, var_C, n = _mean_and_variance(sums)
    log_C = (var_C + layer.eps).log()
    seen = (n > 0).to(sums.dtype)
    each = torch.cat([mean_C, mean_C.square(), log_C, log_C.square()])
    return torch.cat([sums[: 2 * C], torch.where(n > 0, each, 0.0), n.view(1), seen.view(1)])


def _strays(message: Tensor, found: Found) -> tuple[Tensor, Tensor, Tensor]:
    layer: Any = found.layer
    C = layer.num_features
    sums, of_processes = message[: 2 * C], message[2 * C : 6 * C]
    n, P = message[-2], message[-1]
    mean_C, var_C, _ = _mean_and_variance(torch.cat([sums, n.view(1)]))
    var_C = var_C + layer.eps
    log_C = var_C.log()
    means_C, squares_C, logs_C, squared_logs_C = (of_processes / P).view(4, C)
    of_mean_C = (squares_C - 2 * mean_C * means_C + mean_C.square()) / var_C
    of_var_C = squared_logs_C - 2 * log_C * logs_C + log_C.square()
    return _root_of_mean(of_mean_C), _root_of_mean(of_var_C), n


def _mean_and_variance(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    C = len(sums) // 2
    n = sums[-1]
    mean_C, mean_of_squares_C = sums[:C] / n, sums[C : 2 * C] / n
    return mean_C, (mean_of_squares_C - mean_C.square()).clamp(min=0), n


def _root_of_mean(squares_C: Tensor) -> Tensor:
    return squares_C.clamp(min=0).mean().sqrt()


def _device(layer: nn.Module) -> torch.device:
    tensors: Iterable[Tensor] = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
