"""All-reduces of the sizes that training has: whether sums are right, how long they take, and who comes late.

A collective takes as long on every process as on the slowest, so that its duration names nobody. What names one is when
it comes: in each round all processes do the same small piece of work and then meet. Who has worked longest has come
last, and the others have waited for it. That needs no common clock, and a stopped process counts as one that works.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..exchange import Exchange
from .checks import FAILED, OK, WARNING, Check

Facts = dict[str, Any]
CHANNELS = (64, 128, 256, 512, 1024, 2048)
BUCKET_BYTES = 25 << 20  # DistributedDataParallel's default
_WARM_UP, _MOST_ROUNDS, _ROUNDS_OF_BUCKET = 3, 100, 5
_SECONDS_PER_SIZE = 0.5
_LATE_ROUNDS = 60
_LATE_NOTED, _LATE_WRONG = 0.25, 0.5  # of the time, spent waiting for one process, more than for any other
_SLOW_MS = 20.0


def communicators(device: torch.device) -> dict[str, Any]:
    """The group that DistributedDataParallel uses, and the one that layers use."""
    exchange = Exchange()
    exchange.connect(device)
    return {"default": dist.group.WORLD, "dedicated": exchange.connected(device).group}


def measure(device: torch.device) -> Facts:
    """Sums and times of every size on both communicators, as this process sees them."""
    rows, wrong = [], []
    for name, group in communicators(device).items():
        for size, message in _messages(device):
            right = _is_right(message, group)
            if not right:
                wrong.append(f"{size} on the {name} communicator")
            times = _times(message, group, device)
            rows.append(
                {
                    "communicator": name,
                    "message": size,
                    "bytes": message.nbytes,
                    "median_ms": statistics.median(times),
                    "p99_ms": sorted(times)[min(len(times) - 1, int(0.99 * len(times)))],
                }
            )
    return {"rows": rows, "wrong": wrong}


def _messages(device: torch.device) -> list[tuple[str, Tensor]]:
    sizes = [(f"C={C}", torch.empty(2 * C + 3, dtype=torch.float64, device=device)) for C in CHANNELS]
    return [*sizes, ("25 MB", torch.empty(BUCKET_BYTES // 4, device=device))]


def _is_right(message: Tensor, group: Any) -> bool:
    """Whether whole numbers, of which every sum is exact, are summed exactly."""
    pattern = (torch.arange(message.numel(), device=message.device) % 1021).to(message.dtype)
    message.copy_(pattern * (dist.get_rank() + 1))
    dist.all_reduce(message, group=group)
    world_size = dist.get_world_size()
    return torch.equal(message, pattern * (world_size * (world_size + 1) // 2))


def _times(message: Tensor, group: Any, device: torch.device) -> list[float]:
    """Milliseconds of each call, until its result is there."""
    message.zero_()
    warm = [_timed(lambda: dist.all_reduce(message, group=group), device) for _ in range(_WARM_UP)]
    rounds = torch.tensor([_SECONDS_PER_SIZE * 1e3 / max(min(warm), 1e-3)], device=device)
    dist.all_reduce(rounds, dist.ReduceOp.MIN)  # the same number of calls everywhere
    most = _ROUNDS_OF_BUCKET if message.nbytes >= BUCKET_BYTES else _MOST_ROUNDS
    count = max(_ROUNDS_OF_BUCKET, min(most, int(rounds.item())))
    return [_timed(lambda: dist.all_reduce(message, group=group), device) for _ in range(count)]


def _timed(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    _wait_for(device)
    return 1e3 * (time.perf_counter() - start)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def judge_sums(said: list[Facts]) -> Check:
    wrong = [f"rank {rank}: {', '.join(each['wrong'])}" for rank, each in enumerate(said) if each["wrong"]]
    if wrong:
        return Check(
            "sums", FAILED, f"an all-reduce of whole numbers is wrong: {'; '.join(wrong)}", [e["wrong"] for e in said]
        )
    return Check("sums", OK, f"exact in all {len(said[0]['rows'])} sizes and communicators", [e["wrong"] for e in said])


def judge_times(said: list[Facts]) -> Check:
    """What the slowest process has seen of each size."""
    world_size = len(said)
    worst = [max(rows, key=lambda row: row["median_ms"]) for rows in zip(*(each["rows"] for each in said), strict=True)]
    lines = [
        f"{'':17}{'default communicator':^30}  {'dedicated':^30}",
        f"{'message':9}{'bytes':>8}{'median ms':>11}{'p99 ms':>10}{'GB/s':>9}"
        f"{'median ms':>13}{'p99 ms':>10}{'GB/s':>9}",
    ]
    half = len(worst) // 2
    for a, b in zip(worst[:half], worst[half:], strict=True):
        cells = f"{a['median_ms']:11.3f}{a['p99_ms']:10.3f}{_gigabytes(a, world_size):9.3f}"
        cells += f"{b['median_ms']:13.3f}{b['p99_ms']:10.3f}{_gigabytes(b, world_size):9.3f}"
        lines.append(f"{a['message']:9}{a['bytes']:8}{cells}")
    middle = next(row for row in worst[half:] if row["message"] == "C=256")
    bucket = worst[half - 1]
    summary = (
        f"a layer's message takes {middle['median_ms']:.2f} ms (C=256, dedicated), a 25 MB bucket "
        f"{bucket['median_ms']:.0f} ms ({_gigabytes(bucket, world_size):.2f} GB/s)"
    )
    slow = world_size > 1 and middle["median_ms"] > _SLOW_MS
    return Check("all-reduce", WARNING if slow else OK, summary, [each["rows"] for each in said], lines)


def _gigabytes(row: Facts, world_size: int) -> float:
    """Per second and process: an all-reduce moves 2(P-1)/P times the message."""
    return 2 * (world_size - 1) / world_size * row["bytes"] / 1e6 / max(row["median_ms"], 1e-6)


# ---- who comes late


def arrivals(device: torch.device) -> Facts:
    """Seconds of work before each meeting, and how long all has taken."""
    side = 2048 if device.type == "cuda" else 192
    work = torch.randn(side, side, device=device)
    message = torch.zeros(515, dtype=torch.float64, device=device)
    dist.all_reduce(message)
    _wait_for(device)
    begin = since = time.perf_counter()
    worked = []
    for _ in range(_LATE_ROUNDS):
        for _ in range(4):
            work @ work
        _wait_for(device)
        worked.append(time.perf_counter() - since)
        dist.all_reduce(message)
        _wait_for(device)
        since = time.perf_counter()
    return {"worked_s": worked, "seconds": since - begin}


def judge_arrivals(said: list[Facts]) -> Check:
    world_size = len(said)
    if world_size == 1:
        return Check("slowest rank", OK, "one process", [0.0])
    waited = [0.0] * world_size  # seconds, for each
    last = [0] * world_size
    for of_round in zip(*(each["worked_s"] for each in said), strict=True):
        late = max(range(world_size), key=of_round.__getitem__)
        waited[late] += of_round[late] - statistics.median_low(sorted(of_round)[: world_size - 1])
        last[late] += 1
    seconds = max(each["seconds"] for each in said)
    shares = [each / seconds for each in waited]
    slowest, next_one = sorted(range(world_size), key=shares.__getitem__, reverse=True)[:2]
    more = shares[slowest] - shares[next_one]
    verdict = FAILED if more > _LATE_WRONG else WARNING if more > _LATE_NOTED else OK
    own = statistics.mean(said[slowest]["worked_s"])
    others = statistics.mean(statistics.mean(e["worked_s"]) for rank, e in enumerate(said) if rank != slowest)
    summary = (
        f"rank {slowest}: the others wait for it {100 * shares[slowest]:.0f}% of the time (last in {last[slowest]} of "
        f"{_LATE_ROUNDS} rounds; {1e3 * own:.1f} ms for what takes others {1e3 * others:.1f} ms)"
    )
    return Check("slowest rank", verdict, summary, [round(share, 4) for share in shares])
