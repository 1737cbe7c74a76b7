"""Random numbers of a training step, such as dropout's, that are the same after an interruption as without one."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from syncbn.training.randomness import reseed

# Apart from other things that are a function of (seed, epoch, number), such as the augmentation of an item.
_STEPS = 1


class StatelessRandom(Callback):
    """Sets the random generators at the start of each training step to a function of (seed, epoch, step, process).

    A generator's state is a history of all that was ever drawn, on each process and device; this needs none of it
    in a checkpoint. numpy's, Python's and torch's generators are set, the latter on the CPU and on all devices.

    Args:
        seed: another seed gives other random numbers.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # The epoch that the data loader was told, see Lightning's fit loop.
        progress: Any = trainer.fit_loop.epoch_progress.current
        reseed(self.seed, progress.processed, batch_idx, trainer.global_rank, _STEPS)
