"""Runs a model in one process group, then in another that is made after it; exits with the group destroyed."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn

import syncbn

model = syncbn.convert(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)))
for times in (1, 2):
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/{times}", rank=rank, world_size=world_size)
    model(torch.randn(4, 3, requires_grad=True)).sum().backward()
    assert model[0]._exchange.calls == 4 * times
    dist.destroy_process_group()
model(torch.randn(4, 3))
assert model[0]._exchange.calls == 8
print(f"rank {rank} is done", flush=True)
