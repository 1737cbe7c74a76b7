"""In one process, SyncBatchNorm is nn.BatchNorm: arguments, state_dict, results, errors."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import syncbn

PLAIN = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SHAPES = [(6, 4), (2, 4, 7), (2, 4, 5, 6), (2, 4, 3, 4, 5)]


def pair(shape: tuple[int, ...], **arguments: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's layer for inputs of this shape, with the same parameters."""
    ours, plain = (cls(shape[1], **arguments) for cls in (syncbn.SyncBatchNorm, PLAIN[len(shape)]))
    for parameter in plain.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    ours.load_state_dict(plain.state_dict())
    return ours, plain


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "arguments", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"momentum": 0.7}], ids=str
)
def test_three_steps_and_eval(shape: tuple[int, ...], arguments: dict[str, Any]) -> None:
    ours, plain = pair(shape, dtype=torch.float64, **arguments)
    for _ in range(3):
        x = torch.randn(shape, dtype=torch.float64) * 3 + 2
        dy = torch.randn_like(x)
        results = []
        for layer in (ours, plain):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.backward(dy)
            results.append([y, leaf.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x))
    assert ours.state_dict().keys() == plain.state_dict().keys()


def test_arguments_are_those_of_torch() -> None:
    ours = inspect.signature(syncbn.SyncBatchNorm).parameters
    theirs = inspect.signature(nn.SyncBatchNorm).parameters
    positional = [name for name, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional
    assert all(ours[name].default == theirs[name].default for name in positional)
    keywords = {name: p.default for name, p in theirs.items() if p.kind is p.KEYWORD_ONLY}
    assert isinstance(syncbn.SyncBatchNorm(3, **keywords), nn.Module)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck(shape: tuple[int, ...]) -> None:
    ours, _ = pair(shape, dtype=torch.float64)
    x = torch.randn(2, 4, *[2] * (len(shape) - 2), dtype=torch.float64, requires_grad=True)
    weight, bias = (p.detach().clone().requires_grad_() for p in (ours.weight, ours.bias))

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return syncbn.sync_batch_norm(x, None, None, weight, bias, training=True)

    assert torch.autograd.gradcheck(layer, (x, weight, bias))
    assert torch.autograd.gradgradcheck(layer, (x, weight, bias))


def test_only_some_gradients_are_asked_for() -> None:
    for wanted in ([True, False, False], [False, True, False], [False, False, True], [True, False, True]):
        ours, plain = pair((4, 3, 5, 5), dtype=torch.float64)
        x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
        gradients = []
        for layer in (ours, plain):
            leaves = [x.clone(), *layer.parameters()]
            for leaf, wants in zip(leaves, wanted, strict=True):
                leaf.requires_grad_(wants)
            layer(leaves[0]).sin().sum().backward()
            gradients.append([leaf.grad for leaf in leaves])
        torch.testing.assert_close(
            [g for g in gradients[0] if g is not None], [g for g in gradients[1] if g is not None]
        )
        assert [g is not None for g in gradients[0]] == wanted


def test_a_changed_input_is_noticed() -> None:
    layer, x = syncbn.SyncBatchNorm(3), torch.randn(4, 3, requires_grad=True)
    features = x * 2
    y = layer(features)
    features.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_y_may_be_changed_in_place() -> None:
    """ReLU(inplace=True) follows batch normalization in every model."""
    ours, plain = pair((4, 3, 5, 5))
    x = torch.randn(4, 3, 5, 5)
    gradients = []
    for layer in (ours, plain):
        leaf = x.clone().requires_grad_()
        nn.functional.relu(layer(leaf), inplace=True).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_retained_graph_and_accumulated_gradients() -> None:
    ours, plain = pair((4, 3), dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64)
    gradients = []
    for layer in (ours, plain):
        leaf = x.clone().requires_grad_()
        loss = layer(leaf).square().mul(layer(leaf * 2)).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(1, 3, 1, 1), ValueError, "Expected more than 1 value per channel when training"),
        (torch.randn(1, 3), ValueError, "Expected more than 1 value per channel when training"),
        (torch.randn(3), ValueError, "2D to 5D input"),
        (torch.randn(1, 3, 2, 2, 2, 2), ValueError, "2D to 5D input"),
        (torch.randn(2, 4, 5, 5), RuntimeError, "expected 3 channels in dimension 1"),
        (torch.randn(2, 0, 5, 5), ValueError, "at least 1 channel"),
        (torch.ones(2, 3, 5, 5, dtype=torch.long), TypeError, "floating input"),
        (torch.ones(2, 3, 5, 5, dtype=torch.complex64), TypeError, "floating input"),
    ],
    ids=["1x1", "one row", "1-D", "6-D", "channels", "no channels", "integers", "complex"],
)
def test_bad_input(x: Tensor, error: type[Exception], message: str) -> None:
    layer = syncbn.SyncBatchNorm(3)
    with pytest.raises(error, match=message):
        layer(x)
    assert layer.num_batches_tracked == 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="eps must be positive"):
        syncbn.SyncBatchNorm(3, eps=0.0)(torch.randn(2, 3))
    with pytest.raises(ValueError, match="needs num_batches_tracked"):
        syncbn.sync_batch_norm(torch.randn(2, 3), torch.zeros(3), torch.ones(3), training=True, momentum=None)
    with pytest.raises(TypeError, match="expected process_group to be a ProcessGroup"):
        syncbn.SyncBatchNorm(3, process_group="all")


def test_a_wrong_channel_count_is_named_in_eval_too() -> None:
    with pytest.raises(RuntimeError, match="expected 3 channels"):
        syncbn.SyncBatchNorm(3).eval()(torch.randn(2, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_cast_module(dtype: torch.dtype) -> None:
    ours, plain = pair((4, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8) * 2 + 1
    y = ours.to(dtype)(x.to(dtype))
    assert y.dtype == ours.running_mean.dtype == dtype
    torch.testing.assert_close(y.float(), plain(x), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(ours.running_var.float(), plain.running_var, rtol=2e-2, atol=2e-2)


def test_momentum_one_gives_the_variance_itself() -> None:
    layer, x = syncbn.SyncBatchNorm(3, momentum=1.0, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64) * 1e-9
    layer(x)
    torch.testing.assert_close(layer.running_var, x.var(0), rtol=1e-9, atol=0)


def test_a_bad_batch_leaves_the_running_statistics() -> None:
    layer = syncbn.SyncBatchNorm(2)
    y = layer(torch.tensor([[1.0, float("nan")], [2.0, 0.0]]))
    assert y[:, 1].isnan().all()
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, torch.zeros(2))
    assert torch.equal(layer.running_var, torch.ones(2))


def test_a_large_mean_does_not_spoil_the_running_variance() -> None:
    layer = syncbn.SyncBatchNorm(1, momentum=1.0)
    x = torch.randn(2, 1, 100, 100) + 1e5
    layer(x)
    torch.testing.assert_close(layer.running_var, x.double().var().float().view(1), rtol=1e-5, atol=0)


def test_copies_and_pickles() -> None:
    layer = syncbn.SyncBatchNorm(3)
    layer(torch.randn(4, 3))
    x = torch.randn(4, 3)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is syncbn.SyncBatchNorm
        assert torch.equal(other(x), copy.deepcopy(layer)(x))
        assert other._exchange is not layer._exchange


def test_modes_do_not_leave_traces() -> None:
    """A call under inference_mode, no_grad or another default device is like any other, and so is the next one."""
    ours, plain = pair((4, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    results: list[list[Tensor]] = [[], []]
    for layer, result in zip((ours, plain), results, strict=True):
        with torch.inference_mode():
            result.append(layer(x).clone())
        with torch.no_grad():
            y = layer(x)
            assert not y.requires_grad
            result.append(y)
        with torch.device("meta"):
            result.append(layer(x))
        leaf = x.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        result += [leaf.grad, *layer.buffers()]
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine.clone(), theirs.clone(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_plain_checkpointing_gives_right_gradients(use_reentrant: bool) -> None:
    ours, plain = pair((4, 3, 8, 8), dtype=torch.float64)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    gradients = []
    for run in (lambda leaf: torch.utils.checkpoint.checkpoint(ours, leaf, use_reentrant=use_reentrant), plain):
        leaf = x.clone().requires_grad_()
        run(leaf).sin().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_meta_device() -> None:
    layer = syncbn.SyncBatchNorm(3, device="meta")
    x = torch.empty(2, 3, 4, 4, device="meta", requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape


def test_importing_the_core_is_light() -> None:
    heavy = ["lightning", "hydra", "torchvision", "triton", "matplotlib"]
    program = f"import sys, syncbn; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    plain = subprocess.run(
        [sys.executable, "-c", program.replace(", syncbn", ", torch")], capture_output=True, text=True
    )
    assert run.stdout == plain.stdout == "[]\n"
