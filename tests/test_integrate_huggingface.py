"""docs/integrate.md: Accelerate and transformers, with a real Accelerator and a real Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from integrations import Images, assert_same_training, code_of, pools, state
from torch import Tensor, nn
from torch.utils.data import DataLoader

import syncbn
from syncbn import SyncBatchNorm

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
    ResNetForImageClassification,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    TrainingArguments,
)

SECTION = "Hugging Face"
BATCH = 4  # of all processes


@pytest.fixture(scope="module")
def workers() -> Iterator[Any]:
    with pools({"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}) as pool:
        yield pool


def test_three_blocks_stand_on_the_page() -> None:
    assert len(code_of(SECTION)) == 3


def resnet() -> nn.Module:
    torch.manual_seed(1)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config).double()


def loader(images: Images, batch: int) -> DataLoader:
    def pairs(items: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        return torch.stack([item["image"] for item in items]), torch.tensor([item["label"] for item in items])

    return DataLoader(images, batch, collate_fn=pairs)


def plain_training(steps_of: int = 1, epochs: int = 1) -> dict[str, Tensor]:
    """The plain model in one process; ``steps_of`` batches to a step."""
    model = resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(epochs):
        for i, (images, labels) in enumerate(loader(Images(), BATCH)):
            (model(images, labels=labels).loss / steps_of).backward()
            if (i + 1) % steps_of == 0:
                optimizer.step()
                optimizer.zero_grad()
    return state(model)


# ---- Accelerate


def accelerated(code: str, accelerator: Accelerator | None = None) -> dict[str, Tensor]:
    """On a worker: the lines, on a model, an optimizer and a loader that are there."""
    model = resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    names: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "loader": loader(Images(), BATCH // dist.get_world_size()),
        "syncbn": syncbn,
    }
    try:
        if accelerator is not None:
            syncbn.convert(model)
            prepared = accelerator.prepare(model, optimizer, names["loader"])
            names |= dict(zip(("model", "optimizer", "loader"), prepared, strict=True)) | {"accelerator": accelerator}
        exec(code, names)
        assert isinstance(names["model"], nn.parallel.DistributedDataParallel)
    finally:
        AcceleratorState._reset_state(True)
    return state(names["model"])


def test_accelerate_trains_a_resnet_as_one_process_does(workers: Any) -> None:
    assert_same_training(workers(2).run(accelerated, code_of(SECTION)[0]), plain_training())


def test_without_converting_it_does_not(workers: Any) -> None:
    code = code_of(SECTION)[0].replace("syncbn.convert(model)", "model")
    trained = workers(2).run(accelerated, code)[0]
    expected = plain_training()
    assert not torch.allclose(trained["classifier.1.weight"], expected["classifier.1.weight"], atol=1e-4)


def accumulated(code: str) -> dict[str, Tensor]:
    return accelerated(code, Accelerator(gradient_accumulation_steps=2))


def test_accumulated_steps_move_the_running_statistics_once(workers: Any) -> None:
    """Weights are those of one process that accumulates; the statistics' first layer is that of the whole batch."""
    states = workers(2).run(accumulated, code_of(SECTION)[1])
    expected = plain_training(steps_of=2)
    parameters = [name for name, _ in resnet().named_parameters()]
    assert_same_training(
        [{name: each[name] for name in parameters} for each in states], {name: expected[name] for name in parameters}
    )
    whole = resnet()
    whole(torch.stack([image["image"] for image in Images()]))  # eight images, two micro-batches of two processes
    first = "resnet.embedder.embedder.normalization."
    for each in states:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(each[first + name], whole.state_dict()[first + name], rtol=1e-9, atol=1e-9)


# ---- transformers


def trained_by_trainer(folder: str, convert: bool) -> dict[str, Tensor]:
    """On a worker: transformers' Trainer, two epochs, with what it does by default (AdamW, clipping, schedule)."""
    names: dict[str, Any] = {
        "model": resnet(),
        "images": Images("pixel_values", "labels"),
        "arguments": TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH // dist.get_world_size(),
            num_train_epochs=2,
            learning_rate=1e-2,
            use_cpu=True,
            ddp_backend="gloo",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
    }
    code = code_of(SECTION)[2]
    try:
        exec(code if convert else code.replace("syncbn.convert(model)", "model"), names)
    finally:
        AcceleratorState._reset_state(True)
    assert isinstance(names["trainer"].model_wrapped, nn.parallel.DistributedDataParallel)
    return state(names["model"])


def test_the_trainer_trains_as_one_process_does(workers: Any, tmp_path: Path) -> None:
    (expected,) = workers(1).run(trained_by_trainer, str(tmp_path), False)
    assert_same_training(workers(2).run(trained_by_trainer, str(tmp_path), True), expected, tolerance=1e-6)
    (local, _) = workers(2).run(trained_by_trainer, str(tmp_path), False)
    assert not torch.allclose(local["classifier.1.weight"], expected["classifier.1.weight"], atol=1e-3)


def test_what_a_converted_model_saves_is_loaded_without_this_package(tmp_path: Path) -> None:
    model = syncbn.convert(resnet())
    model(Images()[0]["image"][None].expand(2, -1, -1, -1))
    model.save_pretrained(tmp_path)
    loaded = ResNetForImageClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert not any(isinstance(layer, SyncBatchNorm) for layer in loaded.modules())
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


# ---- detectors that freeze their backbone's layers


def detr() -> nn.Module:
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return DetrForObjectDetection(DetrConfig(backbone_config=backbone, d_model=8, num_queries=3, **layers, **heads))


def test_detrs_frozen_layers_stay_frozen_and_are_said_to_be() -> None:
    description = syncbn.describe(syncbn.convert(detr()))
    frozen = description.names("frozen")
    assert frozen
    assert all("backbone" in name for name in frozen)
    assert not description.names("local")


def rt_detr(frozen: bool) -> nn.Module:
    backbone = RTDetrResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic")
    backbone.out_features = ["stage2", "stage3", "stage4"]
    return RTDetrForObjectDetection(
        RTDetrConfig(
            backbone_config=backbone,
            freeze_backbone_batch_norms=frozen,
            encoder_in_channels=[8, 8, 8],
            encoder_hidden_dim=8,
            d_model=8,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
            decoder_in_channels=[8, 8, 8],
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            decoder_layers=1,
            num_queries=5,
        )
    )


def test_rt_detrs_option_makes_its_backbones_layers_synchronized_too() -> None:
    """huggingface/transformers#32604: the backbone is frozen where the original trains it."""
    held, free = (syncbn.describe(syncbn.convert(rt_detr(frozen))) for frozen in (True, False))
    frozen = held.names("frozen")
    assert frozen
    assert held.names("synchronized")  # its encoder's own
    assert not free.names("frozen")
    assert set(free.names("synchronized")) == set(frozen) | set(held.names("synchronized"))
