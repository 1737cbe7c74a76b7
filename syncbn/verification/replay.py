"""One training step of a copied model, without anything that chance or rounding decides."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

Loss = Callable[..., Tensor]
_SEED = 0


class Step(NamedTuple):
    """What is done with a model and its inputs."""

    loss: Loss | None
    dtype: torch.dtype | None

    def copy(self, model: nn.Module) -> nn.Module:
        """The model in the step's dtype, without gradients."""
        copied = copy.deepcopy(model)
        copied.zero_grad(set_to_none=True)
        return copied if self.dtype is None else copied.to(self.dtype)

    def cast(self, values: Any) -> Any:
        """Copies of all tensors, the floating ones in the step's dtype."""

        def to(tensor: Tensor) -> Tensor:
            floating = self.dtype is not None and tensor.is_floating_point()
            copied = tensor.detach().to(self.dtype if floating else tensor.dtype, copy=True)
            return copied.requires_grad_(tensor.requires_grad)

        return tree_map_only(Tensor, to, values)

    def forward(self, model: nn.Module, inputs: Any) -> Any:
        # No leaves: a model may write to its input.
        inputs = tree_map_only(Tensor, lambda each: each.clone() if each.requires_grad else each, inputs)
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)

    def backward(self, outputs: Any, targets: Any, weight: float) -> None:
        if self.loss is None:
            loss = _projection(outputs)
        else:
            loss = self.loss(outputs) if targets is None else self.loss(outputs, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(f"expected loss to return a tensor with one element, got {_spelled(loss)}")
        if loss.requires_grad:
            (loss.sum() * weight).backward()


def _spelled(value: Any) -> str:
    return f"one of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _projection(outputs: Any) -> Tensor:
    """Σ w·(y + sin y) over all tensors y, and Σ w·y over those without dimensions.

    w is drawn along the last dimension: the same for all samples, however they are spread. The sine makes the gradient
    differ between samples, since a normalization takes away what is the same for all.
    """
    tensors = [each for each in tree_leaves(outputs) if isinstance(each, Tensor) and each.is_floating_point()]
    if not tensors:
        raise TypeError(
            f"the model returns {type(outputs).__name__}, in which there is no floating tensor: pass loss=, which "
            f"makes a scalar of it"
        )
    total = torch.zeros((), dtype=tensors[0].dtype, device=tensors[0].device)
    for number, y in enumerate(tensors):
        generator = torch.Generator().manual_seed(number)
        size = y.shape[-1] if y.dim() > 1 else 1
        w = torch.randn(size, generator=generator, dtype=torch.float64).to(y)
        total = total + (w * (y + y.sin() if y.dim() else y)).sum().to(total)
    return total


class WithoutDropout(TorchFunctionMode):
    """A block in which dropout lets everything pass, however it is called.

    Attributes:
        used: whether there was any.
    """

    used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if "dropout" in name:
            self.used |= bool(kwargs.get("training", args[2] if len(args) > 2 else kwargs.get("train", True)))
            return args[0] if args else kwargs["input"]
        if name == "scaled_dot_product_attention":
            self.used |= bool(kwargs.get("dropout_p") or (len(args) > 4 and args[4]))
            args, kwargs = (*args[:4], *[0.0] * (len(args) > 4), *args[5:]), kwargs | {"dropout_p": 0.0}
            if len(args) > 4:
                del kwargs["dropout_p"]
        return func(*args, **kwargs)


# What drops at random, by the names that timm, torchvision and others give it.
_DROPPING = ("dropout", "droppath", "stochasticdepth", "dropblock")


def stop_dropping(model: nn.Module) -> bool:
    """Puts modules that drop something at random into eval mode. Whether there were any in training."""
    found = False
    for module in model.modules():
        if module.training and any(word in type(module).__name__.lower() for word in _DROPPING):
            module.training, found = False, True
        if isinstance(module, nn.RNNBase) and module.dropout:
            found |= module.training
            module.dropout = 0.0
    return found


@contextmanager
def seeded(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """A block that begins with the same random state everywhere. It yields what says whether it has moved since."""
    torch.manual_seed(_SEED)
    random.seed(_SEED)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(_SEED)
    on_gpus = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    before = _random_states(on_gpus)

    def has_moved() -> bool:
        return any(a != b for a, b in zip(before, _random_states(on_gpus), strict=True))

    yield has_moved


def _random_states(on_gpus: set[torch.device]) -> list[Any]:
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in on_gpus)]
    return [random.getstate(), *(state.tolist() for state in states)]
