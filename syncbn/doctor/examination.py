"""The examination itself: the steps in their order, on this process, and the report."""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..guard import TIMEOUT_VARIABLE
from . import exactness, machine, messages, network, pings, software
from .checks import FAILED, Check, ranks_in_words
from .options import Options
from .report import Report
from .steps import SLACK_S, Answer, Missing, Steps, timeout_of

Judge = Callable[[list[Any]], list[Check]]


class _Step(NamedTuple):
    name: str
    work: Callable[[], Any]
    judge: Judge


def examine(options: Options) -> int:
    """Takes all steps; the first process that is still there prints the report. Returns the exit status."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    warnings.simplefilter("ignore")  # the report is what there is to read
    try:
        store = _meet(options, rank, world_size)
    except Exception as error:  # whatever torch makes of a network
        return _tell_alone(options, rank, f"rank {rank} cannot reach the store of rank 0 at {_where()}: {error}")
    steps = Steps(store, rank, world_size, options.timeout)
    threading.Thread(target=_watch, args=(steps, options), daemon=True).start()
    checks, ranks = _take(steps, _device(options), options)
    report = _report(checks, world_size, options)
    if rank == min(ranks, default=rank):
        print(report.json() if options.json else report.text(), flush=True)
    with suppress(Exception):  # the store has gone: so has the process that had it
        steps.part(ranks)
    return 0 if report.healthy else 1


def _meet(options: Options, rank: int, world_size: int) -> Any:
    """The store by which the processes find each other."""
    timeout = timedelta(seconds=options.timeout)
    if options.store is not None:
        store: Any = dist.FileStore(options.store, world_size)
        store.set_timeout(timeout)
        return dist.PrefixStore("syncbn doctor", store)
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise ValueError("MASTER_ADDR and MASTER_PORT are not in the environment, as torchrun sets them")
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # Not waiting for the others here, or nobody could say who is missing.
    master = rank == 0 and not of_agent
    store = dist.TCPStore(host, port, world_size, master, timeout, wait_for_workers=False)
    return dist.PrefixStore(f"syncbn doctor {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _where() -> str:
    return f"{os.environ.get('MASTER_ADDR', '(MASTER_ADDR is not set)')}:{os.environ.get('MASTER_PORT', '')}"


def _tell_alone(options: Options, rank: int, text: str) -> int:
    report = Report("", [Check("rendezvous", FAILED, text)], {"processes": None})
    if options.json and rank == 0:
        print(report.json(), flush=True)
    else:  # of many, perhaps: what is on stdout may be a document of JSON
        print(report.verdict, file=sys.stderr if options.json else sys.stdout, flush=True)
    return 1


def _watch(steps: Steps, options: Options) -> None:
    """Ends the process if the thread that takes the steps does not go on: a store may never answer."""
    limit = options.timeout + 4 * SLACK_S
    while time.monotonic() - steps.alive < limit:
        time.sleep(0.5)
    text = f"rank {steps.rank} has no answer from the store at {_where()}: the process that has it hangs, or its host"
    _tell_alone(options, steps.rank, text)
    sys.stdout.flush()
    os._exit(1)


def _device(options: Options) -> torch.device:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    gpus = torch.cuda.device_count()
    kind = options.device or ("cuda" if 0 < here <= gpus else "cpu")
    if kind == "cpu" or gpus == 0:
        return torch.device(kind)
    if here > gpus:
        os.environ.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")
        os.environ.setdefault("NCCL_MAX_CTAS", "4")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % gpus)


def _take(steps: Steps, device: torch.device, options: Options) -> tuple[list[Check], list[int]]:
    """The checks of all steps up to the one in which somebody is missing; and the ranks that are there."""
    checks: list[Check] = []
    everybody = list(range(steps.world_size))
    for step in _steps(steps, device, options):
        try:
            answers = steps.take(step.name, step.work)
        except Missing as missing:
            return [*checks, Check(step.name, FAILED, str(missing))], [r for r in everybody if r not in missing.ranks]
        except Exception as error:
            text = f"rank {steps.rank} has lost the store at {_where()}, in the step '{step.name}': {error}"
            return [*checks, Check(step.name, FAILED, text)], [steps.rank]
        if any(answer.error is not None for answer in answers):
            # What goes on between processes cannot be relied on any more.
            return [*checks, _failed(step.name, answers)], everybody
        checks += step.judge([answer.value for answer in answers])
    return checks, everybody


def _failed(name: str, answers: list[Answer]) -> Check:
    errors: dict[str, list[int]] = {}
    for rank, answer in enumerate(answers):
        if answer.error is not None:
            errors.setdefault(answer.error, []).append(rank)
    text = "; ".join(f"{ranks_in_words(ranks)}: {error}" for error, ranks in errors.items())
    return Check(name, FAILED, f"the step has failed on {text}", [answer.error for answer in answers])


def _steps(steps: Steps, device: torch.device, options: Options) -> list[_Step]:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"

    def on_device(work: Callable[[torch.device], Any]) -> Callable[[], Any]:
        def on_its_thread() -> Any:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            return work(device)

        return on_its_thread

    def facts() -> Any:
        return {
            "versions": software.versions(),
            "environment": software.environment(),
            "network": network.network(),
            "gpus": machine.gpus(device),
            "disks": machine.disks(options.folder),
        }

    def judge_facts(said: list[Any]) -> list[Check]:
        of = {name: [each[name] for each in said] for name in said[0]}
        hosts = [each["host"] for each in of["network"]]
        return [
            software.judge_versions(of["versions"]),
            software.judge_environment(of["environment"], backend),
            machine.judge_gpus(of["gpus"], hosts, device.type),
            network.judge_network(of["network"]),
            machine.judge_disks(of["disks"]),
        ]

    def join(device: torch.device) -> None:
        os.environ[TIMEOUT_VARIABLE] = str(timeout_of(options.timeout).total_seconds())
        group_store = dist.PrefixStore("group", steps.store)
        dist.init_process_group(
            backend,
            store=group_store,
            rank=steps.rank,
            world_size=steps.world_size,
            timeout=timeout_of(options.timeout),
        )

    several = steps.world_size > 1
    found = [
        _Step("start", facts, judge_facts),
        _Step("process group", on_device(join), lambda said: []),
        _Step(
            "links",
            on_device(lambda device: pings.ping()),
            lambda said: [pings.judge_links(said), pings.judge_clocks(said)],
        ),
        _Step(
            "all-reduce",
            on_device(messages.measure),
            lambda said: [messages.judge_sums(said), messages.judge_times(said)],
        ),
        _Step("slowest rank", on_device(messages.arrivals), lambda said: [messages.judge_arrivals(said)]),
        _Step("exactness", on_device(exactness.exactness), lambda said: [exactness.judge_exactness(said)]),
    ]
    strays = _Step("mismatches", on_device(exactness.strays), lambda said: [exactness.judge_strays(said)])
    return [*found, strays] if several else found


def _report(checks: list[Check], world_size: int, options: Options) -> Report:
    of_network = next((check.per_rank for check in checks if check.name == "network"), [])
    hosts = len({each["host_id"] for each in of_network}) or 1
    title = f"{world_size} process{'es' if world_size > 1 else ''} on {hosts} host{'s' if hosts > 1 else ''}"
    date = datetime.now().astimezone().isoformat(timespec="seconds")
    return Report(title, checks, {"processes": world_size, "hosts": hosts, "date": date, "timeout_s": options.timeout})
