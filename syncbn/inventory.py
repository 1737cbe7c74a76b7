"""``describe``: which layers of a model are synchronized, over whom; which are not, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, dataclass

import torch.distributed as dist
from torch import nn

from .exchange import Exchange
from .freezing import is_held
from .groups import ALL
from .layer import SyncBatchNorm
from .recipes import anchor_of, is_batch_norm, is_frozen
from .selection import Found, find, reason_for_leaving
from .surgery import display_name, original_name, why_unconvertible

SYNCHRONIZED = "synchronized"  # statistics of all its processes
LOCAL = "local"  # statistics of this process's batch alone
FOREIGN = "foreign"  # another package synchronizes it
FROZEN = "frozen"  # normalizes by fixed statistics
UNAFFECTED = "unaffected"  # forms no statistics over the batch


@dataclass(frozen=True)
class Row:
    """One normalization layer."""

    name: str  # qualified
    class_name: str  # of its own class, whether converted or not
    status: str  # "synchronized", "local", "foreign", "frozen" or "unaffected"
    over: str  # whose batches its statistics are formed of; empty where of none
    reason: str  # why it is not synchronized, or what else is to be known


@dataclass(frozen=True)
class Description:
    """The normalization layers of a model, in module order. ``print`` shows a table and a summary."""

    rows: tuple[Row, ...]
    training: bool  # whether the model is in training mode

    def names(self, status: str) -> list[str]:
        """The names of the layers with this status."""
        return [row.name for row in self.rows if row.status == status]

    @property
    def summary(self) -> str:
        """One line: how many are synchronized, over whom, and what of the others."""
        counts = Counter(row.status for row in self.rows)
        total = len(self.rows) - counts[UNAFFECTED]
        if total == 0:
            return "There is no batch normalization layer."
        over = sorted({row.over for row in self.rows if row.status == SYNCHRONIZED})
        others = [f"{counts[status]} {status}" for status in (LOCAL, FOREIGN, FROZEN) if counts[status]]
        parts = [f"{counts[SYNCHRONIZED]} of {total} batch normalization layers synchronized"]
        parts += [f" over {' or '.join(over)}"] if over else []
        parts += [f"; {', '.join(others)}"] if others else []
        parts += [] if self.training else ["; the model is in eval mode, in which nothing is exchanged"]
        return "".join(parts) + "."

    def __str__(self) -> str:
        table = [("layer", "class", "status", "over", "note"), *(astuple(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in table
        ]
        return "\n".join([*lines, self.summary] if self.rows else [self.summary])


def describe(module: nn.Module) -> Description:
    """Which layers of ``module`` are synchronized, over whom; which are not, and why."""
    rows = tuple(_row(each, module.training) for each in find(module, _is_normalization))
    return Description(rows, module.training)


def _is_normalization(module: nn.Module) -> bool:
    """Batch normalization, or a leaf that is named for another one: every package has its own LayerNorm."""
    return is_batch_norm(module) or ("Norm" in type(module).__name__ and not module._modules)


def _row(each: Found, training: bool) -> Row:
    layer = each.layer
    status, over, reason = _standing(layer)
    fixed = not layer.training and getattr(layer, "running_mean", None) is not None
    if status in (SYNCHRONIZED, LOCAL, FOREIGN) and training and fixed:
        status, over = FROZEN, ""
        reason = "in eval mode while the model trains: normalizes by its running statistics"
    return Row(display_name(each), original_name(type(layer)), status, over, reason)


def _standing(layer: nn.Module) -> tuple[str, str, str]:
    """Status, over whom, and the reason, for a layer in training mode."""
    if is_held(layer):
        return FROZEN, "", "syncbn.freeze keeps it in eval mode"
    if isinstance(layer, SyncBatchNorm):
        over, note = _over(layer._exchange, _note(layer))
        return SYNCHRONIZED, over, _joined(_activation(layer), note)
    if is_frozen(layer):
        return FROZEN, "", "its class keeps the statistics fixed"
    if not is_batch_norm(layer):
        return UNAFFECTED, "", _why_unaffected(layer)
    if _is_foreign(layer):
        return FOREIGN, f"{type(layer).__module__.partition('.')[0]}'s choice", _why_unconverted(layer)
    return LOCAL, "this process", _why_unconverted(layer)


def _is_foreign(layer: nn.Module) -> bool:
    anchor = anchor_of(type(layer))
    return anchor is not None and "Sync" in anchor.__name__


def _why_unconverted(layer: nn.Module) -> str:
    if (why := reason_for_leaving(layer)) is not None:
        return why
    if (why := why_unconvertible(layer)) is not None:
        return f"syncbn.convert refuses it: {why}"
    return "not converted: call syncbn.convert(model)"


def _why_unaffected(layer: nn.Module) -> str:
    if "BatchNorm" in type(layer).__name__:
        return "not derived from torch's batch normalization: syncbn.convert does not know it"
    return "forms no statistics over the batch"


def _note(layer: SyncBatchNorm) -> str:
    if not layer.track_running_stats:
        return "no running statistics: in eval, those of this process's batch"
    if layer.affine and not any(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
        return "weight and bias do not learn; the running statistics still move"
    return ""


def _activation(layer: SyncBatchNorm) -> str:
    return f"applies {layer._fused_activation} to its output" if layer._fused_activation else ""


def _over(exchange: Exchange, note: str) -> tuple[str, str]:
    """Whose batches form the statistics, and what is to be known of it."""
    asked = "" if exchange.grouping == ALL else str(exchange.grouping)
    if not (dist.is_available() and dist.is_initialized()):
        return "this process", note or _joined(asked, "torch.distributed is not initialized")
    try:
        size = exchange.world_size
    except RuntimeError as error:  # saved with a group that is not here
        return "unknown", str(error)
    if asked and not exchange.grouped and dist.get_world_size() > 1:
        return exchange.grouping.kind, note
    if size == 1:
        return "this process", _joined(asked, note) or "there is no other"
    over = f"all {size} processes" if exchange.ranks is None else f"ranks {list(exchange.ranks)}"
    return over, _joined(asked, note)


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))
