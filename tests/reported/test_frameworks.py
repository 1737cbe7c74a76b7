"""Synchronized batch normalization in the frameworks around PyTorch.

- open-mmlab/mmsegmentation#387 (also #292, #2147): a model with ``norm_cfg=dict(type='SyncBN')`` on a CPU:
  "SyncBatchNorm expected input tensor to be on GPU".
- open-mmlab/mmdetection#6410: a model with MMSyncBN, tried on one image: "Default process group is not initialized".
- facebookresearch/detectron2#2174: the same in training on one GPU.
- open-mmlab/mmengine#1624: ``convert_sync_batchnorm`` sets layers that are kept in eval training again, and NCCL times
  out.
- huggingface/accelerate#791 (also #268): does Accelerate synchronize batch normalization, and over micro-batches?

In tests/test_integrate_*.py, where the frameworks train: facebookresearch/detectron2#2022 (res2 stays frozen beside
"SyncBN"), open-mmlab/mmengine#412 (all layers by configuration) and huggingface/transformers#32604 (RT-DETR's frozen
backbone).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from syncbn import SyncBatchNorm

# ---- a CPU, one process, no process group


def mmcv_model(kind: str) -> nn.Module:
    mmcv = pytest.importorskip("mmcv.cnn")
    return mmcv.ConvModule(3, 4, 3, norm_cfg={"type": kind, "requires_grad": True})


def test_mmcvs_sync_bn_on_a_cpu(processes: Any) -> None:
    """open-mmlab/mmsegmentation#387: trained on GPUs, used on a CPU. The checkpoint fits, no configuration is edited.

    PyTorch 2.15 still raises where there is more than one process.
    """
    trained = mmcv_model("SyncBN")
    trained.norm.running_mean += 0.5
    image = torch.randn(1, 3, 8, 8)
    for model in (mmcv_model("syncbn.SyncBatchNorm"), syncbn.convert(mmcv_model("SyncBN"))):
        plain = mmcv_model("BN")
        plain.load_state_dict(trained.state_dict())
        model.load_state_dict(trained.state_dict(), strict=True)
        for mode in (False, True):
            torch.testing.assert_close(model.train(mode)(image), plain.train(mode)(image))
    processes(2).run(_on_cpu_processes)


def _on_cpu_processes() -> None:
    image = torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
        mmcv_model("SyncBN")(image)
    for model in (mmcv_model("syncbn.SyncBatchNorm"), syncbn.convert(mmcv_model("SyncBN"))):
        assert model(image).isfinite().all()


def test_one_process_without_a_process_group() -> None:
    """open-mmlab/mmdetection#6410, facebookresearch/detectron2#2174."""
    assert not dist.is_initialized()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    layer, plain = SyncBatchNorm(4, dtype=torch.float64), nn.BatchNorm2d(4, dtype=torch.float64)
    for mode in (True, False):
        torch.testing.assert_close(layer.train(mode)(x), plain.train(mode)(x))


# ---- layers that are kept in eval


def _fine_tune(x: Tensor) -> tuple[bool, int, Tensor]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).double()
    model[1].eval()
    model = syncbn.convert(model)
    before = model[1]._exchange.calls
    if x.shape[0] > 1:  # the first part runs on one process alone: a layer in eval waits for nobody
        model[1](model[0](x))
    alone = model[1]._exchange.calls - before
    model(x).sum().backward()
    return model[1].training, alone, model[1].running_mean


def test_a_layer_that_is_kept_in_eval_stays_there(processes: Any) -> None:
    """open-mmlab/mmengine#1624: mmengine's conversion forgets the mode; convert does not touch it."""
    conversion = pytest.importorskip("mmengine.model").convert_sync_batchnorm
    theirs = nn.Sequential(nn.BatchNorm2d(4))
    theirs[0].eval()
    assert conversion(theirs)[0].training
    parts = [torch.randn(n, 3, 8, 8, dtype=torch.float64) for n in (2, 1)]
    for training, alone, running_mean in processes(2).run(_fine_tune, per_rank=[(part,) for part in parts]):
        assert not training
        assert alone == 0
        assert not running_mean.any()


# ---- Accelerate


def test_accelerate_neither_converts_nor_refuses() -> None:
    """huggingface/accelerate#791, #268: prepare leaves the layers as they are, converted or not."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    try:
        plain, converted = nn.BatchNorm1d(4), syncbn.convert(nn.BatchNorm1d(4))
        assert type(accelerator.prepare(plain)) is nn.BatchNorm1d
        assert isinstance(accelerator.prepare(converted), SyncBatchNorm)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
