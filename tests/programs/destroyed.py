"""What people do with a model after training: with a process group of its own, destroyed, whether still held or not."""

import copy
import pickle
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import syncbn

dist.init_process_group("gloo", init_method="env://")
rank, folder = dist.get_rank(), Path(sys.argv[1])
group = dist.new_group([0, 1])
model = syncbn.convert(nn.Sequential(nn.BatchNorm1d(3)), process_group=group)
x = torch.randn(4, 3)
model(x)
dist.destroy_process_group()
if sys.argv[2] != "held":
    del group

copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.optim.swa_utils.AveragedModel(model).module]
torch.save(model, folder / f"{rank}.pt")
copies.append(torch.load(folder / f"{rank}.pt", weights_only=False))
for each in copies:
    assert torch.equal(each.eval()(x), model.eval()(x))
    assert each[0]._exchange.ranks == (0, 1)
print(model[0]._exchange, syncbn.describe(model).rows[0].status, flush=True)
assert type(syncbn.revert(syncbn.convert(model))[0]) is nn.BatchNorm1d
