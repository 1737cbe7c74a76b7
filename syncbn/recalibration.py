"""``recalibrate``: running statistics that are those of the data.

In training they are a moving average over batches that were seen with other weights than those at the end. Wu and
Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 3, normalize at inference by the population's statistics
instead: those of a few thousand samples, seen with the weights that are used.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from .calls import enter_only, entered
from .exchange import Exchange
from .freezing import is_held
from .functional import sync_batch_norm
from .kept_state import generators_kept, state_kept
from .layer import SyncBatchNorm, describe_layer
from .local import WITH_NOBODY
from .moments import Running
from .pooled_moments import Pool, Pooling, running_statistics
from .recipes import is_exported, is_scripted
from .selection import Selection, batch_norms, divide

Forward = Callable[[Any, Any], Any]
Layers = dict[str, _BatchNorm]  # by their qualified names


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    include: Selection = None,
    exclude: Selection = None,
    process_group: Any = None,
    progress: bool = True,
) -> None:
    """Sets running statistics to the mean and the unbiased variance over all data of all processes.

    One pass, in which every layer normalizes by its batch's statistics as in training, so that the layers after it see
    what they have learned from. What comes in is pooled in float64: the variance is that of all values, not the mean of
    the batches' variances. Layers that are not synchronized normalize by this process's batch, and are set to the same
    population's statistics. The rest of the model is in eval mode, dropout included, as it will be where the statistics
    are used. It is left as it was: modes, all other buffers (``num_batches_tracked``, too), random state.

    A few details are taken care of here:

    - Processes may have different numbers of batches, or none: see ``even_batches``.
    - Layers that are frozen stay so: by ``syncbn.freeze``, by their class, or in eval mode in a model in training mode.
    - A batch that is not finite in a layer is left out there. A layer that has seen no value keeps what it has. A
      warning names both.
    - What ``torch.compile`` has compiled runs uncompiled. Of a DistributedDataParallel, the module is called.

    Args:
        model: on every process, with the same weights.
        batches: this process's data, on the model's device, in any number: a DataLoader, a generator.
        forward: how a batch is fed, called as ``forward(model, batch)``, without gradients. None: ``model(batch)``, or
            ``model(batch[0])`` of a list or tuple, as in ``torch.optim.swa_utils.update_bn``.
        include: which layers; None for all. See ``syncbn.convert``.
        exclude: which of these to leave as they are, in eval mode.
        process_group: over whose data, see ``syncbn.convert``; None for all processes, also where layers are
            synchronized over some of them.
        progress: whether the first process shows a progress bar.

    Raises:
        ValueError: there is no layer to set, or no layer has seen a finite value.
        TypeError: a layer is compiled, or has not seen an input yet.
        RuntimeError: the processes' models differ. After any exception the model is as it was.
    """
    model = model.module if isinstance(model, DistributedDataParallel) else model
    with ExitStack() as stack:
        # Sums must not become inference tensors in a trainer's inference mode, nor enter anybody's graph.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(generators_kept(batches))
        # The blocks that this stands in, such as that of a step that stands in for one, are about other batches.
        stack.callback(enter_only, entered())
        enter_only(())
        population = _Population(_layers(model, include, exclude), process_group)
        _run(model, population, population.evened(batches), forward or feed, progress and population.is_first)
        population.set_running_statistics()


def _run(model: nn.Module, population: _Population, batches: Iterable[Any], forward: Forward, progress: bool) -> None:
    """The pass; it changes nothing but the population."""
    with ExitStack() as stack:
        stack.enter_context(state_kept(model))
        if "torch._dynamo" in sys.modules:  # or else nothing is compiled, and importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        _set_modes(model, population.layers)
        stack.enter_context(_unsynchronized_observed(population.layers))
        stack.enter_context(population.pooling)
        for batch in stack.enter_context(closing(_shown(batches, progress))):
            forward(model, batch)


def feed(model: nn.Module, batch: Any) -> Any:
    """The model on a batch: on its first element, if it is a list or tuple such as (inputs, targets)."""
    return model(batch[0] if isinstance(batch, (list, tuple)) else batch)


def _layers(model: nn.Module, include: Selection, exclude: Selection) -> Layers:
    """Those that are to be set."""
    meant = {each.name: each.layer for each in divide(batch_norms(model), include, exclude)[0]}
    if compiled := [name or "the model" for name, each in meant.items() if is_scripted(each) or is_exported(each)]:
        raise TypeError(
            f"cannot recalibrate {', '.join(compiled)}, compiled or traced already, where no input can be seen: "
            f"recalibrate the model before that, or pass exclude= with these names"
        )
    layers = {
        name: each
        for name, each in meant.items()
        if isinstance(each, _BatchNorm)
        and each.running_mean is not None
        and not is_held(each)
        and (each.training or not model.training)
    }
    if lazy := [name or "the model" for name, each in layers.items() if is_lazy(running_statistics(each).mean)]:
        raise TypeError(f"cannot recalibrate {', '.join(lazy)}, which has not seen an input yet: run the model once")
    if not layers:
        raise ValueError(
            f"there are no running statistics to set in the {type(model).__name__}: no batch normalization layer that "
            f"is meant keeps any, or all of them are frozen"
        )
    return layers


def _set_modes(model: nn.Module, layers: Layers) -> None:
    for module in model.modules():
        module.training = False
    for layer in layers.values():
        layer.training = True


# ---- over all processes


class _Population:
    """All data of all processes, as the layers see it."""

    def __init__(self, layers: Layers, process_group: Any) -> None:
        self.layers = layers
        self.pooling = Pooling(layers.values(), of_union=False)
        self._process_group = process_group
        self._exchange = Exchange(process_group)
        for name, layer in layers.items():
            self._exchange.register(describe_layer(layer, name))
        if not self._exchange.alone:  # models that differ are told before anybody waits for anybody
            self._exchange.connect(self._device)

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self._exchange.alone or dist.get_rank() == (self._exchange.ranks or (0,))[0]

    def evened(self, batches: Iterable[Any]) -> Iterable[Any]:
        """As many batches as any process has; what stands in for one that is not there counts nowhere."""
        from .uneven import EvenBatches

        if self._exchange.alone or isinstance(batches, EvenBatches):
            return batches
        # A batch that the model has taken stands in, whatever it wants of one. Nobody asks how many samples it has.
        return EvenBatches(_Iterable(batches), self._process_group, empty=lambda batch: batch, size=lambda batch: 1)

    def set_running_statistics(self) -> None:
        """Collective. What is not finite, in the buffers' dtype, is not taken.

        Raises:
            ValueError: no layer has seen a finite value.
        """
        self._sum_over_processes()
        found = {layer: _statistics_of(layer, pool) for layer, pool in self.pooling.pools.items()}
        if not any(found.values()):
            raise ValueError(
                "no layer has seen a finite value: expected batches with data on at least one process (a generator "
                "that was used before has none left)"
            )
        for layer, statistics in found.items():
            if statistics is not None:
                running = running_statistics(layer)
                running.mean.copy_(statistics.mean)
                running.var.copy_(statistics.var)
        if self.is_first:
            self._warn([name for name, layer in self.layers.items() if found[layer] is None])

    def _sum_over_processes(self) -> None:
        if self._exchange.alone:
            return
        pools = self.pooling.pools.values()
        sums = torch.cat([pool.sums.to(self._device) for pool in pools])
        self._exchange.all_reduce(sums)
        for pool, total in zip(pools, sums.split([len(pool.sums) for pool in pools]), strict=True):
            pool.sums.copy_(total)

    def _warn(self, unseen: list[str]) -> None:
        left_out = [
            f"{name or 'the layer'} ({round(count / _times_counted(each))})"
            for name, each in self.layers.items()
            if (count := self.pooling.pools[each].sums[-1].item())
        ]
        if left_out:
            warnings.warn(
                f"batches that are not finite were left out of these layers' statistics: {', '.join(left_out)}",
                stacklevel=4,
            )
        if unseen:
            warnings.warn(
                f"these layers have seen no finite value and keep the running statistics that they had: "
                f"{', '.join(unseen)}. Where the model only uses them in training mode, see forward=",
                stacklevel=4,
            )

    @property
    def _device(self) -> torch.device:
        return next(iter(self.pooling.pools.values())).sums.device


def _times_counted(layer: _BatchNorm) -> int:
    """How many processes have counted the same batch."""
    return layer._exchange.world_size if isinstance(layer, SyncBatchNorm) else 1


def _statistics_of(layer: _BatchNorm, pool: Pool) -> Running | None:
    """The pool's statistics as the layer's buffers would have them; None where they are not finite."""
    mean, var, _, _ = running_statistics(layer)
    moved = torch.zeros((), dtype=torch.int64, device=pool.sums.device)
    statistics = Running(torch.zeros_like(mean), torch.zeros_like(var), moved, momentum=1.0)
    pool.move(statistics)
    return statistics if moved else None


class _Iterable:
    """Batches that may be an iterator, for those who may ask for several iterations."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]


# ---- layers that syncbn does not run


@contextmanager
def _unsynchronized_observed(layers: Layers) -> Iterator[None]:
    """What comes into layers that are not converted is pooled, too."""
    with ExitStack() as handles:
        for layer in layers.values():
            if not isinstance(layer, SyncBatchNorm):
                handles.callback(layer.register_forward_pre_hook(_observe, with_kwargs=True).remove)
        yield


def _observe(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A call of a SyncBatchNorm on the same input, for what the blocks around it make of it; the output is not used."""
    x = args[0] if args else kwargs["input"]
    x = x.movedim(-1, 1) if getattr(layer, "channel_last", False) else x  # apex's
    # Whether one value per channel is enough is for the layer itself to say.
    sync_batch_norm(x, layer.running_mean, layer.running_var, training=True, exchange=WITH_NOBODY)


# ---- the progress bar


def _shown(batches: Iterable[Any], shown: bool) -> Generator[Any, None, None]:
    if shown and find_spec("tqdm") is not None:
        from tqdm.auto import tqdm

        batches = tqdm(batches, desc="Recalibrating", unit="batch", leave=False)
    yield from batches
