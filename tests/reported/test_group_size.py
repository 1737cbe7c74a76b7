"""What users have asked of synchronized batch normalization among some of the processes."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import syncbn
from syncbn.lightning import SyncBatchNormPlugin


def samples(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float64).square().view(-1, 1)


def my_part(total: int) -> Tensor:
    """This process's part of so many samples."""
    return samples(total).chunk(dist.get_world_size())[dist.get_rank()]


def batch_mean(**options: Any) -> Any:
    """The mean that a layer's statistics see, for a layer that is converted with these options."""

    def of(x: Tensor) -> float:
        layer = syncbn.convert(nn.BatchNorm1d(1, momentum=1.0).double(), **options)
        layer(x)
        return layer.running_mean.item()

    return of


def test_nobody_makes_groups_that_others_must_make_too(processes: Any) -> None:
    """pytorch/pytorch#48804: every rank has to call new_group for every group, even for those that it is not in, which
    the documentation of SyncBatchNorm did not say: ranks 0 to 7, in two halves."""
    halves = samples(8).split(4)
    for rank, mean in enumerate(processes(4).run(_in_halves)):
        assert mean == halves[rank // 2].mean().item()


def _in_halves() -> float:
    return batch_mean(group_size=dist.get_world_size() // 2)(my_part(8))


def test_a_group_size_less_than_the_number_of_processes(processes: Any) -> None:
    """NVIDIA/apex#148 adds create_syncbn_process_group(group_size) for 2 of 4 GPUs, and facebookresearch/
    ClassyVision#534 a group size that keeps the exchange within a node of 8: with PyTorch's layer, it got connection
    reset errors when DistributedDataParallel was set up."""
    for mine, expected in processes(4).run(_under_ddp):
        torch.testing.assert_close(mine, expected)


def _under_ddp() -> tuple[Tensor, Tensor]:
    model = nn.Sequential(nn.BatchNorm1d(1, momentum=1.0)).double()
    model = DistributedDataParallel(syncbn.convert(model, group_size=2), broadcast_buffers=False)
    model(my_part(8)).sum().backward()
    first = dist.get_rank() // 2 * 4
    return model.module[0].running_mean, samples(8)[first : first + 4].mean(0)


def test_within_a_node_by_one_word(processes: Any) -> None:
    """mosaicml/composer#1391: statistics within a node, for 5 % of throughput on two nodes. Ranks were computed from
    the node's size, as if all nodes had as many; each node making only its own group ended in an NCCL error; and one
    process had to be an exception."""
    for rank, (within, everybody) in enumerate(processes(4).run(_two_nodes)):
        assert within == samples(8).split(4)[rank // 2].mean().item()
        assert everybody == samples(8).mean().item()
    assert batch_mean(group_size="node")(samples(4)) == samples(4).mean().item()


def _two_nodes() -> tuple[float, float]:
    return _within_hosts("aabb"), _within_hosts("aaaa")


def _within_hosts(hosts: str) -> float:
    """As if the processes ran on these: NCCL and syncbn take the environment's word for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NCCL_HOSTID", hosts[dist.get_rank()])
        return batch_mean(group_size="node")(my_part(8))


def test_machines_with_unlike_numbers_of_processes(processes: Any) -> None:
    """pytorch/pytorch#53962 asks for process groups per machine; what came, new_subgroups, takes all machines to have
    the same number of devices."""
    assert processes(4).run(_within_hosts, "aaab") == [samples(8)[:6].mean().item()] * 3 + [
        samples(8)[6:].mean().item()
    ]


def test_samples_per_bn_on_twice_as_many_processes(processes: Any) -> None:
    """open-mmlab/OpenUnReID#13: the best results had 16 samples in each statistics: 4 GPUs with 16 samples, each for
    itself, so that on 8 GPUs with 8 samples pairs must share theirs. Its option samples_per_bn meant that, and only
    its author knew."""
    quarters = [part.mean().item() for part in samples(64).split(16)]
    assert processes(4).run(_sixteen, 64) == quarters
    assert processes(4).run(_sixteen, 32) == [quarters[0]] * 2 + [quarters[1]] * 2
    assert processes(2).run(_sixteen, 64) == [samples(64)[:32].mean().item(), samples(64)[32:].mean().item()]


def _sixteen(total: int) -> float:
    return batch_mean(statistics_batch=16)(my_part(total))


def test_the_normalization_batch_does_not_follow_the_number_of_gpus(processes: Any) -> None:
    """JDAI-CV/fast-reid#54: one GPU reached a higher accuracy than two, since two of 32 samples do not normalize as one
    of 64 does."""
    one = batch_mean(statistics_batch=64)(samples(64))
    assert processes(2).run(_sixty_four) == [one] * 2
    assert processes(4).run(_sixty_four) == [one] * 4


def _sixty_four() -> float:
    return batch_mean(statistics_batch=64)(my_part(64))


def test_two_nodes_normalize_as_one_does(processes: Any) -> None:
    """NVIDIA/apex#366: a detector with 2 images on each of 4 GPUs lost 4 mAP on a second node. There, the statistics
    had seen twice the batch."""
    one_node = [batch_mean()(half) for half in samples(8).split(4)]
    assert processes(2).run(_detector, 4) == one_node[:1] * 2
    assert processes(4).run(_detector, 8) == one_node[:1] * 2 + one_node[1:] * 2


def _detector(total: int) -> float:
    return batch_mean(statistics_batch=4)(my_part(total))


class Detector(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1, momentum=1.0).double()
        self.learned = nn.Linear(1, 1).double()

    def training_step(self, batch: Any) -> Tensor:
        return self.learned(self.norm(batch[0])).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_group_size_in_lightning(processes: Any, tmp_path: Any) -> None:
    """Lightning-AI/pytorch-lightning#2589: should sync_batchnorm support apex's create_syncbn_process_group, too? It
    has never."""
    each = [half.mean().item() for half in samples(8).split(4)]
    for options, expected in (
        ({"group_size": 1}, each),
        ({"group_size": 2}, [samples(8).mean().item()] * 2),
        ({"statistics_batch": 4}, each),
        ({"statistics_batch": 8}, [samples(8).mean().item()] * 2),
    ):
        assert processes(2).run(_fit, str(tmp_path), options) == expected


def _fit(folder: str, options: dict[str, Any]) -> float:
    from test_lightning import trainer

    module = Detector()
    data = DataLoader(TensorDataset(my_part(8)), batch_size=4)
    plugin = SyncBatchNormPlugin(**options)
    # DistributedDataParallel sends rank 0's running statistics to all before forward, which leaves this last batch's.
    trainer(folder, [plugin]).fit(module, data)
    return module.norm.running_mean.item()
