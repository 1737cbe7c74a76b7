"""What tests of the launchers start: steps in which the processes wait for each other, without Lightning's imports.

steps.py norm|reduce STEPS [PAUSE]     SyncBatchNorm's exchange, or an all-reduce such as DistributedDataParallel's
"""

import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

import syncbn

EXCHANGE_TIMEOUT = timedelta(seconds=3)


def main() -> None:
    kind, steps, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    layer = torch.nn.Sequential(torch.nn.BatchNorm1d(4))
    if kind == "norm":
        syncbn.convert(layer, process_group=syncbn.Exchange(timeout=EXCHANGE_TIMEOUT))
    for step in range(steps):
        if kind == "norm":
            layer(torch.randn(8, 4))
        else:
            dist.all_reduce(torch.randn(8))
        print(f"step {step}", flush=True)
        time.sleep(pause)
    if dist.get_rank() == 0:
        print(f"all of {dist.get_world_size()} have done {steps} steps", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
