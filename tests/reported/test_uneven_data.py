"""Processes with unequal numbers of batches train together.

- pytorch/pytorch#42577 (and #38174, #56755): DistributedDataParallel.join lets processes with unequal inputs finish,
  but not where the model communicates in forward, as with SyncBatchNorm: there it hangs.
- Lightning-AI/pytorch-lightning#3325 (and #20404): a Trainer has no support for unequal inputs at all; with sharded
  data, training hangs at the end of the epoch.
"""

from __future__ import annotations

from multiprocessing import current_process
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator

import syncbn
from syncbn.lightning import EvenBatchesCallback, SyncBatchNormPlugin

BATCH = 2
CLASSES = 3


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, CLASSES),
    ).double()


def samples(rank: int, number: int) -> TensorDataset:
    """The data of one process, unlike the others'."""
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(number, 3, 8, 8, generator=generator, dtype=torch.float64) * (rank + 1) + rank
    return TensorDataset(images, torch.randint(CLASSES, (number,), generator=generator))


class Stream(IterableDataset):
    """A shard of which nobody knows how long it is."""

    def __init__(self, rank: int, number: int) -> None:
        self.samples = samples(rank, number)

    def __iter__(self) -> Any:
        return iter(self.samples)


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def on_the_union(numbers: list[int], epochs: int = 1) -> dict[str, Tensor]:
    """One process that trains, step by step, on what all processes bring to the step."""
    shards = [list(DataLoader(samples(rank, number), BATCH)) for rank, number in enumerate(numbers)]
    model = network()
    optimizer = optimizer_for(model)
    for _ in range(epochs):
        for step in range(max(map(len, shards))):
            images, labels = (torch.cat(part) for part in zip(*(s[step] for s in shards if step < len(s)), strict=True))
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
    return state(model)


# ---- DistributedDataParallel


def train(number: int, stream: bool, workers: int, **options: Any) -> tuple[dict[str, Tensor], list[Any], list[float]]:
    rank = dist.get_rank()
    dataset = (Stream if stream else samples)(rank, number)
    current_process()._config["daemon"] = False  # or it may have no children: the loader's workers
    context = "fork" if workers else None  # the test processes' own way to start one imports everything anew
    batches = syncbn.even_batches(DataLoader(dataset, BATCH, num_workers=workers, multiprocessing_context=context))
    model = DistributedDataParallel(syncbn.convert(network()), **options)
    optimizer = optimizer_for(model)
    seen, labels_seen = [], []
    for _ in range(2):
        for images, labels in batches:
            optimizer.zero_grad()
            batches.weigh(cross_entropy(model(images), labels)).backward()
            optimizer.step()
            seen.append((batches.count, batches.total, batches.weight))
            labels_seen += labels.tolist()
    return state(model.module), seen, labels_seen


@pytest.mark.parametrize("find_unused_parameters", [False, True])
@pytest.mark.parametrize("numbers", [[5, 1], [0, 3], [2, 2], [1, 6, 0]], ids=str)
def test_training_is_that_of_the_union(processes: Any, numbers: list[int], find_unused_parameters: bool) -> None:
    """Two epochs in float64; 5 and 1 samples are three batches, the last one smaller, and one."""
    options = {"stream": False, "workers": 0, "find_unused_parameters": find_unused_parameters}
    results = processes(len(numbers)).run(_train, options, per_rank=[(number,) for number in numbers])
    expected = on_the_union(numbers, epochs=2)
    for rank, (trained, seen, labels) in enumerate(results):
        torch.testing.assert_close(trained, expected, rtol=1e-9, atol=1e-12)
        assert sum(count for count, _, _ in seen) == 2 * numbers[rank], "every sample once in each epoch"
        assert labels == 2 * samples(rank, numbers[rank]).tensors[1].tolist()
        assert [total for _, total, _ in seen] == [total for _, total, _ in results[0][1]]
    assert all(sum(each[step][2] for _, each, _ in results) == len(numbers) for step in range(len(results[0][1])))


def _train(number: int, options: dict[str, Any]) -> Any:
    return train(number, **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_streams_of_unknown_length(processes: Any, workers: int) -> None:
    numbers = [1, 5]
    results = processes(2).run(_train, {"stream": True, "workers": workers}, per_rank=[(number,) for number in numbers])
    for trained, _, _ in results:
        torch.testing.assert_close(trained, on_the_union(numbers, epochs=2), rtol=1e-9, atol=1e-12)


# ---- Lightning


class Data(pl.LightningDataModule):
    def __init__(self, numbers: list[int], stream: bool) -> None:
        super().__init__()
        self.numbers, self.stream = numbers, stream

    def train_dataloader(self) -> Any:
        rank = dist.get_rank()
        dataset = (Stream if self.stream else samples)(rank, self.numbers[rank])
        return syncbn.even_batches(DataLoader(dataset, BATCH))

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.losses: list[tuple[int, int, int]] = []
        self.validated = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        batches = self.trainer.train_dataloader
        assert batches.count == len(images), "the numbers are those of this batch"
        return batches.weigh(cross_entropy(self.net(images), labels))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert self.trainer.val_dataloaders.count == len(batch[0])
        self.validated += len(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_for(self)


def fit(folder: str, numbers: list[int], stream: bool) -> tuple[dict[str, Tensor], int]:
    module = Module()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=len(numbers),
        strategy="ddp",
        plugins=[SyncBatchNormPlugin(), LightningEnvironment()],
        callbacks=[EvenBatchesCallback()],
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=Data(numbers, stream))
    return state(module.net), module.validated


@pytest.mark.parametrize("stream", [False, True], ids=["with a length", "fetched ahead"])
@pytest.mark.parametrize("numbers", [[5, 1], [0, 3]], ids=str)
def test_a_lightning_data_module(processes: Any, tmp_path: Any, numbers: list[int], stream: bool) -> None:
    expected = on_the_union(numbers, epochs=2)
    for rank, (trained, validated) in enumerate(processes(2).run(fit, str(tmp_path), numbers, stream)):
        torch.testing.assert_close(trained, expected, rtol=1e-9, atol=1e-12)
        assert validated == 2 * numbers[rank] + min(numbers[rank], 2 * BATCH), (
            "two epochs and the sanity check's two steps"
        )


# ---- a detector, which takes lists and refuses an empty one


def detector() -> nn.Module:
    torch.manual_seed(2)
    backbone = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 32, 3, stride=4, padding=1)
    )
    backbone.out_channels = 32
    anchors = AnchorGenerator(sizes=((8,),), aspect_ratios=((1.0,),))
    return FCOS(backbone, 2, anchor_generator=anchors, min_size=32, max_size=32).double()


def scenes(rank: int, number: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Each image has boxes of its own; all have the same, so that a loss per box is one per image."""
    generator = torch.Generator().manual_seed(rank)
    boxes = torch.tensor([[4.0, 4.0, 20.0, 20.0], [8.0, 2.0, 30.0, 28.0], [1.0, 1.0, 9.0, 30.0]], dtype=torch.float64)
    return [
        (
            torch.rand(3, 32, 32, generator=generator, dtype=torch.float64) / (rank + 1),
            {"boxes": boxes, "labels": torch.ones(3, dtype=torch.int64)},
        )
        for _ in range(number)
    ]


def as_lists(scenes: list[Any]) -> tuple[Any, ...]:
    return tuple(zip(*scenes, strict=True))


def train_detector(number: int) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
    loader = DataLoader(scenes(dist.get_rank(), number), 1, collate_fn=as_lists)
    batches = syncbn.even_batches(loader, empty="dummy")
    model = DistributedDataParallel(syncbn.convert(detector()))
    optimizer = optimizer_for(model)
    seen = []
    for images, targets in batches:
        optimizer.zero_grad()
        batches.weigh(sum(model(images, targets).values())).backward()
        optimizer.step()
        seen.append((len(images), batches.count))
    return state(model.module), seen


@pytest.mark.parametrize("numbers", [[3, 1], [0, 2]], ids=str)
def test_a_detector_gets_a_dummy_that_counts_nowhere(processes: Any, numbers: list[int]) -> None:
    model = detector()
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        model([], [])  # why there must be one
    optimizer = optimizer_for(model)
    shards = [scenes(rank, number) for rank, number in enumerate(numbers)]
    for step in range(max(numbers)):
        optimizer.zero_grad()
        sum(model(*as_lists([shard[step] for shard in shards if step < len(shard)])).values()).backward()
        optimizer.step()
    results = processes(2).run(train_detector, per_rank=[(number,) for number in numbers])
    for rank, (trained, seen) in enumerate(results):
        torch.testing.assert_close(trained, state(model), rtol=1e-9, atol=1e-12)
        assert seen == [(1, int(step < numbers[rank])) for step in range(max(numbers))]
