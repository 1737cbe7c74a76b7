"""The command line, and everything that can be wrong with it before a measurement begins."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from . import processes
from .cases import NETWORKS
from .errors import UserError

MODES = {
    "layer": "forward and backward of one layer over the shapes of real networks",
    "step": "a whole DistributedDataParallel training step of torchvision models",
    "memory": "what a model keeps for backward, with and without recomputation, and the step's time",
    "exchange": "latency of the collectives that synchronize a layer",
    "monitor": "what syncbn.lightning.StatisticsMonitor adds to a training step",
    "scaling": "a model of the synchronization's cost from 2 to 4096 processes, fitted to exchange",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ("contiguous", "channels_last")
MODELS = ("resnet50", "deeplabv3_resnet50", "fcos_resnet50_fpn")
ON_REQUEST = ("conv_bn_relu",)
QUICK_MODELS = ("resnet50", "fcos_resnet50_fpn")
MEMORY_MODELS = ("unet", "resnet50", "deeplabv3_resnet50")
QUICK_MEMORY_MODELS = ("unet", "resnet50")
MONITOR_MODELS = ("resnet50",)
QUICK_MONITOR_MODELS = ("conv_bn_relu",)
MEMORY_IMPLEMENTATIONS = ("local", "syncbn+fuse", "syncbn+recompute")
PICTURES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Options:
    """What the user has asked for, with the defaults of the machine and of ``--quick`` filled in."""

    mode: str
    command: str
    device: str
    processes: int
    quick: bool
    rounds: int
    warm_up: int
    json: Path | None
    plot: Path | None
    dtypes: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    implementations: tuple[str, ...] = ()
    shrink: int = 1
    counts: tuple[int, ...] = ()
    from_: Path | None = None
    processes_per_node: int = 8
    network_latency_us: float = 0.0
    network_gbs: float = 0.0
    host_latency_us: float | None = None
    host_overhead_us: float | None = None
    host_gbs: float | None = None


def parse(arguments: list[str]) -> Options:
    """The options of a command line.

    Raises:
        UserError: something in it cannot be done here; the message is one line.
        SystemExit: it asks for help.
    """
    given = _parser().parse_args(arguments)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU that PyTorch can use; leave it away or say --device cpu")
    on_gpu = device == "cuda"
    count = processes.default_count(device) if given.processes is None else given.processes
    processes.require(count, device)
    _require_files(given)
    if given.mode == "scaling" and given.from_ is None and processes.torchrun_world_size() == 1:
        raise UserError("scaling needs an exchange between at least 2 processes, torchrun has started 1")
    chosen = vars(given) | {
        "command": shlex.join(["python", "-m", "syncbn.bench", *arguments]),
        "device": device,
        "processes": count,
        "rounds": given.rounds or _rounds(given.mode, given.quick, on_gpu),
        "warm_up": 1 if given.quick or not on_gpu else 3,
    }
    if given.mode in ("layer", "step", "memory", "monitor"):
        dtypes = given.dtypes or (("bfloat16", "float32") if on_gpu and not given.quick else _main_dtype(on_gpu))
        shrink = given.shrink or _shrink(given.mode, given.quick, on_gpu)
        layouts = given.layouts or (LAYOUTS if given.mode == "layer" else LAYOUTS[:1])
        chosen |= {"dtypes": dtypes, "layouts": layouts, "shrink": shrink}
    if given.mode == "step":
        chosen["models"] = given.models or (QUICK_MODELS if given.quick else MODELS)
    if given.mode == "memory":
        chosen["models"] = given.models or (QUICK_MEMORY_MODELS if given.quick else MEMORY_MODELS)
        chosen["implementations"] = given.implementations or MEMORY_IMPLEMENTATIONS
    if given.mode == "monitor":
        chosen["models"] = given.models or (QUICK_MONITOR_MODELS if given.quick else MONITOR_MODELS)
        chosen["dtypes"] = given.dtypes or chosen["dtypes"][:1]
        chosen["implementations"] = ("syncbn",)
    if given.mode in ("exchange", "scaling"):
        chosen["counts"] = given.counts or (2, 4, 8, 16)
    return Options(**chosen)


def _main_dtype(on_gpu: bool) -> tuple[str, ...]:
    return ("bfloat16",) if on_gpu else ("float32",)


def _shrink(mode: str, quick: bool, on_gpu: bool) -> int:
    if quick:
        return {"layer": 8, "step": 16, "memory": 8, "monitor": 8}[mode]
    return 1 if on_gpu else 4


def _rounds(mode: str, quick: bool, on_gpu: bool) -> int:
    full = {"layer": 40 if on_gpu else 15, "step": 30 if on_gpu else 5, "memory": 15 if on_gpu else 5}
    full |= {"exchange": 200, "monitor": 20 if on_gpu else 8}
    few = {"layer": 7, "step": 1, "memory": 1, "exchange": 40, "monitor": 2}
    measured = "exchange" if mode == "scaling" else mode
    return (few if quick else full)[measured]


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, with where to find help, rather than with the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--quick", action="store_true", help="a small, noisy run that shows everything in less than 40 s")
    add("--json", type=Path, metavar="PATH", help="write header and rows there")
    add("--plot", type=Path, metavar="PATH", help=f"draw the rows there ({', '.join(PICTURES)}); needs matplotlib")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add(
        "--processes",
        type=_positive,
        metavar="N",
        help="default: one per GPU, or 2 on a CPU; torchrun's under torchrun",
    )
    add("--rounds", type=_positive, metavar="N", help="how often each measurement is repeated")

    tensors = argparse.ArgumentParser(add_help=False)
    add = tensors.add_argument
    add("--dtypes", type=_names(DTYPES), default=(), metavar="A,B", help=f"of {', '.join(DTYPES)}")
    add("--layouts", type=_names(LAYOUTS), default=(), metavar="A,B", help=f"of {', '.join(LAYOUTS)}")
    add("--implementations", type=_names(), default=(), metavar="A,B", help="only these; default: all")
    add("--shrink", type=_positive, metavar="N", help="divide the images' sides; default: 1 on a GPU, 4 on a CPU")

    collectives = argparse.ArgumentParser(add_help=False)
    collectives.add_argument("--counts", type=_counts, default=(), metavar="P,Q", help="of processes; default 2,4,8,16")

    parser: argparse.ArgumentParser = _Parser(
        prog="python -m syncbn.bench", description="Measures synchronized batch normalization."
    )
    modes = parser.add_subparsers(dest="mode", required=True, metavar="{" + ",".join(MODES) + "}")
    of = {
        mode: modes.add_parser(mode, parents=parents, help=MODES[mode], description=f"Measures {MODES[mode]}.")
        for mode, parents in {
            "layer": [common, tensors],
            "step": [common, tensors],
            "memory": [common, tensors],
            "monitor": [common, tensors],
            "exchange": [common, collectives],
            "scaling": [common, collectives],
        }.items()
    }
    networks = tuple(NETWORKS)
    of["layer"].add_argument(
        "--networks", type=_names(NETWORKS), default=networks, metavar="A,B", help=f"of {', '.join(networks)}"
    )
    of["step"].add_argument(
        "--models",
        type=_names((*MODELS, *ON_REQUEST)),
        default=(),
        metavar="A,B",
        help=f"of {', '.join((*MODELS, *ON_REQUEST))}; default: all but the last",
    )
    of["memory"].add_argument(
        "--models", type=_names(MEMORY_MODELS), default=(), metavar="A,B", help=f"of {', '.join(MEMORY_MODELS)}"
    )
    of["monitor"].add_argument(
        "--models",
        type=_names((*MODELS, *ON_REQUEST)),
        default=(),
        metavar="A,B",
        help=f"of {', '.join((*MODELS, *ON_REQUEST))}; default: {', '.join(MONITOR_MODELS)}",
    )
    _add_scaling(of["scaling"])
    return parser


def _add_scaling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--from", dest="from_", type=Path, metavar="PATH", help="an exchange run's JSON; default: measure first")
    add("--processes-per-node", type=_positive, default=8, metavar="N")
    # NCCL's own tuning table gives a tree's hop over the network 5.0 µs (NVIDIA/nccl, src/graph/tuning.cc, hwLat, LL);
    # a DGX H100 has one 400 Gb/s ConnectX-7 for each GPU (NVIDIA DGX H100/H200 User Guide, "Network Modules").
    add("--network-latency-us", type=_number, default=5.0, metavar="X", help="assumed, a hop between nodes; default 5")
    add("--network-gbs", type=_number, default=50.0, metavar="X", help="assumed, GB/s between nodes; default 50")
    add("--host-latency-us", type=_number, metavar="X", help="assume a hop within a node instead of fitting it")
    add("--host-overhead-us", type=_number, metavar="X", help="assume a collective's constant part, likewise")
    add("--host-gbs", type=_number, metavar="X", help="assume GB/s within a node, likewise")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return number


def _counts(text: str) -> tuple[int, ...]:
    counts = sorted({_positive(part) for part in text.split(",")})
    if counts[0] < 2:
        raise argparse.ArgumentTypeError(f"expected numbers of at least 2 processes, got {text!r}")
    return tuple(counts)


def _names(known: Iterable[str] | None = None) -> Callable[[str], tuple[str, ...]]:
    """A type for argparse: names separated by commas, each one of ``known`` unless that is None."""
    allowed = None if known is None else tuple(known)

    def names(text: str) -> tuple[str, ...]:
        parts = tuple(part for part in text.split(",") if part)
        for part in parts:
            if allowed is not None and part not in allowed:
                raise argparse.ArgumentTypeError(f"{part!r} is none of {', '.join(allowed)}")
        if not parts:
            raise argparse.ArgumentTypeError("expected at least one name")
        return parts

    return names


def _require_files(given: argparse.Namespace) -> None:
    """Raises UserError unless results can be written, the plot drawn and what the mode needs imported."""
    for option, path in (("--json", given.json), ("--plot", given.plot)):
        if path is not None:
            _require_writable(option, path)
    if given.plot is not None:
        if given.plot.suffix not in PICTURES:
            raise UserError(f"--plot {given.plot}: expected a name that ends in {', '.join(PICTURES)}")
        _require_package("matplotlib", "--plot")
    if given.mode in ("step", "memory", "monitor"):
        _require_package("torchvision", given.mode)
    if given.mode == "monitor":
        _require_package("lightning", given.mode)
    if given.mode == "scaling" and given.from_ is not None and not given.from_.is_file():
        raise UserError(
            f"--from {given.from_}: no such file; make it with: python -m syncbn.bench exchange --json PATH"
        )


def _require_writable(option: str, path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{option} {path}: is a directory; give a file's name")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: there is no directory {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{option} {path}: may not be written; give another path")


def _require_package(package: str, by: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{by} needs {package}, which is not installed: pip install {package}")
