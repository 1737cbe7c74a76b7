"""What goes wrong between processes ends every one of them, soon, and says who was where.

Each test has processes of its own: what they do to one another would leave a pool's in disorder.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from doomed import run_until_they_end
from torch import Tensor, nn

import syncbn

pytestmark = pytest.mark.timeout(90)

LIMIT = {"SYNCBN_TIMEOUT": "3"}
CHECK = LIMIT | {"SYNCBN_CHECK": "1"}
STARTED_S = 20.0  # for processes to start and to end, on a busy machine
FAILED = 1


class Net(nn.Module):
    """A trunk and two heads of equal size; which of these are used, and in which order, is up to the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.BatchNorm1d(4)
        self.boxes = nn.BatchNorm1d(4)
        self.classes = nn.BatchNorm1d(4)

    def forward(self, x: Tensor, heads: str = "boxes classes") -> list[Tensor]:
        x = self.trunk(x)
        return [getattr(self, head)(x) for head in heads.split()]


def net() -> Net:
    torch.manual_seed(0)
    return syncbn.convert(Net())


def batch(rank: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(rank), requires_grad=True)


def step(model: Net, rank: int, heads: str = "boxes classes") -> None:
    sum(y.square().sum() for y in model(batch(rank), heads)).backward()


# ---- with SYNCBN_CHECK=1 each disagreement raises on every process


def skips_a_layer(rank: int) -> None:
    step(net(), rank, "boxes classes" if rank == 0 else "boxes")


def calls_another_layer(rank: int) -> None:
    step(net(), rank, "boxes classes" if rank == 0 else "classes boxes")


def ignores_a_head(rank: int) -> None:
    boxes, classes = net()(batch(rank))
    losses = [head.square().sum() for head in (boxes, classes)]
    (losses[0] + losses[1] if rank == 0 else losses[0]).backward()


def asks_for_second_gradients_alone(rank: int) -> None:
    x = batch(rank)
    loss = sum(y.square().sum() for y in net()(x))
    torch.autograd.grad(loss, x, create_graph=rank == 1)


def makes_a_call_more(rank: int) -> None:
    model = net()
    for _ in range(1 + rank):
        model.trunk(batch(rank))
    model.boxes(batch(rank))


@pytest.mark.parametrize(
    ("function", "places"),
    [
        (skips_a_layer, ["forward of 'classes', 11", "backward of 'boxes', 10"]),
        (calls_another_layer, ["forward of 'boxes', 11", "forward of 'classes', 11"]),
        (ignores_a_head, ["backward of 'classes', 10", "backward of 'boxes', 10"]),
        (
            asks_for_second_gradients_alone,
            ["backward of 'classes', 10", "forward of 'classes' where gradients are to be differentiated again, 11"],
        ),
        (makes_a_call_more, ["forward of 'boxes', 11", "forward of 'trunk', 11"]),
    ],
)
def test_the_check_raises_on_every_process_and_says_where_each_is(function, places, tmp_path: Path) -> None:
    outcomes = run_until_they_end(function, tmp_path, within=STARTED_S, environment=CHECK)
    for outcome in outcomes:
        assert outcome.status == FAILED
        assert "DisagreementError: the processes meet in different exchanges" in outcome.errors
        for rank, place in enumerate(places):
            assert re.search(rf"  rank {rank}: exchange \d+, {re.escape(place)} numbers", outcome.errors)


@pytest.mark.parametrize(
    "function", [skips_a_layer, ignores_a_head, asks_for_second_gradients_alone, makes_a_call_more]
)
def test_without_the_check_nothing_hangs_nor_succeeds(function, tmp_path: Path) -> None:
    """Gloo aborts a process that has another size. Equal sizes of different layers give NaN, and one call is left."""
    outcomes = run_until_they_end(function, tmp_path, within=STARTED_S, environment=LIMIT)
    assert any(outcome.status in (FAILED, -signal.SIGABRT) for outcome in outcomes), outcomes
    assert all("syncbn: exchange" in outcome.errors or outcome.status != FAILED for outcome in outcomes)


def test_pytorchs_own_check_of_sizes(tmp_path: Path) -> None:
    environment = LIMIT | {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
    for outcome in run_until_they_end(skips_a_layer, tmp_path, within=STARTED_S, environment=environment):
        assert outcome.status == FAILED
        assert "Detected mismatch between collectives on ranks" in outcome.errors
        assert "  rank 0: waiting for 0 s in exchange 3 (forward of 'classes', 11 numbers)" in outcome.errors
        assert "  rank 1: waiting for 0 s in exchange 3 (backward of 'boxes', 10 numbers)" in outcome.errors


def trains(rank: int) -> None:
    model = net()
    for _ in range(3):
        step(model, rank)
    everyones = [torch.empty_like(model.trunk.running_mean) for _ in range(2)]
    dist.all_gather(everyones, model.trunk.running_mean)
    assert torch.equal(*everyones)
    dist.destroy_process_group()


@pytest.mark.parametrize("environment", [CHECK, {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}], ids=["check", "detail"])
def test_the_checks_let_equal_processes_train(environment: dict[str, str], tmp_path: Path) -> None:
    outcomes = run_until_they_end(trains, tmp_path, within=STARTED_S, environment=environment)
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
    assert [outcome.errors for outcome in outcomes] == ["", ""]


def train_in_a_group_of_some(rank: int) -> None:
    pair = dist.new_group([0, 1])
    for _ in range(2):
        if rank < 2:
            step(syncbn.convert(Net(), pair), rank)
        dist.barrier(dist.new_group())
    dist.destroy_process_group()


def test_the_check_of_a_group_leaves_later_groups_alone(tmp_path: Path) -> None:
    outcomes = run_until_they_end(train_in_a_group_of_some, tmp_path, world_size=3, within=STARTED_S, environment=CHECK)
    assert [(outcome.status, outcome.errors) for outcome in outcomes] == [(0, "")] * 3


def test_a_closed_standard_error_does_not_keep_a_process(tmp_path: Path) -> None:
    waiting, _ = run_until_they_end(never_comes_and_has_no_errors, tmp_path, within=STARTED_S, environment=LIMIT)
    assert waiting.status == FAILED


def never_comes_and_has_no_errors(rank: int) -> None:
    sys.stderr.close()
    never_comes(rank)


# ---- without it, the watchdog ends a process that waits in vain


def is_in_eval(rank: int) -> None:
    model = net()
    step(model, rank)
    model.train(rank == 0)
    step(model, rank)
    dist.barrier()  # as DistributedDataParallel would wait for gradients


def never_comes(rank: int) -> None:
    model = net()
    if rank == 0:
        model(batch(rank))
    wait_for_the_others()


def test_the_first_exchange_is_watched_as_well(tmp_path: Path) -> None:
    waiting, _ = run_until_they_end(never_comes, tmp_path, within=STARTED_S, environment=LIMIT)
    assert waiting.status == FAILED
    assert "exchange 1 of rank 0 (the first of a model, before which the processes" in waiting.errors
    assert "rank 1: no answer: ended, stopped, cut off, or not yet at a synchronized layer" in waiting.errors


def runs_out_of_data(rank: int) -> None:
    model = net()
    for _ in range(2 - rank):
        step(model, rank)
    wait_for_the_others()


def wait_for_the_others() -> None:
    dist.barrier()


@pytest.mark.parametrize("environment", [LIMIT, CHECK], ids=["", "check"])
def test_eval_on_one_process(environment: dict[str, str], tmp_path: Path) -> None:
    waiting, absent = run_until_they_end(is_in_eval, tmp_path, within=STARTED_S, environment=environment)
    assert waiting.status == absent.status == FAILED
    overdue = "exchange 7 of rank 0 (forward of 'trunk', 11 numbers) is overdue: it has taken more than 3 s\n"
    assert f"{overdue}rank 1 ends with status 1.\n" in absent.errors, "the first process of a host says all of it"
    assert f"{overdue}  rank 0: waiting for " in waiting.errors
    assert re.search(r"  rank 1: in no exchange; its last was 6 \(backward of 'trunk', 10 numbers\)", waiting.errors)
    assert f"{__file__}" in waiting.errors
    assert "in is_in_eval" in waiting.errors
    assert "3 of its 3 synchronized layers are in eval mode" in waiting.errors


def test_no_data_on_one_process(tmp_path: Path) -> None:
    waiting, absent = run_until_they_end(runs_out_of_data, tmp_path, within=STARTED_S, environment=LIMIT)
    assert waiting.status == absent.status == FAILED
    assert "exchange 7 of rank 0 (forward of 'trunk', 11 numbers) is overdue" in waiting.errors
    assert "in wait_for_the_others" in waiting.errors


def runs_out_of_data_and_ends(rank: int) -> None:
    model = net()
    for _ in range(2 - rank):
        step(model, rank)


def train_in_groups_of_two(rank: int) -> None:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = syncbn.convert(Net(), groups[rank // 2])
    step(model, rank)
    if rank >= 2:
        return
    time.sleep(4.5 * rank)
    step(model, rank)
    dist.destroy_process_group()


def test_the_end_of_another_group_ends_nobody(tmp_path: Path) -> None:
    outcomes = run_until_they_end(train_in_groups_of_two, tmp_path, world_size=4, within=STARTED_S)
    assert [(outcome.status, outcome.errors) for outcome in outcomes[:2]] == [(0, ""), (0, "")]


def test_a_process_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    limit = {"SYNCBN_TIMEOUT": "50"}
    waiting, ended = run_until_they_end(runs_out_of_data_and_ends, tmp_path, within=STARTED_S, environment=limit)
    assert ended.status == 0
    assert waiting.status == FAILED
    assert "exchange 7 of rank 0 (forward of 'trunk', 11 numbers) failed since rank 1 has ended: " in waiting.errors


def raises(rank: int) -> None:
    model = net()
    step(model, rank)
    if rank == 1:
        threading.Thread(target=time.sleep, args=(9,)).start()  # its connections live on with it
        raise ValueError("image 17 is broken")
    step(model, rank)


def test_a_process_that_raises_takes_the_others_down(tmp_path: Path) -> None:
    limit = {"SYNCBN_TIMEOUT": "50"}
    waiting, raising = run_until_they_end(raises, tmp_path, within=STARTED_S, environment=limit)
    assert raising.status == waiting.status == FAILED
    assert "ValueError: image 17 is broken" in raising.errors
    assert "waits for a process that will not come: rank 1 has raised ValueError: image 17 is broken" in waiting.errors
    assert waiting.seconds < raising.seconds - 2, "before it could notice a closed connection"


def dies(rank: int) -> None:
    model = net()
    step(model, rank)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    step(model, rank)


@pytest.mark.parametrize("check", ["0", "1"])
def test_a_process_that_is_killed(check: str, tmp_path: Path) -> None:
    environment = {"SYNCBN_TIMEOUT": "50", "SYNCBN_CHECK": check}
    waiting, killed = run_until_they_end(dies, tmp_path, within=STARTED_S, environment=environment)
    assert killed.status == -signal.SIGKILL
    assert waiting.status == FAILED
    assert "exchange 7 of rank 0 (forward of 'trunk', 11 numbers) failed" in waiting.errors
    assert "rank 1: no answer: ended, stopped, cut off, or not yet at" in waiting.errors


def stops(rank: int) -> None:
    model = net()
    step(model, rank)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    step(model, rank)


def test_a_process_that_is_stopped_is_named(tmp_path: Path) -> None:
    waiting, _ = run_until_they_end(stops, tmp_path, within=STARTED_S, environment=LIMIT, but=1)
    assert waiting.status == FAILED
    assert "rank 1: no answer: ended, stopped, cut off, or not yet at" in waiting.errors


def is_slow(rank: int) -> None:
    model = net()
    for _ in range(2):
        time.sleep(2.4 * rank)  # quiet for long enough to be asked about, not for as long as to be overdue
        step(model, rank)
    dist.destroy_process_group()


@pytest.mark.parametrize("environment", [LIMIT, CHECK], ids=["", "check"])
def test_a_slow_process_is_waited_for(environment: dict[str, str], tmp_path: Path) -> None:
    outcomes = run_until_they_end(is_slow, tmp_path, within=STARTED_S, environment=environment)
    assert [(outcome.status, outcome.errors) for outcome in outcomes] == [(0, ""), (0, "")]
