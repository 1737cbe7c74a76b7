"""The average of the weights over the last steps, running statistics included."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from syncbn.training.errors import UserError

_LATEST = "latest_update_step"


class ExponentialMovingAverage(WeightAveraging):
    """Validates, saves and ends with an exponential moving average of the weights; trains on as without it.

    After each step, average = decay * average + (1 - decay) * weights, and likewise for running means and variances:
    averaged weights with the running statistics of others would be normalized for activations that they do not have.
    Counters are copied. A checkpoint's `state_dict` is the average; what training goes on from is kept beside it.

    Lightning's WeightAveraging does the rest, with what it leaves open for a run that resumes exactly: counters
    stay whole; the average lies on the device that trains; a checkpoint that is saved in the middle of a validation,
    after training, or by a callback that comes before this one holds what it should. Only with `save_weights_only`
    Lightning asks no callback, and would save the weights that are trained, so that it is refused; of
    `trainer.save_checkpoint(path, weights_only=True)`, called while training, nobody hears.

    Args:
        decay: towards 1, the average looks further back, over about 1 / (1 - decay) updates.
        ramp: the decay is at most (1 + n) / (10 + n) at update n, so that a short run is not the average of its
            beginning.
        every_n_steps: how many optimizer steps there are between updates.

    Raises:
        ValueError: an argument is outside its range.
        UserError: when training starts, a ModelCheckpoint has `save_weights_only`.
    """

    def __init__(self, decay: float = 0.999, ramp: bool = True, every_n_steps: int = 1) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be from 0 to below 1, got {decay}")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        super().__init__(use_buffers=True, multi_avg_fn=self._average)
        self.decay = decay
        self.ramp = ramp
        self.every_n_steps = every_n_steps
        self._swapped = False  # whether the module has the average, and the average model what is trained

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and (step_idx + 1) % self.every_n_steps == 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._swapped = False
            if any(isinstance(c, ModelCheckpoint) and c.save_weights_only for c in trainer.checkpoint_callbacks):
                raise UserError(
                    "save_weights_only of a ModelCheckpoint would save the weights that are trained, not their moving "
                    "average: set it to false, or leave the average out"
                )

    # Now the module is where it is trained. The count of updates stays on the host, which reads it at each.
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._average_model is not None
        self._average_model.module.to(pl_module.device)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn is TrainerFn.FITTING and not self._swapped:
            self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn is TrainerFn.FITTING and self._swapped:
            self._swap(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not a copy: a checkpoint that is saved from now on can still be trained further.
        if not self._swapped:
            self._swap(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average_model is None:
            return  # of other weights than those that were averaged
        if not self._swapped:
            # A callback that comes before this one saves after a step that has not been averaged yet.
            self.on_train_batch_end(trainer, pl_module, None, None, 0)
            if self.state_key in checkpoint.get("callbacks", {}):
                checkpoint["callbacks"][self.state_key][_LATEST] = self._latest_update_step
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._swapped:
            checkpoint["state_dict"], checkpoint["current_model_state"] = (
                checkpoint["current_model_state"],
                checkpoint["state_dict"],
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn is TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
        else:
            self._average_model = None  # the module has just been given other weights, an average already

    def _swap(self, pl_module: LightningModule) -> None:
        self._swap_models(pl_module)
        self._swapped = not self._swapped

    def _average(self, averages: list[Tensor], currents: list[Tensor], _: Any) -> None:
        """One update of tensors of one dtype and device."""
        assert self._average_model is not None
        if not averages[0].is_floating_point():
            torch._foreach_copy_(averages, currents)
            return
        updates = int(self._average_model.n_averaged)
        decay = min(self.decay, (1 + updates) / (10 + updates)) if self.ramp else self.decay
        torch._foreach_lerp_(averages, currents, 1 - decay)
