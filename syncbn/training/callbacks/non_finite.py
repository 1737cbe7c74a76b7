"""A loss that is NaN or infinite: the run ends before its weights are saved, or goes on without that step."""

import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from syncbn.training.callbacks.checkpoints import within_accumulation
from syncbn.training.errors import UserError, few
from syncbn.training.processes import gather, rank, vote_group, world_size

_POLICIES = ("raise", "skip")


class NonFiniteLoss(Callback):
    """Ends the run, on all processes at the same step, when the loss of any is not finite; or skips such steps.

    With synchronized statistics, one process's broken batch makes the loss of all NaN in that step (and, without an
    optimizer that skips it, the weights). So the error also says whose batch had values that are not finite. No
    checkpoint is written after such a step: the last one has sound weights.

    With "raise", the device is waited for only where it has finished long ago: what a step has found is sent to the
    host behind it, read and told to the other processes on CPU sockets after the next one, and counted after the one
    after that. A step is an optimizer step, of all batches whose gradients are accumulated for it. With "skip", the
    host waits for the gradients before each optimizer step, which is then made without any, so that weights and
    optimizer state stay as they are. Under a gradient scaler (``precision="16-mixed"``), which skips such steps by
    itself, both policies bear with them: at first its scale is often too large. What the task logs of a skipped step is
    NaN all the same, an epoch's mean included.

    Args:
        policy: "raise" or "skip".
        patience: how many steps in a row may be skipped before the run ends.

    Raises:
        ValueError: there is no such policy, or ``patience`` is below 1.
    """

    def __init__(self, policy: Literal["raise", "skip"] = "raise", patience: int = 20) -> None:
        if policy not in _POLICIES:
            raise ValueError(f"policy must be one of {', '.join(_POLICIES)}, got {policy!r}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self.policy = policy
        self.patience = patience
        self._begin()

    def _begin(self) -> None:
        self._current: _Step | None = None
        self._read_next: _Step | None = None
        self._voted: _Step | None = None
        self._in_a_row = 0
        self._skipped: list[int] = []
        self._group: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin()
        self._group = vote_group()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._current is None:
            self._current = _Step(trainer.global_step + 1, pl_module.device)
        self._current.add_batch(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._current is not None:
            self._current.add_loss(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.policy == "skip" and self._current is not None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if self._anywhere(~self._current.loss_is_finite | ~_all_finite(gradients, pl_module.device)):
                self._current.skipped = True
                optimizer.zero_grad(set_to_none=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if within_accumulation(trainer):
            return
        step, self._current = self._current, None
        if step is not None:
            step.send_to_host()
        self._count(trainer, self._voted)
        self._voted = self._vote(self._read_next)
        self._read_next = step

    # All processes save together. What is under way is waited for: it decides whether the weights are worth saving.
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._settle(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._skipped and rank() == 0:
            warnings.warn(
                f"{len(self._skipped)} steps were skipped, since their loss or gradient was not finite: "
                f"{few(self._skipped)}",
                stacklevel=2,
            )
        self._begin()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._begin()

    def _anywhere(self, flag: Tensor) -> bool:
        """Whether it is so on any process; waits for the device."""
        number = flag.to(torch.int32)
        if world_size() > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return bool(number.item())

    def _settle(self, trainer: Trainer) -> None:
        """Counts all steps that have been made; the last one, too, where its checkpoint is saved within it."""
        self._count(trainer, self._voted)
        self._count(trainer, self._vote(self._read_next))
        self._voted = self._read_next = None
        if self._current is not None and not within_accumulation(trainer):
            step, self._current = self._current, None
            step.send_to_host()
            self._count(trainer, self._vote(step))

    def _vote(self, step: "_Step | None") -> "_Step | None":
        if step is not None:
            step.vote(self._group)
        return step

    def _count(self, trainer: Trainer, step: "_Step | None") -> None:
        """
        Raises:
            UserError: a step whose loss is not finite on some process, and which has not been skipped; or too many in a
                row that have been.
        """
        if step is None:
            return
        guilty = step.processes_with_non_finite_loss()
        if not guilty and not step.skipped:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        harmless = step.skipped or getattr(trainer.precision_plugin, "scaler", None) is not None
        if harmless:
            self._skipped.append(step.number)
        if not harmless or self._in_a_row >= self.patience:
            raise UserError(self._told(step, guilty, harmless))

    def _told(self, step: "_Step", guilty: list[int], harmless: bool) -> str:
        """On all processes together."""
        what = f"the loss is not finite on {_ranks(guilty)}" if guilty else "a gradient is not finite"
        row = f", nor in the {self._in_a_row - 1} steps before" if harmless else ""
        broken = {number: items for number, items in enumerate(gather(step.broken_items())) if items is not None}
        if broken:
            whose = "; ".join(f"the batch of rank {number} {items}" for number, items in broken.items())
            return f"step {step.number}: {what}{row}: {whose}"
        return (
            f"step {step.number}: {what}{row}, and all batches' values are: lower optimizer.lr, set "
            "trainer.gradient_clip_val, or find the operation with trainer.detect_anomaly=true"
        )


class _Step:
    """What one step has found, on the device until somebody reads it."""

    def __init__(self, number: int, device: torch.device) -> None:
        self.number = number
        self.skipped = False
        self.loss_is_finite = torch.ones((), dtype=torch.bool, device=device)
        self._input_is_finite = self.loss_is_finite
        self._indices: list[Tensor] = []
        self._on_host: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._votes: list[Tensor] = []
        self._work: dist.Work | None = None

    def add_batch(self, batch: Any) -> None:
        self._input_is_finite = self._input_is_finite & _all_finite(tree_leaves(batch), self.loss_is_finite.device)
        index = batch.get("index") if isinstance(batch, dict) else None
        if isinstance(index, Tensor):
            self._indices.append(index)

    def add_loss(self, loss: Tensor) -> None:
        self.loss_is_finite = self.loss_is_finite & loss.detach().isfinite().all()

    # On CUDA a copy is made when the device has done all that it was given before, so that one that is asked for later
    # would wait for the next step as well.
    def send_to_host(self) -> None:
        """Begins to copy what the other processes are to be told; to be called when the step has been made."""
        own = self.loss_is_finite.to(torch.int32).view(1)
        if own.is_cuda:
            self._on_host = torch.empty(1, dtype=torch.int32, pin_memory=True)
            self._on_host.copy_(own, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(own.device))
        else:
            self._on_host = own.cpu()

    def vote(self, group: Any) -> None:
        """Tells the other processes; does not wait for them, nor for what the device was given since the step."""
        assert self._on_host is not None
        if self._arrived is not None:
            self._arrived.synchronize()
        own = self._on_host
        self._votes = [own]
        if group is not None:
            self._votes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
            self._work = dist.all_gather(self._votes, own, group=group, async_op=True)

    def processes_with_non_finite_loss(self) -> list[int]:
        if self._work is not None:
            self._work.wait()
        return [number for number, vote in enumerate(self._votes) if not vote.item()]

    def broken_items(self) -> str | None:
        """What is wrong with this process's batch; None if nothing is."""
        if self._input_is_finite.item():
            return None
        items = ", ".join(str(item) for index in self._indices for item in index.flatten().tolist())
        return f"has values that are not finite{f' (items {items})' * bool(items)}"


def _all_finite(values: list[Any], device: torch.device) -> Tensor:
    """Whether all floating tensors are, as a tensor bool [] on the device."""
    result = torch.ones((), dtype=torch.bool, device=device)
    for value in _floating(values):
        own = value.to_local() if isinstance(value, DTensor) else value  # each process looks at its shard
        result = result & own.isfinite().all().to(device)
    return result


def _floating(values: list[Any]) -> Iterator[Tensor]:
    return (value for value in values if isinstance(value, Tensor) and value.is_floating_point())


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {few(ranks)}"
