"""Statistics of groups of processes: the judge is PyTorch on the union of each group."""

from __future__ import annotations

import copy
import logging
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from documentation import blocks
from processes import WorkerError
from test_exchange import launch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from union import Step, parts, train_step

import syncbn
from syncbn.communicator import SLACK
from syncbn.exchange import Exchange
from syncbn.groups import Grouping, Member, OfNode, OfSamples, OfSize


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)).double()


def images(*counts: int) -> list[Tensor]:
    return parts(*((count, 2, 4, 3) for count in counts))


# ---- what each group computes


def step(x: Tensor, host: str, options: dict[str, Any]) -> tuple[Step, int]:
    model = syncbn.convert(network(), **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NCCL_HOSTID", host)
        return train_step(model, x), model[1]._exchange.calls


def assert_like_the_unions(processes: Any, batches: list[Tensor], groups: list[list[int]], **options: Any) -> None:
    """Every process has what the plain model makes of the union of its group's batches."""
    hosts = options.pop("hosts", "aaaa")
    results = processes(len(batches)).run(step, options, per_rank=list(zip(batches, hosts, strict=False)))
    expected = [train_step(network(), torch.cat([batches[rank] for rank in group])) for group in groups]
    gradients = {name: sum(each.grads[name] for each in expected) for name in expected[0].grads}
    for group, union in zip(groups, expected, strict=True):
        sizes = [len(batches[rank]) for rank in group]
        outputs, input_grads = union.output.split(sizes), union.input_grad.split(sizes)
        for place, rank in enumerate(group):
            mine, calls = results[rank]
            torch.testing.assert_close(mine.output, outputs[place])
            torch.testing.assert_close(mine.input_grad, input_grads[place])
            torch.testing.assert_close(mine.buffers, union.buffers)
            torch.testing.assert_close(mine.grads, gradients)
            assert calls == (4 if len(group) > 1 else 0)


PAIRS = [[0, 1], [2, 3]]
EACH = [[0], [1], [2], [3]]
ALL = [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("counts", "groups", "options"),
    [
        ((2, 3, 1, 2), EACH, {"group_size": 1}),
        ((2, 3, 1, 1), PAIRS, {"group_size": 2}),
        ((2, 3, 0, 1), PAIRS, {"group_size": 2}),
        ((2, 3, 1, 1), ALL, {"group_size": 4}),
        ((2, 1, 1, 1), [[0, 2], [1, 3]], {"group_size": "node", "hosts": "abab"}),
        ((2, 1, 3, 1), [[0, 2, 3], [1]], {"group_size": "node", "hosts": "abaa"}),
        ((2, 1, 3, 1), ALL, {"group_size": "node"}),
        ((2, 2, 2, 2), PAIRS, {"statistics_batch": 4}),
        ((2, 2, 2, 2), EACH, {"statistics_batch": 1}),
        ((2, 2, 2, 2), ALL, {"statistics_batch": 100}),
        ((4, 0, 4, 0), PAIRS, {"statistics_batch": 4}),
        ((1, 2, 1, 3), [[0], [1, 2, 3]], {"group_size": "node", "hosts": "abbb"}),
        ((2, 1, 3, 3), [[0, 1], [2, 3]], {"statistics_batch": 4}),
    ],
    ids=str,
)
def test_each_group_is_like_the_union_of_its_batches(
    processes: Any, counts: tuple[int, ...], groups: list[list[int]], options: dict[str, Any]
) -> None:
    assert_like_the_unions(processes, images(*counts), groups, **options)


@pytest.mark.parametrize(("counts", "statistics_batch"), [((2, 2), 4), ((4, 4), 8), ((3, 1), 4)])
def test_the_same_statistics_batch_on_two_processes(
    processes: Any, counts: tuple[int, int], statistics_batch: int
) -> None:
    assert_like_the_unions(processes, images(*counts), [[0, 1]], statistics_batch=statistics_batch)


def _ddp(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    model = syncbn.convert(network(), group_size=2)
    model = DistributedDataParallel(model, broadcast_buffers=False)
    for _ in range(2):
        model.zero_grad()
        (dist.get_world_size() * model(x).sin().sum()).backward()
    return list(model.module.buffers()), [p.grad for p in model.parameters()]


def test_under_ddp_gradients_are_everybodys_and_running_statistics_the_groups(processes: Any) -> None:
    batches = images(2, 3, 1, 1)
    results = processes(4).run(_ddp, per_rank=[(x,) for x in batches])
    halves = []
    for half in (0, 2):
        model = network()
        for _ in range(2):
            model.zero_grad()
            model(torch.cat(batches[half : half + 2])).sin().sum().backward()
        halves.append(model)
    gradients = [a.grad + b.grad for a, b in zip(*(model.parameters() for model in halves), strict=True)]
    for rank, (buffers, mine) in enumerate(results):
        torch.testing.assert_close(mine, gradients)
        torch.testing.assert_close(buffers, list(halves[rank // 2].buffers()))


# ---- slices of a mesh


def _on_a_mesh(x: Tensor) -> tuple[Step, Step, int]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    thin = init_device_mesh("cpu", (1, 4), mesh_dim_names=("dp", "tp"))
    alone = syncbn.convert(network(), thin["dp"])
    return train_step(syncbn.convert(network(), mesh["dp"]), x), train_step(alone, x), alone[1]._exchange.calls


def test_data_parallel_beside_another_dimension(processes: Any) -> None:
    """Two halves of a batch, each on the two processes of the other dimension; and a dimension of size 1."""
    halves = images(2, 3)
    results = processes(4).run(_on_a_mesh, per_rank=[(halves[rank // 2],) for rank in range(4)])
    union = train_step(network(), torch.cat(halves))
    for rank, (mine, alone, calls) in enumerate(results):
        torch.testing.assert_close(mine.output, union.output.split([2, 3])[rank // 2])
        torch.testing.assert_close(mine.input_grad, union.input_grad.split([2, 3])[rank // 2])
        torch.testing.assert_close(mine.buffers, union.buffers)
        own = train_step(network(), halves[rank // 2])
        torch.testing.assert_close(alone.output, own.output)
        torch.testing.assert_close(alone.buffers, own.buffers)
        assert calls == 0


# ---- which groups are formed


def sizes(grouping: Grouping, world_size: int, samples: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    groups = grouping.divide([Member(0, samples)] * world_size)
    assert [rank for group in groups for rank in group] == list(range(world_size))
    return [len(group) for group in groups]


@pytest.mark.parametrize(
    ("world_size", "samples", "asked", "expected"),
    [
        (8, 2, 32, [8]),
        (8, 4, 32, [8]),
        (16, 4, 32, [8] * 2),
        (128, 4, 32, [8] * 16),
        (8, 2, 6, [4, 4]),
        (8, 2, 5, [2, 3, 3]),
        (7, 2, 4, [2, 2, 3]),
        (6, 2, 8, [3, 3]),
        (4, 3, 9, [4]),
        (4, 5, 7, [1] * 4),
        (3, 64, 16, [1, 1, 1]),
        (1, 4, 32, [1]),
    ],
)
def test_groups_whose_batches_come_nearest(
    world_size: int, samples: int, asked: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sizes(OfSamples(asked), world_size, samples, monkeypatch) == expected


def test_no_number_of_groups_comes_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    for world_size in range(1, 20):
        for samples in (1, 2, 3, 5):
            for asked in range(1, 40):
                chosen = sizes(OfSamples(asked), world_size, samples, monkeypatch)
                assert max(chosen) - min(chosen) <= 1
                worst = max(abs(size * samples - asked) for size in chosen)
                assert all(
                    abs(size * samples - asked) >= worst for size in range(1, world_size) if world_size % size == 0
                )


def test_what_is_far_from_what_was_asked_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "syncbn.groups"):
        sizes(OfSamples(32), 4, 4, monkeypatch)
        sizes(OfSamples(16), 4, 4, monkeypatch)
        sizes(OfSamples(32), 4, 2, monkeypatch)
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "WARNING"]
    assert caplog.messages[1:] == [
        "statistics_batch=16: groups of 16 samples",
        "statistics_batch=32: groups of 8 samples",
    ]


def test_nodes_need_not_be_equal_nor_numbered_in_a_row() -> None:
    assert OfNode().divide([Member(host, None) for host in (7, 7, 8, 7, 9, 8)]) == ((0, 1, 3), (2, 5), (4,))


def test_hosts_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from syncbn import groups

    monkeypatch.delenv("NCCL_HOSTID", raising=False)
    hosts = []
    for boot in ("one", "other"):
        (tmp_path / boot).write_text(boot)
        monkeypatch.setattr(groups, "_BOOT_ID", tmp_path / boot)
        hosts.append(groups.host_identity())
    monkeypatch.setattr(groups, "_BOOT_ID", tmp_path / "not on this system")
    assert len({*hosts, groups.host_identity()}) == 3


# ---- the communicators


def test_models_with_the_same_groups_share_their_communicators(processes: Any) -> None:
    for distinct, made, group_of_two in processes(4).run(_shared):
        assert distinct == 1
        assert made == 2
        assert group_of_two


def _shared() -> tuple[int, int, bool]:
    known = set(dist.distributed_c10d._world.pg_names.values())
    counted = dist.distributed_c10d._get_process_group_name
    before = dist.distributed_c10d._world.group_count
    x = torch.randn(2, 3)
    first = syncbn.convert(nn.Sequential(nn.BatchNorm1d(3)), group_size=2)
    second = syncbn.convert(nn.Sequential(nn.BatchNorm1d(3)), statistics_batch=4)
    first(x)
    third = copy.deepcopy(first)
    for model in (second, third):
        model(x)
    groups = {counted(model[0]._exchange._communicator.group) for model in (first, second, third)}
    fresh = groups.isdisjoint(known)
    made = dist.distributed_c10d._world.group_count - before
    # Another test of this pool may have made them already.
    return len(groups), made if fresh else 2, first[0].process_group.size() == 2


def test_groups_have_the_default_groups_timeout(processes: Any) -> None:
    from processes import COLLECTIVE_TIMEOUT

    assert processes(2).run(_timeout) == [COLLECTIVE_TIMEOUT + SLACK] * 2  # and a watchdog with the one


def _timeout() -> timedelta:
    layer = syncbn.convert(nn.BatchNorm1d(3), group_size=1)
    layer(torch.randn(4, 3))
    return layer._exchange._communicator.group._get_backend(torch.device("cpu")).options._timeout


def test_groups_are_formed_anew_in_a_new_process_group(tmp_path: Path) -> None:
    run = launch("groups_again.py", str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert all(f"rank {rank} is done" in run.stdout for rank in range(2))


def test_how_groups_are_made_on_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of NCCL, on a machine that may have none."""
    from syncbn import communicator

    asked: list[Any] = []
    monkeypatch.setattr(communicator, "_uses_nccl", lambda group: True)
    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", lambda *a, **k: asked.append((a, k)) or ("own", []))
    monkeypatch.setattr(communicator, "_launch_order_is_fixed", lambda: True)
    assert communicator._new_groups(((0, 1), (2, 3)), timedelta(seconds=7)) == "own"
    ((groups,), options) = asked[0]
    assert groups == [[0, 1], [2, 3]]
    assert options["timeout"] == options["pg_options"]._timeout == timedelta(seconds=7) + SLACK
    assert options["pg_options"].is_high_priority_stream
    monkeypatch.setattr(communicator, "_launch_order_is_fixed", lambda: False)
    with pytest.warns(UserWarning, match=r"wait for each other: prevented by NCCL >= 2.26 and NCCL_LAUNCH_ORDER"):
        assert communicator._new_groups(((0, 1), (2, 3)), timedelta(seconds=7)) == "own"


# ---- what is kept


def test_groups_stay_when_layers_are_added_and_in_copies(processes: Any) -> None:
    """Pairs by the first batch, then batches of another size: as at the end of an epoch, or with larger images."""
    for rank, seen in enumerate(processes(4).run(_added)):
        assert seen == [PAIRS[rank // 2]] * 4 + [[rank]]


def _added() -> list[list[int]]:
    exchange = Exchange(statistics_batch=4)
    model = syncbn.convert(nn.Sequential(nn.BatchNorm1d(3)), exchange)
    model(torch.randn(2, 3))
    seen = [list(exchange.ranks or ())]
    model.append(syncbn.convert(nn.LazyBatchNorm1d(), exchange))
    model(torch.randn(8, 3))
    twin = copy.deepcopy(model)
    twin(torch.randn(8, 3))
    seen += [list(each[0]._exchange.ranks or ()) for each in (model, twin)]
    unlike = syncbn.convert(copy.deepcopy(model))  # with the options that the layers have
    seen.append(list(exchange.ranks or ()))
    unlike(torch.randn(8, 3))
    seen.append(list(unlike[0]._exchange.ranks or ()))
    return seen


def test_a_saved_model_keeps_what_was_asked_not_the_ranks(processes: Any) -> None:
    (saved, *_) = processes(4).run(_save_pairs)
    for sizes_here, text, error in processes(2).run(_load_pairs, saved):
        assert sizes_here == [2, 1]
        assert text == "Exchange(group_size=2)"
        assert "group_size=4 does not divide the 2 processes into equal groups: choose one of 1, 2, or" in error
    for model in pickle.loads(saved):
        assert model(torch.randn(4, 1)).isfinite().all(), "one process needs no group"


def _save_pairs() -> bytes:
    asked = {"group_size": 2}, {"statistics_batch": 2}, {"group_size": 4}
    models = [syncbn.convert(nn.Sequential(nn.BatchNorm1d(1)), **options) for options in asked]
    for model in models:
        model(torch.randn(2, 1))
    return pickle.dumps(models)


def _load_pairs(saved: bytes) -> tuple[list[int], str, str]:
    *models, four = pickle.loads(saved)
    text = repr(models[0][0]._exchange)
    for model in models:
        model(torch.randn(2, 1))
    with pytest.raises(ValueError, match="group_size=4") as error:
        four(torch.randn(2, 1))
    return [model[0]._exchange.world_size for model in models], text, str(error.value)


def test_revert_and_another_conversion() -> None:
    model = syncbn.convert(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), group_size=2)
    assert repr(model[0]._exchange) == "Exchange(group_size=2)"
    syncbn.convert(model, include="1", statistics_batch=8)
    assert [repr(layer._exchange) for layer in model] == ["Exchange(group_size=2)", "Exchange(statistics_batch=8)"]
    syncbn.convert(model)
    assert [repr(layer._exchange) for layer in model] == ["Exchange(group_size=2)", "Exchange(statistics_batch=8)"]
    assert [type(layer) for layer in syncbn.revert(model)] == [nn.BatchNorm1d] * 2
    assert not any("exchange" in name for layer in model for name in vars(layer))


def test_two_kinds_of_groups_in_one_model(processes: Any) -> None:
    for rank, seen in enumerate(processes(4).run(_two_kinds)):
        assert seen == [(0.5, 2.5)[rank // 2] + 1, 2.5, rank + 1.0]


def _two_kinds() -> list[float]:
    model = nn.ModuleList([nn.BatchNorm1d(1, momentum=1.0) for _ in range(3)])
    syncbn.convert(model, group_size=2)
    syncbn.convert(model, process_group=dist.group.WORLD, include="1")
    syncbn.convert(model, group_size=1, include="2")
    x = torch.full((2, 1), float(dist.get_rank())) + torch.tensor([[0.0], [2.0]])
    for layer in model:
        layer(x)
    return [layer.running_mean.item() for layer in model]


def test_eval_comes_first(processes: Any) -> None:
    """Nothing is exchanged in eval, not even for the groups: only one process validates here, on a large batch."""
    for before, after in processes(4).run(_eval_first):
        assert before == "Exchange(statistics_batch=4)"
        assert after == 2


def _eval_first() -> tuple[str, int]:
    layer = syncbn.convert(nn.BatchNorm1d(3), statistics_batch=4).eval()
    if dist.get_rank() == 0:
        layer(torch.randn(100, 3))
    before = repr(layer._exchange)
    layer.train()(torch.randn(2, 3))
    return before, layer._exchange.world_size


def test_a_compiled_layer_that_is_alone_in_its_group(processes: Any) -> None:
    for y, expected in processes(2).run(_compiled):
        torch.testing.assert_close(y, expected)


def _compiled() -> tuple[Tensor, Tensor]:
    x = torch.randn(4, 3) + dist.get_rank()
    layer = torch.compile(syncbn.convert(nn.BatchNorm1d(3), group_size=1), backend="eager", fullgraph=True)
    return layer(x).detach(), nn.BatchNorm1d(3)(x).detach()


def test_a_batch_that_is_said_beforehand(processes: Any) -> None:
    """For torch.compile and CUDA graphs, and where dimension 0 of the first layer's input counts something else."""
    for size, error in processes(4).run(_said):
        assert size == 2
        assert "does not know yet: run one training step as usual" in error


def _said() -> tuple[int, str]:
    exchange, silent = Exchange(statistics_batch=4), Exchange(statistics_batch=4)
    model = syncbn.convert(nn.Sequential(nn.BatchNorm1d(3)), exchange)
    exchange.connect(torch.device("cpu"), batch_size=2)
    model(torch.randn(32, 3))
    with pytest.raises(RuntimeError) as error:
        silent.connect(torch.device("cpu"))
    return exchange.world_size, str(error.value)


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"group_size": 2, "statistics_batch": 8}, ValueError, "got group_size and statistics_batch"),
        ({"group_size": 2, "process_group": Exchange()}, ValueError, "got process_group and group_size"),
        ({"group_size": 0}, ValueError, "expected group_size to be a whole number of at least 1, or 'node', got 0"),
        ({"group_size": "nodes"}, TypeError, "or 'node', got 'nodes'"),
        ({"group_size": 2.0}, TypeError, "got 2.0"),
        ({"group_size": True}, TypeError, "got True"),
        ({"statistics_batch": -1}, ValueError, "expected statistics_batch to be a whole number of at least 1, got -1"),
        ({"statistics_batch": "32"}, TypeError, "got '32'"),
    ],
    ids=str,
)
def test_options_that_mean_nothing(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(error) as raised:
        syncbn.convert(model, **options)
    assert message in str(raised.value)
    assert type(model[0]) is nn.BatchNorm1d, "nothing has been changed"


@pytest.mark.parametrize("size", [3, 8])
def test_a_size_that_does_not_divide_is_refused_at_once(processes: Any, size: int) -> None:
    message = f"group_size={size} does not divide the 4 processes into equal groups: choose one of 1, 2, 4, or"
    assert all(message in each for each in processes(4).run(_refused, size))
    OfSize(size).require_possible(1)


def _refused(size: int) -> str:
    with pytest.raises(ValueError, match="does not divide") as error:
        syncbn.convert(nn.BatchNorm1d(3), group_size=size)
    return str(error.value)


def test_the_plugin_says_so_in_lightnings_words(processes: Any) -> None:
    for message in processes(2).run(_plugin_refuses):
        assert message.startswith("SyncBatchNormPlugin: group_size=3 does not divide the 2 processes")


def _plugin_refuses() -> str:
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from syncbn.lightning import SyncBatchNormPlugin

    with pytest.raises(MisconfigurationException) as error:
        SyncBatchNormPlugin(group_size=3).apply(nn.BatchNorm1d(3))
    return str(error.value)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ({"group_size": 1}, {"group_size": 2}, "rank 0 was asked for group_size=1, rank 1 for group_size=2"),
        ({}, {"group_size": 2}, "rank 0 was asked for all processes, rank 1 for group_size=2"),
        ({"group_size": "node"}, {"statistics_batch": 4}, "group_size='node', rank 1 for statistics_batch=4"),
        ({}, {"process_group": Exchange(dedicated=False)}, "all processes, rank 1 for all processes, not dedicated"),
    ],
    ids=str,
)
def test_processes_that_ask_for_unlike_groups_are_told(
    processes: Any, one: dict[str, Any], other: dict[str, Any], message: str
) -> None:
    """On each of them, instead of waiting for each other; and afterwards they can go on."""
    with pytest.raises(WorkerError) as error:
        processes(2).run(_train_with, per_rank=[(one,), (other,)])
    assert all(message in each for each in error.value.errors)
    processes(2).run(_train_with, {"group_size": 2})


def _train_with(options: dict[str, Any]) -> None:
    syncbn.convert(nn.BatchNorm1d(3), **options)(torch.randn(4, 3))


def test_a_first_batch_without_samples_anywhere(processes: Any) -> None:
    with pytest.raises(WorkerError, match="no process has a sample in it: pass group_size= instead"):
        processes(2).run(_empty)


def _empty() -> None:
    syncbn.convert(nn.BatchNorm1d(3), statistics_batch=4)(torch.randn(0, 3))


def test_one_value_of_a_process_that_is_alone_in_its_group(processes: Any) -> None:
    with pytest.raises(WorkerError, match="Expected more than 1 value per channel"):
        processes(2).run(_one_value, 1)
    processes(2).run(_one_value, 2)


def _one_value(size: int) -> None:
    syncbn.convert(nn.BatchNorm1d(3), group_size=size)(torch.randn(1, 3))


# ---- describe


def test_describe_tells_over_whom(processes: Any) -> None:
    for rank, told in enumerate(processes(4).run(_described)):
        assert told == {
            "group_size=2": [("groups of 2 processes", ""), (f"ranks {PAIRS[rank // 2]}", "group_size=2")],
            "group_size=1": [("this process", ""), ("this process", "group_size=1")],
            "group_size='node'": [("the processes of each node", ""), ("all 4 processes", "group_size='node'")],
            "statistics_batch=4": [
                ("groups of about 4 samples", ""),
                (f"ranks {PAIRS[rank // 2]}", "statistics_batch=4"),
            ],
        }


def _described() -> dict[str, list[tuple[str, str]]]:
    told = {}
    for options in ({"group_size": 2}, {"group_size": 1}, {"group_size": "node"}, {"statistics_batch": 4}):
        layer = syncbn.convert(nn.BatchNorm1d(3), **options)
        rows = []
        for _ in range(2):
            (row,) = syncbn.describe(layer).rows
            rows.append((row.over, row.reason))
            layer(torch.randn(2, 3))
        told[str(layer._exchange.grouping)] = rows
    return told


def test_describe_without_torch_distributed() -> None:
    (row,) = syncbn.describe(syncbn.convert(nn.BatchNorm1d(3), group_size=2)).rows
    assert (row.over, row.reason) == ("this process", "group_size=2; torch.distributed is not initialized")


# ---- the documentation


def documented() -> list[str]:
    return blocks("docs/groups.md")


@pytest.mark.parametrize("index", range(6))
def test_what_is_documented_runs(processes: Any, index: int) -> None:
    code = documented()[index].replace("group_size=8", "group_size=2")
    assert processes(4).run(_run, code) == [True] * 4


def test_all_that_is_documented_is_run() -> None:
    assert len(documented()) == 6


def _run(code: str) -> bool:
    import lightning

    model = nn.Sequential(nn.BatchNorm1d(3))
    names = {"syncbn": syncbn, "torch": torch, "model": model, "device_type": "cpu", "device": torch.device("cpu")}
    code = code.replace('strategy="ddp", devices=4', 'accelerator="cpu", devices=1, logger=False')
    exec(code, names | {"lightning": lightning})
    return bool(model(torch.randn(2, 3)).isfinite().all())
