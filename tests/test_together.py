"""Layers that are normalized together: the same bits as one after another, for one all-reduce each way."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from documentation import blocks
from judge import affine, assert_close, large_enough
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.checkpoint import checkpoint_contexts
from syncbn.recompute import recompute_activations

SIZES = (16, 8, 4, 2, 1)
CHANNELS = (4, 6, 4, 3, 5)


def levels(dtype: torch.dtype = torch.float32, channels: tuple[int, ...] = CHANNELS, seed: int = 0) -> list[Tensor]:
    """One input for each pyramid level, other ones on each process."""
    generator = torch.Generator().manual_seed(10 * seed + (dist.get_rank() if dist.is_initialized() else 0))
    shapes = [(2, c, size, size) for c, size in zip(channels, SIZES, strict=True)]
    return [(torch.randn(shape, generator=generator) * 3 + 1).to(dtype) for shape in shapes]


def one_after_another(layers: Any, inputs: list[Tensor]) -> list[Tensor]:
    return [layer(x) for layer, x in zip(layers, inputs, strict=True)]


def loss_of(outputs: list[Tensor]) -> Tensor:
    return sum((y.double().sin().sum() for y in outputs), torch.zeros((), dtype=torch.float64))


class Steps:
    """Two steps of layers: everything that they leave, and how many all-reduces these took."""

    def __init__(self, run: Callable[..., list[Tensor]], layers: nn.ModuleList, dtype: torch.dtype = torch.float32):
        self.calls: list[int] = []
        self.left: dict[str, Tensor | None] = {}
        channels = tuple(layer.num_features for layer in layers)
        for step in range(2):
            layers.zero_grad()
            inputs = [x.requires_grad_() for x in levels(dtype, channels, seed=step)]
            self._count(layers)
            outputs = run(layers, inputs)
            self._count(layers)
            loss_of(outputs).backward()
            self._count(layers)
            for name, tensors in (("y", outputs), ("dx", [x.grad for x in inputs])):
                self.left |= {f"{name}{i} of step {step}": each for i, each in enumerate(tensors)}
        self.left |= {name: p.grad for name, p in layers.named_parameters()} | dict(layers.named_buffers())

    def _count(self, layers: nn.ModuleList) -> None:
        self.calls.append(sum(exchange.calls for exchange in {layer._exchange for layer in layers}))

    def each(self) -> list[int]:
        """All-reduces in the last step: forward, backward."""
        return [self.calls[4] - self.calls[3], self.calls[5] - self.calls[4]]


def assert_same_bits(together: Steps, apart: Steps) -> None:
    assert together.left.keys() == apart.left.keys()
    for name, tensor in apart.left.items():
        mine = together.left[name]
        assert mine is not None, name
        assert tensor is not None, name
        assert (mine.dtype, mine.stride()) == (tensor.dtype, tensor.stride()), name
        assert torch.equal(mine, tensor), name


def build(kind: str, dtype: torch.dtype = torch.float32) -> nn.ModuleList:
    """Five layers, on an exchange of their own each unless they share one."""
    options: dict[str, dict[str, Any]] = {
        "activations": {"activation": "leaky_relu"},
        "cumulative": {"momentum": None},
        "untracked": {"track_running_stats": False},
        "plain": {"affine": False},
    }
    if kind == "one layer":
        layers = [syncbn.SyncBatchNorm(4, dtype=dtype)] * 5
    elif kind == "converted":
        layers = list(syncbn.convert(nn.ModuleList(nn.BatchNorm2d(c, dtype=dtype) for c in CHANNELS)))
    else:
        layers = [syncbn.SyncBatchNorm(c, dtype=dtype, **options.get(kind, {})) for c in CHANNELS]
    for layer in layers:
        affine(layer)
    return nn.ModuleList(layers)


# ---- what comes out


def _both_ways(kind: str, dtype: torch.dtype, large: bool) -> tuple[list[int], list[int]]:
    def compared() -> tuple[list[int], list[int]]:
        layers = build(kind, torch.float64 if dtype == torch.float64 else torch.float32)
        together = Steps(syncbn.normalize_together, copy.deepcopy(layers), dtype)
        apart = Steps(one_after_another, layers, dtype)
        assert_same_bits(together, apart)
        return together.each(), apart.each()

    if not large:
        return compared()
    with large_enough():
        return compared()


@pytest.mark.parametrize("large", [False, True], ids=["reference", "cpu"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("converted", torch.float32),
        ("one layer", torch.float32),
        ("activations", torch.bfloat16),
        ("cumulative", torch.float64),
        ("untracked", torch.float16),
        ("plain", torch.float32),
    ],
)
def test_the_same_bits_as_one_after_another(processes: Any, kind: str, dtype: torch.dtype, large: bool) -> None:
    for together, apart in processes(2).run(_both_ways, kind, dtype, large):
        assert together == [1, 1]
        assert apart == [5, 5]


def _step_on(inputs: list[Tensor]) -> dict[str, Tensor]:
    layers = build("converted", torch.float64)
    inputs = [x.requires_grad_() for x in inputs]
    outputs = syncbn.normalize_together(layers, inputs)
    loss_of(outputs).backward()
    grads = {f"{name}.grad": p.grad for name, p in layers.named_parameters()}
    for grad in grads.values():
        dist.all_reduce(grad)
    return (
        {f"y{i}": y.detach() for i, y in enumerate(outputs)}
        | {f"dx{i}": x.grad for i, x in enumerate(inputs)}
        | grads
        | dict(layers.named_buffers())
    )


def test_three_processes_with_uneven_and_empty_batches_are_the_union(processes: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    parts = [
        [torch.randn(n, c, size, size, generator=generator, dtype=torch.float64) * (n + 1) for c, size in pairs]
        for n, pairs in [(2, zip(CHANNELS, SIZES, strict=True)), (0, zip(CHANNELS, SIZES, strict=True))]
    ]
    parts.append([torch.randn(3, c, 5, 2, generator=generator, dtype=torch.float64) for c in CHANNELS])
    steps = processes(3).run(_step_on, per_rank=[(part,) for part in parts])
    for i, c in enumerate(CHANNELS):
        union = [part[i].movedim(1, -1).reshape(-1, c) for part in parts]
        x = torch.cat(union).requires_grad_()
        layer = nn.BatchNorm1d(c, dtype=torch.float64)
        affine(layer)
        y = layer(x)
        loss_of([y]).backward()
        for name, whole in (("y", y.detach()), ("dx", x.grad)):
            mine = [step[f"{name}{i}"].movedim(1, -1).reshape(-1, c) for step in steps]
            assert_close(torch.cat(mine), whole, 1e-9, f"{name}{i}")
        whole_layer = {f"{name}.grad": p.grad for name, p in layer.named_parameters()} | dict(layer.named_buffers())
        for step in steps:
            for name, expected in whole_layer.items():
                assert_close(step[f"{i}.{name}"], expected.double(), 1e-9, name)


def _with_ddp(used: int) -> list[Tensor]:
    model = nn.Module()
    model.norms = syncbn.BatchNormList(nn.BatchNorm2d(c) for c in CHANNELS)  # type: ignore[assignment]
    model.forward = model.norms.__call__  # type: ignore[method-assign, union-attr]
    model = DistributedDataParallel(syncbn.convert(model).double())
    inputs = [x.requires_grad_() for x in levels(torch.float64)]
    (dist.get_world_size() * loss_of([model(inputs)[used]])).backward()
    return [*(x.grad / dist.get_world_size() for x in inputs), *(p.grad for p in model.parameters())]


def test_losses_of_different_outputs_do_not_hang(processes: Any) -> None:
    """Rank 0 has objects on the first level alone, rank 1 on the second: one after another, they wait for ever."""
    first, second = processes(2).run(_with_ddp, per_rank=[(0,), (1,)])
    inputs = [torch.cat(pair).requires_grad_() for pair in zip(*processes(2).run(levels, torch.float64), strict=True)]
    layers = [nn.BatchNorm2d(c).double() for c in CHANNELS]
    outputs = one_after_another(layers, inputs)
    loss_of([outputs[0][:2], outputs[1][2:]]).backward()
    for i, x in enumerate(inputs):
        expected = torch.zeros_like(x) if x.grad is None else x.grad
        assert_close(torch.cat([first[i], second[i]]), expected, 1e-9, f"dx{i}")
    parameters = [p for layer in layers for p in layer.parameters()]
    for mine, theirs, parameter in zip(first[5:], second[5:], parameters, strict=True):
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.equal(mine, theirs)
        assert_close(mine, expected, 1e-9)


# ---- gradients


def _gradients_of_gradients(run: Callable[..., list[Tensor]]) -> tuple[list[Tensor], list[int]]:
    layers = build("activations", torch.float64)
    inputs = [x.requires_grad_() for x in levels(torch.float64)]
    exchanges = [layer._exchange for layer in layers]
    calls = []
    outputs = run(layers, inputs)
    calls.append(sum(each.calls for each in exchanges))
    first = torch.autograd.grad(loss_of(outputs), [*inputs, *layers.parameters()], create_graph=True)
    calls.append(sum(each.calls for each in exchanges))
    second = torch.autograd.grad(loss_of([g.square() for g in first]), [*inputs, *layers.parameters()])
    return [*first, *second], calls


def test_gradients_of_gradients(processes: Any) -> None:
    together = processes(2).run(_gradients_of_gradients, syncbn.normalize_together)
    apart = processes(2).run(_gradients_of_gradients, one_after_another)
    for (mine, calls), (theirs, _) in zip(together, apart, strict=True):
        assert calls == [1, 3]  # backward forms the statistics again
        for a, b in zip(mine, theirs, strict=True):
            assert_close(a, b, 1e-11)


def _needing(what: str) -> tuple[list[int], list[bool], list[bool]]:
    layers = build("converted").requires_grad_(what != "nothing")
    inputs = levels()
    if what == "one input":
        layers[0].requires_grad_(False)
        layers[1].requires_grad_(False)
        inputs[1].requires_grad_()
    exchange = layers[0]._exchange
    outputs = syncbn.normalize_together(layers, inputs)
    calls = [exchange.calls]
    if any(y.requires_grad for y in outputs):
        loss_of(outputs).backward()
    calls.append(exchange.calls)
    gradients = [p.grad is not None for p in layers.parameters()]
    return calls, [y.requires_grad for y in outputs], gradients


@pytest.mark.parametrize(
    ("what", "calls", "outputs", "parameters"),
    [
        ("nothing", [1, 1], [False] * 5, [False] * 10),
        ("parameters", [1, 1], [True] * 5, [True] * 10),
        ("one input", [1, 2], [False] + [True] * 4, [False] * 4 + [True] * 6),
    ],
)
def test_only_what_needs_a_gradient_gets_one(
    processes: Any, what: str, calls: list[int], outputs: list[bool], parameters: list[bool]
) -> None:
    for answer in processes(2).run(_needing, what):
        assert answer == (calls, outputs, parameters)


def _in_place_and_twice() -> None:
    layers = build("converted")
    inputs = [x.requires_grad_() for x in levels()]
    y = [torch.relu_(each) for each in syncbn.normalize_together(layers, inputs)]
    loss = loss_of(y)
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_outputs_changed_in_place_and_a_second_backward(processes: Any) -> None:
    processes(2).run(_in_place_and_twice)


# ---- over whom


def _mixed() -> tuple[list[int], list[int]]:
    ranks = dist.new_group([0, 1])
    shared, over = syncbn.Exchange(), syncbn.Exchange(ranks)
    layers = nn.ModuleList(
        syncbn.SyncBatchNorm(c, process_group=exchange)
        for c, exchange in zip(CHANNELS, (shared, over, shared, over, over), strict=True)
    )
    together = Steps(syncbn.normalize_together, copy.deepcopy(layers))
    apart = Steps(one_after_another, layers)
    assert_same_bits(together, apart)
    dist.destroy_process_group(ranks)
    return together.each(), apart.each()


def test_each_process_group_has_a_message(processes: Any) -> None:
    for together, apart in processes(2).run(_mixed):
        assert together == [2, 2]
        assert apart == [5, 5]


def _not_all_in_training() -> None:
    layers = build("converted")
    layers[1].eval()
    layers[3] = nn.BatchNorm2d(3)
    layers.append(nn.GroupNorm(1, 5))
    inputs = [x.requires_grad_() for x in [*levels(), levels()[-1]]]
    before = copy.deepcopy(layers)
    called = []
    layers[1].register_forward_hook(lambda *_: called.append("eval"))
    exchange = layers[0]._exchange
    mine, theirs = syncbn.normalize_together(layers, inputs), one_after_another(before, inputs)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    for (name, a), b in zip(layers.named_buffers(), before.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert called == ["eval"]
    assert exchange.calls == 1
    layers.eval()
    assert all(
        torch.equal(a, b)
        for a, b in zip(syncbn.normalize_together(layers, inputs), one_after_another(layers, inputs), strict=True)
    )
    assert exchange.calls == 1


def test_other_layers_are_called(processes: Any) -> None:
    processes(2).run(_not_all_in_training)


@pytest.mark.parametrize("kind", ["converted", "one layer", "untracked"])
def test_one_process(kind: str) -> None:
    layers = build(kind)
    inputs_of_one_value_are_refused = [torch.ones(1, layer.num_features, 1, 1) for layer in layers]
    with pytest.raises(ValueError, match="more than 1 value"):
        syncbn.normalize_together(layers, inputs_of_one_value_are_refused)
    together = Steps(syncbn.normalize_together, copy.deepcopy(layers))
    assert_same_bits(together, Steps(one_after_another, layers))
    assert together.each() == [0, 0]
    assert syncbn.normalize_together([], []) == []


# ---- blocks around


def _in_valid_region() -> tuple[list[int], list[int]]:
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[:, : 4 + 8 * dist.get_rank(), :9] = True
    layers = build("converted")
    with syncbn.valid_region(mask):
        together = Steps(syncbn.normalize_together, copy.deepcopy(layers))
        apart = Steps(one_after_another, copy.deepcopy(layers))
    assert_same_bits(together, apart)
    assert not torch.equal(together.left["0.running_mean"], Steps(one_after_another, layers).left["0.running_mean"])
    return together.each(), apart.each()


def test_each_level_has_the_mask_at_its_own_resolution(processes: Any) -> None:
    for together, apart in processes(2).run(_in_valid_region):
        assert together == [1, 1]
        assert apart == [5, 5]


def _checkpointed(layers: nn.ModuleList, inputs: list[Tensor]) -> list[Tensor]:
    def part(*xs: Tensor) -> list[Tensor]:
        ys = syncbn.normalize_together(layers, [x * 2 for x in xs])
        return syncbn.normalize_together(layers, [y.sin() for y in ys])

    return checkpoint(part, *inputs, use_reentrant=False, context_fn=checkpoint_contexts)


def _plainly(layers: nn.ModuleList, inputs: list[Tensor]) -> list[Tensor]:
    return one_after_another(layers, [y.sin() for y in one_after_another(layers, [x * 2 for x in inputs])])


def _with_checkpointing() -> tuple[list[int], list[int]]:
    layers = build("one layer")
    together = Steps(_checkpointed, copy.deepcopy(layers))
    apart = Steps(_plainly, layers)
    assert_same_bits(together, apart)
    return together.each(), apart.each()


def test_a_recomputation_exchanges_nothing(processes: Any) -> None:
    for together, apart in processes(2).run(_with_checkpointing):
        assert together == [2, 2]
        assert apart == [10, 10]


def _recomputing(layers: nn.ModuleList, inputs: list[Tensor]) -> list[Tensor]:
    with recompute_activations():
        return [y.square() for y in syncbn.normalize_together(layers, inputs)]


def _keeping(layers: nn.ModuleList, inputs: list[Tensor]) -> list[Tensor]:
    return [y.square() for y in one_after_another(layers, inputs)]


def _with_recomputed_outputs() -> list[int]:
    layers = build("activations")
    together = Steps(_recomputing, copy.deepcopy(layers))
    assert_same_bits(together, Steps(_keeping, layers))
    return together.each()


def test_outputs_may_be_recomputed(processes: Any) -> None:
    assert processes(2).run(_with_recomputed_outputs) == [[1, 1], [1, 1]]


# ---- what cannot be done together


class Noisy(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def _refusing() -> list[nn.Module]:
    import timm  # here, since workers import this file

    hooked = [syncbn.convert(nn.BatchNorm2d(4)) for _ in range(4)]
    hooked[0].register_forward_hook(lambda *_: None)
    hooked[1].register_forward_pre_hook(lambda *_: None)
    hooked[2].register_full_backward_hook(lambda *_: None)
    hooked[3].register_full_backward_pre_hook(lambda *_: None)
    patched = syncbn.convert(nn.BatchNorm2d(4))
    patched.forward = lambda x: x  # type: ignore[method-assign]
    return [
        *hooked,
        patched,
        syncbn.convert(Noisy(4)),
        syncbn.convert(timm.layers.BatchNormAct2d(4)),
        syncbn.convert(nn.LazyBatchNorm2d()),
        nn.Sequential(syncbn.convert(nn.BatchNorm2d(4)), nn.ReLU()),
        "norm",  # type: ignore[list-item]
    ]


@pytest.mark.parametrize("at", range(10))
def test_what_would_be_left_out_is_refused_by_name(at: int) -> None:
    refused = _refusing()[at]
    first = syncbn.SyncBatchNorm(4)
    with pytest.raises(TypeError, match=rf"layer 1 \({type(refused).__name__}\) cannot be normalized together"):
        syncbn.normalize_together([first, refused], [torch.randn(2, 4, 3, 3)] * 2)
    assert first.num_batches_tracked == 0


def test_wrong_arguments() -> None:
    layers, x = build("converted"), torch.randn(2, 4, 3, 3)
    with pytest.raises(ValueError, match="got 5 layers and 4 inputs"):
        syncbn.normalize_together(layers, [x] * 4)
    with pytest.raises(TypeError, match="got one tensor"):
        syncbn.normalize_together(layers, x)
    with pytest.raises(ValueError, match="expected 4D input"):
        syncbn.normalize_together(layers[:1], [torch.randn(2, 4)])
    with pytest.raises(RuntimeError, match="expected 6 channels"):
        syncbn.normalize_together(layers[:2], [x, x])
    assert layers[0].num_batches_tracked == 0


def test_lazy_layers_once_they_have_seen_an_input() -> None:
    layer = syncbn.convert(nn.LazyBatchNorm2d())
    x = torch.randn(2, 4, 3, 3)
    layer(x)
    expected = copy.deepcopy(layer)(x)
    assert torch.equal(syncbn.normalize_together([layer], [x])[0], expected)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_parametrized_layers() -> None:
    layer = syncbn.convert(nn.BatchNorm2d(4))
    parametrize.register_parametrization(layer, "weight", Doubled())
    x = torch.randn(2, 4, 3, 3)
    expected = copy.deepcopy(layer)(x)
    assert torch.equal(syncbn.normalize_together([layer], [x])[0], expected)


# ---- the module


def test_the_page_runs() -> None:
    code = blocks("docs/together.md")[0]
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert [y.shape[2] for y in scope["outputs"]] == [32, 16, 8, 4, 2]


def test_the_module_keeps_layers_and_keys() -> None:
    before = nn.ModuleList(nn.BatchNorm2d(c) for c in CHANNELS)
    layers = list(before)
    model = nn.Module()
    model.norms = syncbn.BatchNormList(before)
    assert model.norms.state_dict().keys() == before.state_dict().keys()
    assert all(a is b for a, b in zip(model.norms, layers, strict=True))
    plain = model.norms(levels())
    expected = one_after_another(copy.deepcopy(before), levels())
    assert all(torch.equal(a, b) for a, b in zip(plain, expected, strict=True))

    syncbn.convert(model)
    assert type(model.norms) is syncbn.BatchNormList
    assert all(isinstance(layer, syncbn.SyncBatchNorm) for layer in model.norms)
    assert model.norms.state_dict().keys() == before.state_dict().keys()
    assert "norms.4" in str(syncbn.describe(model))
    for copied in (copy.deepcopy(model.norms), pickle.loads(pickle.dumps(model.norms)), syncbn.fuse(model).norms):
        assert type(copied) is syncbn.BatchNormList
        assert len(copied(levels())) == 5
    assert type(syncbn.revert(model).norms[0]) is nn.BatchNorm2d


class Head(nn.Module):
    """As EfficientDet's and RetinaNet's: convolutions that all levels share, normalization that is each level's own."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        if together:
            self.norms = syncbn.BatchNormList(self.norms)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        features = [self.conv(x) for x in features]
        if isinstance(self.norms, syncbn.BatchNormList):
            features = self.norms(features)
        else:
            features = one_after_another(self.norms, features)
        return [y.relu() for y in features]


def _compiled() -> tuple[list[list[str]], list[int]]:
    from torch._dynamo.backends.common import aot_autograd  # here, since workers import this file

    graphs: list[list[str]] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append([str(node.target) for node in graph.graph.nodes if "all_reduce" in str(node.target)])

        def run(args: list[Any]) -> Any:
            return graph(*args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    heads = [syncbn.convert(Head(together).double()) for together in (True, False)]
    inputs = [[x.requires_grad_() for x in levels(torch.float64, (4,) * 5)[:2]] for _ in heads]
    compiled = torch.compile(heads[0], backend=aot_autograd(fw_compiler=count, bw_compiler=count), fullgraph=True)
    for run, xs in zip((compiled, heads[1]), inputs, strict=True):
        for _ in range(2):
            loss_of(run(xs)).backward()
    for a, b in zip(inputs[0], inputs[1], strict=True):
        assert_close(a.grad, b.grad, 1e-9)
    for (name, a), (_, b) in zip(heads[0].state_dict().items(), heads[1].state_dict().items(), strict=True):
        assert_close(a, b, 1e-9, name)
    return graphs, [heads[1].norms[0]._exchange.calls]


def test_a_compiled_head_has_one_all_reduce_each_way(processes: Any) -> None:
    one = ["_c10d_functional.all_reduce.default"]
    for graphs, calls in processes(2).run(_compiled):
        assert graphs == [one, one]
        assert calls == [8]
