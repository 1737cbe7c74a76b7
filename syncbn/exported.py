"""What torch.export sees of a layer in training: the operations of ``nn.BatchNorm``, and nothing of this package.

An exported program keeps no process group, so that only what needs none can be in it. In eval there is nothing to do
here: a layer is one operation of PyTorch's then.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import Call
from .peers import ALONE, Source


def exported(call: Call) -> Tensor:
    """BN(x) by the statistics of this process's batch.

    Raises:
        RuntimeError: the call takes part in something that PyTorch's own operation cannot do.
    """
    if not _alone(call.source):
        raise RuntimeError(
            "torch.export keeps no process group, so that a program exported in training would form the statistics of "
            "each process alone: call model.eval() or syncbn.revert(model) before torch.export"
        )
    if call.mask is not None:
        raise RuntimeError(
            "a program exported in training cannot leave places out of its statistics: call model.eval() before "
            "torch.export, or export without the mask"
        )
    mean, var, num_batches_tracked, momentum = call.running or (None, None, None, 0.0)
    if momentum is None:
        raise RuntimeError(
            "momentum=None averages over all batches, which an exported program cannot do: give the layer a momentum, "
            "or call model.eval(), before torch.export"
        )
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    layer = call.layer
    return F.batch_norm(call.x, mean, var, layer.weight, layer.bias, True, momentum, layer.eps)


@torch.compiler.assume_constant_result
def _alone(source: Source) -> bool:
    """Whether there are no other processes; found out without any exchange with them."""
    return source is ALONE or getattr(source, "alone", False)
