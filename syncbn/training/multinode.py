"""torchrun for a job on several nodes; every node runs the same line.

`launch/multinode.sh` runs this. As on one node, a wrong override ends before any process starts. What else a line needs
is found out: which of this node's addresses and network interfaces leads to the others (gloo and torchrun would take
the one that the host's name stands for, often the loopback interface), and a run folder that is the same on all nodes
and after all restarts.
"""

import argparse
import hashlib
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousTimeoutError

from syncbn.training.agent import RendezvousLostError, run_agent, say
from syncbn.training.environment import RUN_STAMP_VARIABLE
from syncbn.training.errors import UserError, fail
from syncbn.training.launch import (
    checked_config,
    default_process_count,
    needs_one_process,
    process_count,
    restart_count,
    run_here,
)
from syncbn.training.network import Route, parse_endpoint
from syncbn.training.rendezvous import DEFAULT_PORT, Meeting, MultiNodeRendezvous, join

_TRAIN = "syncbn.training.train"
_DESCRIPTION = """\
Trains on several nodes. Run the same line on each of them; what is no option here goes to Hydra:

  launch/multinode.sh --nnodes=2 --rdzv-endpoint=node0:29400 --max-restarts=3 ckpt_path=auto experiment=study
  launch/multinode.sh --nnodes=2 --rdzv-endpoint=node0:29400 --module syncbn.doctor
"""


def main() -> NoReturn:
    """Starts this node's share of the processes and waits for their end."""
    # Until there are processes to pass it on to. The first process of a container would else not notice it at all.
    signal.signal(signal.SIGTERM, _end_at_once)
    if os.environ.pop("SYNCBN_QUIET_LAUNCHER", None):  # by multinode.sh, for this process alone
        os.environ.pop("TORCH_CPP_LOG_LEVEL", None)
    options, arguments = parse(sys.argv[1:])
    os.environ.setdefault(RUN_STAMP_VARIABLE, folder_name(options.rdzv_id))
    # Two jobs on a node would write their traces of NCCL's calls over each other's.
    traces = Path(tempfile.gettempdir(), f"nccl_trace_{folder_name(options.rdzv_id)}_rank_")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(traces))
    if options.module == _TRAIN and needs_one_process(arguments):
        run_here(arguments)
    try:
        processes, max_restarts = checked(options, arguments)
        meeting = meeting_of(options)
        raise SystemExit(run(meeting, processes, options.module, arguments, max_restarts, options.interface))
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def parse(line: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's options, and the arguments of what it launches.

    Names and PET_ variables are torchrun's, so that a Kubeflow PyTorchJob configures this launcher as it does torchrun.
    """
    parser = argparse.ArgumentParser(
        prog="launch/multinode.sh",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s --nnodes=N --rdzv-endpoint=HOST[:PORT] [options] [key=value ...]",
    )

    def option(name: str, **how: object) -> None:
        variable = "PET_" + name[2:].upper().replace("-", "_")
        default = os.environ.get(variable, how.pop("default", None))
        required = bool(how.pop("required", False)) and default is None
        parser.add_argument(name, default=default, required=required, **how)  # type: ignore[arg-type]

    option("--nnodes", required=True, metavar="N|MIN:MAX", help="nodes of the job; a range: it goes on with fewer")
    option(
        "--rdzv-endpoint",
        required=True,
        metavar="HOST[:PORT]",
        help=f"one of the nodes, the same on all, and a free port there (default {DEFAULT_PORT})",
    )
    option(
        "--rdzv-id",
        metavar="NAME",
        help="names the job and its run folder; default: derived from the line, so that the same line is the same job",
    )
    option("--max-restarts", type=int, metavar="N", help="default: the configuration's max_restarts")
    option("--nproc-per-node", metavar="N", help="default: trainer.devices, one per GPU, or two where there is none")
    option("--join-timeout", type=int, default=600, metavar="S", help="for all nodes to come (default 600)")
    option("--node-timeout", type=int, default=60, metavar="S", help="until a silent node is given up (default 60)")
    option("--interface", metavar="NAME", help="of the network; default: the one that leads to the endpoint")
    option("--module", default=_TRAIN, metavar="NAME", help=f"what each process runs (default {_TRAIN})")
    options, arguments = parser.parse_known_args(line)
    if arguments[:1] == ["--"]:
        del arguments[0]
    if not options.rdzv_id:
        told = [options.nnodes, options.rdzv_endpoint, options.module, *arguments]
        options.rdzv_id = "job-" + hashlib.sha256("\0".join(told).encode()).hexdigest()[:8]
    return options, arguments


def folder_name(job: str) -> str:
    """A job's name as that of a folder."""
    return re.sub(r"[^\w.-]+", "_", job)


def checked(options: argparse.Namespace, arguments: list[str]) -> tuple[int, int]:
    """How many processes a node starts, and how often all are started again.

    Raises:
        UserError: the configuration or an option cannot be used.
    """
    processes, restarts = options.nproc_per_node, options.max_restarts
    if processes in ("auto", "gpu", "cpu"):  # what Kubeflow says when it has not been told
        processes = None
    if processes is not None and (not str(processes).isdigit() or int(processes) < 1):
        raise UserError(f"--nproc-per-node must be a number of processes of at least 1, got {processes!r}")
    known = {name for _, name in socket.if_nameindex()}
    if options.interface and (unknown := set(options.interface.split(",")) - known):
        raise UserError(
            f"--interface: no {', '.join(sorted(unknown))} on this node, which has {', '.join(sorted(known))}"
        )
    if restarts is not None and restarts < 0:
        raise UserError(f"--max-restarts must be at least 0, got {restarts}")
    if options.module != _TRAIN:
        return int(processes or default_process_count()), restarts or 0
    if restarts is not None:
        arguments.append(f"max_restarts={restarts}")
    cfg = checked_config(arguments)
    return int(processes or process_count(cfg)), restart_count(cfg)


def meeting_of(options: argparse.Namespace) -> Meeting:
    """The rendezvous that the options describe.

    Raises:
        UserError: an option has no such value.
    """
    endpoint = parse_endpoint(options.rdzv_endpoint, DEFAULT_PORT)
    least, _, most = options.nnodes.partition(":")
    most = most or least
    if not (least.isdigit() and most.isdigit() and 1 <= int(least) <= int(most)):
        raise UserError(f"--nnodes must be a number of nodes or a range such as 2:4, got {options.nnodes!r}")
    for name in ("join_timeout", "node_timeout"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1 second, got {getattr(options, name)}")
    return Meeting(endpoint, options.rdzv_id, int(least), int(most), options.join_timeout, options.node_timeout)


def run(
    meeting: Meeting,
    processes: int,
    module: str,
    arguments: list[str],
    most_restarts: int,
    interface: str | None = None,
) -> int:
    """Runs this node's processes until they have ended; returns the exit status.

    Where the node of the endpoint dies, and restarts are left, this node waits for it to come back.

    Raises:
        UserError: the nodes do not meet.
    """
    rendezvous = meet(meeting, processes, interface)
    max_restarts = most_restarts
    while True:
        try:
            return run_agent(rendezvous, processes, module, arguments, max_restarts)
        except RendezvousLostError as error:
            rendezvous.leave()
            lost = f"the launcher at {meeting.endpoint} has ended, or has been silent for {meeting.node_timeout_s} s"
            if rendezvous.route.stays_here:
                lost = "the other nodes have not answered"
            if error.restarts_left == 0:
                say(f"error: {lost}")
                return 1
            say(f"{lost}: trying again, restart {most_restarts - error.restarts_left + 1} of {most_restarts}")
            max_restarts = error.restarts_left - 1
            if not rendezvous.route.stays_here:
                rendezvous = meet(meeting, processes, interface)
        except RendezvousClosedError:
            say(f"error: another node of {meeting.job} has given up")
            return 1
        except RendezvousTimeoutError:
            say(f"error: fewer than {meeting.min_nodes} nodes came within {meeting.join_timeout_s} s")
            return 1


def meet(meeting: Meeting, processes: int, interface: str | None) -> MultiNodeRendezvous:
    """Finds the rendezvous, and by it the way to the other nodes."""
    rendezvous = join(meeting, say)
    choose_interface(rendezvous.route, interface)
    introduce(rendezvous, processes)
    return rendezvous


def _end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def choose_interface(route: Route, interface: str | None) -> None:
    """Tells gloo and NCCL where the other nodes are. What the environment says already is final, but for the option."""
    name = interface or route.interface
    if name is None:
        return
    # NCCL takes a name for the beginning of one, and the sign for the whole.
    for variable, value in (("GLOO_SOCKET_IFNAME", name), ("NCCL_SOCKET_IFNAME", f"={name}")):
        os.environ[variable] = value if interface else os.environ.get(variable, value)


def introduce(rendezvous: MultiNodeRendezvous, processes: int) -> None:
    """Says where this node looks for the others."""
    meeting, route = rendezvous.meeting, rendezvous.route
    nodes = (
        f"{meeting.min_nodes} to {meeting.max_nodes}" if meeting.min_nodes < meeting.max_nodes else meeting.max_nodes
    )
    where = f"{route.source} on {os.environ.get('GLOO_SOCKET_IFNAME', 'any interface')}"
    count = f"{processes} process" + ("es" if processes > 1 else "")
    print(f"{meeting.job}: this node is {where}, of {nodes}, with {count}", flush=True)


if __name__ == "__main__":
    main()
