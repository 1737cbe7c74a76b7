"""Messages back and forth between two processes: how long they take, and how far the clocks are apart."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from ..groups import host_identity
from .checks import FAILED, OK, WARNING, Check

Facts = dict[str, Any]
_ROUNDS = 12
_ALL_PAIRS_UP_TO = 8  # processes; beyond, each with rank 0 and with the next one
_SKEW_NOTED_S, _SKEW_WRONG_S = 1.0, 10.0
_SLOW = 10.0  # times the median of all pairs
_SLOW_S = 0.005


def pairs(world_size: int) -> list[tuple[int, int]]:
    if world_size <= _ALL_PAIRS_UP_TO:
        return list(itertools.combinations(range(world_size), 2))
    with_first = [(0, rank) for rank in range(1, world_size)]
    return with_first + [(rank, rank + 1) for rank in range(1, world_size - 1)]


def ping() -> Facts:
    """What this process has measured in the pairs that it is the first of: the median round trip, and how far the
    other's clock is ahead.

    As NTP does it: the other notes when a message comes and when the answer goes, so that the clocks' difference is
    known up to half of the fastest round trip.
    """
    measured = []
    for first, second in pairs(dist.get_world_size()):
        if dist.get_rank() == first:
            measured.append({"with": second, **_measured(second)})
        elif dist.get_rank() == second:
            _answer(first)
    return {"host": host_identity(), "pairs": measured}


def _measured(other: int) -> Facts:
    times = torch.zeros(2, dtype=torch.float64)
    trips = []
    for _ in range(_ROUNDS):
        sent = time.time()
        dist.send(times, other)
        dist.recv(times, other)
        back = time.time()
        came, went = times.tolist()
        trips.append(((back - sent) - (went - came), ((came - sent) + (went - back)) / 2))
    fastest = min(trips[2:])
    return {"round_trip_ms": 1e3 * statistics.median(trip for trip, _ in trips[2:]), "ahead_s": fastest[1]}


def _answer(other: int) -> None:
    times = torch.zeros(2, dtype=torch.float64)
    for _ in range(_ROUNDS):
        dist.recv(times, other)
        came = time.time()
        dist.send(torch.tensor([came, time.time()], dtype=torch.float64), other)


def judge_links(said: list[Facts]) -> Check:
    trips = {(rank, each["with"]): each["round_trip_ms"] for rank, own in enumerate(said) for each in own["pairs"]}
    if not trips:
        return Check("links", OK, "one process")
    median = statistics.median(trips.values())
    worst_pair = max(trips, key=trips.__getitem__)
    spelled = f"ranks {worst_pair[0]} and {worst_pair[1]}, {trips[worst_pair]:.2f} ms"
    slow = trips[worst_pair] > max(_SLOW * median, 1e3 * _SLOW_S) and len(trips) > 1
    summary = f"between two processes {median:.2f} ms there and back; slowest: {spelled}"
    return Check("links", WARNING if slow else OK, summary, [own["pairs"] for own in said])


def judge_clocks(said: list[Facts]) -> Check:
    """Rendezvous takes a host whose clock is behind for one that has stopped; logs cannot be laid together."""
    ahead = {each["with"]: each["ahead_s"] for each in said[0]["pairs"]}
    per_rank = [0.0, *(ahead.get(rank, 0.0) for rank in range(1, len(said)))]
    if not ahead:
        return Check("clocks", OK, "one process", per_rank)
    rank = max(ahead, key=lambda each: abs(ahead[each]))
    skew = ahead[rank]
    verdict = FAILED if abs(skew) > _SKEW_WRONG_S else WARNING if abs(skew) > _SKEW_NOTED_S else OK
    if verdict == OK:
        hosts = len({own["host"] for own in said})
        where = "on one host" if hosts == 1 else f"on {hosts} hosts"
        return Check("clocks", OK, f"{where} they agree within {1e3 * abs(skew):.2f} ms", per_rank)
    direction = "ahead of" if skew > 0 else "behind"
    return Check(
        "clocks", verdict, f"rank {rank}'s is {abs(skew):.1f} s {direction} rank 0's: run an NTP client", per_rank
    )
