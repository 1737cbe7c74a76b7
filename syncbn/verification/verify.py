"""``verify``: whether a model on several processes does what it does on one with all their inputs, layer by layer."""

from __future__ import annotations

import hashlib
import sys
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from ..calls import enter_only, entered
from ..communicator import initialized, resolve
from ..host import HostCommunicator, host_communicators
from ..inventory import FROZEN
from ..kept_state import random_state_kept
from ..selection import batch_norms
from ..surgery import original_name
from .differences import Against, compare, merged
from .meeting import Meeting, Talk
from .recording import Key, bytes_of, on_host
from .replay import Loss, Step
from .result import AT_THE_START, Facts, Row, Standing, Verification, causes
from .runs import PartRun, Ranks, Run, run_on_part, run_on_union
from .unions import samples_in, union_of


def verify(
    model: nn.Module,
    inputs: Any,
    targets: Any = None,
    *,
    loss: Loss | None = None,
    reduction: Literal["sum", "mean"] = "sum",
    dtype: torch.dtype | None = torch.float64,
    tolerance: float | None = None,
    process_group: Any = None,
) -> Verification:
    """Runs one training step of ``model`` on all processes, and of the plain model on one with all their inputs.

    Compared are every layer's output, the gradients of its output, input and parameters, and its running statistics
    afterwards. What disagrees first, and why that may be, is in the result, which is the same on every process::

        found = syncbn.verify(model, images)
        if rank == 0:
            print(found)

    The plain model is ``syncbn.revert``'s: PyTorch's own layers. Both runs are made with copies, in float64, with the
    same weights and the same seed, so that nothing is left to rounding or chance. The model stays as it was:
    parameters, gradients, buffers, modes, hooks, random state.

    A few details are taken care of here:

    - Dropout is switched off, and stochastic depth as timm and torchvision name it: no two runs have the same masks.
    - Parts may have different numbers of samples, or none.
    - A layer in eval mode in a container that trains is compared with one that trains, since this is most often a
      mistake. One that ``syncbn.freeze`` holds, or that is in eval mode with the container around it, is meant so.
    - A process that fails, or is in another layer than the others, stops them all: nobody waits for it.
    - Layers that take a mask or a residual, which PyTorch's cannot, are compared with themselves in one process.

    The union is that of the processes over which most layers are synchronized. The first process of it holds the
    union's inputs, a copy of the model, all that its step needs, and all layers' outputs and their gradients on the
    host; every process holds those of its own part.

    Args:
        model: on every process; of a DistributedDataParallel, its module is run. In the modes that it is in.
        inputs: this process's part of a batch. A tuple are the arguments of the call, a dict its keyword arguments,
            anything else is the one argument. Tensors are parts of the union along dimension 0; a list has an entry
            for each sample.
        targets: passed to ``loss`` after the outputs; of parts like ``inputs``.
        loss: makes a scalar of the outputs. None: the sum of a fixed random projection of every tensor in them.
        reduction: "sum" if the union's loss is the sum of the parts' losses; "mean" if it is their mean: where each is
            a mean over equally many samples, and DistributedDataParallel averages the gradients.
        dtype: that of the copies and of all floating inputs; None to leave them as they are.
        tolerance: how large an error may be, in units of the greatest absolute value of a tensor; None for 1e-7 in
            float64, 1e-3 in float32, 0.1 in less.
        process_group: who takes part, and whose parts are the union, see ``syncbn.convert``; None for all processes.

    Raises:
        TypeError: the model is sharded, or has not seen an input yet; or no scalar can be made of its outputs.
        ValueError: the parts have no union.
        RuntimeError: another process has failed, or has another model. Where one process raises, all do: it its own
            error, the others one that says who and what.
    """
    model = _unwrapped(model)
    talk = Talk(_host(process_group))
    with ExitStack() as stack:
        stack.enter_context(random_state_kept(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.callback(enter_only, entered())  # the blocks that this stands in are about other batches
        enter_only(())
        if "torch._dynamo" in sys.modules:  # or else nothing is compiled, and importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if dtype is not None:
            for kind in {tensor.device.type for tensor in model.parameters()} | {"cpu"}:
                stack.enter_context(torch.autocast(kind, enabled=False))
        batch = _Batch(inputs, targets)
        return _Verifier(talk, model, batch, Step(loss, dtype), reduction, tolerance, process_group is not None).run()


def _host(process_group: Any) -> HostCommunicator | None:
    """How the processes that take part talk; None for one alone."""
    if not initialized():
        return None
    host = host_communicators.of(resolve(process_group))
    return host if len(host.ranks) > 1 else None


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(compiled := model._modules.get("_orig_mod"), nn.Module):
            model = compiled
        else:
            return model


class _Batch(NamedTuple):
    """A part, or the union."""

    inputs: Any
    targets: Any


class _Verifier:
    """One verification, in which every process goes through the same phases."""

    def __init__(
        self,
        talk: Talk,
        model: nn.Module,
        batch: _Batch,
        step: Step,
        reduction: str,
        tolerance: float | None,
        group_given: bool,
    ) -> None:
        self._talk, self._model, self._batch, self._step = talk, model, batch, step
        self._reduction, self._tolerance, self._group_given = reduction, tolerance, group_given

    def run(self) -> Verification:
        talk, model, step = self._talk, self._model, self._step
        models: list[_Model] = talk.share(talk.together(self._described))
        _require_same(talk.ranks, models)
        averages = self._reduction == "mean"
        part, meeting = run_on_part(talk, model, *self._batch, step, averages, self._group_given)
        said: list[_Said] = talk.share(_said(part))
        groups = [_agreed(talk.ranks, [each.ranks for each in said], rank) for rank in talk.ranks]
        group = groups[talk.ranks.index(talk.rank)]
        differing = [name for name in models[0].digests if len({each.digests[name] for each in models}) > 1]
        start = _at_the_start(step, model, differing)
        against = self._against({name for each in said for name in each.uncalled})
        union = None
        if meeting.parted is None:
            union = self._union(group, part, {name for each in said for name in each.masked})
        elif group[0] == talk.rank:
            union = Run()  # of which only the start is compared
        if union is not None:
            union.tensors = start | union.tensors
        of_union, otherwise = (union.tensors, union.before_backward) if union is not None else (None, None)
        found = compare(talk, group, start | part.tensors, of_union, against, otherwise)
        everyones = talk.share((found, union.calls if union is not None else []))
        rows = merged([rows for rows, _ in everyones])
        if meeting.parted is not None:
            rows = [row for row in rows if row.what.endswith(AT_THE_START)] + [_parting(meeting, against)]
        calls = [(name or "the model", call) for name, call in max((calls for _, calls in everyones), key=len)]
        standings = _standings(talk.ranks, said)
        verification = Verification(
            rows=tuple(rows),
            groups=tuple(sorted(set(groups))),
            samples=tuple(each.samples for each in models),
            dtype=str(against.dtype).removeprefix("torch."),
            tolerance=against.within,
            notes=tuple(self._notes(said, standings, groups)),
            order=tuple(calls),
        )
        return self._explained(verification, meeting, standings, any(each.moved_random for each in said), len(group))

    def _described(self) -> _Model:
        """Raises TypeError or ValueError where the model cannot be run like this."""
        if self._reduction not in ("sum", "mean"):
            raise ValueError(f'expected reduction to be "sum" or "mean", got {self._reduction!r}')
        _require_whole(self._model)
        values = _values(self._model)
        structure = [
            f"{name or 'the model'}: {original_name(type(each))}" for name, each in self._model.named_modules()
        ]
        structure += [f"{name} of shape {list(each.shape)}" for name, each in values.items()]
        structure += [f"reduction={self._reduction!r}, dtype={self._step.dtype}, tolerance={self._tolerance}"]
        digests = {name: _digest(each) for name, each in values.items()}
        return _Model(structure, digests, samples_in(self._batch.inputs))

    def _union(self, group: Ranks, part: PartRun, masked: set[str]) -> Run | None:
        """The run on the union, in the group's first process. Collective over all processes."""
        talk, model = self._talk, self._model
        if group[0] != talk.rank:
            talk.send_object(self._batch, group[0])
            talk.agree(None)
            return None
        device = _device(self._batch.inputs, model)
        parts = [self._batch if rank == talk.rank else talk.receive_object(rank, device) for rank in group]

        def run() -> Run:
            inputs = union_of([each.inputs for each in parts], "inputs")
            targets = union_of([each.targets for each in parts], "targets")
            return run_on_union(model, inputs, targets, self._step, part, masked)

        return talk.together(run)

    def _against(self, uncalled: set[str]) -> Against:
        gammas = {}
        for each in batch_norms(self._model):
            weight = getattr(each.layer, "weight", None)
            gammas[each.name] = float(weight.detach().abs().max()) if weight is not None and weight.numel() else 1.0
        return Against(
            averages=self._reduction == "mean",
            dtype=self._step.dtype or _least_precise(self._model, self._batch.inputs),
            tolerance=self._tolerance,
            classes={name: original_name(type(each)) for name, each in self._model.named_modules()},
            gammas=gammas,
            uncalled=uncalled,
        )

    def _explained(
        self,
        found: Verification,
        meeting: Meeting,
        standings: dict[str, Standing],
        moved_random: bool,
        expected: int,
    ) -> Verification:
        if found.first is None:
            return found
        facts = Facts(
            standings=standings,
            expected=expected,
            samples=found.samples,
            reduction=self._reduction,
            own_loss=self._step.loss is not None,
            draws_random_numbers=moved_random,
            before={call: found.order[i][0] for i, call in enumerate(found.order[1:])},
            parted=meeting.parted,
        )
        return replace(found, causes=tuple(causes(found.first, facts)))

    def _notes(self, said: list[_Said], standings: dict[str, Standing], groups: list[Ranks]) -> list[str]:
        notes = []
        model = self._model
        if len(self._talk.ranks) == 1:
            notes.append("one process: there is nobody to synchronize with; the layers were compared with plain ones")
        elif max(map(len, groups)) == 1:
            notes.append("every layer forms its statistics in one process alone: with itself it was compared")
        if not any(True for _ in batch_norms(model)):
            notes.append("there is no batch normalization layer in the model")
        elif not model.training:
            notes.append(
                "the model is in eval mode, in which nothing is synchronized: call model.train() to compare it"
            )
        frozen = [name for name, each in standings.items() if any(s[0] == FROZEN for s in each.by_rank.values())]
        if frozen and model.training:
            notes.append(f"normalizing by fixed statistics: {_listed(frozen)}")
        if any(each.dropped for each in said):
            notes.append("dropout was switched off, since no two runs have the same masks")
        if any(each.moved_random for each in said):
            notes.append("the model draws random numbers, which may differ between the runs")
        masked = sorted({name for each in said for name in each.masked})
        if masked:
            notes.append(
                f"with a mask or a residual, which PyTorch's layers do not take, so compared with themselves in one "
                f"process: {_listed(masked)}"
            )
        fused = sorted({name for each in said for name, what in each.fused if what == "output"})
        if fused:
            notes.append(f"fused with what follows, whose output is compared in place of theirs: {_listed(fused)}")
        unused = [name for name in said[0].unused if all(name in each.unused for each in said)]
        if unused:
            notes.append(f"not called by anything, so not compared: {_listed(unused)}")
        return notes


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(name or 'the model' for name in names[:most])}{more}"


# ---- what the processes tell each other


class _Model(NamedTuple):
    """What a process says of its model before anything is run."""

    structure: list[str]
    digests: dict[str, str]  # of all parameters and buffers
    samples: int | None


def _require_whole(model: nn.Module) -> None:
    sharded = {"FullyShardedDataParallel", "FSDPModule"}
    for name, module in model.named_modules():
        if sharded & {base.__name__ for base in type(module).__mro__}:
            raise TypeError(
                f"{name or 'the model'} is sharded over the processes, so that none of them can run it alone: verify "
                f"the model before it is sharded"
            )
    of_meshes = [name for name, each in _values(model).items() if type(each.data).__name__ == "DTensor"]
    if of_meshes:
        raise TypeError(
            f"{_listed(of_meshes)} are spread over the processes (DTensor), so that none of them can run the model "
            f"alone: verify it before it is parallelized"
        )
    lazy = [name for name, each in _values(model).items() if is_lazy(each)]
    if lazy:
        raise TypeError(f"{_listed(lazy)} have no size yet: run the model once, then verify it")


def _values(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(bytes_of(on_host(tensor))).hexdigest()


def _require_same(ranks: Ranks, models: list[_Model]) -> None:
    for rank, each in zip(ranks, models, strict=True):
        for index in range(max(len(models[0].structure), len(each.structure))):
            a, b = (m.structure[index] if index < len(m.structure) else "nothing more" for m in (models[0], each))
            if a != b:
                raise RuntimeError(
                    f"the processes have different models: rank {ranks[0]} has {a}, rank {rank} has {b}. Every process "
                    f"must run the same model"
                )


class _Said(NamedTuple):
    """What a process says of its run."""

    ranks: Ranks
    standings: list[Any]
    masked: set[str]
    uncalled: set[str]
    fused: set[tuple[str, str]]
    unused: list[str]
    moved_random: bool
    dropped: bool


def _said(run: PartRun) -> _Said:
    return _Said(*(getattr(run, name) for name in _Said._fields))


def _agreed(ranks: Ranks, said: list[Ranks], rank: int) -> Ranks:
    """The union's ranks of one process, if all of them say the same; everybody, if they do not."""
    by_rank = dict(zip(ranks, said, strict=True))
    group = by_rank[rank]
    return group if rank in group and all(by_rank.get(member) == group for member in group) else ranks


def _standings(ranks: Ranks, said: list[_Said]) -> dict[str, Standing]:
    everyones = [dict(each.standings) for each in said]
    names = dict.fromkeys(name for each in everyones for name in each)
    return {
        name: Standing({rank: each[name] for rank, each in zip(ranks, everyones, strict=True) if name in each})
        for name in names
    }


def _at_the_start(step: Step, model: nn.Module, names: list[str]) -> dict[Key, Tensor]:
    """The values that are not the same on all processes."""
    values = _values(model)
    return {
        Key(name.rpartition(".")[0], 0, f"{name.rpartition('.')[2]} {AT_THE_START}"): on_host(values[name])
        for name in names
    }


def _parting(meeting: Meeting, against: Against) -> Row:
    """The row of processes that did not meet."""
    layer = meeting.first_layer or "the model"
    return Row(layer, against.classes.get(layer, ""), "call", 1, None, False, (), "the processes part there")


def _device(inputs: Any, model: nn.Module) -> torch.device:
    tensors = [each for each in (*tree_leaves(inputs), *model.parameters()) if isinstance(each, Tensor)]
    return next((each.device for each in tensors if each.device.type != "cpu"), torch.device("cpu"))


def _least_precise(model: nn.Module, inputs: Any) -> torch.dtype:
    tensors = [each for each in (*tree_leaves(inputs), *model.parameters()) if isinstance(each, Tensor)]
    dtypes = {each.dtype for each in tensors if each.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
