"""``even_batches``: what its batches, its numbers and its weights are, and what happens when something goes wrong."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import re
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from documentation import blocks
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.plugins.environments import LightningEnvironment
from processes import Processes, WorkerError, join_gloo
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import syncbn
from syncbn.lightning import EvenBatchesCallback, SyncBatchNormPlugin
from syncbn.lightning.plugin import guards
from syncbn.samples import count, layout_of, pack, take, unpack

# ---- where a batch has its samples

Pair = namedtuple("Pair", "image label")


@dataclass(frozen=True)
class Data:
    image: Tensor
    names: list[str]
    scale: float = 1.0


x, y = torch.arange(24.0).reshape(4, 2, 3), torch.arange(4)
image, boxes = torch.ones(3, 8, 8), {"boxes": torch.ones(3, 4), "labels": torch.ones(3)}

STACKED = {
    "tensor": x,
    "tuple": (x, y),
    "tuple of one kind": (x, x),
    "list with a list": [x, [y, y]],
    "dict": {"x": x, "y": {"y": y}, "scale": 2.0, "size": (7, 7), "step": torch.tensor(3)},
    "namedtuple": Pair(x, y),
    "dataclass": Data(x, ["a", "b", "c", "d"]),
    "names and numbers": (x, ["a", "b", "c", "d"], [1, 2, 3, 4]),
    "array": (x.numpy(), y.numpy()),
}
LISTED = {
    "images and targets": ((image, image[:, :5]), (boxes, boxes)),
    "one image with three boxes": ((image,), (boxes,)),
    "images and numbers": ([image, image], [1, 2]),
    "dict of lists": {"images": [image, image], "targets": [boxes, boxes], "id": 7},
    "detectron2's": [{"image": image, "height": 8}, {"image": image, "height": 8}],
    "pairs": [(image, boxes), (image, boxes)],
}


def no_loader() -> None:
    """Nothing that says how its batches are made."""


@pytest.mark.parametrize("batch", STACKED.values(), ids=STACKED)
def test_stacked_batches(batch: Any) -> None:
    assert layout_of(no_loader, batch) == "stacked"
    assert count(batch, "stacked") == 4
    for samples in (0, 1):
        fewer = take(batch, "stacked", samples)
        assert type(fewer) is type(batch)
        assert count(fewer, "stacked") == samples or samples == 0
        assert count(batch, "stacked") == 4, "the batch itself stays"
    assert take(x, "stacked", 0).shape == (0, 2, 3)
    assert take(x, "stacked", 1).untyped_storage().nbytes() == 6 * 4, "the batch's memory is not kept"


@pytest.mark.parametrize("batch", LISTED.values(), ids=LISTED)
def test_listed_batches(batch: Any) -> None:
    samples = 1 if batch is LISTED["one image with three boxes"] else 2
    assert layout_of(no_loader, batch) == "listed"
    assert count(batch, "listed") == samples
    assert count(take(batch, "listed", 0), "listed") == 0
    assert count(take(batch, "listed", 1), "listed") == 1


def test_the_rest_of_a_batch_stays() -> None:
    empty = take(STACKED["dict"], "stacked", 0)
    assert (empty["scale"], empty["size"], empty["step"]) == (2.0, (7, 7), 3)
    assert take(STACKED["dataclass"], "stacked", 0).names == []
    assert take(LISTED["dict of lists"], "listed", 0) == {"images": [], "targets": [], "id": 7}


def test_the_default_collation_is_always_stacked() -> None:
    dataset = [((image, image), boxes)] * 3
    loader = DataLoader(dataset, 3)
    batch = next(iter(loader))
    assert layout_of(loader, batch) == "stacked"
    assert count(batch, "stacked") == 3


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        ([image, image], "2 arrays of one kind"),
        ([image, torch.ones(1, 8, 8)], "2 arrays of one kind"),
        ([[image, image], [image, image]], "a list of samples or a list for each part"),
        ((x, y[:3]), r"its parts have \[3, 4\]"),
        ((x, x[:3]), r"its parts have \[3, 4\]"),
        (3, "nothing in it tells"),
        ({"scale": 1.0}, "nothing in it tells"),
    ],
)
def test_a_batch_in_doubt_is_refused(batch: Any, why: str) -> None:
    with pytest.raises(ValueError, match=f"{why}.*layout='listed'.*size="):
        layout_of(no_loader, batch)


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(TypeError, match=r"holds a Conv2d.*empty="):
        take((x, nn.Conv2d(1, 1, 1)), "stacked", 0)


def test_a_batch_can_be_sent() -> None:
    sent = unpack(pickle.loads(pickle.dumps(pack(STACKED["dict"]))))
    torch.testing.assert_close(sent, STACKED["dict"])


# ---- one process


def test_one_process_gets_the_loaders_batches() -> None:
    loader = [1, 2, 3]
    batches = syncbn.even_batches(loader)
    assert list(batches) == list(batches) == loader
    assert len(batches) == 3
    for _ in batches:
        with pytest.raises(ValueError, match="cannot tell how many samples"):
            _ = batches.count


def test_one_process_learns_from_its_batch() -> None:
    batches = syncbn.even_batches(DataLoader(TensorDataset(x), 3))
    for (batch,) in batches:
        assert (batches.count, batches.total, batches.weight) == (len(batch), len(batch), 1.0)
        assert batches.weigh(batch.mean()) == batch.mean()
        assert batches.weigh(batch.sum(), reduction="sum") == batch.sum() / len(batch)
        assert batches.weigh(batch.sum(), batch.numel(), "sum") == batch.mean()


def test_a_mean_over_nothing_is_a_connected_zero_and_a_nan_of_something_stays() -> None:
    weight = torch.ones(3, requires_grad=True)
    batches = syncbn.even_batches([torch.ones(0, 3), torch.full((2, 3), math.nan)])
    empty, bad = batches, iter(batches)
    loss = (next(bad) * weight).mean()
    assert loss.isnan()
    for counted in (None, 0, torch.zeros(())):
        weight.grad = None
        zero = empty.weigh(loss, counted)
        zero.backward(retain_graph=True)
        assert zero == 0
        assert torch.equal(weight.grad, torch.zeros(3))
    assert batches.weight == 0
    assert batches.weigh((next(bad) * weight).mean()).isnan()
    assert batches.weigh(torch.tensor(math.nan), torch.ones(1)).isnan()
    assert batches.weigh(torch.tensor([math.nan], dtype=torch.float16), 0).dtype == torch.float16


def test_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match="every epoch"):
        syncbn.even_batches(batch for batch in [x])
    with pytest.raises(TypeError, match="every epoch, such as a DataLoader, got a int"):
        syncbn.even_batches(3)
    with pytest.raises(ValueError, match="'dummy' or a function"):
        syncbn.even_batches([x], empty="nothing")
    with pytest.raises(ValueError, match="stacked, listed"):
        syncbn.even_batches([x], layout="sparse")
    batches = syncbn.even_batches([x])
    with pytest.raises(RuntimeError, match="no batch of even_batches is being trained"):
        batches.weigh(torch.ones(()))
    next(iter(batches))
    with pytest.raises(TypeError, match=r"sum of several losses\), got dict"):
        batches.weigh({"loss": torch.ones(())})
    with pytest.raises(TypeError, match="int64"):
        batches.weigh(torch.ones((), dtype=torch.int64))
    with pytest.raises(ValueError, match=r"one element, its mean or sum over the batch, got \[2\]"):
        batches.weigh(torch.ones(2))
    with pytest.raises(ValueError, match="mean, sum, got 'none'"):
        batches.weigh(torch.ones(()), reduction="none")
    with pytest.raises(ValueError, match=r"tensor of one element, got \[2\]"):
        batches.weigh(torch.ones(()), torch.ones(2))
    bad = syncbn.even_batches([x], size=lambda batch: -1)
    for _ in bad:
        with pytest.raises(ValueError, match="at least 0, got -1"):
            _ = bad.count


def test_numbers_of_batches_that_were_fetched_ahead_are_not_mixed_up() -> None:
    """Without whoever says when a step begins, they are those of the batch fetched last, and of none at the end."""
    batches = syncbn.even_batches([x, x[:1]])
    ahead = iter(batches)
    next(ahead)
    next(ahead)
    assert batches.count == 1
    assert next(ahead, None) is None
    with pytest.raises(RuntimeError, match="EvenBatchesCallback"):
        batches.weigh(torch.ones(()))

    batches.steps.defer()
    ahead = iter(batches)
    counts = []
    next(ahead)
    for _ in range(2):
        next(ahead, None)
        batches.steps.begin_next()
        counts.append(batches.count)
        batches.steps.end()
    assert counts == [4, 1]


def test_the_sampler_is_told_the_epoch() -> None:
    sampler = UnrepeatedDistributedSampler(range(8), 2, 0)
    batches = syncbn.even_batches(DataLoader(range(8), 2, sampler=sampler))
    batches.set_epoch(3)
    assert sampler.epoch == 3
    assert batches.sampler is sampler is batches.batch_sampler.sampler
    assert batches.batch_size == 2
    assert syncbn.even_batches([x]).sampler is None


# ---- several processes


def shapes(loader: Any, **options: Any) -> list[Any]:
    """What is handed out, as numbers of samples in the batch, the numbers beside it, and the length."""
    batches = syncbn.even_batches(loader, **options)
    numbers = [(len(batch), batches.count, batches.total, round(batches.weight, 6)) for batch in batches]
    return [len(batches), *numbers]


def test_steps_and_numbers_are_agreed_upon(processes: Any) -> None:
    first, second = processes(2).run(shapes, per_rank=[([x, x, x[:1]],), ([x[:2]],)])
    assert first == [3, (4, 4, 6, round(8 / 6, 6)), (4, 4, 4, 2.0), (1, 1, 1, 2.0)]
    assert second == [3, (2, 2, 6, round(4 / 6, 6)), (0, 0, 4, 0.0), (0, 0, 1, 0.0)]


def test_nobody_has_anything(processes: Any) -> None:
    assert processes(2).run(shapes, []) == [[0], [0]]


def _standing_in(batches: Any, empty: Any) -> list[Any]:
    batches = syncbn.even_batches(batches, empty=empty)
    return [batch for _ in range(2) for batch in batches]


def test_a_process_without_any_batch_learns_their_structure(processes: Any) -> None:
    batch = {"x": x, "names": ["a", "b", "c", "d"], "scale": 2.0}
    _, ours = processes(2).run(_standing_in, None, per_rank=[([batch],), ([],)])
    for each in ours:
        assert each["x"].shape == (0, 2, 3)
        assert (each["names"], each["scale"]) == ([], 2.0)
    _, ours = processes(2).run(_standing_in, "dummy", per_rank=[([batch],), ([],)])
    for each in ours:
        assert torch.equal(each["x"], x[:1])
        assert each["names"] == ["a"]


def test_a_dummy_is_the_processs_own_last_sample_also_for_an_empty_batch(processes: Any) -> None:
    _, ours = processes(2).run(_standing_in, "dummy", per_rank=[([x, x, x],), ([x[2:], x[:0]],)])
    assert [len(each) for each in ours] == [2, 1, 1] * 2
    assert torch.equal(ours[1], x[2:3])
    assert torch.equal(ours[2], x[2:3])


def _changed_in_place() -> list[float]:
    rank = dist.get_rank()
    batches = syncbn.even_batches([torch.ones(2, 3)] * (1 if rank else 3), empty="dummy")
    return [float(batch.mul_(2).mean()) for batch in batches]


def test_a_stand_in_is_made_anew_for_each_step(processes: Any) -> None:
    assert processes(2).run(_changed_in_place)[1] == [2.0, 2.0, 2.0]


def _by_functions() -> list[tuple[int, int]]:
    batches = syncbn.even_batches(
        [[image] * 2] * (2 - dist.get_rank()), size=lambda batch: 10 * len(batch), empty=lambda batch: batch[:1]
    )
    return [(len(batch), batches.count) for batch in batches]


def test_functions_can_read_and_make_batches(processes: Any) -> None:
    assert processes(2).run(_by_functions) == [[(2, 20), (2, 20)], [(2, 20), (1, 0)]]


def _lengths() -> Any:
    rank = dist.get_rank()
    known = syncbn.even_batches([x] * rank)
    first = len(known) if rank == 0 else None  # one process may ask alone
    known.loader.append(x)
    for _ in known:
        pass
    unknown = syncbn.even_batches([x] if rank else _Unknown())
    with pytest.raises(TypeError, match="no length"):
        len(unknown)
    later = pickle.loads(pickle.dumps(copy.deepcopy(known)))
    return first, len(known), len(later), sum(1 for _ in unknown)


class _Unknown:
    def __iter__(self) -> Iterator[Tensor]:
        yield from (x, x)


def test_lengths(processes: Any) -> None:
    assert processes(2).run(_lengths) == [(1, 2, 2, 2), (None, 2, 2, 2)]


def _samples_seen() -> list[int]:
    dataset = range(7)
    sampler = UnrepeatedDistributedSampler(dataset)
    batches = syncbn.even_batches(DataLoader(dataset, 2, sampler=sampler))
    seen = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        seen += [int(each) for batch in batches for each in batch]
    return seen


def test_every_sample_is_seen_once(processes: Any) -> None:
    """With a sampler that repeats none, which torch's DistributedSampler does."""
    seen = processes(2).run(_samples_seen)
    assert sorted(seen[0] + seen[1]) == sorted(2 * list(range(7)))


def _in_groups() -> list[Any]:
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    device_only = [dist.new_group(ranks, backend="cuda:gloo") for ranks in ([0, 1], [2, 3])]
    loader = [x] * (rank + 1)
    return [shapes(loader, process_group=groups[rank // 2]) for groups in (pairs, device_only)]


def test_groups_of_processes_and_groups_that_take_no_cpu_tensors(processes: Any) -> None:
    for rank, both in enumerate(processes(4).run(_in_groups)):
        for length, *steps in both:
            assert length == len(steps) == 2 * (rank // 2 + 1)
            assert [own for _, own, _, _ in steps] == [4] * (rank + 1) + [0] * (rank % 2 == 0)


def _once_more(store: str) -> list[Any]:
    before = shapes([x] * (1 + dist.get_rank()))
    rank = dist.get_rank()
    batches = syncbn.even_batches([x] * (1 + rank))
    dist.destroy_process_group()
    alone = [batches.total for _ in batches]
    join_gloo(rank, 2, store)
    return [before, alone, [batches.total for _ in batches]]


def test_torch_distributed_may_be_set_up_anew() -> None:
    with tempfile.TemporaryDirectory() as folder:
        own = Processes(2)
        try:
            results = own.run(_once_more, str(Path(folder) / "second"))
        finally:
            own.stop()
    for rank, (before, alone, after) in enumerate(results):
        assert before[0] == 2
        assert alone == [4] * (1 + rank)
        assert after == [8, 4]


def _one_loop_inside_of_another() -> list[int]:
    rank = dist.get_rank()
    outer, inner = syncbn.even_batches([x] * (1 + rank)), syncbn.even_batches([x[:1]] * (2 - rank))
    totals = []
    for _ in outer:
        totals += [batches.total for batches in (outer, inner) for _ in (inner if batches is inner else [None])]
    totals += [inner.total for pair in zip(outer, inner, strict=False)]
    return totals


def test_loops_may_be_nested_and_interleaved(processes: Any) -> None:
    assert processes(2).run(_one_loop_inside_of_another) == [[8, 2, 1, 4, 2, 1, 2, 1]] * 2


# ---- the loss


def _gradient(parts: list[tuple[Tensor, Tensor]], weigh: str) -> Tensor:
    """DistributedDataParallel's of a pixelwise loss in which some pixels are ignored."""
    model = DistributedDataParallel(syncbn.convert(segmenter()))
    batches = syncbn.even_batches(parts)
    for images, labels in batches:
        valid = (labels != 255).sum()
        logits = model(images)
        if weigh == "mean":
            loss = batches.weigh(cross_entropy(logits, labels, ignore_index=255), valid)
        elif weigh == "sum":
            loss = batches.weigh(cross_entropy(logits, labels, ignore_index=255, reduction="sum"), valid, "sum")
        else:
            loss = batches.weigh(logits.square().mean((1, 2, 3)).sum(), reduction="sum")
        loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def segmenter() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1)).double()


def labelled(samples: int, ignored: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (samples, 5, 5), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = 255
    return torch.randn(samples, 2, 5, 5, generator=generator, dtype=torch.float64) + seed, labels


@pytest.mark.parametrize("weigh", ["mean", "sum", "sum over samples"])
@pytest.mark.parametrize("ignored", [0.5, 1.0], ids=["some ignored", "all ignored on one process"])
def test_the_gradient_is_that_of_the_unions_mean(processes: Any, weigh: str, ignored: float) -> None:
    """Three processes: 3 samples, 1 sample with few or no valid pixels, none."""
    batches = [[labelled(3, 0.3, 0)], [labelled(1, ignored, 1)], []]
    results = processes(3).run(_gradient, weigh, per_rank=[(each,) for each in batches])
    model = segmenter()
    images, labels = (torch.cat([batch[0][part] for batch in batches if batch]) for part in range(2))
    logits = model(images)
    (logits.square().mean() if "samples" in weigh else cross_entropy(logits, labels, ignore_index=255)).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    for gradient in results:
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def _accumulated(parts: list[Tensor]) -> Tensor:
    """The documented lines: the gradient of the mean over all samples of several steps."""
    model = DistributedDataParallel(syncbn.convert(classifier()))
    batches = syncbn.even_batches(parts)
    seen = 0
    for step, images in enumerate(batches):
        with model.no_sync() if step + 1 < len(batches) else contextlib.nullcontext():
            (batches.weigh(model(images).square().mean()) * batches.total).backward()
        seen += batches.total
    return torch.cat([parameter.grad.flatten() / seen for parameter in model.parameters()])


def classifier() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).double()


def test_accumulated_gradients(processes: Any) -> None:
    torch.manual_seed(5)
    parts = [
        [torch.randn(n, 2, dtype=torch.float64) + rank for n in sizes] for rank, sizes in enumerate(((3, 2), (4,)))
    ]
    results = processes(2).run(_accumulated, per_rank=[(each,) for each in parts])
    model = classifier()
    loss = sum(model(torch.cat(step)).square().sum() for step in ((parts[0][0], parts[1][0]), (parts[0][1],)))
    (loss / 9).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    for gradient in results:
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


# ---- the dummy in the statistics


def _dummy_inside_of_a_users_region() -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    layer = syncbn.SyncBatchNorm(2, momentum=1.0).double()
    batches = syncbn.even_batches([torch.full((2, 2, 3), 5.0 - 2 * rank).double()] * (2 - rank), empty="dummy")
    for batch in batches:
        mask = torch.ones(len(batch), 1, 3, dtype=torch.bool)
        with syncbn.region.valid_region(mask):
            layer(batch)
            layer(batch, mask=mask)
    return layer.running_mean.clone(), layer(torch.ones(2, 2, 3).double()).mean()


def test_a_dummy_counts_nowhere_whatever_masks_there_are(processes: Any) -> None:
    """The second step is rank 0's alone. After the loop everything counts again."""
    for mean, after in processes(2).run(_dummy_inside_of_a_users_region):
        torch.testing.assert_close(mean, torch.full((2,), 5.0).double())
        assert abs(after) < 1e-6


def _left_early(how: str) -> tuple[Tensor, Tensor, list[int]]:
    rank = dist.get_rank()
    layer = syncbn.SyncBatchNorm(2, momentum=1.0).double()
    batches = syncbn.even_batches([torch.ones(4, 2).double()] * (3 - 2 * rank), empty="dummy")
    try:
        for step, batch in enumerate(batches):
            layer(batch)
            if step == 1 and how == "break":
                break
            if step == 1:
                raise ArithmeticError
    except ArithmeticError:
        pass
    during = layer.running_mean.clone()
    layer(torch.full((4, 2), float(rank)).double())
    return during, layer.running_mean, [batches.total for _ in batches]


@pytest.mark.parametrize("how", ["break", "raise"])
def test_a_loop_may_be_left_by_all(processes: Any, how: str) -> None:
    for during, after, totals in processes(2).run(_left_early, how):
        torch.testing.assert_close(during, torch.ones(2).double())
        torch.testing.assert_close(after, torch.full((2,), 0.5).double()), "the dummy's process counts again"
        assert totals == [8, 4, 4]


# ---- what goes wrong


class Failing:
    """So many good batches, then the error, if there is one."""

    def __init__(self, good: int, error: Exception | None = None) -> None:
        self.good, self.error = good, error

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.good):
            yield x
        if self.error is not None:
            raise self.error


def _failing(good: int, all_fail: bool = False) -> tuple[int, str, int]:
    rank = dist.get_rank()
    loader = Failing(good, OSError("disk is gone")) if rank or all_fail else Failing(3)
    batches = syncbn.even_batches(loader)
    steps, kind = 0, ""
    try:
        for _ in batches:
            dist.all_reduce(torch.ones(()))  # as a model would: nobody may be left alone in a step
            steps += 1
    except Exception as error:
        kind = f"{type(error).__name__}: {error}"
    loader.good, loader.error = 1, None
    return steps, kind, sum(1 for _ in batches)


@pytest.mark.parametrize("good", [0, 2, 5])
def test_a_loader_that_raises_stops_all_processes_in_the_same_step(processes: Any, good: int) -> None:
    first, second = processes(2).run(_failing, good)
    assert first[0] == second[0] == good
    assert second[1] == "OSError: disk is gone"
    assert first[1].startswith("RuntimeError: even_batches stops on every process")
    assert "rank 1: OSError: disk is gone" in first[1]
    assert first[2] == second[2] == 1, "the next loop starts afresh"


def test_loaders_that_raise_everywhere_raise_their_own(processes: Any) -> None:
    assert processes(2).run(_failing, 1, True) == [(1, "OSError: disk is gone", 1)] * 2


def _run(loader: Any, **options: Any) -> None:
    for _ in syncbn.even_batches(loader, **options):
        dist.all_reduce(torch.ones(()))


def test_a_batch_that_cannot_be_read_stops_all(processes: Any) -> None:
    with pytest.raises(WorkerError) as error:
        processes(2).run(_run, per_rank=[([x, x],), ([x, (x, y[:2])],)])
    first, second = error.value.errors
    assert "on rank 1: ValueError: cannot tell how many samples a tuple has" in first
    assert "ValueError: cannot tell" in second


class Opaque:
    def __len__(self) -> int:
        return 2


def _opaque(number: int) -> None:
    _run([Opaque()] * number, size=len, layout="listed")


@pytest.mark.parametrize("numbers", [(2, 1), (1, 0)], ids=["its own end", "for another process"])
def test_a_stand_in_that_cannot_be_made_stops_all(processes: Any, numbers: tuple[int, int]) -> None:
    with pytest.raises(WorkerError) as error:
        processes(2).run(_opaque, per_rank=[(number,) for number in numbers])
    fails = 1 if numbers[1] else 0
    assert "TypeError: cannot make a batch with 0 samples of one that holds a Opaque" in error.value.errors[fails]
    assert f"rank {fails}: TypeError: cannot make" in error.value.errors[1 - fails]


def _without_a_sample() -> None:
    _run([x[:0]] * (1 - dist.get_rank()), empty="dummy")


def test_no_sample_to_make_a_dummy_of(processes: Any) -> None:
    with pytest.raises(WorkerError) as error:
        processes(2).run(_without_a_sample)
    assert all("no process has had a sample yet" in each for each in error.value.errors)


def _left_by_one() -> None:
    batches = syncbn.even_batches([x] * 4)
    for step, _ in enumerate(batches):
        if step == dist.get_rank() + 1:
            break
    for _ in batches:
        pass


def _other_loops() -> None:
    one, other = syncbn.even_batches([x]), syncbn.even_batches([x])
    for _ in other if dist.get_rank() else one:
        pass


def test_processes_that_lose_step_are_told(processes: Any) -> None:
    with pytest.raises(WorkerError) as error:
        processes(2).run(_left_by_one)
    for each in error.value.errors:
        assert "rank 0 is at step 0 of loop 2" in each
        assert "rank 1 is at step 3 of loop 1" in each
    with pytest.raises(WorkerError) as error:
        processes(2).run(_other_loops)
    for each in error.value.errors:
        assert re.search(r"rank 0 is at step 0 of loop 1 over even_batches number (\d+), rank 1 .* number (\d+)", each)


# ---- the documentation


def images_and_labels(number: int) -> TensorDataset:
    return TensorDataset(torch.randn(number, 3, 8, 8) + 1, torch.arange(number) % 4)


def image_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))


class Detector(nn.Module):
    """Refuses an empty list, as torchvision's do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = image_network()

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        logits = self.net(torch.stack(list(images)))
        return {"class": cross_entropy(logits, torch.stack([target["label"] for target in targets]))}


def _run_page(code: list[str], folder: str) -> list[int]:
    rank = dist.get_rank()
    model = DistributedDataParallel(syncbn.convert(image_network()))
    scenes = [(image, {"label": label}) for image, label in images_and_labels(2 + 2 * rank)]
    names: dict[str, Any] = {
        "contextlib": contextlib,
        "loader": DataLoader(images_and_labels(3 + 4 * rank), 2),
        "loader_of_scenes": DataLoader(scenes, 2, collate_fn=lambda batch: tuple(zip(*batch, strict=True))),
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "detector": DistributedDataParallel(syncbn.convert(Detector())),
        "dataset": images_and_labels(7),
        "network": image_network,
        "rank": rank,
        "world_size": 2,
    }
    for block in code:
        exec(block, names)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        plugins=[SyncBatchNormPlugin(), LightningEnvironment()],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(names["Model"](), names["Data"]())
    return [sum(len(labels) for _, labels in names["loader"]), trainer.global_step, names["seen"]]


def test_the_documented_code_runs(processes: Any, tmp_path: Any) -> None:
    code = blocks("docs/uneven-data.md")
    assert processes(2).run(_run_page, code, str(tmp_path)) == [[4, 2, 10], [3, 2, 10]], "the parts of 7 samples"


def test_every_trainer_has_the_callback() -> None:
    assert any(isinstance(callback, EvenBatchesCallback) for callback in guards())


def _one_group_runs_out(count: int) -> list[bool]:
    """Layers of this process alone, which soon has only a dummy, of which nothing counts."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 16, 1))
    model = DistributedDataParallel(syncbn.convert(model, group_size=1))
    batches = syncbn.even_batches([torch.randn(2, 1, 6, 6)] * count, empty="dummy")
    finite = []
    for x in batches:
        model.zero_grad()
        batches.weigh(model(x).square().mean()).backward()
        finite.append(all(bool(p.grad.isfinite().all()) for p in model.parameters()))
    return finite


def test_a_group_of_layers_that_is_wholly_out_of_data(processes: Any) -> None:
    assert processes(2).run(_one_group_runs_out, per_rank=[(3,), (1,)]) == [[True] * 3] * 2
