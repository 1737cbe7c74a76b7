"""What a sampled step says of each batch normalization layer: the numbers that ``StatisticsMonitor`` shows.

Everything is computed on the device in a few operations for all layers together, and read in one transfer. The
layers' messages are there anyway (``observed``), so that no input is read a second time and no module gets a hook,
which torch.compile would trace. Of a layer whose messages cannot be seen, the running statistics still tell: the batch
is what they have moved toward.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ..layer import SyncBatchNorm
from ..moments import TAGS
from ..observed import Observable, origin, watched_by
from ..selection import batch_norms


class Reading(NamedTuple):
    """One layer on one sampled step. NaN is what is not known."""

    seen: bool  # whether its messages were; not in what is compiled, nor of layers that are not synchronized
    finite: bool  # whether its batch was; True where it was not seen
    values: float  # per channel, over the layer's processes, in one call
    samples: float  # in the batches of these processes
    mean_stray: float  # see Readings
    var_stray: float
    collapsed: float  # share of the channels
    mean_lag: float
    var_lag: float
    updates: float  # num_batches_tracked after the step
    moved: float  # how many of these the step has made
    sound: bool  # whether the running statistics are finite


class Readings:
    """The batch normalization layers of a model, watched in one step after another.

    With M_c, V_c the mean and biased variance of channel c over all processes of the layer, m_pc and v_pc those of
    process p, μ_c and σ²_c the running statistics before the step:

        mean_stray = √( 1/(P·C) · Σ_p Σ_c (m_pc − M_c)² / (V_c + ε) )

        var_stray = √( 1/(P·C) · Σ_p Σ_c ln²( (v_pc + ε) / (V_c + ε) ) )

        mean_lag = √( 1/C · Σ_c (μ_c − M_c)² / (V_c + ε) )

        var_lag = √( 1/C · Σ_c ln²( (σ²_c + ε) / (V_c + ε) ) )

    The first two as in ``strays``. A channel has collapsed where V_c < threshold · ε.

    Attributes:
        names: of the layers, in the model.
        layers: those that have seen an input, in module order.
        users: place of a synchronized layer -> its Exchange, and its index there.
        exchanges: theirs, each once.

    Args:
        model: lazy layers that have not seen an input yet are left out.
        device: where to compute.
        collapsed_below: the threshold, in units of ε.
    """

    def __init__(self, model: nn.Module, device: torch.device, collapsed_below: float) -> None:
        found = [each for each in batch_norms(model) if _is_readable(each.layer)]
        self.names = [each.name or "the model" for each in found]
        self.layers: list[Any] = [each.layer for each in found]
        self.device = device
        self._collapsed_below = collapsed_below
        sizes = [layer.num_features for layer in self.layers]
        self._channels = sum(sizes)
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._sizes_L = torch.tensor(sizes, dtype=torch.float64, device=device)
        self._layer_of_C = torch.arange(len(sizes), device=device).repeat_interleave(
            torch.tensor(sizes, dtype=torch.long, device=device)
        )
        eps_L = torch.tensor([layer.eps for layer in self.layers], dtype=torch.float64, device=device)
        self._eps_C = eps_L[self._layer_of_C]
        self._targets: dict[tuple[int, ...], Tensor] = {}
        self._watching = ExitStack()
        self._messages: list[tuple[list[int], Tensor, Tensor]] = []
        self._before: Tensor | None = None
        # As they are now: a plugin takes the exchanges away again when the fit ends.
        self.users = {
            i: (layer._exchange, layer._index) for i, layer in enumerate(self.layers) if _is_synchronized(layer)
        }
        self.exchanges = list(dict.fromkeys(exchange for exchange, _ in self.users.values()))
        self._place = {(id(exchange), index): i for i, (exchange, index) in self.users.items()}

    def begin(self) -> None:
        """Watches what is called from now on."""
        self.abandon()
        self._before = self._running()
        self._watching.enter_context(watched_by(self))

    def abandon(self) -> None:
        """Watches no more, and forgets what was seen."""
        self._watching.close()
        self._messages, self._before = [], None

    def saw(self, frames: Sequence[Observable], own: Tensor, union: Tensor) -> None:
        """As a ``Watcher``."""
        places = [self._place.get((id(origin(frame.source)), frame.number)) for frame in frames]
        if all(place is not None for place in places):
            self._messages.append(([place for place in places if place is not None], own, union))

    def end(self, samples: float) -> list[Reading]:
        """What was seen since ``begin``, layer by layer. Collective, and waits for the device.

        Args:
            samples: how many this process's batch had.
        """
        assert self._before is not None
        before, messages = self._before, self._messages
        self.abandon()
        after = self._running()
        together = bool(self.users) and dist.is_available() and dist.is_initialized()
        ranks = dist.get_world_size() if together else 1
        own_mean_C, own_var_C, own_n_L = self._moments([(places, own) for places, own, _ in messages])
        mean_C, var_C, n_L = self._moments([(places, union) for places, _, union in messages])
        squares_2C = torch.stack([
            (own_mean_C - mean_C).square() / (var_C + self._eps_C),
            ((own_var_C + self._eps_C) / (var_C + self._eps_C)).log().square(),
        ])  # fmt: skip
        present_L = (own_n_L > 0).double()
        strays_2L = torch.where(present_L > 0, self._sums(squares_2C) / self._sizes_L, 0.0)
        samples_P = torch.zeros(ranks, dtype=torch.float64, device=self.device)
        samples_P[dist.get_rank() if ranks > 1 else 0] = samples
        over_all = torch.cat([strays_2L.flatten(), present_L, samples_P])
        if ranks > 1:
            dist.all_reduce(over_all)
        mean_stray_L, var_stray_L, present_L, samples_P = over_all.split([*[len(self.layers)] * 3, ranks])
        columns = {
            "mean_stray": (mean_stray_L / present_L).sqrt(),
            "var_stray": (var_stray_L / present_L).sqrt(),
            "finite": (self._sums(mean_C + var_C) * 0 == 0).double(),
            "n": n_L,
            **self._of_running(before, after, mean_C, var_C, n_L),
        }
        numbers = torch.cat([*columns.values(), samples_P]).tolist()  # the one transfer
        L = len(self.layers)
        told = {name: numbers[i * L : (i + 1) * L] for i, name in enumerate(columns)}
        calls = Counter(place for places, *_ in messages for place in places)
        return [
            self._reading(layer, calls[i], {name: column[i] for name, column in told.items()}, numbers[-ranks:])
            for i, layer in enumerate(self.layers)
        ]

    def updates(self) -> list[float]:
        """``num_batches_tracked`` of each layer. Waits for the device."""
        return self._running()[2 * self._channels :].tolist()

    # ---- from tensors to numbers

    def _moments(self, messages: list[tuple[list[int], Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [C], variance [C] and n [L] of all calls of a layer as one batch. NaN and 0 where there was none."""
        sums = torch.zeros(2 * self._channels + len(self.layers) + 1, dtype=torch.float64, device=self.device)
        if messages:
            target = self._target(tuple(place for places, _ in messages for place in places))
            sums.index_add_(0, target, torch.cat([message.to(self.device) for _, message in messages]))
        n_L = sums[2 * self._channels : -1]
        n_C = n_L[self._layer_of_C]
        mean_C = sums[: self._channels] / n_C
        mean_of_squares_C = sums[self._channels : 2 * self._channels] / n_C
        return mean_C, (mean_of_squares_C - mean_C.square()).clamp(min=0), n_L

    def _target(self, places: tuple[int, ...]) -> Tensor:
        """Where each number of the messages of these layers, laid end to end, is to be added."""
        if places not in self._targets:
            if len(self._targets) > 8:  # a model that runs other layers each time
                self._targets.clear()
            parts = []
            for place in places:
                channels = torch.arange(self.layers[place].num_features) + self._starts[place]
                last = 2 * self._channels + len(self.layers)
                parts += [
                    channels,
                    channels + self._channels,
                    torch.tensor([2 * self._channels + place, *[last] * TAGS]),
                ]
            self._targets[places] = torch.cat(parts).to(self.device)
        return self._targets[places]

    def _sums(self, values: Tensor) -> Tensor:
        """[..., C] summed over each layer's channels: [..., L]."""
        sums = values.new_zeros(*values.shape[:-1], len(self.layers))
        return sums.index_add_(-1, self._layer_of_C, values)

    def _running(self) -> Tensor:
        """Running means, variances and counts, [2C+L] float64, a copy; NaN where there are none."""
        nan = torch.full((1,), math.nan, device=self.device)
        parts = [_vector(layer.running_mean, layer.num_features, nan) for layer in self.layers]
        parts += [_vector(layer.running_var, layer.num_features, nan) for layer in self.layers]
        counts = [_vector(layer.num_batches_tracked, 1, nan) for layer in self.layers]
        return torch.cat([torch.cat([each.to(self.device) for each in group]).double() for group in (parts, counts)])

    def _of_running(
        self, before: Tensor, after: Tensor, mean_C: Tensor, var_C: Tensor, n_L: Tensor
    ) -> dict[str, Tensor]:
        """What the running statistics tell, [L] each."""
        C = self._channels
        moved_L = after[2 * C :] - before[2 * C :]
        batch_mean_C, batch_var_C = self._batch(before, after, moved_L)
        seen_C = (n_L > 0)[self._layer_of_C]
        batch_mean_C, batch_var_C = (
            torch.where(seen_C, known, told) for known, told in ((mean_C, batch_mean_C), (var_C, batch_var_C))
        )
        # Where nothing tells of the batch, the running variance does: it is the mean of many.
        variance_C = torch.where(batch_var_C.isnan(), after[C : 2 * C], batch_var_C)
        collapsed_C = (variance_C < self._collapsed_below * self._eps_C).double() + variance_C * 0
        denominator_C = batch_var_C + self._eps_C
        mean_lag_C = (before[:C] - batch_mean_C).square() / denominator_C
        var_lag_C = ((before[C : 2 * C] + self._eps_C) / denominator_C).log().square()
        collapsed_L, mean_lag_L, var_lag_L, sound_L = (
            self._sums(torch.stack([collapsed_C, mean_lag_C, var_lag_C, (after[: 2 * C].view(2, C) * 0).sum(0)]))
            / self._sizes_L
        )
        return {
            "collapsed": collapsed_L,
            "mean_lag": mean_lag_L.sqrt(),
            "var_lag": var_lag_L.sqrt(),
            "updates": after[2 * C :],
            "moved": moved_L,
            "sound": (sound_L == 0).double(),
        }

    def _batch(self, before: Tensor, after: Tensor, moved_L: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the batch by what the running statistics have moved: (after − (1−f)·before) / f."""
        C = self._channels
        momenta = [layer.momentum if layer.momentum is not None else math.nan for layer in self.layers]
        factor_L = torch.tensor(momenta, dtype=torch.float64).to(self.device)
        factor_L = torch.where(factor_L.isnan(), 1 / after[2 * C :], factor_L)
        factor_L = torch.where(moved_L > 0, 1 - (1 - factor_L) ** moved_L, math.nan)
        factor_C = torch.where(factor_L > 0, factor_L, math.nan)[self._layer_of_C]
        change = after[: 2 * C].view(2, C) - before[: 2 * C].view(2, C)
        mean_C, var_C = before[: 2 * C].view(2, C) + change / factor_C
        return mean_C, var_C.clamp(min=0)

    @staticmethod
    def _reading(layer: Any, calls: int, told: dict[str, float], samples: list[float]) -> Reading:
        n, finite, sound = (told.pop(name) for name in ("n", "finite", "sound"))
        return Reading(
            seen=calls > 0,
            finite=finite == 1 or not calls,
            values=n / calls if calls else math.nan,
            samples=sum(samples[rank] for rank in _ranks(layer, len(samples))),
            sound=sound == 1 or layer.running_mean is None,
            **told,
        )


def _is_readable(layer: nn.Module) -> bool:
    if not isinstance(layer, _BatchNorm) or layer.num_features == 0:
        return False
    return not any(is_lazy(each) for each in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)))


def _is_synchronized(layer: nn.Module) -> bool:
    return isinstance(layer, SyncBatchNorm)


def _vector(buffer: Tensor | None, size: int, nan: Tensor) -> Tensor:
    return nan.expand(size) if buffer is None else buffer.detach().view(-1)


def _ranks(layer: Any, world_size: int) -> Sequence[int]:
    """The processes whose batches form the layer's statistics."""
    if not isinstance(layer, SyncBatchNorm):
        return [dist.get_rank() if world_size > 1 else 0]
    return range(world_size) if layer._exchange.ranks is None else layer._exchange.ranks
