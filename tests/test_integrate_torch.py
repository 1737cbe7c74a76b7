"""docs/integrate.md: plain PyTorch; and that the page keeps to what is tested."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import torch
from documentation import ROOT, blocks
from integrations import PAGE, assert_same_training, code_of, state
from test_ddp import batches, network, train
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

FRAMEWORKS = ["Plain PyTorch", "timm", "mmengine and mmcv", "detectron2", "Hugging Face"]


def test_every_block_of_the_page_belongs_to_a_framework() -> None:
    assert len(blocks(PAGE)) == sum(len(code_of(framework)) for framework in FRAMEWORKS)


def test_the_tests_that_the_page_names_exist() -> None:
    for name in re.findall(r"tests/[\w/*]+\.py", (ROOT / PAGE).read_text()):
        assert list(ROOT.glob(name)), name


def test_importing_syncbn_imports_no_framework() -> None:
    code = (
        "import sys, syncbn, syncbn.integrations; "
        "print(sorted({'timm', 'mmengine', 'mmcv', 'accelerate', 'transformers', 'torchvision'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_ddp_and_fsdp_train_as_one_process_does(processes: Any) -> None:
    parts = [batches(2, 1), batches(1, 3)]
    plain = network()
    train(plain, [torch.cat(step) for step in zip(*parts, strict=True)], scale=1)
    codes = code_of("Plain PyTorch")
    assert len(codes) == 2
    for code in codes:
        assert_same_training(processes(2).run(_train, code, per_rank=[(each,) for each in parts]), state(plain))


def _train(parts: list[Tensor], code: str) -> dict[str, Tensor]:
    names: dict[str, Any] = {"model": network(), "device": "cpu", "mesh": init_device_mesh("cpu", (2,))}
    exec(code, names)
    train(names["model"], parts, scale=2)
    return {
        name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in state(names["model"]).items()
    }
