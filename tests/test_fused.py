"""activation(BN(x) + residual) and masks through the layer: over processes, twice differentiated, in bfloat16."""

from __future__ import annotations

import copy
import pickle
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import device_of
from judge import assert_close
from torch import Tensor, nn

import syncbn
from syncbn import functional
from syncbn.kernels import backend_for

ACTIVATION = {
    None: lambda z: z,
    "relu": F.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.2),
    "silu": F.silu,
}
CALLS = [(None, True), ("relu", False), ("relu", True), ("leaky_relu", True), ("silu", False), ("silu", True)]
EVERY_CALL = pytest.mark.parametrize(("activation", "with_residual"), CALLS, ids=str)


def layers(activation: str | None, dtype: torch.dtype = torch.float64) -> tuple[syncbn.SyncBatchNorm, nn.BatchNorm2d]:
    """Ours, fused, and PyTorch's, with the same parameters."""
    ours = syncbn.SyncBatchNorm(5, activation=activation, negative_slope=0.2, dtype=dtype)
    plain = nn.BatchNorm2d(5, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    for parameter in plain.parameters():
        parameter.data.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    ours.load_state_dict(plain.state_dict())
    return ours, plain


@EVERY_CALL
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_one_process(activation: str | None, with_residual: bool, mode: str) -> None:
    ours, plain = layers(activation)
    x, residual, dy = (torch.randn(3, 5, 8, 9, dtype=torch.float64) for _ in range(3))
    results = []
    for layer in (ours.train(mode == "train"), plain.train(mode == "train")):
        leaves = x.clone().requires_grad_(), residual.clone().requires_grad_()
        added = leaves[1] if with_residual else None
        if layer is ours:
            y = ours(leaves[0], added) if with_residual else ours(leaves[0])
        else:
            y = ACTIVATION[activation](plain(leaves[0]) + (added if with_residual else 0))
        y.backward(dy)
        gradients = [leaf.grad for leaf in leaves[: 1 + with_residual]]
        results.append([y, *gradients, *(p.grad for p in layer.parameters()), *layer.buffers()])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def train_on_union(parts: list[tuple[Tensor, Tensor, Tensor]], activation: str | None, name: str) -> Any:
    """On a worker: this process's part, by this backend."""
    functional.backend_for = lambda x: import_module(f"syncbn.kernels.{name}")  # type: ignore[assignment,return-value]
    device = device_of(name)
    x, residual, dy = (each.to(device) for each in parts[torch.distributed.get_rank()])
    ours, _ = layers(activation)
    ours.to(device)
    x, residual = x.requires_grad_(), residual.requires_grad_()
    y = ours(x, residual)
    y.backward(dy)
    results = [y.detach(), x.grad, residual.grad, *(p.grad for p in ours.parameters()), *ours.buffers()]
    return [each.cpu() for each in results]


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("activation", list(ACTIVATION), ids=str)
def test_the_union_of_two_processes(processes: Any, interpreters: Any, backend: str, activation: str | None) -> None:
    parts = [tuple(torch.randn(n, 5, 8, 9, dtype=torch.float64) for _ in range(3)) for n in (3, 1)]
    interpreted = backend == "triton" and not torch.cuda.is_available()
    pool = interpreters(2) if interpreted else processes(2)
    try:
        results = pool.run(train_on_union, parts, activation, backend)
    finally:
        pool.run(as_ever)
    _, plain = layers(activation)
    x, residual, dy = (torch.cat(each) for each in zip(*parts, strict=True))
    x, residual = x.requires_grad_(), residual.requires_grad_()
    y = ACTIVATION[activation](plain(x) + residual)
    y.backward(dy)
    for index, expected in enumerate((y.detach(), x.grad, residual.grad)):
        assert_close(torch.cat([result[index] for result in results]), expected, 1e-9, ("y", "dx", "dresidual")[index])
    for index, parameter in enumerate(plain.parameters(), 3):
        assert_close(sum(result[index] for result in results), parameter.grad, 1e-8, "γ's and β's gradients")
    for result in results:
        torch.testing.assert_close(result[5:], list(plain.buffers()))


def as_ever() -> None:
    """On a worker: the backend by device again."""
    functional.backend_for = backend_for


@EVERY_CALL
def test_gradients_of_gradients(activation: str | None, with_residual: bool) -> None:
    ours, _ = layers(activation)
    x, residual = (torch.randn(2, 5, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    parameters = ours.weight.detach().requires_grad_(), ours.bias.detach().requires_grad_()

    def call(x: Tensor, residual: Tensor, *parameters: Tensor) -> Tensor:
        added = residual if with_residual else None
        return torch.func.functional_call(ours, dict(zip(("weight", "bias"), parameters, strict=True)), (x, added))

    ours.track_running_stats, ours.running_mean, ours.running_var, ours.num_batches_tracked = False, None, None, None
    assert torch.autograd.gradcheck(call, (x, residual, *parameters), check_undefined_grad=False)
    assert torch.autograd.gradgradcheck(call, (x, residual, *parameters), check_undefined_grad=False)


def test_a_mask_leaves_padding_out() -> None:
    """Two images of different size in one batch: the statistics are those of the images alone, and so are gradients."""
    images = [torch.randn(1, 5, 6, 8, dtype=torch.float64) + 3, torch.randn(1, 5, 4, 5, dtype=torch.float64) + 3]
    batch, mask = torch.zeros(2, 5, 6, 8, dtype=torch.float64), torch.zeros(2, 1, 6, 8, dtype=torch.bool)
    for i, image in enumerate(images):
        batch[i, :, : image.shape[2], : image.shape[3]] = image[0]
        mask[i, :, : image.shape[2], : image.shape[3]] = True
    ours, plain = layers("relu")
    dy = torch.randn_like(batch) * mask
    batch.requires_grad_()
    y = ours(batch, mask=mask)
    y.backward(dy)
    values = torch.cat([image.flatten(2)[0] for image in images], 1).T.clone().requires_grad_()
    judge = nn.BatchNorm1d(5, dtype=torch.float64)
    judge.load_state_dict(plain.state_dict())
    expected = judge(values).relu()
    expected.backward(dy.movedim(1, -1)[mask[:, 0]])
    assert_close(y.movedim(1, -1)[mask[:, 0]], expected.detach(), 1e-11, "y")
    assert_close(batch.grad.movedim(1, -1)[mask[:, 0]], values.grad, 1e-11, "dx")
    assert batch.grad.movedim(1, -1)[~mask[:, 0]].abs().max() == 0
    for ours_, theirs in zip([*ours.parameters()], [*judge.parameters()], strict=True):
        assert_close(ours_.grad, theirs.grad, 1e-10, "γ's and β's gradients")
    for name, buffer in judge.named_buffers():
        assert_close(ours.get_buffer(name), buffer.double(), 1e-12, name)


@pytest.mark.parametrize("shape", [(2, 1, 6, 1), (1, 1, 6, 8), (6, 8), (1,)], ids=str)
def test_masks_broadcast(shape: tuple[int, ...]) -> None:
    x, mask = torch.randn(2, 5, 6, 8), torch.rand(shape) < 0.7
    mask[..., -1] = True
    ours, _ = layers(None, torch.float32)
    again = copy.deepcopy(ours)
    torch.testing.assert_close(ours(x, mask=mask), again(x, mask=mask.expand(2, 1, 6, 8).clone()))
    torch.testing.assert_close(ours.running_var, again.running_var)


def test_masks_that_do_not_fit() -> None:
    ours, _ = layers(None, torch.float32)
    with pytest.raises(ValueError, match=r"one channel, \[2, 1, 6, 8\], got \[2, 5, 6, 8\]"):
        ours(torch.randn(2, 5, 6, 8), mask=torch.ones(2, 5, 6, 8))
    with pytest.raises(ValueError, match="takes no gradient"):
        ours(torch.randn(2, 5, 6, 8), mask=torch.ones(2, 1, 6, 8, requires_grad=True))


@pytest.mark.parametrize("kind", ["broadcast", "wider", "of another dtype", "a larger sum"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_residual_of_another_kind_means_what_pytorch_means(kind: str, mode: str) -> None:
    ours, plain = layers("relu", torch.float32)
    x = torch.randn(2, 5, 6, 8)
    residual = {
        "broadcast": torch.randn(5, 1, 1),
        "wider": torch.randn(2, 5, 6, 8, dtype=torch.float64),
        "of another dtype": torch.randn(2, 5, 6, 8).half(),
        "a larger sum": torch.randn(3, 2, 5, 6, 8),
    }[kind]
    results = []
    for layer in (ours.train(mode == "train"), plain.train(mode == "train")):
        leaves = x.clone().requires_grad_(), residual.clone().requires_grad_()
        y = layer(*leaves) if layer is ours else F.relu(layer(leaves[0]) + leaves[1])
        y.double().square().sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves), *(p.grad for p in layer.parameters())])
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        assert_close(actual, expected.double(), 1e-5 if expected.dtype != torch.float16 else 1e-2, kind)


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="one of relu, leaky_relu, silu, got 'gelu'"):
        syncbn.SyncBatchNorm(3, activation="gelu")
    with pytest.raises(ValueError, match="negative_slope to be at least 0, got -1"):
        syncbn.SyncBatchNorm(3, activation="leaky_relu", negative_slope=-1)
    with pytest.raises(ValueError, match="'tanh'"):
        syncbn.sync_batch_norm(torch.randn(2, 3), None, None, training=True, activation="tanh")


@pytest.mark.parametrize("wrong", ["weight", "bias", "running_mean"])
def test_vectors_of_another_size(wrong: str) -> None:
    """The CUDA kernels would read beyond their ends."""
    vectors = {name: torch.ones(3) for name in ("running_mean", "running_var", "weight", "bias")}
    vectors[wrong] = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"of 3 elements on cpu.*got one of 2 elements"):
        syncbn.sync_batch_norm(torch.randn(2, 3), training=True, **vectors)


@pytest.mark.parametrize(
    ("activation", "with_residual", "most"),
    [(*call, most) for call, most in zip(CALLS, (1, 1, 2, 2, 1, 2), strict=True)],
    ids=str,
)
def test_backward_keeps_no_more_than_unfused_layers(activation: str | None, with_residual: bool, most: int) -> None:
    """Unfused: BN keeps x, a ReLU its output, SiLU its input. In tensors of x's size; what is shared counts once."""

    def kept(call: Any) -> set[int]:
        pointers: set[int] = set()

        def pack(tensor: Tensor) -> Tensor:
            if tensor.numel() == x.numel():
                pointers.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = call()
        assert y.requires_grad  # and y is alive, so that no other tensor has its address
        return pointers

    ours, plain = layers(activation, torch.float32)
    x, residual = (torch.randn(3, 5, 8, 9, requires_grad=True) for _ in range(2))
    fused = kept(lambda: ours(x, residual if with_residual else None))
    unfused = kept(lambda: ACTIVATION[activation](plain(x) + (residual if with_residual else 0)))
    assert len(fused) == most <= len(unfused)


def test_autocast_and_low_precision_parameters() -> None:
    ours, plain = layers("relu", torch.float32)
    x, residual = torch.randn(3, 5, 8, 9), torch.randn(3, 5, 8, 9)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x.bfloat16(), residual.bfloat16())
    assert y.dtype == torch.bfloat16
    assert_close(y, F.relu(plain.double()(x.double()) + residual.double()).detach(), 3e-2, "y")


def test_it_shows_and_stays_in_copies() -> None:
    layer = syncbn.SyncBatchNorm(3, activation="leaky_relu", negative_slope=0.3)
    assert "activation=leaky_relu, negative_slope=0.3" in repr(layer)
    assert "activation" not in repr(syncbn.SyncBatchNorm(3))
    x = torch.randn(4, 3)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(again(x), layer(x))
    assert layer.state_dict().keys() == nn.BatchNorm2d(3).state_dict().keys()


class WithAnActivationOfItsOwn(nn.BatchNorm2d):
    """Its attributes have names that the layer might have chosen, too."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.activation = nn.Tanh()
        self.negative_slope = "steep"

    def forward(self, input: Tensor) -> Tensor:
        return self.activation(super().forward(input))


def test_an_attribute_called_activation_is_the_subclass_s_own() -> None:
    plain = WithAnActivationOfItsOwn(3)
    converted = syncbn.convert(copy.deepcopy(plain))
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(converted(x), plain(x))
