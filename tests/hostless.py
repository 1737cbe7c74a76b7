"""Whether code would wait for a GPU, found out without one.

PyTorch's own means serve: a fake tensor has a shape, a dtype and a device, but no data, so that whatever would read it
on the host raises; and each operator that reads data to give its answer, or that answer's shape, bears a tag that says
so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HostReadError(RuntimeError):
    """The host has read data of a tensor, or copied some to or from a device."""


class _NoReading(TorchDispatchMode):
    TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(tag in function.tags for tag in self.TAGS):
            raise HostReadError(str(function))
        return function(*args, **(kwargs or {}))


class _NoHostTensors(_NoReading):
    """Nor any tensor on the host, from or to which something could be copied."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = super().__torch_dispatch__(function, types, args, kwargs)
        for each in tree_leaves((args, kwargs, results)):
            if isinstance(each, Tensor) and each.device.type == "cpu":
                raise HostReadError(f"{function} with a tensor on the host")
        return results


@contextmanager
def no_reading() -> Iterator[None]:
    """Operators that read the data of their tensors raise HostReadError."""
    with _NoReading():
        yield


@contextmanager
def no_data() -> Iterator[FakeTensorMode]:
    """Tensors made inside, or with ``from_tensor``, have no data; reading them raises, in backward, too."""
    with FakeTensorMode() as mode:
        yield mode


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Tensors can be made on "cuda" and have no data. Reading one raises, and so does any tensor on the host.

    Autograd needs a driver: without one, there is no backward here.
    """
    with FakeTensorMode(), _NoHostTensors():
        yield
