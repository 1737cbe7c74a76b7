"""Thousands of steps of two processes, with all that allocates in between: memory, handles and statistics stay flat.

    python tests/programs/soak.py --steps 3000                # a loop of one's own around DistributedDataParallel
    python tests/programs/soak.py --steps 3000 --loop trainer # Lightning's Trainer

starts its two processes by itself; under torchrun it is one of several. A round is twenty steps: batches and images of
other sizes, padding, empty batches, checkpointing, evaluation, recalibration, gradients of gradients, copies, pickles.
After each round every process counts what it holds. Exit status 0 if that does not grow, and if the running statistics
are bit-equal on all processes at the end.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import io
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import syncbn

PROCESSES = 2
STEPS_IN_A_ROUND = 20
# Of what a process holds after a round, how much more there may be in the last rounds than in those after the warm-up.
# A few bytes lost in every step, or one object in every round, are more than that.
ALLOWED = {
    "descriptors": 0,
    "threads": 0,
    "tensors": 0,  # that Python knows of
    "objects": 20,  # that the garbage collector knows of
    "blocks": 500,  # of Python's allocator
    "heap": 128 << 10,  # bytes that malloc has handed out, tensors included
    "resident": 8 << 20,  # bytes of memory, with what malloc keeps for later
}
# What a program that leaks would lose in a step, to show that the soak notices.
LEAKS: list[Callable[[], Any]] = [
    lambda: torch.zeros(8),
    lambda: [[]],
    lambda: os.open(os.devnull, os.O_RDONLY),
    lambda: ctypes.CDLL(None).malloc(16 << 10),
]


class _Mallinfo(ctypes.Structure):
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def held() -> list[int]:
    """What this process holds, in the order of ``ALLOWED``."""
    gc.collect()
    objects = gc.get_objects()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [
        len(os.listdir("/proc/self/fd")),
        int(status["Threads"]),
        sum(issubclass(type(each), Tensor) for each in objects),
        len(objects),
        sys.getallocatedblocks(),
        _heap(),
        int(status["VmRSS"].split()[0]) * 1024,
    ]


def _heap() -> int:
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)  # glibc 2.33
    if mallinfo is None:
        return 0
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)


class History:
    """What a process held after each round. Kept so that it does not count itself."""

    def __init__(self, rounds: int) -> None:
        self._values = array("q", bytes(8 * len(ALLOWED) * rounds))
        self._rounds = 0

    def note(self) -> None:
        start = self._rounds * len(ALLOWED)
        self._values[start : start + len(ALLOWED)] = array("q", held())
        self._rounds += 1

    def growth(self) -> dict[str, float]:
        """By how much more there is in the last rounds than in the first ones after the warm-up, if it goes on growing.

        The first 40 % are the warm-up: caches fill, and malloc comes to know the sizes. The rest has three parts. What
        leaks grows from the first to the second and again to the third. What is opened once, later than elsewhere, or
        is there by chance when it is counted does not: where a step is slow, the watchdog asks the store on a thread.
        """
        rounds = [self._values[i : i + len(ALLOWED)] for i in range(0, self._rounds * len(ALLOWED), len(ALLOWED))]
        warm = rounds[int(0.4 * len(rounds)) :]
        few = len(warm) // 3
        parts = warm[:few], warm[few:-few], warm[-few:]
        middles = {
            name: [statistics.median_low(sorted(each[place] for each in part)) for part in parts]
            for place, name in enumerate(ALLOWED)
        }
        return {name: 2 * min(b - a, c - b) for name, (a, b, c) in middles.items()}


def grown(growth: dict[str, float]) -> list[str]:
    """What has grown by more than is allowed, in words."""
    return [f"{name} grew by {more:g}" for name, more in growth.items() if more > ALLOWED[name]]


# ---- what runs


class Net(nn.Module):
    """Convolutions, fused layers, a checkpointed block, and a head that is called for two levels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = checkpoint(self.block, x, use_reentrant=False, context_fn=syncbn.checkpoint_contexts)
        levels = x, nn.functional.avg_pool2d(x, 2)
        return sum(self.head(level).mean((2, 3)) for level in levels)


def images(step: int) -> Tensor:
    """The batch of a step, the same in each round: 0 to 3 images of 8 to 24 pixels, other ones on each process."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(100 * step + rank)
    number = 0 if step == 7 and rank else 1 + (step + rank) % 3
    return torch.randn(number, 3, 8 + 4 * (step % 5), 8 + 8 * (rank + step % 2), generator=generator)


def own_loop(rounds: int, after_round: Callable[[], None]) -> nn.Module:
    """Trains so many rounds; returns the network."""
    net = syncbn.fuse(syncbn.convert(Net(), syncbn.Exchange(timeout=timedelta(seconds=60))))
    model = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.001, momentum=0.9)
    for _ in range(rounds):
        for step in range(STEPS_IN_A_ROUND):
            x = images(step)
            mask = torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool)
            mask[..., x.shape[-1] // 2 :] = False
            padded = syncbn.valid_region(mask) if step % 4 == 1 else nullcontext()
            lean = syncbn.recompute_activations() if step % 4 == 2 else nullcontext()
            with padded, lean:
                loss = model(x).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        in_between(net, model)
        optimizer.zero_grad()
        after_round()
    return net


def in_between(net: nn.Module, model: nn.Module) -> None:
    """What happens only now and then in a long run."""
    with torch.no_grad():
        net.eval()(images(0))
        net.train()
    syncbn.recalibrate(net, [images(1), images(2)], progress=False)
    with syncbn.accumulate_statistics(net):
        net(images(3))
        net(images(4))
    with syncbn.local(net):
        net(images(1))
    x = images(2).requires_grad_()
    (gradient,) = torch.autograd.grad(net.stem(x).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    batches = syncbn.even_batches(DataLoader(torch.randn(3 + 2 * dist.get_rank(), 3, 8, 8), batch_size=2))
    for batch in batches:
        batches.weigh(model(batch).square().mean()).backward()
    copy = pickle.loads(pickle.dumps(deepcopy(net)))
    copy(images(5))
    torch.save(syncbn.revert(copy).state_dict(), io.BytesIO())


def trainer_loop(rounds: int, after_round: Callable[[], None]) -> nn.Module:
    """The same with Lightning: a round is an epoch with its validation and checkpoint."""
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from syncbn.lightning import SyncBatchNormPlugin
    from syncbn.training.callbacks import Agreement, GracefulStop, NonFiniteLoss

    class Images(torch.utils.data.IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return map(images, range(STEPS_IN_A_ROUND))

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Tensor) -> Tensor:
            loss = self.net(batch).square().sum()
            self.log("loss", loss, batch_size=1)
            return loss

        def validation_step(self, batch: Tensor) -> None:
            self.log("val_loss", self.net(batch).square().sum(), sync_dist=True, batch_size=1)

        def on_train_epoch_end(self) -> None:
            after_round()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.001, momentum=0.9)

    module = Module()
    with tempfile.TemporaryDirectory() as folder:
        pl.Trainer(
            accelerator="cpu",
            devices=dist.get_world_size(),
            strategy="ddp",
            plugins=[SyncBatchNormPlugin(), TorchElasticEnvironment()],
            max_epochs=rounds,
            limit_val_batches=2,
            num_sanity_val_steps=0,
            callbacks=[
                Agreement(),
                NonFiniteLoss(),
                GracefulStop(str(Path(folder, "last.ckpt"))),
                pl.callbacks.ModelCheckpoint(folder),
            ],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        ).fit(module, DataLoader(Images(), batch_size=None), DataLoader(Images(), batch_size=None))
    return module.net


LOOPS = {"own": own_loop, "trainer": trainer_loop}


def same_statistics(net: nn.Module) -> bool:
    """Whether all buffers are bit-equal on all processes."""
    own = torch.cat([buffer.double().flatten() for buffer in net.buffers()])
    everyones = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, own)
    return bool(own.isfinite().all()) and all(torch.equal(own, each) for each in everyones)


def work(options: argparse.Namespace) -> int:
    """This process's part; 1 if something has grown on any process, or the statistics differ."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=options.meet_at)
    rounds = -(-options.steps // STEPS_IN_A_ROUND)
    history, leaked = History(rounds), []

    def after_round() -> None:
        if options.leak and dist.get_rank() == 1:
            leaked.extend(leak() for leak in LEAKS for _ in range(STEPS_IN_A_ROUND))
        history.note()

    started = time.monotonic()
    net = LOOPS[options.loop](rounds, after_round)
    seconds = time.monotonic() - started
    growths: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(growths, history.growth())
    problems = [f"process {rank}: {told}" for rank, growth in enumerate(growths) for told in grown(growth)]
    if not same_statistics(net):
        problems.append("the running statistics are not bit-equal, or not finite")
    if dist.get_rank() == 0:
        print(f"{rounds * STEPS_IN_A_ROUND} steps in {seconds:.0f} s, {options.loop} loop")
        for rank, growth in enumerate(growths):
            print(f"process {rank}: " + ", ".join(f"{name} {more:+g}" for name, more in growth.items()))
        print("\n".join(problems) or "flat, and the same statistics on all processes")
    dist.destroy_process_group()
    return bool(problems)


def start_processes(arguments: list[str]) -> int:
    """Runs this program in two processes; the first exit status that is not 0."""
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(PROCESSES):
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "GROUP_RANK": "0"}
            sizes = {"LOCAL_WORLD_SIZE": str(PROCESSES), "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "soak"}
            # torch's flight recorder keeps the last 2000 collectives: it would fill for hundreds of steps.
            sizes["TORCH_FR_BUFFER_SIZE"] = "50"
            command = [sys.executable, __file__, *arguments, f"--meet-at=file://{folder}/store"]
            processes.append(subprocess.Popen(command, env=os.environ | variables | sizes))
        try:
            return next((status for status in [process.wait() for process in processes] if status), 0)
        finally:
            for process in processes:
                process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--loop", choices=sorted(LOOPS), default="own")
    parser.add_argument("--leak", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--meet-at", default="env://", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        return start_processes(sys.argv[1:])
    torch.set_num_threads(1)
    # gloo's file store counts the processes by these.
    if options.meet_at != "env://":
        options.meet_at += f"?rank={os.environ['RANK']}&world_size={os.environ['WORLD_SIZE']}"
    return work(options)


if __name__ == "__main__":
    raise SystemExit(main())
