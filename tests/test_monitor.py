"""StatisticsMonitor, with real Trainers in real processes."""

from __future__ import annotations

import csv
import math
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from documentation import blocks
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import syncbn
from syncbn.lightning import AccumulateStatisticsCallback, StatisticsMonitor, SyncBatchNormPlugin
from syncbn.lightning.history import History
from syncbn.lightning.readings import Reading

pytest.importorskip("matplotlib")

BATCH, STEPS, CHANNELS = 3, 8, 4
PNG = b"\x89PNG\r\n\x1a\n"
EPS = 1e-5


class Module(pl.LightningModule):
    """The first layer sees the data itself, the second one a constant."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        constant = nn.Linear(5, 5)
        nn.init.zeros_(constant.weight)
        constant.requires_grad_(False)
        self.net = net or nn.Sequential(
            nn.BatchNorm1d(CHANNELS), nn.Linear(CHANNELS, 5), constant, nn.BatchNorm1d(5), nn.Linear(5, 1)
        )
        self.double()

    def training_step(self, batch: Any) -> Tensor:
        return self.net(batch[0]).sin().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Manual(Module):
    """Two optimizers, a step of each in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.net(batch[0]).sin().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.01) for i in (1, 4)]


class Together(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm1d(CHANNELS), nn.BatchNorm1d(CHANNELS - 1)])

    def forward(self, x: Tensor) -> Tensor:
        a, b = syncbn.normalize_together(self.norms, [x, x[:, 1:]])
        return a.mean(1) + b.square().mean(1)


class FailsAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyError("in the middle")


def samples(rank: int, nan_at: tuple[int, ...] = ()) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(STEPS * BATCH, CHANNELS, generator=generator, dtype=torch.float64) + 2 * rank
    for step in nan_at if rank == 1 else ():
        x[step * BATCH] = math.nan
    return x


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def fitted(
    folder: Path,
    monitor: StatisticsMonitor | None,
    module: pl.LightningModule,
    *callbacks: Callback,
    processes: int = 2,
    nan_at: tuple[int, ...] = (),
    **options: Any,
) -> tuple[pl.Trainer, list[str]]:
    """The Trainer, and what was warned of."""
    several: dict[str, Any] = {"strategy": "ddp", "plugins": [SyncBatchNormPlugin(), LightningEnvironment()]}
    ckpt_path = options.pop("ckpt_path", None)
    trainer = pl.Trainer(**{
        "accelerator": "cpu",
        "devices": processes,
        "max_epochs": 1,
        "callbacks": [*([monitor] if monitor else []), *callbacks],
        "logger": CSVLogger(folder, name="", version=""),
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
        **(several if processes > 1 else {}),
        **options,
    })  # fmt: skip
    loader = DataLoader(TensorDataset(samples(rank(), nan_at)), batch_size=BATCH)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, loader, ckpt_path=ckpt_path)
        finally:
            texts = [str(each.message) for each in caught]
            told = [text for text in texts if "batch normalization, in" in text or "StatisticsMonitor" in text]
    return trainer, told


def logged(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


# ---- what it sees, of two processes


def seen(folder: str) -> dict[str, Any]:
    """Several fits in one program, of which each process tells."""
    told: dict[str, Any] = {}
    root = Path(folder)

    module, plain = Module(), Module()
    trainer, told["warnings"] = fitted(root / "a", StatisticsMonitor(2), module)
    fitted(root / "b", None, plain)
    told["unchanged"] = all(torch.equal(module.state_dict()[k], v) for k, v in plain.state_dict().items())
    told["metrics"] = {k: float(v) for k, v in trainer.logged_metrics.items()}

    monitor = StatisticsMonitor(4, report=None)
    _, told["not finite"] = fitted(root / "nan", monitor, Module(), nan_at=(2, 6))
    told["skipped"] = dict(zip(monitor._readings.names, monitor._findings.skipped, strict=True))

    module = Module(Together())
    fitted(root / "together", StatisticsMonitor(2), module)

    fails = Module()
    with pytest.raises(KeyError):
        fitted(root / "fails", StatisticsMonitor(2, report="deeper/page.png"), fails, FailsAt(5))

    _, told["without"] = fitted(root / "without", StatisticsMonitor(2), Module(nn.Linear(CHANNELS, 1)))

    accumulating = StatisticsMonitor(1, report=None)
    _, told["accumulated"] = fitted(
        root / "accumulated", accumulating, Module(), AccumulateStatisticsCallback(), accumulate_grad_batches=2
    )
    told["accumulated samples"] = len(accumulating._history)
    manual = StatisticsMonitor(3, report=None)
    _, told["manual"] = fitted(root / "manual", manual, Manual())
    told["manual steps"] = manual._history.of_step("step")
    return told


@pytest.fixture(scope="module")
def told(processes: Any, tmp_path_factory: Any) -> tuple[list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("seen")
    return processes(2).run(seen, str(folder)), folder


def of_first_layer(step: int) -> tuple[float, float]:
    """How far the processes' batches are from their union, by the formulas in the documentation."""
    parts = [samples(each).split(BATCH)[step] for each in (0, 1)]
    union = torch.cat(parts)
    variance = union.var(0, unbiased=False) + EPS
    means = torch.stack([(part.mean(0) - union.mean(0)).square() / variance for part in parts])
    variances = torch.stack([((part.var(0, unbiased=False) + EPS) / variance).log().square() for part in parts])
    return float(means.mean().sqrt()), float(variances.mean().sqrt())


def test_what_is_logged_is_what_the_data_says(told: Any) -> None:
    _, folder = told
    rows = logged(folder / "a")
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    for sampled, row in zip((0, 2, 4, 6), rows, strict=True):
        mean, var = of_first_layer(sampled)
        assert row["statistics/mean_stray/net.0"] == pytest.approx(mean)
        assert row["statistics/var_stray/net.0"] == pytest.approx(var)
        assert row["statistics/values/net.0"] == row["statistics/samples"] == 2 * BATCH
        assert row["statistics/collapsed/net.0"] == 0
        assert row["statistics/collapsed/net.3"] == 1, "a constant"
        assert row["statistics/skipped_updates"] == 0
    # At first the running statistics are 0 and 1, whatever comes.
    union = torch.cat([samples(each)[:BATCH] for each in (0, 1)])
    variance = union.var(0, unbiased=False) + EPS
    assert rows[0]["statistics/mean_lag/net.0"] == pytest.approx(
        float((union.mean(0).square() / variance).mean().sqrt())
    )
    assert rows[0]["statistics/var_lag/net.0"] == pytest.approx(
        float(((1 + EPS) / variance).log().square().mean().sqrt())
    )


def test_the_share_of_time_is_one(told: Any) -> None:
    """Of what is known from the second window on: the first exchange of a layer is not timed."""
    rows = logged(told[1] / "a")
    assert "statistics/exchange_share" not in rows[0]
    assert 0 < rows[-1]["statistics/exchange_share"] < 1
    assert 0 < rows[-1]["statistics/exchange_ms"] < 1000


def test_training_is_not_changed(told: Any) -> None:
    assert all(each["unchanged"] for each in told[0])


def test_a_collapsed_variance_is_told_once_on_the_first_process(told: Any) -> None:
    first, second = (each["warnings"] for each in told[0])
    assert second == []
    assert len(first) == 1
    assert "net.3 (100% of 5 channels): the variance has collapsed" in first[0]
    assert "net.0" not in first[0]


def test_batches_that_are_not_finite_are_counted(told: Any) -> None:
    """NaN on the other process, between sampled steps and after the last of them."""
    for each in told[0]:
        # The second layer comes after weights whose gradient was not finite: from then on, all of its batches.
        assert each["skipped"] == {"net.0": 2, "net.3": 6}
    [warning] = [text for text in told[0][0]["not finite"] if ": batches were not finite" in text]
    assert "net.0 (1 of 4 updates in 4 batches), net.3 (3 of 4 updates in 4 batches): batches were" in warning


def test_layers_that_are_normalized_together(told: Any) -> None:
    for row in logged(told[1] / "together"):
        assert row["statistics/values/net.norms.0"] == row["statistics/values/net.norms.1"] == 2 * BATCH
        assert 0 < row["statistics/mean_stray/net.norms.1"] < 2
    mean, _ = of_first_layer(2)
    assert logged(told[1] / "together")[1]["statistics/mean_stray/net.norms.0"] == pytest.approx(mean)


def test_a_report_is_left_even_by_an_exception(told: Any) -> None:
    for page in (told[1] / "a" / "statistics.png", told[1] / "fails" / "deeper" / "page.png"):
        content = page.read_bytes()
        assert content.startswith(PNG)
        assert 30_000 < len(content) < 600_000
    assert list((told[1] / "fails" / "deeper").iterdir()) == [told[1] / "fails" / "deeper" / "page.png"]


def test_a_model_without_batch_normalization_is_left_alone_and_told_of(told: Any) -> None:
    assert ["nothing to look at" in each for each in told[0][0]["without"]] == [True]
    assert not (told[1] / "without" / "statistics.png").exists()


def test_accumulation_and_several_optimizers(told: Any) -> None:
    for each in told[0]:
        assert each["accumulated samples"] == STEPS // 2, "one batch of each step"
        assert each["manual steps"] == [2, 6, 8, 12, 14], "two in a batch: what begins at or after a multiple of 3"
    assert not any("not finite" in text or "do not move" in text for text in told[0][0]["accumulated"])
    assert not any("not finite" in text for text in told[0][0]["manual"])


# ---- what it finds, in one process


def fitted_alone(folder: Path, net: nn.Module, every: int = 2, **options: Any) -> tuple[StatisticsMonitor, list[str]]:
    monitor = StatisticsMonitor(every, report=None, **options)
    _, told = fitted(folder, monitor, Module(net), processes=1)
    return monitor, told


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = (syncbn.convert(nn.BatchNorm1d(CHANNELS)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x).square().sum(1)


def test_one_process_has_its_own_batch(tmp_path: Path) -> None:
    """Layers that are converted are seen as they are with many; of others the running statistics tell."""
    fitted_alone(
        tmp_path / "converted", nn.Sequential(syncbn.convert(nn.BatchNorm1d(CHANNELS)), nn.Linear(CHANNELS, 1))
    )
    fitted_alone(tmp_path / "plain", nn.Sequential(nn.BatchNorm1d(CHANNELS), nn.Linear(CHANNELS, 1)))
    converted, plain = (logged(tmp_path / name) for name in ("converted", "plain"))
    for ours, torchs in zip(converted, plain, strict=True):
        assert ours["statistics/values/net.0"] == ours["statistics/samples"] == torchs["statistics/samples"] == BATCH
        assert ours["statistics/mean_stray/net.0"] == ours["statistics/var_stray/net.0"] == 0
        assert "statistics/values/net.0" not in torchs
        # By the unbiased variance, 3/2 of what 3 values have.
        ratio = ours["statistics/mean_lag/net.0"] / torchs["statistics/mean_lag/net.0"]
        assert ratio == pytest.approx(math.sqrt(1.5), rel=1e-4)
        assert torchs["statistics/var_lag/net.0"] == pytest.approx(ours["statistics/var_lag/net.0"], abs=math.log(1.5))


def test_a_layer_that_is_not_called_is_told_of(tmp_path: Path) -> None:
    monitor, told = fitted_alone(tmp_path, Unused())
    assert [(finding.kind, finding.layer) for finding in monitor.findings] == [("still", "net.unused")]
    assert "net.unused (no update in 2 batches): the running statistics do not move" in told[0]


def test_a_frozen_layer_is_not(tmp_path: Path) -> None:
    net = Unused()
    syncbn.freeze(net, include="unused")
    assert fitted_alone(tmp_path, net)[0].findings == []


def test_running_statistics_that_are_not_finite_are_told_of(tmp_path: Path) -> None:
    net = nn.Sequential(nn.BatchNorm1d(CHANNELS), nn.Linear(CHANNELS, 1))
    net[0].running_mean[1] = math.inf
    monitor, _ = fitted_alone(tmp_path, net)
    assert [(finding.kind, finding.layer) for finding in monitor.findings] == [("broken", "net.0")]


class Swinging(nn.Module):
    """Before the layer the mean goes from one side to the other: no moving average can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last, self.side = nn.BatchNorm1d(CHANNELS, momentum=0.9), nn.Linear(CHANNELS, 1), 10

    def forward(self, x: Tensor) -> Tensor:
        self.side *= -1
        return self.last(self.norm(x + self.side))


def test_running_statistics_that_are_far_off_are_told_of_once_they_had_time(tmp_path: Path) -> None:
    monitor, _ = fitted_alone(tmp_path, Swinging(), every=1)
    [finding] = monitor.findings
    assert (finding.kind, finding.layer) == ("far", "net.norm")
    assert finding.step == 7, "the first one after twice three averaging times of 1/0.9 batches"
    assert "after 7 updates" in finding.detail


def test_what_is_compiled_is_told_of_and_not_compiled_again(tmp_path: Path) -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter = CompileCounter()
    net = nn.Sequential(syncbn.convert(nn.BatchNorm1d(CHANNELS)), nn.Linear(CHANNELS, 1))
    monitor, told = fitted_alone(tmp_path, torch.compile(net, backend=counter))
    torch.compiler.reset()
    assert counter.frame_count == 1
    assert [(finding.kind, finding.layer) for finding in monitor.findings] == [("unseen", "net.0")]
    assert "compiled graph" in told[0]
    assert 0 < logged(tmp_path)[-1]["statistics/mean_lag/net.0"] < 2, "the running statistics are watched"


def test_a_run_that_is_resumed_keeps_its_course(tmp_path: Path) -> None:
    def monitored(folder: str, **options: Any) -> StatisticsMonitor:
        monitor = StatisticsMonitor(2)
        trainer, _ = fitted(tmp_path / folder, monitor, Module(), processes=1, **options)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return monitor

    monitored("first")
    resumed = monitored("second", max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert resumed._history.of_step("step") == [1, 3, 5, 7, 9, 11, 13, 15]
    assert (tmp_path / "second" / "statistics.png").exists()


def test_a_run_of_weeks_keeps_a_bounded_course() -> None:
    history = History(["a"])
    reading = Reading(True, True, 6, 6, 0.1, 0.1, 0, 0.1, 0.1, 1, 1, True)
    for step in range(2000):
        history.add([step, 1, 0.1, 6, 0], [reading])
    steps = history.of_step("step")
    assert 128 <= len(history) <= 256
    assert steps[0] == 0
    assert steps[-1] > 1980
    assert len({b - a for a, b in pairwise(steps)}) == 1


def test_a_number_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        StatisticsMonitor(0)
    with pytest.raises(ValueError, match="collapsed_below must be greater than 0, got -1"):
        StatisticsMonitor(collapsed_below=-1)
    with pytest.raises(ValueError, match=r"a report that ends in \.png, \.svg, \.pdf, got 'page.txt'"):
        StatisticsMonitor(report="page.txt")


def test_a_report_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer, _ = fitted(tmp_path, StatisticsMonitor(report="taken/page.png"), Module(), processes=1)
    assert trainer.global_step == STEPS


def test_a_report_that_cannot_be_drawn_ends_nothing(tmp_path: Path) -> None:
    """Matplotlib reads a name in dollars as a formula, and this one is none."""
    module = Module()
    module.add_module("$\\frac$", nn.BatchNorm1d(3))
    trainer, told = fitted(tmp_path, StatisticsMonitor(report="page.png"), module, processes=1)
    assert trainer.global_step == STEPS
    assert any("could not be written to" in each for each in told)


def test_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks("docs/monitoring.md"):
        exec(block, {"__name__": "documentation"})
    assert (tmp_path / "statistics.png").exists()
