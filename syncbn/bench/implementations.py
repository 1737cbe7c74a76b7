"""What is compared: this project's layer, the local one, and others' synchronized ones.

Each is a layer for ``layer`` and a conversion of a model for ``step``. What cannot run here says why. Parameters are
float32, as in mixed-precision training.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncBatchNormFunction

import syncbn
from syncbn import Exchange, SyncBatchNorm
from syncbn.recompute import recompute_activations

Layer = Callable[[int, int], nn.Module]

LOCAL = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@dataclass(frozen=True)
class Implementation:
    """One way to normalize.

    Attributes:
        layer: ``layer(channels, dimensions)``, for inputs with that many dimensions of places: a module that takes x,
            or x and the residual where ``adds``. None where it is no single layer, so that ``layer`` leaves it out.
        convert: makes a model's BatchNorm layers these, and returns the model; None where ``step`` leaves it out.
        adds: whether it is batch normalization, addition of a residual and ReLU, rather than the first alone.
        foreign: whether it comes from another package, whose failure on a case is noted and does not end the run.
        overwrites_input: whether it needs an input of its own each time.
        layouts: which it is run on.
        missing: why it cannot run here, or None.
        on_request: whether it is left out where nobody has named it.
    """

    name: str
    layer: Layer | None
    convert: Callable[[nn.Module], nn.Module] | None = None
    adds: bool = False
    foreign: bool = False
    overwrites_input: bool = False
    layouts: tuple[str, ...] = ("contiguous", "channels_last")
    missing: str | None = None
    on_request: bool = False


def implementations(device: torch.device, world_size: int) -> list[Implementation]:
    """All of them, for processes on ``device``."""
    no_cuda = None if device.type == "cuda" else "its kernels are for CUDA only"
    return [
        Implementation("syncbn", _ours, convert=_convert_to_ours),
        Implementation("syncbn+add+relu", _ours_fused, adds=True),
        Implementation("syncbn+fuse", None, convert=_convert_and_fuse),
        Implementation("syncbn+recompute", None, convert=_Recomputing, on_request=True),
        Implementation("syncbn+compile", None, convert=_compiled(_convert_to_ours), on_request=True),
        Implementation("syncbn+fuse+compile", None, convert=_compiled(_convert_and_fuse), on_request=True),
        Implementation("local", _local, convert=lambda model: model),
        Implementation("local+compile", None, convert=_compiled(lambda model: model), on_request=True),
        Implementation("local+add+relu", _followed_by_add_and_relu(_local), adds=True),
        Implementation("torch-sync", _torch_sync, convert=_convert_to_torch_sync, missing=_no_torch_sync(device)),
        Implementation(
            "torch-sync+add+relu", _followed_by_add_and_relu(_torch_sync), adds=True, missing=_no_torch_sync(device)
        ),
        Implementation(
            "fairscale", _fairscale, convert=_replace(_fairscale), foreign=True, missing=_not_installed("fairscale")
        ),
        Implementation("naive", _naive, convert=_replace(_naive)),
        Implementation(
            "inplace-abn",
            _inplace_abn,
            foreign=True,
            overwrites_input=True,
            missing=_not_installed("inplace_abn") or no_cuda or _alone_it_does_not_synchronize(world_size),
        ),
        Implementation(
            "apex",
            _apex,
            foreign=True,
            layouts=("contiguous",),
            missing=_not_installed("apex") or no_cuda or _no_apex_extension(),
        ),
    ]


def _not_installed(package: str) -> str | None:
    return None if importlib.util.find_spec(package) is not None else "not installed"


def _no_torch_sync(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "torch.nn.SyncBatchNorm refuses tensors on a CPU"


def _alone_it_does_not_synchronize(world_size: int) -> str | None:
    return None if world_size > 1 else "does not synchronize in a world of one process"


# This project


class AlwaysExchange(Exchange):
    """Exchanges in a world of one process, too, so that one GPU does what one of many would do."""

    @property
    def alone(self) -> bool:
        return False


def _ours(channels: int, dimensions: int) -> nn.Module:
    return SyncBatchNorm(channels, process_group=AlwaysExchange())


def _ours_fused(channels: int, dimensions: int) -> nn.Module:
    return SyncBatchNorm(channels, process_group=AlwaysExchange(), activation="relu")


def _convert_to_ours(model: nn.Module) -> nn.Module:
    return syncbn.convert(model, AlwaysExchange())


def _convert_and_fuse(model: nn.Module) -> nn.Module:
    return syncbn.fuse(_convert_to_ours(model))


def _compiled(convert: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def compiled(model: nn.Module) -> nn.Module:
        model = convert(model)
        model.compile(fullgraph=True)
        return model

    return compiled


class _Recomputing(nn.Module):
    """A converted and fused model whose layers' outputs are not kept for backward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = _convert_and_fuse(model)

    def forward(self, *args: Any) -> Any:
        with recompute_activations():
            return self.model(*args)


# PyTorch


def _local(channels: int, dimensions: int) -> nn.Module:
    return LOCAL[dimensions](channels)


class TorchSyncBatchNorm(nn.SyncBatchNorm):
    """``torch.nn.SyncBatchNorm`` in training, as it runs in a world of many processes.

    In a world of one the module itself would fall back to local batch normalization.
    """

    def forward(self, input: Tensor) -> Tensor:
        if dist.get_world_size() > 1:
            return super().forward(input)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        assert self.num_batches_tracked is not None  # never made without
        self.num_batches_tracked.add_(1)
        return TorchSyncBatchNormFunction.apply(
            input,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.eps,
            self.momentum,
            dist.group.WORLD,
            1,
        )


def _torch_sync(channels: int, dimensions: int) -> nn.Module:
    return TorchSyncBatchNorm(channels)


def _convert_to_torch_sync(model: nn.Module) -> nn.Module:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.SyncBatchNorm:
            module.__class__ = TorchSyncBatchNorm
    return model


class FollowedByAddAndReLU(nn.Module):
    """A normalization layer, then addition and ReLU in place, as residual networks are written."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return F.relu_(self.norm(x).add_(residual))


def _followed_by_add_and_relu(layer: Layer) -> Layer:
    return lambda channels, dimensions: FollowedByAddAndReLU(layer(channels, dimensions))


# Others


def _fairscale(channels: int, dimensions: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses what PyTorch has since deprecated
        from fairscale.experimental.nn import SyncBatchNorm as FairscaleSyncBatchNorm

    warnings.filterwarnings("ignore", module="fairscale")
    return FairscaleSyncBatchNorm(channels)


def _inplace_abn(channels: int, dimensions: int) -> nn.Module:
    # Signature: docstring of InPlaceABNSync in inplace_abn/abn.py, mapillary/inplace_abn at 01d23bf.
    from inplace_abn import InPlaceABNSync

    return InPlaceABNSync(channels, activation="identity")


def _apex(channels: int, dimensions: int) -> nn.Module:
    # Signature: https://nvidia.github.io/apex/parallel.html, "Synchronized BatchNorm".
    from .apex_beside_syncbn import apex_sync_batch_norm

    return apex_sync_batch_norm()(channels)


def _no_apex_extension() -> str | None:
    from .apex_beside_syncbn import extension_file

    return None if extension_file() is not None else "installed without its CUDA extension"


class NaiveSyncBatchNorm(nn.Module):
    """Synchronization as detectron2's NaiveSyncBatchNorm does it, left to autograd.

    The means of x and x² are averaged over the processes by an all-reduce that autograd can differentiate; the rest are
    plain operations. Processes count alike, whatever they bring.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()
        places = [dim for dim in range(x.dim()) if dim != 1]
        means_2C = torch.cat([values.mean(places), values.square().mean(places)])
        mean_C, mean_of_squares_C = (_AllReduce.apply(means_2C) / dist.get_world_size()).chunk(2)
        var_C = mean_of_squares_C - mean_C.square()
        scale_C = self.weight * (var_C + self.eps).rsqrt()
        shift_C = self.bias - mean_C * scale_C
        with torch.no_grad():
            self.running_mean.lerp_(mean_C, self.momentum)
            self.running_var.lerp_(var_C, self.momentum)
        broadcast = (-1, *[1] * (x.dim() - 2))
        return (values * scale_C.view(broadcast) + shift_C.view(broadcast)).to(x.dtype)


class _AllReduce(torch.autograd.Function):
    """The sum over the processes; its gradient is summed over them, too."""

    @staticmethod
    def forward(ctx: Any, message: Tensor) -> Tensor:
        total = message.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def _naive(channels: int, dimensions: int) -> nn.Module:
    return NaiveSyncBatchNorm(channels)


def _replace(layer: Layer) -> Callable[[nn.Module], nn.Module]:
    """A conversion that puts a new layer in the place of every BatchNorm2d."""

    def convert(model: nn.Module) -> nn.Module:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, layer(child.num_features, 2).to(child.weight.device))
        return model

    return convert
