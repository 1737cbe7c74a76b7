"""The two runs that ``verify`` compares: a model's on this process's part, and the plain model's on the union."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import Call, Surrounding
from ..freezing import is_held
from ..fusion import PART as FUSED
from ..inventory import describe
from ..layer import SyncBatchNorm
from ..peers import ALONE
from ..recipes import anchor_of, is_batch_norm
from ..selection import batch_norms
from ..surgery import convert, revert
from .meeting import InStep, Meeting, Stopped, Talk
from .recording import Key, Recorder, on_host
from .replay import Step, WithoutDropout, seeded, stop_dropping

Ranks = tuple[int, ...]
_Standing = tuple[str, str, str, int]  # status, over, reason, and over how many processes


@dataclass
class Run:
    """What one run has left."""

    tensors: dict[Key, Tensor] = field(default_factory=dict)  # in the order in which they came
    # Buffers that backward has moved: under activation checkpointing, PyTorch's own layers move them again there.
    before_backward: dict[Key, Tensor] = field(default_factory=dict)
    calls: list[tuple[str, int]] = field(default_factory=list)  # of layers, in forward order
    moved_random: bool = False
    dropped: bool = False  # whether there was any dropout


@dataclass
class PartRun(Run):
    """What the run on this process's part has left."""

    ranks: Ranks = ()  # over whom most layers are synchronized
    standings: list[tuple[str, _Standing]] = field(default_factory=list)
    masked: set[str] = field(default_factory=set)  # layers with what PyTorch's own cannot take
    uncalled: set[str] = field(default_factory=set)  # layers whose work has been done without calling them
    fused: set[tuple[str, str]] = field(default_factory=set)  # what there is not in the plain model: layer, "output"
    unused: list[str] = field(default_factory=list)  # leaves that nothing has called


def run_on_part(
    talk: Talk, model: nn.Module, inputs: Any, targets: Any, step: Step, averages: bool, group_given: bool
) -> tuple[PartRun, Meeting]:
    """One step of a copy of the model. Where one process fails, all do; where they part, all stop.

    Args:
        averages: whether each part's loss counts as much as there are processes in the union.
        group_given: whether the union is that of all who take part, whatever the layers are synchronized over.
    """
    layers = [each.name for each in batch_norms(model)]
    meeting = Meeting(talk.host, [name or "the model" for name in layers])
    run, error = PartRun(), None
    try:
        _step_on_part(talk, model, inputs, targets, step, averages, group_given, meeting, run)
    except Stopped:
        pass
    except Exception as raised:
        error = _with_hint(raised, step) if meeting.parted is None else None
        meeting.leave(failed=True)
    else:
        meeting.leave(failed=False)
    if meeting.failed or error is not None:
        talk.agree(error)
    return run, meeting


def _step_on_part(
    talk: Talk,
    model: nn.Module,
    inputs: Any,
    targets: Any,
    step: Step,
    averages: bool,
    group_given: bool,
    meeting: Meeting,
    run: PartRun,
) -> None:
    copied = step.copy(model)
    in_step: dict[str, InStep] = {}
    for number, each in enumerate(batch_norms(copied)):
        if isinstance(each.layer, SyncBatchNorm):
            in_step[each.name] = InStep(each.layer._exchange, number, meeting)
            vars(each.layer)["_exchange"] = in_step[each.name]
    run.fused = _fused(copied)
    watch = _MaskWatch()

    def weight() -> float:
        run.ranks = talk.ranks if group_given else _over_most(copied, talk.ranks)
        return 1 / len(run.ranks) if averages else 1.0

    try:
        with watch:
            recorder = _run(copied, step.cast(inputs), step.cast(targets), step, weight, run)
    finally:
        run.standings = _standings(copied, model)
    run.masked = {name for name, each in in_step.items() if each in watch.sources}
    run.uncalled = {name for name, each in in_step.items() if each.used and not recorder.calls[name]}
    idle = [(name, each) for name, each in copied.named_modules() if not each._modules and not recorder.calls[name]]
    run.unused = [name for name, each in idle if name not in run.uncalled and _has_state(each)]
    run.uncalled |= {name for name, each in idle if not _has_state(each) and _is_fused_away(name, copied)}


def run_on_union(
    model: nn.Module, inputs: Any, targets: Any, step: Step, part: PartRun, masked: Collection[str]
) -> Run:
    """One step of the plain model in this process alone.

    Args:
        masked: names of layers for which PyTorch's own cannot stand in.
    """
    try:
        run = Run()
        _run(
            _plain(step.copy(model), masked), step.cast(inputs), step.cast(targets), step, lambda: 1.0, run, part.fused
        )
    except Exception as error:
        raise _with_hint(error, step) from None
    return run


def _run(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    step: Step,
    weight: Callable[[], float],
    run: Run,
    fused: Collection[tuple[str, str]] = (),
) -> Recorder:
    fused = run.fused if isinstance(run, PartRun) else fused
    run.dropped = stop_dropping(model)
    with ExitStack() as stack:
        has_moved = stack.enter_context(seeded(model))
        without = stack.enter_context(WithoutDropout())
        recorder = stack.enter_context(Recorder(model, fused))
        outputs = step.forward(model, inputs)
        run.calls = sorted(recorder.order, key=lambda call: call[0] == "")  # the model itself at the end
        moved = _buffers(model)
        recorder.in_backward = True
        step.backward(outputs, targets, weight())
        run.moved_random = has_moved()
    run.dropped |= without.used
    after = _buffers(model)
    run.tensors = recorder.tensors | _gradients(model) | after
    run.before_backward = {key: value for key, value in moved.items() if not torch.equal(value, after[key])}
    return recorder


def _gradients(model: nn.Module) -> dict[Key, Tensor]:
    return {
        Key(*_place(name), f"grad of {name.rpartition('.')[2]}"): on_host(
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _buffers(model: nn.Module) -> dict[Key, Tensor]:
    return {Key(*_place(name), name.rpartition(".")[2]): on_host(buffer) for name, buffer in model.named_buffers()}


def _place(name: str) -> tuple[str, int]:
    """The layer of a parameter or buffer, and that it belongs to no call."""
    return name.rpartition(".")[0], 0


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(), *module.buffers()))


def _with_hint(error: Exception, step: Step) -> Exception:
    if step.dtype is not None and ("dtype" in str(error) or "scalar type" in str(error)):
        error.add_note(f"syncbn.verify runs the model in {step.dtype}: pass dtype=None for the one it is in")
    return error


# ---- the synchronized model


def _fused(model: nn.Module) -> set[tuple[str, str]]:
    """What is different in a model that ``fuse`` has changed: between a layer and its activation there is nothing."""
    roles = {name: vars(each)[FUSED].role for name, each in model.named_modules() if FUSED in vars(each)}
    places = {"layer": "output", "activation": "input"}
    return {(name, places[role]) for name, role in roles.items() if role in places}


class _MaskWatch(Surrounding):
    """Which layers are given what PyTorch's own cannot take: a mask, or a residual that fusing has not brought."""

    def __init__(self) -> None:
        self.sources: list[Any] = []

    def changed(self, call: Call) -> Call:
        unfused = call.residual is not None and call.layer.activation is None
        if call.mask is not None or unfused:
            self.sources.append(call.source)
        return call


def _over_most(model: nn.Module, everybody: Ranks) -> Ranks:
    """The ranks over which most of the layers that train are synchronized; of several such, the most ranks."""
    over = Counter(
        each.layer._exchange.ranks or everybody
        for each in batch_norms(model)
        if isinstance(each.layer, SyncBatchNorm) and each.layer.training
    )
    return max(over, key=lambda ranks: (over[ranks], len(ranks)), default=everybody)


def _standings(copied: nn.Module, model: nn.Module) -> list[tuple[str, _Standing]]:
    layers = [(each.name, each.layer) for each in batch_norms(copied)]
    sizes = {name: layer._exchange.world_size for name, layer in layers if isinstance(layer, SyncBatchNorm)}
    # Whom a layer is synchronized with, the copy knows, which has run; why one was left out, the model.
    rows = zip(describe(copied).rows, describe(model).rows, strict=True)
    return [(row.name, (row.status, row.over, was.reason or row.reason, sizes.get(row.name, 1))) for row, was in rows]


def _is_fused_away(name: str, model: nn.Module) -> bool:
    """Whether the module's owner may have been given a forward without it."""
    parts = name.split(".")
    owners = (vars(model.get_submodule(".".join(parts[:i]))).get(FUSED) for i in range(len(parts)))
    return any(part is not None and part.role == "owner" for part in owners)


# ---- the plain model


def _plain(model: nn.Module, masked: Collection[str]) -> nn.Module:
    """The model with PyTorch's own layers; where there are none such, with ones that form statistics alone."""
    revert(model)
    _train_as_their_containers(model)
    for each in batch_norms(model):
        foreign = "Sync" in getattr(anchor_of(type(each.layer)), "__name__", "")
        if isinstance(each.layer, SyncBatchNorm) or foreign or each.name in masked:
            vars(convert(each.layer))["_exchange"] = ALONE
    return model


def _train_as_their_containers(model: nn.Module) -> None:
    for container in model.modules():
        for layer in container.children():
            has_statistics = getattr(layer, "running_mean", None) is not None
            if container.training and is_batch_norm(layer) and not is_held(layer) and has_statistics:
                layer.training = True
