"""Outputs that are computed again: the same bits, less memory, and nothing stale."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from judge import affine, large_enough
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from union import assert_like_the_union, parts

import syncbn
from syncbn.bench.memory import saved_bytes
from syncbn.calls import Call, Surrounding
from syncbn.recompute import recompute_activations
from syncbn.training.models.unet import UNet

ACTIVATIONS = pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu"])


class Net(nn.Module):
    """Two layers, the second with the first one's output as its residual, and what keeps their outputs."""

    def __init__(self, activation: str | None = "relu") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 3)
        self.norm1, self.norm2 = (syncbn.SyncBatchNorm(6, activation=activation) for _ in range(2))
        affine(self.norm1)
        affine(self.norm2)
        self.norm1.weight.data[::2] *= -1  # which In-Place ABN could not take

    def body(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm1(self.conv1(x), mask=mask)
        return self.norm2(self.conv2(y), y, mask)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.conv3(self.body(x, mask))


def image(batch: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, 11, 9, generator=torch.Generator().manual_seed(4), dtype=dtype) * 2 + 1


def gradients(forward: Callable[[], Tensor], *of: Tensor | nn.Module) -> list[Tensor]:
    """Of a loss, by the parameters of these modules and by these tensors."""
    leaves = list(chain.from_iterable(each.parameters() if isinstance(each, nn.Module) else [each] for each in of))
    return list(torch.autograd.grad(forward().float().square().mean(), leaves))


def inside(forward: Callable[..., Tensor], *args: Any) -> Callable[[], Tensor]:
    def recomputing() -> Tensor:
        with recompute_activations():
            return forward(*args)

    return recomputing


def assert_same_bits(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    assert all(map(torch.equal, one, other))


def is_there(tensor_or_its_memory: weakref.ref[Any]) -> bool:
    gc.collect()
    return tensor_or_its_memory() is not None


def memory_of(tensor: Tensor) -> weakref.ref[Any]:
    return weakref.ref(tensor.untyped_storage())


@pytest.fixture(params=["cpu", "reference"])
def backend(request: Any) -> Iterator[None]:
    with large_enough() if request.param == "cpu" else nullcontext():
        yield


class counted_normalizations(Surrounding):  # noqa: N801
    """Counts what is normalized by calls inside, also later. To be entered inside of ``recompute_activations``."""

    def __init__(self) -> None:
        self.count = 0

    def changed(self, call: Call) -> Call:
        return call._replace(backend=Counted(call.backend, self))


class Counted:
    def __init__(self, backend: Any, counter: counted_normalizations) -> None:
        self.moments, self.grad_moments, self.grad_input = backend.moments, backend.grad_moments, backend.grad_input
        self.backend, self.counter = backend, counter

    def normalize(self, *args: Any) -> Any:
        self.counter.count += 1
        return self.backend.normalize(*args)


# ---- the same bits


@ACTIVATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.usefixtures("backend")
def test_gradients_have_the_same_bits(activation: str | None, dtype: torch.dtype, layout: torch.memory_format) -> None:
    net, x = Net(activation).to(dtype), image(dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    assert_same_bits(gradients(inside(net, x), net, x), gradients(lambda: net(x), net, x))


@ACTIVATIONS
@pytest.mark.usefixtures("backend")
def test_masks(activation: str | None) -> None:
    net, x = Net(activation), image().requires_grad_()
    mask = torch.rand(3, 1, 9, 7) > 0.3
    assert_same_bits(gradients(inside(net, x, mask), net, x), gradients(lambda: net(x, mask), net, x))


@pytest.mark.usefixtures("backend")
def test_autocast() -> None:
    net, x = Net(), image()
    with torch.autocast("cpu", torch.bfloat16):
        plain, ours = gradients(lambda: net(x), net), gradients(inside(net, x), net)
        assert saved_bytes(inside(net, x)) < 0.75 * saved_bytes(lambda: net(x))
    assert_same_bits(ours, plain)


def test_without_gradients_for_the_layers_parameters() -> None:
    net = Net()
    net.norm1.requires_grad_(False)
    net.conv1.requires_grad_(False)
    of = net.conv2, net.norm2, net.conv3
    assert_same_bits(gradients(inside(net, image()), *of), gradients(lambda: net(image()), *of))


def test_backward_twice_and_gradients_of_gradients() -> None:
    net, x = Net("silu").double(), image(dtype=torch.float64).requires_grad_()

    def penalized(forward: Callable[[], Tensor]) -> list[Tensor]:
        loss = forward().square().sum()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        once = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        again = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        return [*once, *again, *torch.autograd.grad(dx.square().sum(), list(net.parameters()), allow_unused=True)[:-1]]

    assert_same_bits(penalized(inside(net, x)), penalized(lambda: net(x)))


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_an_activation_of_its_own_that_keeps_its_input(activation: str) -> None:
    """The layer's output is what such an activation keeps, so that it can be dropped without fusing."""
    act = {"silu": nn.SiLU(), "gelu": nn.GELU()}[activation]
    net = nn.Sequential(nn.Conv2d(3, 6, 3), syncbn.SyncBatchNorm(6), act, nn.Conv2d(6, 2, 3))
    assert_same_bits(gradients(inside(net, image()), net), gradients(lambda: net(image()), net))
    assert saved_bytes(inside(net, image())) < 0.75 * saved_bytes(lambda: net(image()))


def test_views_of_an_output() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), syncbn.SyncBatchNorm(6, activation="relu"))
    linear = nn.Linear(5 * 63, 2)

    def forward() -> Tensor:
        y = net(image())
        return linear(y[:, 1:].flatten(1)) + linear(y.movedim(1, -1)[..., :5].reshape(3, -1)) + y[..., ::2].sin().sum()

    assert_same_bits(gradients(inside(forward), net, linear), gradients(forward, net, linear))


def test_one_layer_behind_another() -> None:
    net = nn.Sequential(*(syncbn.SyncBatchNorm(3, activation="silu") for _ in range(5)), nn.Conv2d(3, 2, 1))
    assert_same_bits(gradients(inside(net, image()), net), gradients(lambda: net(image()), net))


# ---- memory


def unet() -> nn.Module:
    return UNet(2, widths=(8, 16, 24))


def resnet50() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.resnet50(num_classes=2)


@pytest.mark.parametrize(
    ("build", "size", "at_most"), [(unet, 48, 0.7), (resnet50, 96, 0.67)], ids=["U-Net", "resnet50"]
)
def test_a_model_keeps_less(build: Callable[[], nn.Module], size: int, at_most: float) -> None:
    """Than the plain one, whose ReLUs are in place: a third less, also of a residual network."""
    x = torch.randn(2, 3, size, size)
    plain, ours = build(), syncbn.fuse(syncbn.convert(build()))
    assert saved_bytes(inside(ours, x)) < at_most * saved_bytes(lambda: plain(x))
    assert saved_bytes(lambda: ours(x)) > 0.9 * saved_bytes(lambda: plain(x))


def test_only_the_outputs_go() -> None:
    """x of a layer stays for its own backward, and takes everything else that is kept to its own end."""
    conv, norm, behind = nn.Conv2d(3, 6, 3), syncbn.SyncBatchNorm(6, activation="relu"), nn.Conv2d(6, 2, 3)
    with recompute_activations():
        x = conv(image())
        y = norm(x)
        out = behind(y)
    x, y = memory_of(x), memory_of(y)
    assert is_there(x)
    assert not is_there(y)
    del out
    assert not is_there(x)


def test_an_output_that_somebody_has_is_not_computed_again() -> None:
    net = Net()
    with recompute_activations(), counted_normalizations() as counted:
        y = net.norm1(net.conv1(image()))
        loss = net.conv2(y).square().mean()
    loss.backward()
    assert counted.count == 1
    assert y.isfinite().all()


def test_an_output_whose_memory_was_let_go_of_is_computed_again() -> None:
    """As pipelines do with what they have sent on."""
    net, held = Net(), []

    def forward(let_go: bool) -> Tensor:
        y = net.norm1(net.conv1(image()))
        out = net.conv2(y)
        if let_go:
            y.untyped_storage().resize_(0)
            held.append(y)
        return out

    assert_same_bits(gradients(inside(forward, True), net.conv2), gradients(lambda: forward(False), net.conv2))


@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
def test_residuals_make_no_long_chains(blocks: int) -> None:
    """Of blocks with identity shortcuts, each output is computed again once, on average, and two thirds are dropped."""
    convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(blocks))
    norms = nn.ModuleList(syncbn.SyncBatchNorm(4, activation="relu") for _ in range(blocks))

    def forward() -> Tensor:
        y = x
        for conv, norm in zip(convs, norms, strict=True):
            y = norm(conv(y), y)
        return y.sin()

    x = torch.randn(2, 4, 32, 32, requires_grad=True)
    plain = gradients(forward, convs, norms)
    with recompute_activations(), counted_normalizations() as counted:
        y = forward()
    assert counted.count == blocks
    assert_same_bits(gradients(lambda: y, convs, norms), plain)
    assert counted.count <= 2 * blocks + 1
    kept, less = saved_bytes(forward), saved_bytes(inside(forward))
    assert less <= kept - (2 * blocks // 3 - 0.1) * x.nbytes


def test_a_residual_that_nobody_else_keeps_is_not_kept_instead() -> None:
    """A recipe that made it stay would save nothing."""
    norm, behind, x = syncbn.SyncBatchNorm(4, activation="relu"), nn.Conv2d(4, 2, 1), torch.randn(2, 4, 9, 9)
    with recompute_activations():
        residual = x + 1
        y = norm(x, residual)
        out = behind(y)
    residual, y = memory_of(residual), memory_of(y)
    assert not is_there(residual)
    assert is_there(y)
    out.sum().backward()


def test_one_computation_for_all_who_need_it() -> None:
    net, convs = Net(), [nn.Conv2d(6, 6, 1) for _ in range(3)]
    with recompute_activations(), counted_normalizations() as counted:
        y = net.norm1(net.conv1(image()))
        loss = sum(conv(y).square().mean() for conv in convs)
        del y
    loss.backward(retain_graph=True)
    assert counted.count == 2
    loss.backward()  # which still has it: the last one stays while the graph does
    assert counted.count == 2


def test_nothing_is_kept_by_what_knows_the_outputs() -> None:
    """Not in a block that never ends, and not without a graph."""
    net, x = Net(), image()
    with recompute_activations() as block:
        for _ in range(3):
            with torch.no_grad():
                y = net.body(x)
            net(x).sum().backward()
        y = memory_of(y)
        assert not is_there(y)
        outputs = block._outputs
        assert len(outputs._recipes) == 0
        assert {id(each) for each in outputs._kept} <= {id(each.untyped_storage()) for each in (*net.parameters(), x)}


# ---- what has been changed since


def step_between(change: Callable[[dict[str, Tensor]], None]) -> None:
    """A step in which ``change`` gets what takes part in the forward, before the backward."""
    net, residual = Net(), torch.randn(3, 6, 9, 7)
    at = {"residual": residual.requires_grad_()}
    with recompute_activations():
        kept = at["residual"].sin()  # its gradient needs the residual
        at["x"] = net.conv1(image())
        at["y"] = net.norm1(at["x"], at["residual"])
        loss = net.conv2(at["y"]).square().mean() + kept.mean()
    change(at)
    at.clear()
    torch.autograd.grad(loss, net.conv2.weight)  # which needs y alone


def change_in_place(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(at: dict[str, Tensor]) -> None:
        with torch.no_grad():
            at[name].mul_(2)

    return change


@pytest.mark.parametrize("name", ["x", "y", "residual"])
def test_a_change_in_place_is_an_error(name: str) -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step_between(change_in_place(name))


def test_a_change_of_an_output_that_is_gone_since_is_an_error() -> None:
    """As of one that is there: it would be kept without recomputation."""
    net = Net()
    with recompute_activations():
        y = net.norm1(net.conv1(image()))
        loss = net.conv2(y).square().mean()
        y[:, 1].zero_()
        y = memory_of(y)
    assert not is_there(y)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*\[3, 6, 9, 7\]\] was at version 0"):
        loss.backward()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_an_optimizers_step_before_backward_is_an_error(name: str) -> None:
    net = Net()
    optimizer = torch.optim.SGD([getattr(net.norm1, name)], lr=0.1)
    net(image()).sum().backward()
    loss = inside(net, image())().square().mean()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_needs_only_the_output_does_not_mind_other_parameters() -> None:
    """Neither does it without recomputation: y is what it was."""
    net = Net()

    def forward() -> Tensor:
        loss = net.conv2(net.norm1(net.conv1(image())))
        with torch.no_grad():
            net.norm1.weight.mul_(1).add_(0)
        return loss

    assert_same_bits(gradients(inside(forward), net.conv2), gradients(forward, net.conv2))


def test_an_output_that_is_changed_before_it_is_used_is_kept_as_it_is() -> None:
    net = Net()

    def forward() -> Tensor:
        y = net.norm1(net.conv1(image()))
        y.mul_(y.detach() + 3)
        return net.conv2(y)

    of = net.conv1, net.norm1, net.conv2
    assert_same_bits(gradients(inside(forward), *of), gradients(forward, *of))


# ---- inside of other things


def test_it_ends_and_an_exception_ends_it() -> None:
    net, x = Net(), image()
    with pytest.raises(RuntimeError, match="expected input"), recompute_activations():
        net(x[:, :2])
    with recompute_activations():
        pass
    with counted_normalizations() as counted:
        loss = net(x).sum()
    loss.backward()
    assert counted.count == 2


def test_blocks_in_blocks() -> None:
    net, x = Net(), image()

    def forward() -> Tensor:
        with recompute_activations() as block, block, recompute_activations():
            y = net.norm1(net.conv1(x))
        return net.conv3(net.norm2(net.conv2(y), y))

    assert_same_bits(gradients(inside(forward), net), gradients(forward, net))
    assert saved_bytes(inside(forward)) < saved_bytes(forward)


def test_eval_is_not_touched() -> None:
    net, x = Net().eval(), image()
    assert_same_bits(gradients(inside(net, x), net), gradients(lambda: net(x), net))
    assert torch.equal(inside(net, x)(), net(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_inside(reentrant: bool) -> None:
    net, x = Net(), image().requires_grad_()

    def forward() -> Tensor:
        return net.conv3(checkpoint(net.body, x, use_reentrant=reentrant))

    if reentrant:  # which knows only of backward()
        inside(forward)().square().mean().backward()
        ours = [each.grad for each in net.parameters()]
    else:
        ours = gradients(inside(forward), net)
    assert_same_bits(ours, gradients(lambda: net(x), net))


def test_checkpointing_outside() -> None:
    net, x = Net(), image()
    forward = inside(net.body, x)
    ours = gradients(lambda: net.conv3(checkpoint(forward, use_reentrant=False)), net)
    assert_same_bits(ours, gradients(lambda: net(x), net))


def test_other_hooks() -> None:
    net, x = Net(), image()
    plain = gradients(lambda: net(x), net)
    for blocks in ((recompute_activations, save_on_cpu), (save_on_cpu, recompute_activations)):

        def forward(blocks: Any = blocks) -> Tensor:
            with blocks[0](), blocks[1]():
                return net(x)

        assert_same_bits(gradients(forward, net), plain)


def test_other_threads_are_not_in_the_block() -> None:
    net, x, found = Net(), image(), []

    def forward() -> None:
        with counted_normalizations() as counted:
            loss = net(x).sum()
        loss.backward()
        found.append(counted.count)

    with recompute_activations():
        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()
    assert found == [2]


def test_tensors_without_plain_memory() -> None:
    """A sparse tensor that another operation keeps, and an output of an empty batch."""
    net, sparse = Net(), torch.eye(4).to_sparse()

    def forward(x: Tensor) -> Tensor:
        return torch.sparse.mm(sparse, net(x).flatten(2).sum(2).t())

    assert_same_bits(gradients(inside(forward, image()), net), gradients(lambda: forward(image()), net))


# ---- over processes


class Recomputing(nn.Sequential):
    """Two activations of their own, which keep what they get."""

    def __init__(self) -> None:
        norms = nn.BatchNorm2d(5), nn.BatchNorm2d(4)
        super().__init__(nn.Conv2d(3, 5, 3), norms[0], nn.SiLU(), nn.Conv2d(5, 4, 3), norms[1], nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        with recompute_activations():
            return super().forward(x)


def test_the_union(processes: Any) -> None:
    """Beside the plain layers, the block changes nothing."""
    assert_like_the_union(processes, Recomputing, parts((2, 3, 8, 8), (1, 3, 8, 8)))


def _steps(rank_image: Tensor, wrap: str) -> tuple[list[list[Tensor]], list[int]]:
    """Gradients and exchanges, without and with recomputation."""
    found, exchanges = [], []
    contexts: list[AbstractContextManager[Any]] = [nullcontext(), recompute_activations()]
    for context in contexts:
        model = syncbn.convert(Net())
        exchange = model.norm1._exchange
        if wrap == "ddp":
            model = DistributedDataParallel(model)
        elif wrap == "fsdp":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for part in (model.conv1, model.norm1, model.conv2, model.norm2, model.conv3, model):
                fully_shard(part, mesh=mesh)
        with large_enough(), context:
            before = exchange.calls
            model(rank_image).square().mean().nan_to_num().backward()
            exchanges.append(exchange.calls - before)
        found.append([each.grad.full_tensor() if wrap == "fsdp" else each.grad for each in model.parameters()])
    return found, exchanges


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("batches", [(2, 2), (3, 0)], ids=["even", "an empty process"])
def test_nothing_is_exchanged_again(processes: Any, wrap: str, batches: tuple[int, int]) -> None:
    """Under FSDP each module lets go of its parameters after its forward: backward of the next one has none of them."""
    results = processes(2).run(_steps, wrap, per_rank=[(image(batch),) for batch in batches])
    for (plain, ours), exchanges in results:
        assert_same_bits(ours, plain)
        assert exchanges[0] == exchanges[1] > 0


# ---- compiled


@contextmanager
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_compiled_code_is_not_touched() -> None:
    """Neither inside of a block, nor where the block is inside; another step's block compiles nothing anew."""
    net, x = Net().double(), image(dtype=torch.float64)
    plain = gradients(lambda: net(x), net)
    with fresh_compiler(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        for _ in range(3):
            torch.testing.assert_close(gradients(inside(compiled, x), net), plain)
    with fresh_compiler(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(inside(net, x), backend="eager", fullgraph=True)
        for _ in range(3):
            torch.testing.assert_close(gradients(compiled, net), plain)


# ---- the page


def test_the_pages_code_runs() -> None:
    page = (Path(__file__).parent.parent / "docs" / "memory.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert all(each.grad is not None for each in names["model"].parameters())
