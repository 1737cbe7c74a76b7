"""A model on the CPU in a process group that reduces CUDA tensors only."""

import torch
import torch.distributed as dist

import syncbn

dist.init_process_group("cuda:gloo")
try:
    syncbn.SyncBatchNorm(3)(torch.randn(4, 3))
except RuntimeError as error:
    print(error, flush=True)
dist.destroy_process_group()
