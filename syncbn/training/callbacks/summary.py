"""What is about to be trained, in one table: model, normalization, data, batch and learning rate."""

import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

import syncbn
from syncbn.groups import OfNode, OfSamples, OfSize
from syncbn.inventory import FOREIGN, FROZEN, LOCAL, SYNCHRONIZED, UNAFFECTED, Row
from syncbn.layer import SyncBatchNorm
from syncbn.training.callbacks.console import say
from syncbn.training.processes import world_size

Line = tuple[str, str]
_NAME_WIDTH = len("not synchronized")
_NAMES = 3  # of layers, where all would be too many
_NOT_CONVERTED = "not converted"


class Summary(Callback):
    """Tells before the first step what is trained, and after it how many values the statistics are formed of.

    How many layers are synchronized over how many processes is read from the model as it is trained, after the
    plugin has converted it; so is the effective batch of each layer: the images whose values its statistics are
    formed of. What is not synchronized is named with the reason.
    """

    def __init__(self) -> None:
        self._counters: list[_Values] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        for line in aligned(summarize(trainer, pl_module)):
            say(trainer, line)
        self._counters = [_Values(name, layer, _processes(layer)) for name, layer in _batch_norms(pl_module)]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        counters, self._counters = self._counters, []
        for counter in counters:
            counter.stop()
        if told := _values(counters):
            say(trainer, *aligned([("values", told)]))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        for counter in self._counters:
            counter.stop()
        self._counters = []


def summarize(trainer: Trainer, task: LightningModule) -> list[Line]:
    """The table's lines: what, and how much of it."""
    batch = batch_per_process(trainer)
    return [
        ("model", _model(task)),
        *_normalization(task, batch),
        *_data(trainer),
        ("global batch", _global_batch(trainer, batch)),
        ("learning rate", _learning_rate(trainer)),
        ("precision", f"{trainer.precision} on {_processes_and_device(trainer)}"),
    ]


def aligned(lines: Iterable[Line]) -> list[str]:
    """Two columns; a name that is repeated stands once."""
    lines = list(lines)
    width = max([_NAME_WIDTH, *(len(name) for name, _ in lines)])
    result, last = [], ""
    for name, value in lines:
        result.append(f"  {'' if name == last else name:<{width}}  {value}")
        last = name
    return result


def batch_per_process(trainer: Trainer) -> int | None:
    """Images per process and step, where the loader says."""
    size = getattr(trainer.train_dataloader, "batch_size", None)
    if size is None:
        size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    return size if isinstance(size, int) else None


# ---- model and normalization


def _model(task: LightningModule) -> str:
    model = getattr(task, "model", task)
    total = sum(parameter.numel() for parameter in task.parameters())
    learn = sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad)
    trainable = "" if learn == total else f", {_millions(learn)} of them trainable"
    return f"{type(model).__name__}, {_millions(total)} parameters{trainable}"


def _normalization(task: LightningModule, batch: int | None) -> list[Line]:
    rows = syncbn.describe(task).rows
    layers = dict(_batch_norms(task))
    total = sum(row.status != UNAFFECTED for row in rows)
    if not total:
        others = Counter(row.class_name for row in rows)
        told = ", ".join(f"{number} {name}" for name, number in others.items())
        return [("normalization", f"no batch normalization layer{f' ({told})' if told else ''}")]
    lines: list[Line] = []
    for over, few in _grouped(row for row in rows if row.status == SYNCHRONIZED).items():
        effective = effective_batch(layers.get(few[0].name), batch)
        lines.append(
            ("normalization", f"{len(few)} of {total} layers synchronized over {over}: {_images(effective)} in each")
        )
    if not lines:
        lines.append(("normalization", f"0 of {total} layers synchronized"))
    left = Counter((row.status, _reason(row)) for row in rows if row.status in (LOCAL, FOREIGN, FROZEN))
    for (status, reason), number in left.items():
        names = [row.name for row in rows if (row.status, _reason(row)) == (status, reason)]
        more = f" and {number - _NAMES} more" if number > _NAMES else ""
        images = f": {_images(batch)} in each" if status == LOCAL else ""
        lines.append(("not synchronized", f"{number} {status}{images} ({reason}): {', '.join(names[:_NAMES])}{more}"))
    return lines


def _grouped(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.over, []).append(row)
    return groups


def _reason(row: Row) -> str:
    return "norm=local, or one process" if row.reason.startswith(_NOT_CONVERTED) else row.reason


def _batch_norms(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, each) for name, each in module.named_modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]


def effective_batch(layer: nn.Module | None, batch: int | None) -> int | None:
    """Images that a layer's statistics are formed of, or None where that shows only at the first exchange."""
    processes = None if layer is None else _processes(layer)
    if isinstance(layer, SyncBatchNorm) and isinstance(layer._exchange.grouping, OfSamples):
        return layer._exchange.grouping.samples
    return None if batch is None or processes is None else batch * processes


def _processes(layer: nn.Module) -> int | None:
    """Over how many processes a layer's statistics are formed; None where that is not known yet."""
    if not isinstance(layer, SyncBatchNorm):
        return 1
    exchange = layer._exchange
    if world_size() == 1 or exchange.grouped:
        return exchange.world_size
    match exchange.grouping:
        case OfSize(size):
            return size
        case OfNode():
            return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
        case OfSamples():
            return None
    return exchange.world_size


# ---- values, which only show when a batch has passed


class _Values:
    """How many values per channel a layer gets in a step, from its inputs' shapes."""

    def __init__(self, name: str, layer: nn.Module, processes: int | None) -> None:
        self.name = name
        self.layer = layer
        self.processes = processes
        self.values = 0
        self._handle = layer.register_forward_pre_hook(self._count)

    def stop(self) -> None:
        self._handle.remove()

    def _count(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0] if inputs else None
        if module.training and isinstance(x, Tensor) and x.ndim >= 2 and not torch.jit.is_tracing():
            # A layer that is called for several levels forms statistics for each: the fewest tell.
            values = x.numel() // max(x.shape[1], 1)
            self.values = min(self.values or values, values)


def _values(counters: list[_Values]) -> str:
    known = []
    for counter in counters:
        processes = counter.processes or _processes(counter.layer)
        if counter.values and processes:
            known.append((counter.values * processes, counter.name.removeprefix("model.")))
    if not known:
        return ""
    fewest, most = min(known), max(known)
    if fewest[0] == most[0]:
        return f"{fewest[0]} per channel in the statistics of each layer"
    return f"per channel in the statistics {fewest[0]} (layer {fewest[1]}) to {most[0]} (layer {most[1]})"


# ---- data, batch, learning rate


def _data(trainer: Trainer) -> list[Line]:
    data: Any = getattr(trainer, "datamodule", None)
    parts, dropped = [], []
    for what, name in (("training", "train_set"), ("validation", "val_set")):
        items = getattr(data, name, None)
        if items is None:
            continue
        parts.append(f"{len(items)} for {what}")
        all_items = getattr(items, "dataset", items)
        if len(all_items) != len(items):
            dropped.append(f"{len(all_items) - len(items)} of {len(all_items)} for {what}")
    lines = [("images", ", ".join(parts))] if parts else []
    if dropped:
        lines.append(("left out", f"{', '.join(dropped)}, see left_out.txt"))
    return lines


def _global_batch(trainer: Trainer, batch: int | None) -> str:
    if batch is None:
        return f"unknown, over {trainer.world_size} processes"
    factors = [f"{batch} per process"]
    if trainer.world_size > 1:
        factors.append(f"{trainer.world_size} processes")
    if trainer.accumulate_grad_batches > 1:
        factors.append(f"{trainer.accumulate_grad_batches} accumulated")
    total = batch * trainer.world_size * trainer.accumulate_grad_batches
    return f"{_images(total)} ({' x '.join(factors)})"


def _learning_rate(trainer: Trainer) -> str:
    rates = []
    for optimizer in trainer.optimizers:
        # The schedule's peak, where there is a schedule: what the optimizer has now is its first step's.
        rates += [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    different = sorted({f"{float(rate):.4g}" for rate in rates}, key=float)
    names = ", ".join(type(optimizer).__name__.replace("Lightning", "") for optimizer in trainer.optimizers)
    base = getattr(trainer.lightning_module, "base_batch_size", None)
    scale = getattr(trainer.lightning_module, "lr_scale", 1.0)
    configured = base is not None and not getattr(trainer.lightning_module, "resumed_with_other_batch", False)
    scaled = f", scaled by {scale:g} from that for {_images(base)}" if configured else ""
    return f"{', '.join(different) or 'none'} ({names}{scaled})"


def _processes_and_device(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{trainer.world_size} process{'es' if trainer.world_size > 1 else ''} ({name})"


def _images(number: int | None) -> str:
    if number is None:
        return "images as many as a batch has"
    return f"{number} image{'s' if number != 1 else ''}"


def _millions(number: int) -> str:
    return f"{number / 1e6:.2f} M" if number >= 10_000 else str(number)
