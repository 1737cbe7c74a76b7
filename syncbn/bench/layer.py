"""Forward and backward of one layer on CPU processes: this project, local nn.BatchNorm2d and, if installed, fairscale.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node=2 -m syncbn.bench.layer --rounds 40

The implementations take turns in every round, so that they share whatever else the machine is doing, and the minimum
of each one's rounds counts. Two idle all-reduces of the layer's message sizes, which a local layer has no need of, are
taken off this project's time for its ratio to the local layer.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..layer import SyncBatchNorm

SHAPES = [(2, 64, 128, 128), (2, 256, 64, 64), (2, 512, 32, 32), (1, 256, 100, 168), (2, 2048, 16, 16)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def main() -> None:
    parser = argparse.ArgumentParser(description="Times one normalization layer on CPU processes.")
    parser.add_argument("--rounds", type=int, default=40, help="how often each implementation takes its turn")
    rounds = parser.parse_args().rounds
    dist.init_process_group("gloo")
    to_local: list[float] = []
    to_fairscale: list[float] = []
    show("shape", "layout", "syncbn ms", "- idle ms", "local ms", "ratio", "fairscale ms")
    for shape in SHAPES:
        for layout, memory_format in LAYOUTS.items():
            best = measure(shape, memory_format, rounds)
            ratio = (best["syncbn"] - best["idle"]) / best["local"]
            to_local.append(ratio)
            if "fairscale" in best:
                to_fairscale.append(best["fairscale"] / best["syncbn"])
            values = (best["syncbn"], best["idle"], best["local"], ratio, best.get("fairscale", float("nan")))
            show("x".join(map(str, shape)), layout, *[f"{value:.2f}" for value in values])
    show("geometric mean", "", "", "", "", f"{geometric_mean(to_local):.2f}", "")
    if to_fairscale and dist.get_rank() == 0:
        print(f"fairscale takes {geometric_mean(to_fairscale):.2f} times as long as syncbn")
    dist.destroy_process_group()


def implementations(channels: int) -> dict[str, nn.Module]:
    """The layers to compare, by name."""
    layers: dict[str, nn.Module] = {"syncbn": SyncBatchNorm(channels), "local": nn.BatchNorm2d(channels)}
    if importlib.util.find_spec("fairscale") is not None:
        from fairscale.experimental.nn import SyncBatchNorm as FairscaleSyncBatchNorm

        layers["fairscale"] = FairscaleSyncBatchNorm(channels)
    return layers


def measure(shape: tuple[int, ...], memory_format: torch.memory_format, rounds: int) -> dict[str, float]:
    """Each implementation's fastest forward and backward, and two idle all-reduces, in milliseconds."""
    x = torch.randn(shape).contiguous(memory_format=memory_format).requires_grad_()
    dy = torch.randn(shape).contiguous(memory_format=memory_format)
    layers = implementations(shape[1])
    messages = [torch.zeros(2 * shape[1] + extra, dtype=torch.float64) for extra in (3, 2)]
    turns: dict[str, Callable[[], None]] = {name: partial(step, layer, x, dy) for name, layer in layers.items()}
    turns["idle"] = partial(exchange_idly, messages)
    best = dict.fromkeys(turns, float("inf"))
    for round_ in range(rounds + 1):
        for name, turn in turns.items():
            x.grad = None
            dist.barrier()
            start = time.perf_counter()
            turn()
            if round_ > 0:  # the first one connects the processes
                best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    layer(x).backward(dy)


def exchange_idly(messages: list[Tensor]) -> None:
    for message in messages:
        dist.all_reduce(message)


def geometric_mean(ratios: list[float]) -> float:
    """NaN where too few rounds on a busy machine have let the idle all-reduces take longer than the layer."""
    return statistics.geometric_mean(ratios) if min(ratios) > 0 else float("nan")


def show(*columns: str) -> None:
    """A row of the table, on rank 0."""
    if dist.get_rank() == 0:
        widths = (18, 15, 11, 11, 10, 7, 14)
        cells = zip(columns, widths, strict=True)
        print(
            "".join(f"{text:<{width}}" if i < 2 else f"{text:>{width}}" for i, (text, width) in enumerate(cells)),
            flush=True,
        )


if __name__ == "__main__":
    main()
