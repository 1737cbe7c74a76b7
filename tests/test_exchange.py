"""How processes talk: which communicator, whose layers, and what happens where they do not belong together."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import WorkerError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import syncbn
from syncbn.communicator import SLACK
from syncbn.exchange import Exchange
from syncbn.guard import limit
from syncbn.watchdog import watchdog


def two_layers() -> nn.Sequential:
    return syncbn.convert(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)))


# ---- one communicator beside the default group


def test_models_share_one_communicator_beside_the_default_group(processes: Any) -> None:
    for shared, is_default, calls in processes(2).run(_communicators):
        assert shared == 1
        assert not is_default
        assert calls == [2, 1]


def _communicators() -> tuple[int, bool, list[int]]:
    model, other = two_layers(), two_layers()
    x = torch.randn(4, 3)
    model(x)
    twin = copy.deepcopy(model)
    twin(x)
    other[0](x)
    groups = [each[0]._exchange._communicator.group for each in (model, twin, other)]
    calls = [each[0]._exchange.calls for each in (model, other)]
    return len(set(groups)), groups[0] is dist.group.WORLD, calls


def test_the_default_group_on_request(processes: Any) -> None:
    assert processes(2).run(_undedicated) == [True, True]


def _undedicated() -> bool:
    layer = syncbn.SyncBatchNorm(3, process_group=Exchange(dedicated=False))
    layer(torch.randn(4, 3))
    return layer._exchange._communicator.group is dist.group.WORLD


def test_the_timeout_is_the_users(processes: Any) -> None:
    """Of the watchdog, which can say more; the process group gives up some time later."""
    from processes import COLLECTIVE_TIMEOUT

    timeouts = COLLECTIVE_TIMEOUT, COLLECTIVE_TIMEOUT + SLACK
    assert processes(2).run(_timeouts) == [timeouts] * 2


def _timeouts() -> tuple[timedelta, timedelta]:
    layer = syncbn.SyncBatchNorm(3)
    layer(torch.randn(4, 3))
    communicator = layer._exchange._communicator
    of_group = communicator.group._get_backend(torch.device("cpu")).options._timeout
    return timedelta(seconds=watchdog._limits[communicator]), of_group


@pytest.mark.parametrize(
    ("timeout", "of_group", "environment", "expected"),
    [
        (None, 600, {}, 540),
        (7, 600, {}, 7),
        (3600, 600, {}, 540),  # it cannot be exceeded
        (7, 600, {"SYNCBN_TIMEOUT": "2.5"}, 2.5),
        (None, 600, {"SYNCBN_CHECK": "1"}, 60),
        (7, 600, {"SYNCBN_CHECK": "1"}, 7),
        (None, 600, {"SYNCBN_CHECK": "1", "SYNCBN_TIMEOUT": "300"}, 300),
    ],
)
def test_which_timeout_counts(
    timeout: float | None,
    of_group: float,
    environment: dict[str, str],
    expected: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked = None if timeout is None else timedelta(seconds=timeout)
    assert limit(asked, timedelta(seconds=of_group)) == timedelta(seconds=expected), "before the group itself gives up"


@pytest.mark.parametrize("value", ["soon", "0", "-1", "inf", "nan"])
def test_a_timeout_that_is_none(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNCBN_TIMEOUT", value)
    with pytest.raises(ValueError, match=f"SYNCBN_TIMEOUT to be a number of seconds greater than 0, got '{value}'"):
        limit(None, timedelta(seconds=60))


def test_convert_passes_the_timeout_on() -> None:
    minute = timedelta(minutes=1)
    torchs = nn.SyncBatchNorm(3)
    model = syncbn.convert(nn.Sequential(nn.BatchNorm1d(3), torchs), timeout=minute)
    assert [layer._exchange.timeout for layer in model] == [minute, minute]
    assert syncbn.convert(model)[0]._exchange.timeout == minute, "it stays"
    assert syncbn.convert(model, timeout=2 * minute)[0]._exchange.timeout == 2 * minute
    assert syncbn.convert(model, group_size=1, timeout=minute)[0]._exchange.timeout == minute
    with pytest.raises(ValueError, match=r"expected an Exchange or a timeout, got both"):
        syncbn.convert(model, Exchange(), timeout=minute)
    with pytest.raises(ValueError, match="expected a positive timeout"):
        syncbn.convert(model, timeout=timedelta(seconds=-1))


def test_what_is_no_timeout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"expected timeout to be a datetime.timedelta, got int"):
        Exchange(timeout=30)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a positive timeout"):
        Exchange(timeout=timedelta(0))
    monkeypatch.setenv("SYNCBN_CHECK", "yes")
    with pytest.raises(ValueError, match="expected SYNCBN_CHECK to be 0 or 1, got 'yes'"):
        limit(None, timedelta(seconds=60))


PROGRAMS = Path(__file__).parent / "programs"


def launch(program: str, *arguments: str, processes: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program of ``tests/programs`` under torchrun: for what no pool of processes can be used for."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*command, str(PROGRAMS / program), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def test_a_new_process_group_after_the_old_one(tmp_path: Path) -> None:
    """The communicator is made again, and nothing aborts at exit (a gloo group kept for too long does)."""
    run = launch("again.py", str(tmp_path), TORCH_DISTRIBUTED_DEBUG="DETAIL")
    assert run.returncode == 0, run.stderr
    assert all(f"rank {rank} is done" in run.stdout for rank in range(2))


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_program_that_is_run_over_nccl_where_there_is_a_gpu(world_size: int) -> None:
    """Over gloo, everything in it but CUDA graphs."""
    run = launch("nccl.py", "gloo", processes=world_size)
    assert run.returncode == 0, run.stderr
    assert all(f"rank {rank} is done" in run.stdout for rank in range(world_size))


# ---- NCCL's rules, as far as they can be seen without a GPU


def test_importing_fixes_the_launch_order_of_nccl() -> None:
    program = "import os, syncbn; print(os.environ['NCCL_LAUNCH_ORDER_IMPLICIT'])"
    environment = {k: v for k, v in os.environ.items() if k != "NCCL_LAUNCH_ORDER_IMPLICIT"}
    for given, expected in ({}, "1"), ({"NCCL_LAUNCH_ORDER_IMPLICIT": "0"}, "0"):
        run = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment | given
        )
        assert run.stdout.strip() == expected


@pytest.mark.parametrize(
    ("value", "version", "fixed"),
    [("1", (2, 26, 0), True), ("1", (2, 30, 7), True), ("1", (2, 25, 9), False), ("0", (2, 30, 7), False)],
)
def test_where_the_launch_order_is_fixed(
    monkeypatch: pytest.MonkeyPatch, value: str, version: tuple[int, ...], fixed: bool
) -> None:
    from syncbn import communicator

    monkeypatch.setenv("NCCL_LAUNCH_ORDER_IMPLICIT", value)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: version)
    assert communicator._launch_order_is_fixed() is fixed


def test_how_the_communicator_is_made_on_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of NCCL, on a machine that may have none: high priority, few CTAs, the user's timeout."""
    from syncbn import communicator

    asked: dict[str, Any] = {}
    monkeypatch.setattr(communicator, "_uses_nccl", lambda group: True)
    monkeypatch.setattr(dist, "new_group", lambda **options: asked.update(options) or "a new group")
    monkeypatch.setattr(communicator, "_launch_order_is_fixed", lambda: True)
    assert communicator._new_group_of_all(timedelta(seconds=7)) == "a new group"
    assert asked["timeout"] == asked["pg_options"]._timeout == timedelta(seconds=7) + SLACK
    assert asked["pg_options"].is_high_priority_stream
    assert asked["pg_options"].config.max_ctas == 4

    monkeypatch.setattr(communicator, "_launch_order_is_fixed", lambda: False)
    with pytest.warns(UserWarning, match=r"shares the default process group.*NCCL_LAUNCH_ORDER_IMPLICIT=1"):
        assert communicator._new_group_of_all(timedelta(seconds=7)) is dist.group.WORLD


def test_a_cuda_graph_cannot_capture_the_first_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"exchange.connect\(device\), before the capture"):
        Exchange().connect(torch.device("cuda"))


# ---- other processes than all


def test_subgroups_and_meshes(processes: Any) -> None:
    """Statistics over {0, 1} and {2, 3}; along each dimension of a 2x2 mesh; and over everybody."""
    values = [torch.full((2, 1), float(rank)) + torch.tensor([[0.0], [2.0]]) for rank in range(4)]
    for rank, means in enumerate(processes(4).run(_means, per_rank=[(x,) for x in values])):
        halves, columns, everyone = (0.5, 2.5)[rank // 2] + 1, (1.0, 2.0)[rank % 2] + 1, 2.5
        assert means == {"group": halves, "rows": halves, "columns": columns, "mesh of all": everyone, "all": everyone}


def _means(x: Tensor) -> dict[str, float]:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    over = {
        "group": groups[dist.get_rank() // 2],
        "rows": mesh["inner"],
        "columns": mesh["outer"],
        "mesh of all": init_device_mesh("cpu", (4,)),
        "all": None,
    }
    means = {}
    for name, group in over.items():
        layer = syncbn.SyncBatchNorm(1, momentum=1.0, process_group=group)
        layer(x)
        means[name] = layer.running_mean.item()
    return means


def test_processes_that_cannot_be_meant(processes: Any) -> None:
    for rank, (outside, mesh) in enumerate(processes(4).run(_not_meant)):
        assert (outside == "fine") == (rank < 2)
        assert rank < 2 or f"rank {rank}) is not a member" in outside
        assert "one-dimensional DeviceMesh, got 2 dimensions" in mesh


def _not_meant() -> tuple[str, str]:
    group = dist.new_group([0, 1])
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    return _error(lambda: syncbn.SyncBatchNorm(1, process_group=group)), _error(lambda: Exchange(mesh))


def _error(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return str(error)
    return "fine"


def test_a_group_of_one_is_alone(processes: Any) -> None:
    for world_size, calls, error in processes(2).run(_group_of_one):
        assert (world_size, calls) == (1, 0)
        assert "Expected more than 1 value per channel" in error


def _group_of_one() -> tuple[int, int, str]:
    groups = [dist.new_group([rank]) for rank in range(2)]
    layer = syncbn.SyncBatchNorm(3, process_group=groups[dist.get_rank()])
    layer(torch.randn(4, 3))
    return layer._exchange.world_size, layer._exchange.calls, _error(lambda: layer(torch.randn(1, 3)))


def test_a_device_that_the_group_cannot_reduce() -> None:
    """A CPU tensor on a group for CUDA only. (NCCL cannot be had without a GPU; gloo for CUDA only says the same.)"""
    run = launch("cuda_only.py")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("reduces tensors on cuda (cuda:gloo), but this layer's input is on cpu") == 2


# ---- copies


def test_copies_reach_the_same_processes(processes: Any) -> None:
    for means in processes(4).run(_copies):
        assert len(set(means)) == 1, means


def _copies() -> list[float]:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    layer = syncbn.SyncBatchNorm(1, momentum=1.0, process_group=groups[dist.get_rank() // 2])
    x = torch.full((2, 1), float(dist.get_rank()))
    layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    for other in others:
        other.running_mean.zero_()
        other(x)
    return [each.running_mean.item() for each in (layer, *others)]


def test_a_saved_group_that_is_not_here(processes: Any) -> None:
    (saved, *_) = processes(4).run(_save, [0, 3])
    for error, over in processes(2).run(_load_and_run, saved):
        assert "over a process group of ranks [0, 3], which does not exist here" in error
        assert "syncbn.convert(model, process_group=...)" in error
        assert over == "Exchange(ranks [0, 3])"


@pytest.mark.parametrize("ranks", [[0, 1, 2, 3], [0, 1]], ids=["all", "those that are all here"])
def test_a_model_of_all_processes_runs_in_any_number(processes: Any, ranks: list[int]) -> None:
    (saved, *_) = processes(4).run(_save, ranks)
    for error, _ in processes(2).run(_load_and_run, saved):
        assert error == "fine"
    layer = pickle.loads(saved)
    assert layer(torch.randn(4, 1)).shape == (4, 1)


def test_a_group_destroyed_by_itself_is_missed(processes: Any) -> None:
    """It must not be taken for the default group."""
    for error in processes(4).run(_destroy_the_group):
        assert "which does not exist here" in error


def _destroy_the_group() -> str:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    layer = syncbn.SyncBatchNorm(1, process_group=groups[dist.get_rank() // 2])
    x = torch.randn(4, 1)
    layer(x)
    dist.destroy_process_group(groups[dist.get_rank() // 2])
    del groups
    return _error(lambda: layer(x))


def _save(ranks: list[int]) -> bytes:
    group = dist.group.WORLD if len(ranks) == dist.get_world_size() else dist.new_group(ranks)
    return pickle.dumps(syncbn.SyncBatchNorm(1, process_group=group)) if dist.get_rank() in ranks else b""


def _load_and_run(saved: bytes) -> tuple[str, str]:
    layer = pickle.loads(saved)
    over = repr(layer._exchange)
    error = _error(lambda: layer(torch.randn(4, 1)))
    syncbn.convert(layer, process_group=dist.group.WORLD)(torch.randn(4, 1))
    return error, over


def test_the_default_group_means_all_processes_not_ddps_own_group(processes: Any) -> None:
    """Passed by name, or as a mesh of all processes: gradient buckets run on it, in an order of their own."""
    for shared in processes(2).run(_pass_the_default_group):
        assert shared == [False, False]


def _pass_the_default_group() -> list[bool]:
    groups = [dist.group.WORLD, init_device_mesh("cpu", (2,))]
    layers = [syncbn.SyncBatchNorm(3, process_group=group) for group in groups]
    for layer in layers:
        layer(torch.randn(4, 3))
    return [layer._exchange._communicator.group is dist.group.WORLD for layer in layers]


@pytest.mark.parametrize("held", ["held", "not held"])
def test_after_the_process_group_is_destroyed(tmp_path: Path, held: str) -> None:
    """The end of training: a model with a group of its own is copied, saved, evaluated, converted to another."""
    run = launch("destroyed.py", str(tmp_path), held)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Exchange(ranks [0, 1])") == 2


# ---- processes whose layers do not belong together


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        (([3, 4], [3, 5]), "differ in synchronized layer 1: rank 0 has 1(channels=4"),
        (([3, 4], [3]), "rank 1 has no such layer"),
    ],
    ids=["channels", "number of layers"],
)
def test_unlike_models_are_refused_by_name(processes: Any, widths: tuple[list[int], list[int]], expected: str) -> None:
    with pytest.raises(WorkerError) as error:
        processes(2).run(_unlike, per_rank=[(each,) for each in widths])
    assert all(expected in each for each in error.value.errors)
    assert processes(2).run(_still_works) == [True, True]


def _unlike(widths: list[int]) -> None:
    model = syncbn.convert(nn.Sequential(*[nn.BatchNorm1d(width) for width in widths]))
    model[0](torch.randn(4, 3))


def _still_works() -> bool:
    return bool(two_layers()(torch.randn(4, 3)).isfinite().all())


@pytest.mark.parametrize(
    "arguments", [({"eps": 1e-5}, {"eps": 1e-3}), ({"momentum": 0.1}, {"momentum": None})], ids=str
)
def test_unlike_options_are_refused(processes: Any, arguments: tuple[dict[str, Any], ...]) -> None:
    with pytest.raises(WorkerError, match=next(iter(arguments[0]))):
        processes(2).run(_run_with, per_rank=[(each,) for each in arguments])


def _run_with(arguments: dict[str, Any]) -> None:
    syncbn.SyncBatchNorm(3, **arguments)(torch.randn(4, 3))


def test_processes_that_meet_in_different_layers_get_nan(processes: Any) -> None:
    """Two layers of one size, called in different orders: a plain all-reduce would mix them silently."""
    for forward, statistics, backward in processes(2).run(_swapped, per_rank=[(0,), (1,)]):
        assert forward == "nan"
        assert statistics == "untouched"
        assert backward == "nan"


def _swapped(rank: int) -> tuple[str, str, str]:
    model = two_layers()
    x = torch.randn(4, 3, requires_grad=True)
    model(x)
    before = [buffer.clone() for buffer in model.buffers()]
    order = (0, 1) if rank == 0 else (1, 0)
    ys = [model[i](x) for i in order]
    untouched = all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    losses = [model[i](x).sum() for i in (0, 1)]  # forward in one order, backward in two
    x.grad = None
    for i in order:
        losses[i].backward()
    return (
        "nan" if all(y.isnan().all() for y in ys) else "plausible",
        "untouched" if untouched else "changed",
        "nan" if x.grad.isnan().all() else "plausible",
    )


def test_tags_tell_models_and_directions_apart(processes: Any) -> None:
    for tags in processes(2).run(_tags):
        assert len(set(tags)) == len(tags) == 8


def _tags() -> list[int]:
    models = [two_layers(), two_layers()]
    for model in models:
        model(torch.randn(4, 3))
    return [layer._exchange.tag(layer._index, way) for model in models for layer in model for way in (False, True)]


def test_the_tag_is_exact_for_large_numbers() -> None:
    from syncbn.moments import mean_and_variance

    for world_size, tag in ((3, 10**5 + 7), (4096, 10**5 + 7), (65536, 2**18 - 1)):
        message = torch.tensor([1.0, 1.0, 1.0, tag, tag**2], dtype=torch.float64) * world_size
        assert mean_and_variance(message, world_size)[0].isfinite().all()
        message[-2] += 1
        message[-1] += 2 * tag + 1  # one process sent tag + 1
        assert mean_and_variance(message, world_size)[0].isnan().all()


# ---- counting


def test_calls_and_bytes_are_counted(processes: Any) -> None:
    C = 3
    for calls, size in processes(2).run(_count):
        assert calls == 4
        assert size == 2 * 8 * ((2 * C + 3) + (2 * C + 2))


def _count() -> tuple[int, int]:
    model = two_layers()
    model(torch.randn(4, 3, requires_grad=True)).sum().backward()
    return model[0]._exchange.calls, model[0]._exchange.bytes
