"""The moving average of weights and running statistics: against one by hand, and resumed exactly."""

import functools

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.utils.data import DataLoader

from syncbn.lightning import SyncBatchNormPlugin
from syncbn.training.callbacks.averaging import ExponentialMovingAverage
from syncbn.training.errors import UserError
from syncbn.training.models import UNet
from syncbn.training.tasks import SegmentationTask
from syncbn.training.tasks.losses import CrossEntropyLoss


def clone(state):
    return {name: value.clone() for name, value in state.items()}


class Watch(Callback):
    """What is trained after each step, and what is validated. It comes first of all callbacks."""

    def __init__(self, save=None):
        self.steps, self.validated, self.save = [], [], save

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append(clone(pl_module.state_dict()))
        if self.save == trainer.global_step:
            trainer.save_checkpoint("mid.ckpt")

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.validated.append(clone(pl_module.state_dict()))
        if self.save == "validation":
            trainer.save_checkpoint("validation.ckpt")
            self.save = None


def loader(seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(8, 3, 8, 8, generator=generator)
    data = [{"image": image, "semantic": (image[0] > 0.5).long(), "index": i} for i, image in enumerate(images)]
    return DataLoader(data, batch_size=2)


def fitted(average, save=None, resume=None, epochs=2, processes=1, callbacks=()):
    torch.manual_seed(0)
    task = SegmentationTask(
        UNet(2, widths=(4, 8)), CrossEntropyLoss(), ["a", "b"], functools.partial(torch.optim.Adam, lr=0.01)
    )
    watch = Watch(save)
    several = {"strategy": "ddp", "plugins": [SyncBatchNormPlugin(), LightningEnvironment()]} if processes > 1 else {}
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        max_epochs=epochs,
        callbacks=[watch, *([average] if average else []), *callbacks],
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **several,
    )
    trainer.fit(task, loader(0), loader(1), ckpt_path=resume, weights_only=False)
    return task, watch, trainer


def by_hand(steps, decay=0.9, ramp=False):
    """After each step; the first is the weights themselves."""
    averages = [steps[0]]
    for n, state in enumerate(steps[1:], start=1):
        now = min(decay, (1 + n) / (10 + n)) if ramp else decay
        last = averages[-1]
        averages.append({
            name: last[name].lerp(value, 1 - now) if value.is_floating_point() else value
            for name, value in state.items()
        })  # fmt: skip
    return averages


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("ramp", [False, True])
def test_validated_and_left_is_the_average_with_its_running_statistics(ramp):
    task, watch, _ = fitted(ExponentialMovingAverage(0.9, ramp))
    averages = by_hand(watch.steps, ramp=ramp)
    assert any("running_var" in name for name in averages[0])
    assert len(watch.steps) == 8
    assert_equal(watch.validated[0], averages[3])
    assert_equal(watch.validated[-1], averages[7])
    assert_equal(task.state_dict(), averages[7])
    _, without, _ = fitted(None)
    assert_equal(watch.steps[-1], without.steps[-1])  # training does not notice


def test_every_so_many_steps():
    task, watch, _ = fitted(ExponentialMovingAverage(0.9, False, every_n_steps=3))
    assert_equal(task.state_dict(), by_hand(watch.steps[2::3])[-1])


@pytest.mark.parametrize("where", [3, "validation"])
def test_a_run_resumed_anywhere_equals_the_uninterrupted_one(where):
    """Saved by a callback that comes before the average's, in the middle of an epoch; and of a validation."""
    average = functools.partial(ExponentialMovingAverage, 0.9, True)
    whole, watch, _ = fitted(average(), save=where)
    path = "mid.ckpt" if where == 3 else "validation.ckpt"
    step = 3 if where == 3 else 4
    saved = torch.load(path, weights_only=False)
    assert_equal(saved["state_dict"], by_hand(watch.steps, ramp=True)[step - 1])
    assert_equal(saved["current_model_state"], watch.steps[step - 1])
    resumed, again, _ = fitted(average(), resume=path)
    continued = again.steps
    expected = by_hand([*watch.steps[:step], *continued], ramp=True)[-1]
    assert_equal(resumed.state_dict(), expected)
    if where == "validation":
        assert_equal(resumed.state_dict(), whole.state_dict())


def test_the_best_checkpoint_is_validated_as_it_was_saved():
    best = ModelCheckpoint(dirpath=".", filename="best", monitor="val/loss", save_on_train_epoch_end=False)
    task, watch, trainer = fitted(ExponentialMovingAverage(0.9), callbacks=[best])
    found = trainer.validate(task, loader(1), ckpt_path=best.best_model_path, verbose=False, weights_only=False)
    assert found[0]["val/loss"] == pytest.approx(float(best.best_model_score), abs=1e-7)
    saved = torch.load(best.best_model_path, weights_only=False)["state_dict"]
    assert_equal(task.state_dict(), saved)
    assert_equal(watch.validated[-1], saved)


def test_what_is_saved_after_training_can_be_trained_further():
    average = functools.partial(ExponentialMovingAverage, 0.9, True)
    longer, _, _ = fitted(average(), epochs=3)
    _, watch, trainer = fitted(average(), epochs=2)
    trainer.save_checkpoint("end.ckpt")
    saved = torch.load("end.ckpt", weights_only=False)
    assert_equal(saved["current_model_state"], watch.steps[-1])
    resumed, _, _ = fitted(average(), epochs=3, resume="end.ckpt")
    assert_equal(resumed.state_dict(), longer.state_dict())


def on_two(_):
    task, watch, _ = fitted(ExponentialMovingAverage(0.9, False), processes=2)
    return clone(task.state_dict()), watch.steps, watch.validated


def test_with_synchronized_layers_all_processes_have_the_same_average(processes):
    (state, steps, validated), (other, _, _) = processes(2).run(on_two, None)
    assert len(steps) == 4
    assert_equal(state, by_hand(steps)[-1])
    assert_equal(validated[-1], state)
    assert_equal(other, state)


def test_a_checkpoint_that_would_hold_other_weights_is_refused():
    """Lightning asks no callback when it saves weights only."""
    best = ModelCheckpoint(dirpath=".", monitor="val/loss", save_weights_only=True)
    fitted(None, epochs=1, callbacks=[best])
    with pytest.raises(UserError, match="save_weights_only of a ModelCheckpoint would save the weights that are tr"):
        fitted(ExponentialMovingAverage(0.9), callbacks=[best])


@pytest.mark.parametrize("wrong", [{"decay": 1.0}, {"every_n_steps": 0}])
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ExponentialMovingAverage(**wrong)
