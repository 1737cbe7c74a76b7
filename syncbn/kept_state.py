"""Running a model without changing anything of it: modes, buffers and random state are as before."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """A block after which the model's modes and buffers, and the random state, are what they were, whatever happens."""
    with random_state_kept(model), _buffers_kept(model), _modes_kept(model):
        yield


@contextmanager
def generators_kept(loader: object) -> Iterator[None]:
    """A block after which the random generators of a DataLoader and its samplers, if it has any, are as before."""
    holders = [loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler"))]
    found = {id(each): each for each in (getattr(holder, "generator", None) for holder in holders)}
    states = [(each, each.get_state()) for each in found.values() if isinstance(each, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    # Not by train() and eval(), which some libraries override with more than a mode (merging weights, for one).
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    buffers = {module: dict(module._buffers) for module in model.modules()}
    values = {
        each: each.clone()
        for kept in buffers.values()
        for each in kept.values()
        if each is not None and not is_lazy(each) and not each.is_meta
    }
    try:
        yield
    finally:
        for module, kept in buffers.items():
            module._buffers.update(kept)
        with torch.no_grad():
            for buffer, value in values.items():
                buffer.copy_(value)


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """PyTorch's on the CPU and on the model's devices, Python's, and NumPy's where it is in use."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    numpy = sys.modules.get("numpy")
    of_numpy = numpy.random.get_state() if numpy is not None else None
    of_python = random.getstate()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in {device.type for device in devices} - {"cpu", "meta"}:
            indices = sorted({device.index or 0 for device in devices if device.type == kind})
            stack.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
        try:
            yield
        finally:
            random.setstate(of_python)
            if numpy is not None:
                numpy.random.set_state(of_numpy)
