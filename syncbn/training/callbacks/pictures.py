"""Pictures of a run: what the model makes of some validation images, and the course of metrics. Only rank 0 draws."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from syncbn.training.drawing import Example, compare, rendered


class Pictures(Callback):
    """Draws truth and prediction of some validation images: masks or boxes, whichever the task predicts.

    In training every few epochs, into ``folder`` as ``epoch_003.png`` and into TensorBoard if a logger is one; and
    once more where the trained model is validated on its own (``Trainer.validate`` after ``Trainer.fit``), into
    ``path``, so that this shows the checkpoint that was chosen.

    The images are the first that rank 0 validates, with the weights that are validated (averaged ones, if so) and
    as the task is given them. It needs what the tasks of this package have: ``predict_step`` gives classes
    [B, H, W], or a dict of boxes, labels and scores for each image.

    Args:
        path: file for the chosen checkpoint's picture.
        folder: folder for those of the epochs; None for none.
        images: how many to show.
        every_n_epochs: how often; it takes a validation to draw.
        min_score: boxes that score less are not drawn.

    Raises:
        ValueError: a number is below 1, or the score is outside 0 to 1.
    """

    def __init__(
        self,
        path: str,
        folder: str | None = None,
        images: int = 8,
        every_n_epochs: int = 1,
        min_score: float = 0.3,
    ) -> None:
        for name, value in {"images": images, "every_n_epochs": every_n_epochs}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
        if not 0 <= min_score <= 1:
            raise ValueError(f"min_score must be from 0 to 1, got {min_score}")
        self.path = Path(path)
        self.folder = None if folder is None else Path(folder)
        self.images = images
        self.every_n_epochs = every_n_epochs
        self.min_score = min_score
        self._wanted = 0  # in the validation under way
        self._examples: list[Example] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._examples = []
        self._wanted = self.images if trainer.is_global_zero and self._due(trainer) else 0

    # Here, not after the validation, when averaged weights have been put back.
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        missing = self._wanted - len(self._examples)
        if missing <= 0 or not isinstance(batch, Mapping):
            return
        # Everything is in eval mode: nothing is synchronized, one process may run the model alone.
        few = {key: value[:missing] for key, value in batch.items() if isinstance(value, (Tensor, list, tuple))}
        with torch.inference_mode(), trainer.precision_plugin.val_step_context():
            predictions = pl_module.predict_step(few, batch_idx)
        self._examples += examples(few, predictions)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._examples:
            return
        figure = compare(self._examples, _class_names(pl_module, trainer), self.min_score)
        self._examples = []
        epoch = trainer.current_epoch + 1
        figure.suptitle(_title(trainer, epoch), fontsize=12)
        if trainer.state.fn is TrainerFn.VALIDATING:
            _save(figure, self.path)
            return
        if self.folder is not None:
            _save(figure, self.folder / f"epoch_{epoch:03d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("predictions", rendered(figure), trainer.global_step, dataformats="HWC")

    def _due(self, trainer: Trainer) -> bool:
        if trainer.state.fn is TrainerFn.VALIDATING:
            return True
        if trainer.sanity_checking:
            return False
        # Not the epochs' numbers alone: some may end without a validation.
        epoch, since = trainer.current_epoch + 1, trainer.check_val_every_n_epoch or 1
        return epoch // self.every_n_epochs > (epoch - since) // self.every_n_epochs


def examples(batch: Mapping[str, Any], predictions: Any) -> list[Example]:
    """The items of a batch with what a task predicts for them, without the padding.

    Batch as the tasks get it: `image`, and `semantic` (with `valid` where padded) or `targets`.
    """
    result = []
    for i in range(len(predictions)):
        if isinstance(predictions, Tensor):
            image, truth, prediction = batch["image"][i], batch["semantic"][i], predictions[i]
            if (valid := batch.get("valid")) is not None:
                rows, columns = _extent(valid[i].any(0) if valid[i].ndim == 3 else valid[i])
                image, truth, prediction = (each[..., rows, columns] for each in (image, truth, prediction))
            result.append(Example(image.cpu(), truth.cpu(), prediction.cpu()))
        else:
            target, found = batch["targets"][i], predictions[i]
            result.append(Example(batch["image"][i].cpu(), _boxes(target), _boxes(found)))
    return result


def _boxes(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: found[name].detach().cpu() for name in ("boxes", "labels", "scores") if name in found}


def _extent(valid: Tensor) -> tuple[slice, slice]:
    """Rows and columns of the rectangle that is valid, bool [H, W]."""
    rows, columns = valid.any(1).nonzero(), valid.any(0).nonzero()
    if len(rows) == 0:
        return slice(None), slice(None)
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _class_names(task: LightningModule, trainer: Trainer) -> tuple[str, ...]:
    names = getattr(task, "class_names", None) or trainer.datamodule.class_names  # type: ignore[attr-defined]
    return tuple(map(str, names))


def _title(trainer: Trainer, epoch: int) -> str:
    when = "" if trainer.state.fn is TrainerFn.VALIDATING else f", epoch {epoch}"
    monitored = [each.monitor for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    known = trainer.callback_metrics
    values = [f", {name} {float(known[name]):.3f}" for name in monitored if name is not None and name in known]
    return f"validation images{when}{''.join(values)}"


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rendered(figure)).save(path)


class Curves(Callback):
    """Draws the course of metrics over the epochs when training ends. A resumed run shows the whole course.

    Args:
        path: file to write.
        panels: title of each panel -> label of each curve -> name of the logged metric.
    """

    def __init__(self, path: str, panels: Mapping[str, Mapping[str, str]]) -> None:
        self.path = Path(path)
        self.panels = {title: dict(curves) for title, curves in panels.items()}
        self.history: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wanted = {name for curves in self.panels.values() for name in curves.values()}
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name in wanted}
        if not logged and self.history and self.history[-1]["step"] == trainer.global_step:
            return  # resumed at the end of an epoch, which Lightning ends once more
        self.history.append({"step": float(trainer.global_step), **logged})

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.history:
            self._draw()

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = list(state_dict["history"])

    def _draw(self) -> None:
        # A task logs its own metrics: the panels of others stay away.
        panels = {title: curves for title, curves in self.panels.items() if self._has_points(curves)}
        if not panels:
            return
        figure = Figure(figsize=(4.6 * len(panels), 3.4), dpi=120, layout="constrained")
        axes: list[Axes] = list(figure.subplots(1, len(panels), squeeze=False)[0])
        for axis, (title, curves) in zip(axes, panels.items(), strict=True):
            for label, name in curves.items():
                points = [(row["step"], row[name]) for row in self.history if name in row]
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
            axis.set(title=title, xlabel="step")
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(frameon=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.path)

    def _has_points(self, curves: Mapping[str, str]) -> bool:
        return any(name in row for row in self.history for name in curves.values())
