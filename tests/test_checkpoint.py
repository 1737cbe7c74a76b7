"""``checkpoint_contexts``: the same bits as without checkpointing, by as many exchanges and updates."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torchvision
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from judge import assert_close, large_enough
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import syncbn
from syncbn.calls import entered
from syncbn.checkpoint import checkpoint_contexts
from syncbn.recompute import recompute_activations
from syncbn.region import valid_region

Forward = Callable[["Net", Tensor], Tensor]

checked = functools.partial(checkpoint, use_reentrant=False, context_fn=checkpoint_contexts)


class Block(nn.Module):
    """Two layers, one of them called twice, and one with a residual and an activation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.2)
        self.last = syncbn.SyncBatchNorm(4, activation="relu")

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).sigmoid()
        y = self.norm(self.conv(self.dropout(y)))
        return self.last(self.conv(y), x)


class Net(nn.Module):
    def __init__(self, block: Callable[[], nn.Module] = Block, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block() for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        return plain(self, x)


def network() -> Net:
    torch.manual_seed(1)
    return syncbn.convert(Net())


# ---- forwards of the same model


def plain(net: Net, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = block(x)
    return x


def whole(net: Net, x: Tensor) -> Tensor:
    return checked(net, x)


def each_block(net: Net, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = checked(block, x)
    return x


def some_blocks(net: Net, x: Tensor) -> Tensor:
    first, second, third = net.blocks
    return third(checked(second, first(x)))


def nested(net: Net, x: Tensor) -> Tensor:
    return checked(each_block, net, x)


def nested_deeper(net: Net, x: Tensor) -> Tensor:
    first, second, third = net.blocks

    def inner(x: Tensor) -> Tensor:
        return second(checked(first, x))

    def outer(x: Tensor) -> Tensor:
        return checked(third, checked(inner, x))

    return checked(outer, x)


def in_plain_checkpoint(net: Net, x: Tensor) -> Tensor:
    """What is played in a recomputation that exchanges again has to be recorded again."""
    return checkpoint(each_block, net, x, use_reentrant=False)


def without_early_stop(net: Net, x: Tensor) -> Tensor:
    with set_checkpoint_early_stop(False):
        return nested(net, x)


def by_wrapper(net: Net, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = checkpoint_wrapper(block, context_fn=checkpoint_contexts)(x)
    return x


def in_recompute_activations(net: Net, x: Tensor) -> Tensor:
    with recompute_activations():
        return some_blocks(net, x)


def around_recompute_activations(net: Net, x: Tensor) -> Tensor:
    def forward(x: Tensor) -> Tensor:
        first, second, third = net.blocks
        with recompute_activations():
            x = second(first(x))
        return third(x)

    return checked(forward, x)


SAME = [
    whole,
    each_block,
    some_blocks,
    nested,
    nested_deeper,
    without_early_stop,
    by_wrapper,
    in_recompute_activations,
    around_recompute_activations,
]


def steps(forward: Forward, x: Tensor, backwards: int = 1, net: Net | None = None) -> tuple[list[Tensor], int]:
    """Two steps: the outputs, all gradients and buffers; and the number of exchanges."""
    net = net or network()
    results = []
    torch.manual_seed(4)  # of dropout
    for _ in range(2):
        x = x.detach().requires_grad_()
        y = forward(net, x)
        for backward in range(backwards):
            y.sin().sum().backward(retain_graph=backward + 1 < backwards)
        results += [y.detach(), x.grad]
    assert entered() == ()
    results += [p.grad for p in net.parameters() if p.grad is not None] + list(net.buffers())
    return results, _calls(net)


def same_bits(forward: Forward, x: Tensor, backwards: int = 1, net: Callable[[], Net] = network) -> None:
    expected, expected_calls = steps(plain, x, backwards, net())
    actual, calls = steps(forward, x, backwards, net())
    assert calls == expected_calls
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def images(n: int, **kwargs: Any) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 4, 7, 5, generator=generator, **kwargs)


def _same_bits(x: Tensor, forward: Forward, fast: bool, backwards: int = 1) -> None:
    with large_enough() if fast else contextlib.nullcontext():
        same_bits(forward, x, backwards)


@pytest.mark.parametrize("fast", [False, True], ids=["reference", "fast"])
@pytest.mark.parametrize("forward", SAME, ids=lambda forward: forward.__name__)
def test_same_bits_by_as_many_exchanges(processes: Any, forward: Forward, fast: bool) -> None:
    processes(2).run(_same_bits, forward, fast, per_rank=[(images(3),), (images(2),)])


@pytest.mark.parametrize("counts", [(0, 3), (1, 1)], ids=["an empty process", "one image each"])
def test_of_any_batches(processes: Any, counts: tuple[int, int]) -> None:
    processes(2).run(_same_bits, nested, False, per_rank=[(images(n),) for n in counts])


@pytest.mark.parametrize("forward", [each_block, nested])
def test_backward_twice(processes: Any, forward: Forward) -> None:
    """retain_graph: each backward recomputes, from the tape's start."""
    processes(2).run(_same_bits, forward, False, 2, per_rank=[(images(3),), (images(2),)])


@pytest.mark.parametrize("forward", SAME, ids=lambda forward: forward.__name__)
def test_one_process(forward: Forward) -> None:
    same_bits(forward, images(2))


def test_inside_of_a_checkpoint_without_contexts(processes: Any) -> None:
    processes(2).run(_in_plain_checkpoint, per_rank=[(images(3),), (images(2),)])


def _in_plain_checkpoint(x: Tensor) -> None:
    """As plain checkpointing does: the right gradients, and whatever it runs twice is exchanged and moved twice."""
    expected, _ = steps(plain, x)
    net = network()
    actual, _ = steps(in_plain_checkpoint, x, net=net)
    gradients = len(expected) - len(list(net.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(actual[:gradients], expected[:gradients], strict=True))
    assert net.blocks[0].last.num_batches_tracked == 4


# ---- what else a training step has


def _autocast(x: Tensor) -> None:
    def under_autocast(forward: Forward) -> Forward:
        def run(net: Net, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return forward(net, x)

        return run

    expected, _ = steps(under_autocast(plain), x)
    actual, _ = steps(under_autocast(nested), x)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_autocast(processes: Any) -> None:
    processes(2).run(_autocast, per_rank=[(images(3),), (images(2),)])


class Checked(Net):
    def forward(self, x: Tensor) -> Tensor:
        return some_blocks(self, x)


def _ddp(x: Tensor, model: type[Net]) -> list[Tensor]:
    torch.manual_seed(1)
    net = DistributedDataParallel(syncbn.convert(model()))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.manual_seed(4)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).sin().sum().backward()
        optimizer.step()
    return [each.detach() for each in (*net.parameters(), *net.buffers())]


def test_distributed_data_parallel(processes: Any) -> None:
    parts = [(images(3),), (images(2),)]
    for actual, expected in zip(
        processes(2).run(_ddp, Checked, per_rank=parts), processes(2).run(_ddp, Net, per_rank=parts), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def _resnet(x: Tensor, fused: bool) -> None:
    results = []
    for wrap in (False, True):
        torch.manual_seed(0)
        model = syncbn.convert(torchvision.models.resnet18(num_classes=3))
        model = syncbn.fuse(model) if fused else model
        if wrap:
            apply_activation_checkpointing(
                model,
                functools.partial(checkpoint_wrapper, context_fn=checkpoint_contexts),
                lambda module: isinstance(module, torchvision.models.resnet.BasicBlock),
            )
        for _ in range(2):
            model(x).sin().sum().backward()
        results.append([p.grad for p in model.parameters()] + list(model.buffers()) + [_calls(model)])
    expected, actual = results
    assert actual.pop() == expected.pop() == 2 * 2 * 20
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def _calls(model: nn.Module) -> int:
    exchanges = {layer._exchange for layer in model.modules() if isinstance(layer, syncbn.SyncBatchNorm)}
    return sum(exchange.calls for exchange in exchanges)


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_the_blocks_of_a_resnet(processes: Any, fused: bool) -> None:
    torch.manual_seed(0)
    processes(2).run(_resnet, fused, per_rank=[(torch.randn(n, 3, 32, 32),) for n in (1, 2)])


def _penalty(x: Tensor) -> None:
    def gradients(forward: Forward) -> list[Tensor]:
        net = network().double()
        torch.manual_seed(4)
        inputs = x.double().requires_grad_()
        (first,) = torch.autograd.grad(forward(net, inputs).sin().sum(), inputs, create_graph=True)
        first.square().sum().backward()
        return [inputs.grad, *(p.grad for p in net.parameters()), *net.buffers()]

    for mine, expected in zip(gradients(each_block), gradients(plain), strict=True):
        assert torch.equal(mine, expected)


def test_gradients_of_gradients(processes: Any) -> None:
    processes(2).run(_penalty, per_rank=[(images(3),), (images(2),)])


def _gradient_in_forward(x: Tensor) -> None:
    """A backward in a checkpointed forward plays a tape that was recorded there, and one that was recorded outside."""

    def forward(net: Net, x: Tensor, check: Callable[..., Tensor]) -> Tensor:
        first, second, third = net.blocks
        outside = check(first, x).square().sum()

        def inside(x: Tensor) -> Tensor:
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(check(second, leaf).square().sum(), leaf)
            (before,) = torch.autograd.grad(outside, net.blocks[0].conv.weight, retain_graph=True)
            return third(x + gradient + before.mean())

        return check(inside, x)

    expected, expected_calls = steps(functools.partial(forward, check=lambda f, x: f(x)), x)
    actual, calls = steps(functools.partial(forward, check=checked), x)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    # The recomputation runs the gradients again, which exchange: second has 3 calls and first has 3, in 2 steps.
    assert calls == expected_calls + 2 * (3 + 3)


def test_a_gradient_inside_of_a_checkpointed_forward(processes: Any) -> None:
    processes(2).run(_gradient_in_forward, per_rank=[(images(3),), (images(2),)])


# ---- blocks around it


def _masked(net: Net, x: Tensor, forward: Forward) -> Tensor:
    mask = torch.ones_like(x[:, :1], dtype=torch.bool)
    mask[..., 3:] = False
    with valid_region(mask):
        return forward(net, x)


@pytest.mark.parametrize("forward", [each_block, nested])
def test_the_blocks_around_the_forward_hold_in_the_recomputation(forward: Forward) -> None:
    """Backward runs outside of them."""
    expected, _ = steps(functools.partial(_masked, forward=plain), images(2))
    actual, _ = steps(functools.partial(_masked, forward=forward), images(2))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert not torch.equal(expected[0], steps(plain, images(2))[0][0])


def test_the_blocks_around_backward_do_not() -> None:
    def in_a_block(forward: Forward) -> Any:
        net = network()
        torch.manual_seed(4)
        y = forward(net, images(2))
        with valid_region(torch.zeros(2, dtype=torch.bool)) as block:
            y.sum().backward()
            assert entered() == (block,)
        return [p.grad for p in net.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(in_a_block(nested), in_a_block(plain), strict=True))


# ---- what goes wrong


def test_an_error_in_the_forward_leaves_nothing_behind() -> None:
    def failing(net: Net, x: Tensor) -> Tensor:
        checked(net.blocks[0], x)
        raise LookupError

    with pytest.raises(LookupError):
        checked(failing, network(), images(2))
    assert entered() == ()
    same_bits(nested, images(2))


def _one_then_other(first: nn.Module, second: nn.Module, turns: Iterator[bool], x: Tensor) -> Tensor:
    return first(second(x)) if next(turns) else second(first(x))


def test_a_recomputation_of_other_layers_is_refused() -> None:
    model = syncbn.convert(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    x = images(2).requires_grad_()
    y = checked(_one_then_other, *model, iter([False, True]), x)
    with pytest.raises(RuntimeError, match=r"call 1 of a synchronized layer is now of 1\(.*, and was of 0\("):
        y.sum().backward()
    assert entered() == ()


def test_a_recomputation_of_more_layers_is_refused() -> None:
    norm, turns = syncbn.SyncBatchNorm(4), iter([False, True])
    y = checked(lambda x: norm(norm(x) if next(turns) else x.sin()), images(2).requires_grad_())
    with set_checkpoint_early_stop(False), pytest.raises(RuntimeError, match=r"call 2 .* was of no layer"):
        y.sum().backward()


def test_a_tape_goes_with_its_graph() -> None:
    tapes = []

    def contexts() -> Any:
        recording, recomputation = checkpoint_contexts()
        tapes.append(weakref.ref(recording.tape))
        return recording, recomputation

    gc.disable()
    try:
        y = checkpoint(network(), images(2), use_reentrant=False, context_fn=contexts)
        y.sum().backward()
        assert tapes[0]() is not None
        del y
        assert tapes[0]() is None
    finally:
        gc.enable()


# ---- threads


def _at_once(*functions: Callable[[], Any]) -> None:
    errors: list[BaseException] = []

    def run(function: Callable[[], Any]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


class Meeting(nn.Module):
    """Lets nobody pass before two threads are there, once it has been opened for that."""

    barrier: threading.Barrier | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.barrier is not None:
            self.barrier.wait(timeout=20)
        return x


def test_two_threads_recompute_at_once() -> None:
    """As autograd does where a model has two devices: both are in the middle of their tapes at the same time."""
    meeting = Meeting()
    nets = [network().blocks[0] for _ in range(3)]
    bodies = [nn.Sequential(block, meeting, block) for block in nets]
    for block in nets:
        block.eval()
        block.norm.train()
        block.last.train()
    inputs = [images(2), images(3)]
    outputs = [checked(body, x) for body, x in zip(bodies, inputs, strict=False)]
    meeting.barrier = threading.Barrier(2)
    _at_once(outputs[0].sum().backward, outputs[1].sum().backward)
    meeting.barrier = None
    for block, x in zip(nets, inputs, strict=False):
        bodies[2].zero_grad()
        bodies[2](x).sum().backward()
        for mine, expected in zip(block.parameters(), nets[2].parameters(), strict=True):
            assert torch.equal(mine.grad, expected.grad)
        assert block.norm.num_batches_tracked == 4  # two calls of two


def test_two_threads_play_one_tape_at_once() -> None:
    norms = [syncbn.SyncBatchNorm(4), syncbn.SyncBatchNorm(4)]
    meeting, x = Meeting(), images(2)
    recording, recomputation = checkpoint_contexts()
    with recording:
        expected = norms[1](meeting(norms[0](x)))
    meeting.barrier = threading.Barrier(2)

    def play() -> None:
        for _ in range(2):
            with recomputation:
                assert torch.equal(norms[1](meeting(norms[0](x))), expected)
            assert entered() == ()

    _at_once(play, play)
    assert [norm.num_batches_tracked.item() for norm in norms] == [1, 1]


# ---- torch.compile


@dataclass
class Graphs:
    """How many of an operation each compiled graph has."""

    operation: str
    forward: list[int] = field(default_factory=list)
    backward: list[int] = field(default_factory=list)

    def backend(self) -> Any:
        return aot_autograd(
            fw_compiler=functools.partial(self._note, self.forward),
            bw_compiler=functools.partial(self._note, self.backward),
            partition_fn=min_cut_rematerialization_partition,
            keep_inference_input_mutations=True,
        )

    def _note(self, counts: list[int], graph: torch.fx.GraphModule, _: Any) -> Any:
        counts.append(sum(str(node.target) == self.operation for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)


ALL_REDUCE = "_c10d_functional.all_reduce.default"


def small_block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Sigmoid())


def small_network(blocks: int = 2) -> Net:
    torch.manual_seed(1)
    return syncbn.convert(Net(small_block, blocks))


def each_block_without_contexts(net: Net, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return x


def _compiled(x: Tensor, forward: Forward) -> Graphs:
    """Says how often the graphs exchange, once everything has turned out to be as without any of this."""
    torch._dynamo.reset()
    graphs = Graphs(ALL_REDUCE)
    compiled = torch.compile(forward, backend=graphs.backend(), fullgraph=True)
    results, _ = steps(compiled, x, net=small_network())
    expected, _ = steps(plain, x, net=small_network())
    for mine, theirs in zip(results, expected, strict=True):
        assert_close(mine, theirs.double(), 1e-4)
        assert mine.dtype != torch.int64 or mine == 2  # num_batches_tracked
    return graphs


@pytest.mark.parametrize("forward", [each_block, nested])
def test_a_compiled_graph_repeats_no_exchange(processes: Any, forward: Forward) -> None:
    for graphs in processes(2).run(_compiled, forward, per_rank=[(images(3),), (images(2),)]):
        assert graphs == Graphs(ALL_REDUCE, [2], [2])


def test_a_compiled_graph_without_the_contexts_does(processes: Any) -> None:
    for graphs in processes(2).run(_compiled, each_block_without_contexts, per_rank=[(images(3),), (images(2),)]):
        assert graphs.forward == [2]
        assert graphs.backward[0] > 2


def _compiled_block(x: Tensor) -> None:
    """A block that is compiled by itself, in whatever checkpoints it."""
    expected, expected_exchanges, _ = _with_compiled_block(plain, x)
    for forward in (each_block, nested):
        actual, exchanges, graphs = _with_compiled_block(forward, x)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        assert exchanges == expected_exchanges
        assert graphs == Graphs("syncbn.sum_on_tape.default", [1, 1], [0])  # one is of the recomputation


def _with_compiled_block(forward: Forward, x: Tensor) -> tuple[list[Tensor], int, Graphs]:
    net, graphs = small_network(1), Graphs("syncbn.sum_on_tape.default")
    torch._dynamo.reset()
    net.blocks[0].compile(backend=graphs.backend(), fullgraph=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        results, _ = steps(forward, x, net=net)
    return results, sum(event.name == "gloo:all_reduce" for event in profile.events()), graphs


def test_a_compiled_block_is_checkpointed(processes: Any) -> None:
    processes(2).run(_connect, per_rank=[(images(3),), (images(2),)])
    processes(2).run(_compiled_block, per_rank=[(images(3),), (images(2),)])


def _connect(x: Tensor) -> None:
    plain(small_network(1), x)


def test_a_compiled_block_of_one_process() -> None:
    _compiled_block(images(2))


def broken(net: Net, x: Tensor) -> Tensor:
    def forward(x: Tensor) -> Tensor:
        x = net.blocks[0](x)
        torch._dynamo.graph_break()
        return net.blocks[1](x)

    return checked(forward, x)


def _graph_break(x: Tensor) -> None:
    torch._dynamo.reset()
    results, _ = steps(torch.compile(broken, backend="aot_eager"), x, net=small_network())
    for mine, expected in zip(results, steps(plain, x, net=small_network())[0], strict=True):
        assert_close(mine, expected.double(), 1e-4)
        assert mine.dtype != torch.int64 or mine == 2  # num_batches_tracked


def test_a_graph_break_in_what_is_checkpointed(processes: Any) -> None:
    """Python checkpoints it, then, and what is around the break is compiled."""
    processes(2).run(_graph_break, per_rank=[(images(3),), (images(2),)])
