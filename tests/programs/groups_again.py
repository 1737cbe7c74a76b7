"""Groups of about four samples: two of them at first, one in the process group that is made after it."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn

import syncbn

model = syncbn.convert(nn.Sequential(nn.BatchNorm1d(3)), statistics_batch=4)
model(torch.randn(100, 3))  # does not count
for times, samples in ((1, 4), (2, 2)):
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/{times}", rank=rank, world_size=world_size)
    model(torch.randn(samples, 3, requires_grad=True)).sum().backward()
    assert model[0]._exchange.world_size == times, model[0]._exchange
    dist.destroy_process_group()
print(f"rank {rank} is done", flush=True)
