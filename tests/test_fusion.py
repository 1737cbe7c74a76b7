"""fuse: outputs, gradients, buffers and everything about the model as before; who is fused; how it is undone."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from union import Step, parts, train_step

import syncbn
from syncbn import SyncBatchNorm

pytest.importorskip("timm")
pytest.importorskip("torchvision")

import timm
import torchvision
from torchvision.models.detection import FCOS
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone


def fused(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, SyncBatchNorm) and m._fused_activation]


def randomized(model: nn.Module) -> nn.Module:
    """γ, β and running statistics unlike those of the start."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def pair(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """The converted model, and the same fused."""
    torch.manual_seed(0)
    plain = syncbn.convert(randomized(build())).double()
    return plain, syncbn.fuse(copy.deepcopy(plain))


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [tensor for each in values for tensor in tensors(each)]


def step(model: nn.Module, x: Tensor, call: Callable[[nn.Module, Tensor], Any]) -> tuple[list[Tensor], ...]:
    model.zero_grad()
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    outputs = tensors(call(model, x * 1))
    sum(y.double().sin().sum() for y in outputs).backward()
    grads = [torch.zeros(1) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [y.detach() for y in outputs], [x.grad], grads, list(model.buffers())


def plainly(model: nn.Module, x: Tensor) -> Any:
    return model(x)


def assert_same(plain: nn.Module, other: nn.Module, x: Tensor, call: Any = plainly, steps: int = 2) -> None:
    """Outputs, all gradients, and buffers, in training and in eval."""
    for _ in range(steps):
        assert_same_step(plain.train(), other.train(), x, call)
    if steps > 1:
        assert_same_step(plain.eval(), other.eval(), x, call)
    with torch.no_grad():
        a, b = (tensors(call(model.eval(), x * 1)) for model in (other, plain))
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def assert_same_step(plain: nn.Module, other: nn.Module, x: Tensor, call: Any) -> None:
    for a, b in zip(step(other, x, call), step(plain, x, call), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


IMAGES = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# ---- real models


def fcos() -> nn.Module:
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    return FCOS(backbone, num_classes=3, min_size=32, max_size=32)


def detect(model: nn.Module, x: Tensor) -> Any:
    boxes = torch.tensor([[4.0, 4.0, 20.0, 25.0]], dtype=torch.float64)
    targets = [{"boxes": boxes, "labels": torch.tensor([1])} for _ in x]
    return model(list(x), targets) if model.training else model.backbone(x)


VISION = torchvision.models
MODELS = {
    # 1 stem + 16 bottlenecks of 3 (the last of each with the residual) = 49; 4 downsample layers have no activation
    "resnet50": (partial(VISION.resnet50, weights=None), 49, 53),
    # a ResNet-50, and 7 in the head: 1x1, 3 atrous and pooling branches, projection, the head's own
    "deeplabv3": (partial(VISION.segmentation.deeplabv3_resnet50, weights=None, weights_backbone=None), 49 + 7, 60),
    # blocks with ReLU: 1 without expansion, 5 with expansion and depthwise; all others have Hardswish or nothing
    "mobilenet_v3": (partial(VISION.mobilenet_v3_large, weights=None), 1 + 5 * 2, 46),
    # the backbone; its feature pyramid has no normalization, and the heads have GroupNorm
    "fcos": (fcos, 49, 53),
    # F.relu(bn(conv(x))) in each of its 57 convolutions, without auxiliary heads
    "googlenet": (partial(VISION.googlenet, weights=None, aux_logits=False, init_weights=False), 57, 57),
    # SiLU: stem, head, 16 depthwise and 15 expansions; 16 projections have no activation
    "efficientnet": (partial(VISION.efficientnet_b0, weights=None), 1 + 1 + 16 + 15, 49),
    # nn.Identity between the two, x += shortcut: 8 blocks of 2; the stem's is called by forward_intermediates, too
    "timm resnet18": (partial(timm.create_model, "resnet18"), 8 * 2, 20),
    # activation inside of timm's own normalization: nothing follows
    "timm efficientnet": (partial(timm.create_model, "efficientnet_b0"), 0, 49),
}


@pytest.mark.parametrize(("build", "sites", "layers"), MODELS.values(), ids=MODELS)
def test_models_of_others_do_what_they_did(build: Any, sites: int, layers: int) -> None:
    plain, model = pair(build)
    keys, types = list(plain.state_dict()), [type(m) for m in plain.modules()]
    assert sum(isinstance(m, SyncBatchNorm) for m in model.modules()) == layers
    assert len(fused(model)) == sites
    assert list(model.state_dict()) == keys
    assert_same(plain, model, IMAGES, detect if isinstance(plain, FCOS) else plainly, steps=1)

    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    syncbn.revert(model)
    original = syncbn.revert(plain)
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()] != types
    for mine, its in zip(model.modules(), original.modules(), strict=True):
        assert vars(mine).keys() == vars(its).keys()


def test_hardswish_stays() -> None:
    _, model = pair(partial(torchvision.models.mobilenet_v3_small, weights=None))
    followed = [block[1] for block in model.modules() if isinstance(block, nn.Sequential) and len(block) == 3]
    hardswish = [b for b in model.modules() if isinstance(b, nn.Sequential) and isinstance(b[-1], nn.Hardswish)]
    assert followed
    assert hardswish
    assert not any(block[1]._fused_activation for block in hardswish if isinstance(block[1], SyncBatchNorm))


# ---- all forms of activation and sum


class Block(nn.Module):
    """Whatever ``after(self, y, identity)`` does with the second normalization's output y."""

    def __init__(self, after: Callable[..., Any], activation: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True) if activation is None else activation
        self.drop = nn.Identity()
        self.after = after

    def forward(self, x: Tensor) -> Any:
        identity = self.conv1(x)
        return self.after(self, self.bn2(self.conv2(identity)), identity)


def iadd(y: Tensor, other: Tensor) -> Tensor:
    y += other
    return y


F = nn.functional
FORMS: dict[str, Callable[..., Any]] = {
    "module": lambda self, y, x: self.act(y),
    "module after Identity": lambda self, y, x: self.act(self.drop(y)),
    "F.relu": lambda self, y, x: F.relu(y),
    "F.relu in place": lambda self, y, x: F.relu(y, inplace=True),
    "F.relu by name": lambda self, y, x: F.relu(input=y),
    "torch.relu_": lambda self, y, x: torch.relu_(y),
    "torch.relu": lambda self, y, x: torch.relu(y),
    "method": lambda self, y, x: y.relu(),
    "method in place": lambda self, y, x: y.relu_(),
    "F.leaky_relu": lambda self, y, x: F.leaky_relu(y, 0.2),
    "F.leaky_relu by name": lambda self, y, x: F.leaky_relu(y, negative_slope=0.3, inplace=True),
    "F.leaky_relu, slope 0.01": lambda self, y, x: F.leaky_relu(y),
    "F.silu": lambda self, y, x: F.silu(y),
    "y + x": lambda self, y, x: self.act(y + x),
    "x + y": lambda self, y, x: F.relu(x + y),
    "y += x": lambda self, y, x: self.act(iadd(y, x)),
    "y.add(x)": lambda self, y, x: y.add(x).relu(),
    "y.add_(x)": lambda self, y, x: y.add_(x).relu_(),
    "torch.add": lambda self, y, x: F.leaky_relu(torch.add(y, x, alpha=1), 0.1, inplace=True),
    "silu of a sum": lambda self, y, x: F.silu(y + x),
    "a residual of another shape": lambda self, y, x: F.relu(y + x.mean((2, 3), keepdim=True)),
    "a residual used again": lambda self, y, x: F.relu(y + x) + x,
    "both are normalized": lambda self, y, x: self.act(y + self.bn1(x)),
    "a sum after Identity": lambda self, y, x: self.act(self.drop(y) + x),
    "others in between": lambda self, y, x: self.act(iadd(y, torch.sigmoid(x * 2))),
    "used thrice": lambda self, y, x: self.act(self.act(y + self.act(x.clone())) - 0.5),
}


@pytest.mark.parametrize("after", FORMS.values(), ids=FORMS)
def test_every_form_of_it(after: Any) -> None:
    plain, model = pair(partial(Block, after))
    assert len(fused(model)) == 1
    if after is not FORMS["both are normalized"]:
        assert fused(model) == ["bn2"]
    assert_same(plain, model, IMAGES[..., :6, :6])


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.LeakyReLU(0.2, inplace=True), nn.LeakyReLU(0, inplace=True), nn.SiLU()], ids=str
)
def test_modules(activation: nn.Module) -> None:
    for after in (FORMS["module"], FORMS["y + x"]):
        plain, model = pair(partial(Block, after, activation))
        assert fused(model) == ["bn2"]
        assert_same(plain, model, IMAGES[..., :6, :6])


def test_a_sum_in_place_keeps_the_type_of_what_it_is_added_to() -> None:
    for form, dtype in (("y += x", torch.bfloat16), ("y + x", torch.float32)):
        plain, model = pair(partial(_Wide, FORMS[form]))
        assert fused(model) == ["bn2"]
        outputs = [each.bfloat16().train()(IMAGES[..., :6, :6].bfloat16()) for each in (plain, model)]
        assert [y.dtype for y in outputs] == [dtype] * 2
        torch.testing.assert_close(*outputs)


class _Wide(Block):
    def forward(self, x: Tensor) -> Any:
        identity = self.conv1(x)
        return self.after(self, self.bn2(self.conv2(identity)), identity.float())


def test_sequential_neighbours_need_no_tracing() -> None:
    class Opaque(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    def build() -> nn.Module:
        relu = nn.ReLU()
        return nn.Sequential(
            Opaque(), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), relu, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), relu
        )

    plain, model = pair(build)
    assert fused(model) == ["2", "5"]
    assert isinstance(model, nn.Sequential)
    assert_same(plain, model, IMAGES[..., :6, :6])


class Detector(nn.Module):
    """Cannot be traced; what is inside can."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Block(FORMS["y += x"])
        self.head = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x)
        return self.head(features) if features.mean() > 1e9 else self.relu(self.bn(features))


def test_what_cannot_be_traced_whole_is_fused_part_by_part() -> None:
    plain, model = pair(Detector)
    assert fused(model) == ["backbone.bn2", "head.0"]
    assert_same(plain, model, IMAGES[..., :6, :6])


def test_an_activation_shared_by_all_blocks() -> None:
    def build() -> nn.Module:
        relu = nn.ReLU(inplace=True)
        return nn.Sequential(Block(FORMS["module"], relu), nn.Conv2d(4, 3, 1), Block(FORMS["y += x"], relu))

    plain, model = pair(build)
    assert fused(model) == ["0.bn2", "2.bn2"]
    assert type(model[0].act) is nn.ReLU
    assert_same(plain, model, IMAGES[..., :6, :6])


# ---- what stays as it was


def test_objects_modes_random_numbers_and_attributes_stay() -> None:
    model = syncbn.convert(torchvision.models.resnet18(weights=None))
    model.layer1.eval()
    model.layer2[0].bn1.weight.requires_grad_(False)
    before = {m: (m.training, dict(vars(m))) for m in model.modules()}
    state, names = torch.get_rng_state(), dict(model.named_modules())
    assert syncbn.fuse(model) is model
    assert torch.equal(torch.get_rng_state(), state)
    left = {name for name, module in model.named_modules() if module is not names[name]}
    assert left == {"relu"}, "an activation of which nothing is left is replaced; all other objects stay"
    assert names["relu"](torch.tensor(-1.0)) == 0
    added = {"_fusion", "_fused_activation", "_fused_slope"}
    for module, (training, its) in before.items():
        assert module.training == training
        assert {k: v for k, v in vars(module).items() if k not in added} == its
    assert isinstance(model.layer1[0], torchvision.models.resnet.BasicBlock)
    assert isinstance(model.relu, nn.ReLU)


def test_nothing_is_run_by_fusing() -> None:
    calls: list[Any] = []
    model = syncbn.convert(torchvision.models.resnet18(weights=None))
    for module in model.modules():
        if not isinstance(module, SyncBatchNorm | nn.ReLU):
            module.register_forward_hook(lambda *_: calls.append("hook"))
    syncbn.fuse(model)
    assert calls == []
    assert model.layer1[0].bn1.num_batches_tracked == 0
    model(IMAGES.float())
    assert len(calls) == 8 + 3 + 20 + 4 + 4, "blocks, downsamples, convolutions, layers; two pools, fc, model"


class Signature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor, scale: float = 2.0, *, bias: float = 1.0) -> Tensor:
        return F.relu(self.bn(x)) * scale + bias


class Positional(Signature):
    def forward(self, input: Tensor, /, scale: Any = 2.0, other: Any = (1.0, 2.0)) -> Tensor:  # type: ignore[override]
        return F.relu(self.bn(input)) * scale + other[1]


class Named(Signature):
    def forward(self, input: Tensor, scale: Any = 2.0, other: Any = (1.0, 2.0)) -> Tensor:  # type: ignore[override]
        return F.relu(self.bn(input)) * scale + other[1]


def test_the_arguments_of_forward_stay() -> None:
    plain, model = pair(Named)
    assert fused(model) == ["bn"]
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    x = IMAGES[..., :6, :6]
    for call in (
        lambda m: m(x),
        lambda m: m(x, 3.0),
        lambda m: m(other=(1, x), input=x),
        lambda m: m(x, scale=torch.ones(1)),
    ):
        torch.testing.assert_close(call(model), call(plain))
    with pytest.raises(TypeError):
        model(x, unknown=1)
    for other in (Signature, Positional):
        plain, model = pair(other)
        torch.testing.assert_close(model(x), plain(x))


class ChangesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x *= 2
        x -= 1
        x.add_(3)
        return F.relu(self.bn(x))


def test_other_steps_in_place_stay_in_place() -> None:
    """torch.fx alone takes x *= 2 for x = x * 2."""
    plain, model = pair(ChangesItsInput)
    assert fused(model) == ["bn"]
    a, b = IMAGES.clone(), IMAGES.clone()
    torch.testing.assert_close(model(a), plain(b))
    assert torch.equal(a, b)
    assert not torch.equal(a, IMAGES)


class UsesABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x)) * (self.scale * 2)


def test_buffers_are_read_anew_in_each_call() -> None:
    plain, model = pair(UsesABuffer)
    assert fused(model) == ["bn"]
    for each in (plain, model):
        each.scale.fill_(3.0)
    assert_same(plain, model, IMAGES[..., :6, :6])


def test_gradient_checkpointing_of_a_fused_block() -> None:
    plain, model = pair(partial(torchvision.models.resnet18, weights=None))
    expected = step(plain.eval(), IMAGES, plainly)
    block, forward = model.layer2, type(model.layer2).forward
    model.layer2 = nn.Sequential(_Checkpointed(block))
    for a, b in zip(step(model.eval(), IMAGES, plainly), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert forward is nn.Sequential.forward


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def test_a_fused_model_is_compiled_whole() -> None:
    _, model = pair(partial(torchvision.models.resnet18, weights=None))
    model.eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES))


# ---- again, and back


def test_fusing_and_converting_again_change_nothing() -> None:
    model = syncbn.fuse(syncbn.convert(torchvision.models.resnet18(weights=None)))
    types, code = [type(m) for m in model.modules()], fused(model)
    for again in (syncbn.fuse, syncbn.convert, lambda m: [syncbn.fuse(each) for each in m.layer1]):
        again(model)
        assert [type(m) for m in model.modules()] == types
        assert fused(model) == code
    syncbn.revert(model)
    assert {type(m) for m in model.layer1[0].children()} == {nn.Conv2d, nn.BatchNorm2d, nn.ReLU}


def test_blocks_of_one_kind_share_a_class() -> None:
    model = syncbn.fuse(syncbn.convert(torchvision.models.resnet50(weights=None)))
    assert type(model.layer1[1]) is type(model.layer4[2]) is not type(model.layer1[0])
    assert type(model.layer1[1]).__name__ == "FusedBottleneck"


def test_revert_gives_built_layers_their_own_activation_back() -> None:
    model = nn.Sequential(
        SyncBatchNorm(3, negative_slope=0.3), nn.ReLU(), SyncBatchNorm(3, activation="silu"), nn.ReLU(), nn.SiLU()
    )
    before = [dict(vars(m)) for m in model]
    syncbn.fuse(model)
    assert [m._fused_activation for m in (model[0], model[2])] == ["relu", "silu"]
    assert repr(model[0]).endswith("activation=relu)")
    syncbn.revert(model)
    assert [dict(vars(m)) for m in model] == before
    assert [type(m) for m in model] == [SyncBatchNorm, nn.ReLU, SyncBatchNorm, nn.ReLU, nn.SiLU]


def test_a_part_alone_cannot_be_reverted() -> None:
    model = syncbn.fuse(syncbn.convert(torchvision.models.resnet18(weights=None)))
    types = [type(m) for m in model.modules()]
    for part in (model.layer1[0].bn1, model.bn1, model.relu):
        with pytest.raises(ValueError, match=r"fused by syncbn\.fuse with modules outside"):
            syncbn.revert(part)
    assert [type(m) for m in model.modules()] == types
    syncbn.revert(model.layer1)
    assert len(fused(model)) == 17 - 4
    model(IMAGES.float())


def test_revert_refuses_what_another_library_has_changed() -> None:
    model = syncbn.fuse(syncbn.convert(Block(FORMS["y += x"])))
    fused_class = type(model)
    model.__class__ = type("Sharded", (fused_class,), {})
    with pytest.raises(TypeError, match="another library has changed the class"):
        syncbn.revert(model)
    model.__class__ = fused_class
    assert type(syncbn.revert(model)) is Block


def test_without_any_synchronized_layer() -> None:
    for model in (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), nn.ReLU()):
        with pytest.raises(ValueError, match=r"call syncbn\.convert\(model\) first"):
            syncbn.fuse(model)


def test_layers_that_are_not_converted_stay_as_they_are() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU())
    syncbn.fuse(syncbn.convert(model, exclude="0"))
    assert fused(model) == ["2"]
    assert type(model[1]) is nn.ReLU


def test_describe_and_the_log_tell(caplog: Any) -> None:
    model = syncbn.convert(Two())
    with caplog.at_level(logging.DEBUG, "syncbn.fusion"):
        syncbn.fuse(model)
    assert "applies relu to its output" in str(syncbn.describe(model))
    messages = [record.getMessage() for record in caplog.records]
    assert "bn1 is not fused: something else reads its output, too" in messages
    assert "1 of 2 SyncBatchNorm layers are fused with the activation after them" in messages


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2, self.act = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.bn1(x)
        return self.act(self.bn2(F.relu(y))), y


# ---- copies


def _torch_saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle 0": lambda model: pickle.loads(pickle.dumps(model, protocol=0)),
    "torch.save": _torch_saved,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_are_fused_and_can_be_reverted(duplicate: Any) -> None:
    model = syncbn.fuse(syncbn.convert(torchvision.models.resnet18(weights=None)))
    copied = duplicate(model)
    assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]
    torch.testing.assert_close(copied.eval()(IMAGES.float()), model.eval()(IMAGES.float()))
    plain = torchvision.models.resnet18(weights=None)
    assert [type(m) for m in syncbn.revert(copied).modules()] == [type(m) for m in plain.modules()]
    assert [vars(m).keys() for m in copied.modules()] == [vars(m).keys() for m in plain.modules()]
    assert len(fused(model)) == 17


def test_another_program_loads_a_fused_model(tmp_path: Any) -> None:
    model = syncbn.fuse(syncbn.convert(torchvision.models.resnet18(weights=None))).eval()
    torch.save((model, IMAGES.float(), model(IMAGES.float())), tmp_path / "model.pt")
    program = (
        "import sys, torch; model, x, y = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.testing.assert_close(model(x), y); import syncbn\n"
        "print(type(model.layer1[0]).__name__, type(syncbn.revert(model).layer1[0]).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path / "model.pt")], capture_output=True, text=True)
    assert run.stdout.split() == ["FusedBasicBlock", "BasicBlock"], run.stderr


# ---- several processes


def _small_resnet() -> nn.Module:
    torch.manual_seed(0)
    block = torchvision.models.resnet.BasicBlock
    return randomized(torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=5)).double()


def _fused_step(x: Tensor) -> tuple[Step, int]:
    model = syncbn.fuse(syncbn.convert(_small_resnet()))
    return train_step(model, x), len(fused(model))


def _fused_ddp_step(x: Tensor) -> tuple[Step, int]:
    model = DistributedDataParallel(syncbn.fuse(syncbn.convert(_small_resnet())))
    taken = train_step(model, x)
    taken.grads = {name.removeprefix("module."): grad for name, grad in taken.grads.items()}
    taken.buffers = {name.removeprefix("module."): buffer for name, buffer in taken.buffers.items()}
    return taken, len(fused(model))


@pytest.mark.parametrize("run", [_fused_step, _fused_ddp_step], ids=["alone", "in DistributedDataParallel"])
def test_processes_with_fused_models_train_as_one_with_the_plain_model(processes: Any, run: Any) -> None:
    shares = [x[:, :3] for x in parts((2, 3, 40, 40), (1, 3, 40, 40))]
    expected = train_step(_small_resnet(), torch.cat(shares))
    answers = processes(2).run(run, per_rank=[(share,) for share in shares])
    assert [sites for _, sites in answers] == [9, 9]
    close = {"rtol": 1e-6, "atol": 1e-8}
    torch.testing.assert_close(torch.cat([s.output for s, _ in answers]), expected.output, **close)
    torch.testing.assert_close(torch.cat([s.input_grad for s, _ in answers]), expected.input_grad, **close)
    for taken, _ in answers:
        torch.testing.assert_close(taken.grads, expected.grads, **close)
        torch.testing.assert_close(taken.buffers, expected.buffers, **close)


def _forgets(rank: int) -> str:
    model = syncbn.convert(nn.Sequential(OrderedDict(stem=nn.BatchNorm2d(3), act=nn.ReLU())))
    if rank == 0:
        syncbn.fuse(model)
    with pytest.raises(RuntimeError) as error:
        model(torch.randn(2, 3, 4, 4))
    if rank == 1:
        syncbn.fuse(model)
    model(torch.randn(2, 3, 4, 4))
    assert "activation=None" not in syncbn.fuse(model)[0]._exchange._layers[0]
    dist.barrier()
    return str(error.value)


def test_a_process_that_forgets_to_fuse_is_named(processes: Any) -> None:
    for message in processes(2).run(_forgets, per_rank=[(0,), (1,)]):
        assert "rank 0 has stem(" in message
        assert "activation=relu" in message
        assert "activation=None" in message


def test_an_activation_that_models_share_stays_an_activation() -> None:
    """Such as the default argument of a constructor, or a class attribute."""
    act = nn.SiLU()
    models = [nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), act) for _ in range(2)]
    x = IMAGES[..., :6, :6]
    before = models[1].double()(x)
    models[1][1].reset_running_stats()
    assert fused(syncbn.fuse(syncbn.convert(models[0].double()))) == ["1"]
    torch.testing.assert_close(models[1](x), before)
    assert models[1][2] is act
    assert syncbn.revert(models[0])[2] is act


@pytest.mark.parametrize("depth", [20, 300])
def test_a_long_chain_of_sums_is_followed_in_time(depth: int) -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(depth))
            self.bns = nn.ModuleList(nn.BatchNorm2d(2) for _ in range(depth))

        def forward(self, x: Tensor) -> Tensor:
            for conv, bn in zip(self.convs, self.bns, strict=True):
                x = F.relu(bn(conv(x)) + x)
            return x

    model = syncbn.fuse(syncbn.convert(Chain()))
    assert len(fused(model)) == depth


@pytest.mark.parametrize("what", [nn.GELU(), nn.Identity(), nn.ReLU()], ids=str)
@pytest.mark.parametrize("where", [1, 2])
def test_a_layer_or_an_activation_that_is_replaced_later_is_noticed(what: nn.Module, where: int) -> None:
    """As tools do that fold normalization into convolutions, which would leave no activation at all."""
    model = syncbn.fuse(syncbn.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())))
    model[where] = what
    with pytest.raises(RuntimeError, match=r"Call syncbn.fuse\(model\) again"):
        model(IMAGES.float())


def test_a_slope_that_is_changed_later_is_noticed() -> None:
    model = syncbn.fuse(syncbn.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.1))))
    model[2].negative_slope = 0.5
    with pytest.raises(RuntimeError, match="negative_slope"):
        model(IMAGES.float())


def test_a_residual_that_is_a_number() -> None:
    """What a module returns is not known before: a branch that a search has switched off returns 0."""

    class Zero(nn.Module):
        def forward(self, x: Tensor) -> int:
            return 0

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.other = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Zero()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn(self.conv(x)) + self.other(x))

    plain, model = pair(Cell)
    assert fused(model) == ["bn"]
    assert_same(plain, model, IMAGES[..., :6, :6])


def test_new_objects_of_a_fused_class_do_what_the_original_does() -> None:
    model = syncbn.fuse(syncbn.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())))
    assert type(model[2])()(torch.tensor(-1.0)) == 0
    assert type(model)(nn.ReLU())(torch.tensor(-1.0)) == 0
