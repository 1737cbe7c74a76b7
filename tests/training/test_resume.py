"""A run that is interrupted and resumed equals the uninterrupted one, bit for bit."""

import copy
import functools
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path

import interrupted
import pytest
import torch
from jobs import TRAIN_SH, run_job
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncbn.training.callbacks import ExactResume, GracefulStop, LastCheckpoint, StatelessRandom
from syncbn.training.callbacks.resume import add_in_order_of_ranks
from syncbn.training.data import DigitScenesDataModule
from syncbn.training.data.augmentation import segmentation_training
from syncbn.training.tasks import SegmentationTask
from syncbn.training.tasks.losses import CrossEntropyDiceLoss
from syncbn.training.tasks.optimization import one_cycle

# Two epochs of 7 batches and 4 steps on each of two processes; 3 batches of validation.
JOB = [
    "trainer=cpu",
    "trainer.max_epochs=2",
    "trainer.accumulate_grad_batches=2",
    "model._target_=interrupted.Net",
    "augmentation=segmentation",
    "augmentation.train.base_size=72",
    "augmentation.train.crop_size=56",
    "augmentation.train.distort=0.5",
    "augmentation.val.size=null",
    "data.train_size=28",
    "data.val_size=12",
    "data.image_size=64",
    "data.digits=[2,2]",
    "data.digit_size=[20,24]",
    "callbacks.pictures=null",
    "logger=none",
    "run_dir=run",
]
# In the middle of the first epoch, within its last accumulation, in its validation, at the start of the second epoch.
INTERRUPTIONS = [(2, False), (5, False), (6, True), (7, False)]


def start(cwd, *overrides):
    shutil.copy(interrupted.__file__, cwd)
    return run_job([str(TRAIN_SH), *JOB, *overrides], cwd)


def load(path):
    return torch.load(path, weights_only=True)


def differences(a, b, path=""):
    """Where two nested states differ in any bit."""
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b) else [path]
    if isinstance(a, dict):
        missing = [f"{path}.{key}" for key in a.keys() ^ b.keys()]
        return missing + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} entries"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}.{i}")]
    return [] if a == b else [f"{path}: {a!r} and {b!r}"]


def training_state(checkpoint):
    """All that the rest of a run depends on, and the course so far."""
    keys = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    progress = {k: v for k, v in checkpoint["loops"]["fit_loop"].items() if "val_loop" not in k}
    return {key: checkpoint[key] for key in keys} | {"progress": progress, "epoch_sums": checkpoint["epoch_sums"]}


@pytest.mark.timeout(600)
def test_two_processes_interrupted_again_and_again_with_other_workers(tmp_path):
    """Each start is interrupted at another place; all but the reference have worker processes that read ahead."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = start(tmp_path / "whole")
    assert whole.process.returncode == 0, whole.output + whole.error_output
    resume = []
    stopped_at = []
    for batch, validation in INTERRUPTIONS:
        callback = ["_target_=interrupted.InterruptAt", f"batch={batch}", f"validation={validation}"]
        part = start(
            tmp_path / "parts", "data.num_workers=2", *resume, *(f"+callbacks.interrupt.{field}" for field in callback)
        )
        assert part.process.returncode == 128 + signal.SIGINT, part.output + part.error_output
        (line,) = [line for line in part.lines if line.startswith("interrupted after step")]
        stopped_at.append(int(line.split()[3].rstrip(":")))
        resume = ["ckpt_path=last"]
    last = start(tmp_path / "parts", "data.num_workers=2", *resume)
    assert last.process.returncode == 0, last.output + last.error_output
    assert stopped_at == [2, 4, 4, 5]
    expected, actual = (load(tmp_path / name / "run" / "checkpoints" / "last.ckpt") for name in ("whole", "parts"))
    assert not differences(training_state(expected), training_state(actual))
    # The mean losses of the epochs as well.
    histories = [c["callbacks"]["Curves"]["history"] for c in (expected, actual)]
    assert len(histories[0]) == 2
    assert not differences(*histories)


def _two_steps_more(rank):
    """Where the weights of a run of three steps differ from those of one resumed after the first; the last gradients,
    those of this process alone and those that DDP has made of them.
    """

    def build(state):
        torch.manual_seed(0)
        model = nn.Sequential(*(layer for i in range(6) for layer in (nn.Linear(5 + 7 * i, 12 + 7 * i), nn.Tanh())))
        model.load_state_dict(state or model.state_dict())
        ddp = DistributedDataParallel(model)
        add_in_order_of_ranks(ddp)
        return ddp

    def gradients(model, number):
        model.zero_grad()
        generator = torch.Generator().manual_seed(10 * number + rank)
        model(torch.randn(4, 5, generator=generator)).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    def step(ddp, number):
        own, reduced = gradients(copy.deepcopy(ddp.module), number), gradients(ddp, number)
        with torch.no_grad():
            for parameter, gradient in zip(ddp.parameters(), reduced, strict=True):
                parameter -= 0.1 * gradient
        return own, reduced

    whole = build(None)
    step(whole, 0)
    resumed = build({name: tensor.clone() for name, tensor in whole.module.state_dict().items()})
    for number in (1, 2):
        step(whole, number)
        own, reduced = step(resumed, number)
    return differences(whole.module.state_dict(), resumed.module.state_dict()), own, reduced


def test_gradients_of_more_than_two_processes_are_added_alike_in_a_resumed_run(processes):
    """DDP's buckets are other ones in the first step, and with them gloo's order of addition."""
    answers = processes(3).run(_two_steps_more, per_rank=[(rank,) for rank in range(3)])
    assert [different for different, _, _ in answers] == [[]] * 3
    for *own, reduced in zip(*(own for _, own, _ in answers), answers[0][2], strict=True):
        torch.testing.assert_close(reduced, sum(own) / 3)


class Recorder(Callback):
    """Which items each batch held, and what each epoch has logged."""

    def __init__(self):
        self.batches = []
        self.epochs = {}

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.batches.append((batch_idx, batch["index"].tolist(), float(batch["image"].sum())))

    def on_validation_epoch_start(self, trainer, task):
        self.batches.append(("validation", trainer.global_step))

    def on_train_epoch_end(self, trainer, task):
        if "train/loss" in trainer.callback_metrics:
            self.epochs[trainer.global_step] = float(trainer.callback_metrics["train/loss"])


class SaveWhereItMayStop(GracefulStop):
    """Asked to stop all the time, it saves a checkpoint wherever it would end the run, and goes on."""

    def _count_votes(self, trainer):
        return True

    def _stop(self, trainer):
        progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        before = progress.state_dict()
        trainer.save_checkpoint(self.path.parent / f"{trainer.fit_loop.total_batch_idx}-{trainer.validating}.ckpt")
        progress.load_state_dict(before)


class SaveAsLast(LastCheckpoint):
    """Keeps all that would be `last.ckpt`, after each optimizer step if it may be."""

    def __init__(self, folder):
        super().__init__(str(folder / "last.ckpt"), every_n_steps=1)
        self.count = 0

    def save(self, trainer):
        self.count += 1
        self.path = self.path.with_name(f"last-{self.count}.ckpt")
        super().save(trainer)


SCHEDULES = {
    "epochs": {"max_epochs": 2},
    "steps": {"max_epochs": -1, "max_steps": 6},
    "epochs and steps": {"max_epochs": 2, "max_steps": 100},
    "accumulation": {"max_epochs": 2, "accumulate_grad_batches": 2},
    "validation in mid-epoch": {"max_epochs": 2, "val_check_interval": 2},
    "validation in mid-accumulation": {"max_epochs": 2, "val_check_interval": 3, "accumulate_grad_batches": 2},
    "validation each second epoch": {"max_epochs": 3, "check_val_every_n_epoch": 2},
    "limited epochs": {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 1},
}


def fit(folder, checkpoint=None, callbacks=(), **schedule):
    torch.manual_seed(0)
    task = SegmentationTask(
        interrupted.Net(11),
        CrossEntropyDiceLoss(),
        class_names=[str(i) for i in range(11)],
        optimizer=functools.partial(torch.optim.AdamW, lr=0.01),
        scheduler=one_cycle,  # asks for the number of steps, and so for the loader, before anything is restored
        channels_last=False,
    )
    data = DigitScenesDataModule(
        train_size=8,
        val_size=4,
        image_size=64,
        digits=(2, 2),
        digit_size=(20, 24),
        train_transforms=segmentation_training(64, 48),
    )
    recorder = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[StatelessRandom(), ExactResume(), recorder, *callbacks],
        **schedule,
    )
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    path = Path(folder, "final.ckpt")
    trainer.save_checkpoint(path)
    return load(path), recorder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCHEDULES)
def test_wherever_a_run_may_stop_it_goes_on_the_same(name, tmp_path):
    """From each checkpoint of `GracefulStop` and of `LastCheckpoint`, in one process."""
    schedule = SCHEDULES[name]
    places = tmp_path / "places"
    saves = SaveAsLast(places)
    expected, whole = fit(tmp_path, callbacks=[SaveWhereItMayStop(str(places / "stop.ckpt")), saves], **schedule)
    checkpoints = sorted(places.glob("*.ckpt"))
    assert saves.count >= expected["global_step"]
    assert len(checkpoints) > saves.count
    for checkpoint in checkpoints:
        actual, part = fit(tmp_path, checkpoint, **schedule)
        keys = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
        assert not differences({k: expected[k] for k in keys}, {k: actual[k] for k in keys}), checkpoint
        assert whole.batches[len(whole.batches) - len(part.batches) :] == part.batches, checkpoint
        assert part.epochs.items() <= whole.epochs.items(), checkpoint


@pytest.mark.parametrize(
    ("first", "second", "ends"),
    [
        (signal.SIGINT, signal.SIGINT, True),
        (signal.SIGINT, signal.SIGTERM, True),  # what torchrun makes of a second Ctrl-C
        (signal.SIGTERM, signal.SIGTERM, False),
    ],
)
def test_a_second_ctrl_c_ends_a_run_at_once(monkeypatch, first, second, ends):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    stop = GracefulStop("last.ckpt")
    stop._on_signal(first, None)
    now = 1.0
    stop._on_signal(second, None)  # the same press, passed on
    now = 5.0
    with pytest.raises(KeyboardInterrupt) if ends else nullcontext():
        stop._on_signal(second, None)


def test_a_mean_over_an_epoch_survives_another_number_of_processes():
    from syncbn.training.callbacks.resume import _share

    def entry(total, count):
        return [{"arguments": {"fx": "training_step", "name": "loss"}, "sum": total, "count": count}]

    gathered = [entry(1.5, 2), entry(2.5, 4)]
    assert _share(gathered, 1, 2) == entry(2.5, 4)
    assert [_share(gathered, rank, 3) for rank in range(3)] == [entry(4.0, 6), [], []]
    assert _share([], 0, 1) == []


class Draws(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.drawn = []

    def training_step(self, batch, batch_idx):
        import random

        import numpy as np

        self.drawn.append((float(torch.rand(())), float(np.random.rand()), random.random()))
        return self.weight.sum()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(3))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore")
def test_each_step_draws_numbers_of_its_own(tmp_path):
    def drawn(seed):
        module = Draws()
        torch.rand(seed + 1)  # what was drawn before does not matter
        Trainer(
            accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[StatelessRandom(seed)],
        ).fit(module)  # fmt: skip
        return module.drawn

    assert drawn(1) == drawn(1)
    assert len({draw for seed in (1, 2) for draw in drawn(seed)}) == 12
