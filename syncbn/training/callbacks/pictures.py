"""Pictures of a run: `predictions.png` and `curves.png`. Only rank 0 draws."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

# Class 0 is near black, so that colour on the masks always means a digit.
_PALETTE = (
    "#15181c", "#e6194b", "#f58231", "#ffe119", "#bfef45", "#3cb44b",
    "#42d4f4", "#4363d8", "#911eb4", "#f032e6", "#fabed4",
)  # fmt: skip


class SegmentationPictures(Callback):
    """Draws image, truth and prediction of some validation scenes, after the last validation.

    It draws when the trained model is validated on its own (`Trainer.validate` after `Trainer.fit`), so the
    picture shows the checkpoint that was chosen. The data module must offer `val_scenes` and `class_names`.

    Args:
        path: file to write.
        scenes: how many scenes to show, the first of the validation set.
    """

    def __init__(self, path: str, scenes: int = 8) -> None:
        if scenes < 1:
            raise ValueError(f"scenes must be at least 1, got {scenes}")
        self.path = Path(path)
        self.scenes = scenes

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING and trainer.is_global_zero:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, task: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        scenes = [data.val_scenes[i] for i in range(min(self.scenes, len(data.val_scenes)))]
        images = torch.stack([scene["image"] for scene in scenes]).to(task.device)
        # The module is still in eval mode: nothing is synchronized, one process may run it alone.
        with torch.inference_mode(), trainer.precision_plugin.val_step_context():
            predictions = task.predict_step({"image": images}, 0).cpu()
        names = data.class_names
        figure = draw_segmentation(scenes, predictions, names)
        miou = trainer.callback_metrics.get("val/miou")
        if miou is not None:
            figure.suptitle(f"validation scenes, mean IoU {float(miou):.3f}", fontsize=13)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.path)


def draw_segmentation(scenes: list[dict[str, Any]], predictions: torch.Tensor, class_names: tuple[str, ...]) -> Figure:
    """Image, truth and prediction of each scene side by side, two scenes to a row, and a legend of the
    classes.

    Scenes as `DigitScenes` gives them, predictions int64 [len(scenes), H, W].
    """
    colours = ListedColormap([_PALETTE[i % len(_PALETTE)] for i in range(len(class_names))])
    rows, pairs = (len(scenes) + 1) // 2, min(len(scenes), 2)
    figure = Figure(figsize=(1.75 * 3 * pairs + 0.3, 1.75 * rows + 1.1), dpi=120, layout="constrained")
    axes = figure.subplots(rows, 3 * pairs, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, scene in enumerate(scenes):
        row, first = divmod(i, pairs)
        image, truth, prediction = axes[row][3 * first : 3 * first + 3]
        image.imshow(scene["image"].permute(1, 2, 0).float().numpy())
        for axis, mask in ((truth, scene["semantic"]), (prediction, predictions[i])):
            axis.imshow(mask.numpy(), cmap=colours, vmin=-0.5, vmax=len(class_names) - 0.5, interpolation="nearest")
        if row == 0:
            for axis, title in ((image, "image"), (truth, "truth"), (prediction, "prediction")):
                axis.set_title(title, fontsize=10)
    figure.legend(
        handles=[Patch(facecolor=colours(i), label=name) for i, name in enumerate(class_names)],
        loc="outside lower center",
        ncols=len(class_names),
        frameon=False,
        handlelength=1.0,
        columnspacing=1.2,
        fontsize=9,
    )
    return figure


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
        figure = Figure(figsize=(4.6 * len(self.panels), 3.4), dpi=120, layout="constrained")
        axes: list[Axes] = list(figure.subplots(1, len(self.panels), squeeze=False)[0])
        for axis, (title, curves) in zip(axes, self.panels.items(), strict=True):
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
