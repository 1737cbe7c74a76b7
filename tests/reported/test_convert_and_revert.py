"""Converting a model must not change what it computes, and there must be a way back.

- pytorch/pytorch#187298: convert_sync_batchnorm makes a bare SyncBatchNorm of every subclass, so that an activation in
  the subclass's forward is silently lost.
- huggingface/pytorch-image-models#1254: the same of timm's BatchNormAct2d; the logits of an EfficientNet became 1e17.
- pytorch/pytorch#41081: there is no function that turns SyncBatchNorm layers back; users' own ones lose the number of
  dimensions, the training flags and what else a layer had.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from union import assert_like_the_union, parts, train_step

import syncbn
from syncbn import SyncBatchNorm

timm = pytest.importorskip("timm")


class BatchNormAct2d(nn.BatchNorm2d):
    """The subclass of pytorch/pytorch#187298."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def subclass() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8), nn.Conv2d(8, 4, 3))


def timm_model(name: str) -> nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=4)


def timms_synchronized(name: str) -> nn.Module:
    return timm.layers.convert_sync_batchnorm(timm_model(name))


class Volumes(nn.Module):
    """Layers of all three dimensions, which torch.nn.SyncBatchNorm cannot tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, (1, 3, 3), stride=(1, 4, 4))
        self.of_volumes = nn.BatchNorm3d(4, eps=1e-3)
        self.of_images = nn.BatchNorm2d(4, momentum=None)
        self.of_rows = nn.BatchNorm1d(4, momentum=0.3)
        self.of_vectors = nn.BatchNorm1d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.of_volumes(self.conv(x.unsqueeze(2))).mean(2).relu()
        x = self.of_images(x).mean(2).sigmoid()
        return self.of_vectors(self.of_rows(x).square().mean(2))


def torchs_synchronized() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(Volumes())


MODELS = {
    "a subclass with an activation": (subclass, None),
    "timm test_efficientnet": (functools.partial(timm_model, "test_efficientnet"), None),
    "timm test_byobnet": (functools.partial(timm_model, "test_byobnet"), None),
    "timm's SyncBatchNormAct": (
        functools.partial(timms_synchronized, "test_byobnet"),
        functools.partial(timm_model, "test_byobnet"),
    ),
    "layers of three dimensions": (Volumes, None),
    "torch.nn.SyncBatchNorm": (torchs_synchronized, Volumes),
}
EVERY_MODEL = pytest.mark.parametrize(("build", "judge"), MODELS.values(), ids=MODELS.keys())
IMAGES = parts((2, 3, 32, 32), (1, 3, 32, 32))


def norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def randomized(model: nn.Module) -> nn.Module:
    """With γ, β and running statistics as if it had learned."""
    for layer in norms(model).values():
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            if tensor is not None:
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model


# ---- convert keeps the behaviour


@EVERY_MODEL
def test_eval_gives_the_same_bits(build: Any, judge: Any) -> None:
    model, x = randomized(build()).eval(), torch.randn(2, 3, 32, 32)
    inputs = [x, x.contiguous(memory_format=torch.channels_last)]
    expected = [model(x) for x in inputs]
    converted = syncbn.convert(copy.deepcopy(model))
    assert all(isinstance(layer, SyncBatchNorm) for layer in norms(converted).values())
    assert all(torch.equal(converted(x), y) for x, y in zip(inputs, expected, strict=True))
    with torch.inference_mode():
        assert all(torch.equal(converted(x), y) for x, y in zip(inputs, expected, strict=True))
    syncbn.revert(converted)
    assert all(torch.equal(converted(x), y) for x, y in zip(inputs, expected, strict=True))


@EVERY_MODEL
def test_training_is_that_of_the_union(processes: Any, build: Any, judge: Any) -> None:
    # Deep networks of few values per channel amplify rounding; without synchronization the difference is ~1.
    assert_like_the_union(processes, build, IMAGES, judge, tolerance=1e-6)


@EVERY_MODEL
def test_checkpoints_are_the_same(build: Any, judge: Any) -> None:
    plain = randomized(build())
    converted = syncbn.convert(randomized(build()))
    theirs, ours = plain.state_dict(), converted.state_dict()
    assert list(ours) == list(theirs)
    assert ours._metadata == theirs._metadata
    converted.load_state_dict(theirs)
    plain.load_state_dict(converted.state_dict())
    for tensor, expected in zip(converted.state_dict().values(), theirs.values(), strict=True):
        assert torch.equal(tensor, expected)


def test_the_activation_of_the_reported_subclass_is_not_lost() -> None:
    layer, x = BatchNormAct2d(4), torch.randn(2, 4, 8, 8)
    expected = copy.deepcopy(layer)(x)
    assert expected.min() == 0
    torchs = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(layer)).eval()
    assert torchs(x).min() < 0, "what was reported"
    syncbn.convert(layer)
    torch.testing.assert_close(layer(x), expected)
    assert layer.eval()(x).min() == 0


def test_the_reported_efficientnet_keeps_its_logits() -> None:
    model = timm.create_model("tf_efficientnet_b3.ns_jft_in1k", pretrained=False).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        syncbn.convert(model)
        assert sum(isinstance(m, timm.layers.BatchNormAct2d) for m in norms(model).values()) == 78
        assert torch.equal(model(x), expected)
        assert torch.equal(syncbn.revert(model)(x), expected)


def test_dropout_in_a_layer_is_not_lost() -> None:
    """huggingface/pytorch-image-models#1254: "drop and act are ignored"."""
    layer = timm.layers.BatchNormAct2d(4, drop_layer=functools.partial(nn.Dropout, p=0.5))
    x = torch.randn(8, 4, 8, 8)
    torch.manual_seed(0)
    expected = copy.deepcopy(layer)(x)
    torch.manual_seed(0)
    torch.testing.assert_close(syncbn.convert(layer)(x), expected)
    assert (expected == 0).float().mean() > 0.6, "dropout and ReLU"


# ---- revert is exact


def attributes(layer: nn.Module) -> dict[str, Any]:
    """All that the layer has: parameters, buffers, modules and hooks one by one."""
    found = {}
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            found |= {(name, key): each for key, each in value.items()}
        else:
            found[name] = value
    return found


def assert_is_what_it_was(layer: nn.Module, before: dict[str, Any]) -> None:
    now = attributes(layer)
    assert now.keys() == before.keys()
    assert [name for name, value in now.items() if value is not before[name]] == []


def individual(model: nn.Module) -> list[Any]:
    """Makes every layer unlike the others, in all that users change. Returns what hooks will append to."""
    called: list[Any] = []
    for i, (name, layer) in enumerate(norms(model).items()):
        layer.train(i % 2 == 0)
        for parameter in layer.parameters():
            parameter.requires_grad_(i % 3 != 0)
        layer.register_forward_pre_hook(lambda *_, name=name: called.append((name, "before")))
        layer.register_forward_hook(lambda *_, name=name: called.append((name, "after")))
        layer.register_full_backward_hook(lambda *_, name=name: called.append((name, "backward")))
        layer.register_state_dict_post_hook(lambda *_, name=name: called.append((name, "saved")))
        layer.note = [name]
        layer.eps *= i + 1
    return called


@EVERY_MODEL
def test_everything_is_given_back(build: Any, judge: Any) -> None:
    model = randomized(build())
    called = individual(model)
    types = {name: type(layer) for name, layer in norms(model).items()}
    before = {name: attributes(layer) for name, layer in norms(model).items()}
    flags = {name: (p.requires_grad, p.dtype, p.device) for name, p in model.named_parameters()}

    syncbn.convert(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 3, 32, 32)
    model(x).square().mean().backward()
    optimizer.step()
    hooked = {name for name, what in called if what == "after"}
    assert hooked == set(before), "hooks are called"
    learned = copy.deepcopy(dict(model.state_dict()))

    assert syncbn.revert(model) is model
    assert {name: type(layer) for name, layer in norms(model).items()} == types
    for name, layer in norms(model).items():
        assert_is_what_it_was(layer, before[name])
    assert {name: (p.requires_grad, p.dtype, p.device) for name, p in model.named_parameters()} == flags
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, learned[name]), "what was learned stays"
    called.clear()
    model.eval()(x)
    assert {name for name, what in called if what == "after"} == set(before)


def test_layers_of_any_dtype_and_device_are_given_back() -> None:
    layers = nn.ModuleList(
        [
            nn.BatchNorm2d(4).half(),
            BatchNormAct2d(4).bfloat16(),
            nn.BatchNorm1d(4).double(),
            nn.BatchNorm3d(4, device="meta"),
            nn.SyncBatchNorm(4),
            nn.BatchNorm2d(4, affine=False, track_running_stats=False),
            nn.LazyBatchNorm2d(),
        ]
    )
    layers[4].weight.data = layers[4].weight.data.bfloat16()
    before = [(type(layer), attributes(layer)) for layer in layers]
    assert all(isinstance(layer, SyncBatchNorm) for layer in syncbn.convert(layers))
    syncbn.revert(layers)
    for layer, (original, its) in zip(layers, before, strict=True):
        assert type(layer) is original
        assert_is_what_it_was(layer, its)


@pytest.mark.parametrize(("name", "wrong"), [("of_volumes", 4), ("of_images", 5), ("of_rows", 4), ("of_vectors", 4)])
def test_the_number_of_dimensions_is_checked_again(name: str, wrong: int) -> None:
    """The functions that users wrote in pytorch/pytorch#41081 make a BatchNormXd that takes any number."""
    model = syncbn.revert(syncbn.convert(Volumes()))
    with pytest.raises(ValueError, match=r"expected .*D input"):
        model.get_submodule(name)(torch.randn(2, 4, *[3] * (wrong - 2)))


def test_one_layer_can_be_reverted() -> None:
    model = syncbn.convert(Volumes())
    syncbn.revert(model.of_images)
    assert type(model.of_images) is nn.BatchNorm2d
    assert sum(isinstance(m, SyncBatchNorm) for m in model.modules()) == 3


def test_what_is_added_between_stays() -> None:
    layer = syncbn.convert(nn.BatchNorm2d(4))
    layer.note, called = "kept", []
    layer.register_forward_hook(lambda *_: called.append("hook"))
    layer.eval().weight.requires_grad_(False)
    layer.double()
    syncbn.revert(layer)(torch.randn(2, 4, 3, 3, dtype=torch.float64))
    assert (layer.note, called, layer.training, layer.weight.requires_grad) == ("kept", ["hook"], False, False)


def _converted_and_reverted(x: Tensor, build: Any) -> Any:
    """On a worker: a step on the union, then one on this process's own part."""
    torch.manual_seed(0)
    model = syncbn.fuse(syncbn.convert(build().double()))
    train_step(model, x)
    syncbn.revert(model)
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.sin().sum().backward()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return y.detach(), x.grad, buffers


@pytest.mark.parametrize(
    "build", [subclass, Volumes, MODELS["timm test_byobnet"][0]], ids=["a subclass", "three dimensions", "timm"]
)
def test_a_reverted_model_is_the_plain_one_on_each_process(processes: Any, build: Any) -> None:
    images = parts((2, 3, 32, 32), (3, 3, 32, 32))
    torch.manual_seed(0)
    trained = build().double()
    train_step(trained, torch.cat(images))
    results = processes(2).run(_converted_and_reverted, build, per_rank=[(part,) for part in images])
    for part, (y, dx, buffers) in zip(images, results, strict=True):
        plain, x = copy.deepcopy(trained), part.clone().requires_grad_()
        expected = plain(x)
        expected.sin().sum().backward()
        torch.testing.assert_close(y, expected.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(dx, x.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(buffers, dict(plain.named_buffers()), rtol=1e-6, atol=1e-8)


def test_a_reverted_model_needs_no_other_process(processes: Any) -> None:
    """Only one of two processes goes on with it."""
    assert processes(2).run(_one_goes_on) == [True, True]


def _one_goes_on() -> bool:
    model = syncbn.revert(syncbn.convert(subclass()))
    if dist.get_rank() == 0:
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    return True
