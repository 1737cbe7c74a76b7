"""describe: what the user is told of each layer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from syncbn import SyncBatchNorm

pytest.importorskip("torchvision")

import torchvision


class OwnNormalization(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return x


class PlainBatchNorm(nn.Module):
    """Somebody's own, derived from nothing that convert knows."""


def model() -> nn.Module:
    return nn.ModuleDict(
        {
            "stem": nn.BatchNorm2d(4),
            "left": nn.BatchNorm2d(4),
            "frozen": torchvision.ops.FrozenBatchNorm2d(4),
            "torchs": nn.SyncBatchNorm(4),
            "own": OwnNormalization(4),
            "unknown": PlainBatchNorm(),
            "layer": nn.LayerNorm(4),
            "instance": nn.InstanceNorm2d(4),
            "linear": nn.Linear(2, 2),
        }
    )


def standing(module: nn.Module) -> dict[str, tuple[str, str]]:
    return {row.name: (row.status, row.reason) for row in syncbn.describe(module).rows}


def test_before_convert() -> None:
    told = standing(model())
    assert list(told) == ["stem", "left", "frozen", "torchs", "own", "unknown", "layer", "instance"]
    assert told["stem"] == ("local", "not converted: call syncbn.convert(model)")
    assert told["torchs"][0] == "foreign"
    assert told["own"][0] == "local"
    assert told["own"][1].startswith("syncbn.convert refuses it: OwnNormalization.forward never calls super()")
    assert told["frozen"] == ("frozen", "its class keeps the statistics fixed")
    assert told["unknown"][0] == "unaffected"
    assert "syncbn.convert does not know it" in told["unknown"][1]
    assert told["layer"] == told["instance"] == ("unaffected", "forms no statistics over the batch")


def test_after_convert() -> None:
    module = syncbn.convert(model(), exclude=["left", "own"])
    told = standing(module)
    assert told["stem"] == told["torchs"] == ("synchronized", "torch.distributed is not initialized")
    assert told["left"] == ("local", "left out by exclude='left'")
    assert told["own"] == ("local", "left out by exclude='own'")
    assert standing(copy.deepcopy(module))["left"][0] == "local", "the reason is forgotten, not the fact"
    syncbn.convert(module, include="left")
    assert standing(module)["own"] == ("local", "not named by include='left'")
    assert standing(module)["left"][0] == "synchronized"
    syncbn.revert(module)
    assert standing(module)["left"] == ("local", "not converted: call syncbn.convert(model)")


def test_the_original_class_is_named() -> None:
    rows = syncbn.describe(syncbn.convert(model(), exclude="own")).rows
    assert [row.class_name for row in rows][:4] == [
        "BatchNorm2d",
        "BatchNorm2d",
        "FrozenBatchNorm2d",
        "SyncBatchNorm",
    ]


def test_layers_in_eval_mode_while_the_model_trains_are_frozen() -> None:
    module = syncbn.convert(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    module[0].eval()
    assert standing(module)["0"] == (
        "frozen",
        "in eval mode while the model trains: normalizes by its running statistics",
    )
    assert standing(module)["1"][0] == "synchronized"
    description = syncbn.describe(module.eval())
    assert description.names("synchronized") == ["0", "1"]
    assert "the model is in eval mode, in which nothing is exchanged" in description.summary


def test_what_surprises_is_noted() -> None:
    module = nn.ModuleDict({"fixed": SyncBatchNorm(4), "stateless": SyncBatchNorm(4, track_running_stats=False)})
    module["fixed"].requires_grad_(False)
    told = standing(module)
    assert told["fixed"] == ("synchronized", "weight and bias do not learn; the running statistics still move")
    assert told["stateless"] == ("synchronized", "no running statistics: in eval, those of this process's batch")


def test_the_table_is_aligned_and_summarized() -> None:
    lines = str(syncbn.describe(syncbn.convert(model(), exclude=["left", "own"]))).splitlines()
    assert lines[0].split() == ["layer", "class", "status", "over", "note"]
    status = lines[0].index("status")
    assert {line[status:].split()[0] for line in lines[1:-1]} == {"synchronized", "local", "frozen", "unaffected"}
    assert lines[-1] == ("2 of 5 batch normalization layers synchronized over this process; 2 local, 1 frozen.")
    assert str(syncbn.describe(nn.Linear(2, 2))) == "There is no batch normalization layer."


def test_a_model_that_is_a_layer_is_named_by_its_class() -> None:
    assert standing(syncbn.convert(nn.BatchNorm2d(4))).keys() == {"BatchNorm2d"}


def _over() -> list[str]:
    alone = dist.new_group([0]) if dist.get_rank() == 0 else (dist.new_group([0]), dist.new_group([0, 1]))[1]
    if dist.get_rank() == 0:
        dist.new_group([0, 1])
    module = nn.Sequential(nn.BatchNorm2d(4), nn.SyncBatchNorm(4, process_group=alone), nn.BatchNorm2d(4))
    description = syncbn.describe(syncbn.convert(module))
    rows = [f"{row.status} over {row.over}" for row in description.rows]
    saved = pickle.dumps(syncbn.convert(nn.Sequential(nn.BatchNorm2d(4)), alone))
    dist.destroy_process_group(alone)
    lost = syncbn.describe(pickle.loads(saved)).rows[0]
    return [*rows, description.summary, lost.over, lost.reason]


def test_over_whom(processes: Any) -> None:
    one, two = processes(2).run(_over)
    everyone = "synchronized over all 2 processes"
    assert one[:3] == [everyone, "synchronized over this process", everyone]
    assert two[:3] == [everyone, "synchronized over ranks [0, 1]", everyone]
    assert two[3] == "3 of 3 batch normalization layers synchronized over all 2 processes or ranks [0, 1]."
    assert one[4] == "unknown"
    assert "over a process group of ranks [0], which does not exist here" in one[5]


def test_describing_changes_nothing() -> None:
    module = syncbn.convert(model(), exclude="own")
    before = {name: (type(m), dict(vars(m))) for name, m in module.named_modules()}
    print(syncbn.describe(module))
    assert {name: (type(m), dict(vars(m))) for name, m in module.named_modules()} == before
    assert torch.is_grad_enabled()
