"""Where the launchers of a job's nodes meet, and the store through which their processes find each other.

torchrun's own stores listen on all network interfaces, whatever address they are given: any machine that reaches the
port can read and write the keys of the job. These listen on one address.
"""

import ipaddress
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, create_handler

from syncbn.training.errors import UserError
from syncbn.training.network import Endpoint, Route, route_to

DEFAULT_PORT = 29400  # torchrun's
_LOOPBACK = "127.0.0.1"
_HEARTBEAT_S = 2
_CONNECT_S = 2.0
_RETRY_S = 0.5
# Between the moment a job's store listens and the moment the job has written its first key.
_FIRST_KEY_S = 5.0
_ANSWER_S = 60  # torchrun's
# A node that starts its processes again is out of the rendezvous for a moment.
_ABSENCE_S = 5.0


class Rendezvous(RendezvousHandler):
    """torchrun's interface, and what this package's launcher asks beside it."""

    # How often the processes of the job have been started before, on whatever nodes.
    starts_before = -1

    def lost(self) -> str | None:
        """Why the present round cannot go on, as of the last `num_nodes_waiting`, or None if it can."""
        return None

    @property
    def use_agent_store(self) -> bool:
        return True


class LoopbackRendezvous(Rendezvous):
    """For one node: always complete, and reachable from nowhere else.

    Its store serves the agent and the training processes, on a port that the system chooses, so that two jobs on a
    node never collide.
    """

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self._store: TCPStore | None = None

    def get_backend(self) -> str:
        return "loopback"

    def next_rendezvous(self) -> RendezvousInfo:
        # A new store for each round: restarted processes must not find the keys of those before them.
        self._store = store_at(_LOOPBACK)
        self.starts_before += 1
        return RendezvousInfo(
            PrefixStore(f"{self.run_id}/{self.starts_before}", self._store),
            rank=0,
            world_size=1,
            bootstrap_store_info=RendezvousStoreInfo(_LOOPBACK, self._store.port),
        )

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self.run_id

    def shutdown(self) -> bool:
        self._store = None
        return True


@dataclass(frozen=True)
class Meeting:
    """Which launchers meet, and where."""

    endpoint: Endpoint
    job: str  # tells it from other jobs at the same endpoint
    min_nodes: int
    max_nodes: int
    join_timeout_s: int = 600  # for all nodes to come
    node_timeout_s: int = 60  # a node that is not heard of for so long is given up


class MultiNodeRendezvous(Rendezvous):
    """torchrun's c10d rendezvous, with these differences:

    - The processes of each round get a store of their own, on the first node. torchrun keeps one over all rounds:
      restarted processes then find the addresses of those before them, and a node that has joined anew waits in vain to
      be told where the store is.
    - It knows when another node has given up, or has not been heard of.
    """

    def __init__(self, meeting: Meeting, route: Route, store: TCPStore) -> None:
        self.meeting = meeting
        self.route = route
        self._processes_store: TCPStore | None = None
        self._nodes = 0
        self._missing_since: float | None = None
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        self._inner = _dynamic_rendezvous(meeting, route, store)

    def get_backend(self) -> str:
        return self._inner.get_backend()

    def next_rendezvous(self) -> RendezvousInfo:
        self._processes_store = None
        agents = self._inner.next_rendezvous()
        if agents.rank == 0:
            self._processes_store = store_at(self.route.source)
        self._nodes = agents.world_size
        self.starts_before = self._inner._state_holder.state.round
        self._missing_since = None
        place = RendezvousStoreInfo.build(
            agents.rank,
            PrefixStore("processes", agents.store),
            self.route.source,
            self._processes_store.port if self._processes_store else None,
        )
        return RendezvousInfo(agents.store, agents.rank, agents.world_size, place)

    def lost(self) -> str | None:
        state = self._inner._state_holder.state
        if state.closed:
            return "another node has given up"
        if len(state.participants) >= self._nodes or state.wait_list:
            self._missing_since = None
            return None
        self._missing_since = self._missing_since or time.monotonic()
        if time.monotonic() - self._missing_since < _ABSENCE_S:
            return None
        missing = self._nodes - len(state.participants)
        return f"{missing} of {self._nodes} nodes have not been heard of for {self.meeting.node_timeout_s} s"

    def is_closed(self) -> bool:
        return self._inner.is_closed()

    def set_closed(self) -> None:
        self._inner.set_closed()

    def num_nodes_waiting(self) -> int:
        return self._inner.num_nodes_waiting()

    def get_run_id(self) -> str:
        return self.meeting.job

    def shutdown(self) -> bool:
        return self._inner.shutdown()

    def leave(self) -> None:
        """Ends the heartbeats, after which the others take this node for gone."""
        self._inner._stop_heartbeats()


def join(meeting: Meeting, say: Callable[[str], None]) -> MultiNodeRendezvous:
    """This node's part of a meeting. The node whose address is the endpoint's serves the store; the others wait for it.

    Args:
        meeting: which one.
        say: is told, once, that this node has to wait.

    Raises:
        UserError: the endpoint cannot be reached, or another job is there.
    """
    deadline = time.monotonic() + meeting.join_timeout_s
    told = False
    while True:
        try:
            route = route_to(meeting.endpoint)
            if route.stays_here:
                return MultiNodeRendezvous(meeting, route, _serve(meeting, route))
            socket.create_connection((route.target, meeting.endpoint.port), _CONNECT_S).close()
            return MultiNodeRendezvous(meeting, route, _connect(meeting, route))
        except OSError as error:
            reason = error.strerror or str(error)
            if time.monotonic() > deadline:
                raise UserError(
                    f"nobody has answered at {meeting.endpoint} for {meeting.join_timeout_s} s ({reason}): start the "
                    "job there, too, and let the nodes reach that port"
                ) from error
            if not told:
                say(f"waiting for {meeting.endpoint}: {reason}")
                told = True
            time.sleep(_RETRY_S)


def store_at(address: str, port: int = 0) -> TCPStore:
    """A store's server that listens on one address; port 0 leaves the choice to the system.

    Raises:
        OSError: the port is not free.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, port), family=family)
    port = listener.getsockname()[1]
    # The store owns the descriptor from here on.
    return TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _serve(meeting: Meeting, route: Route) -> TCPStore:
    """The store at the endpoint: a new one, or that of another launcher of the same job on this node."""
    local, named = route.target, meeting.endpoint.host
    if ipaddress.ip_address(local).is_loopback and named not in (local, "localhost") and meeting.max_nodes > 1:
        # Many systems give their own name such an address. Whoever writes localhost means several launchers here.
        raise UserError(f"{named} is {local} on this node, where no other one can reach it: give its address")
    try:
        store = store_at(local, meeting.endpoint.port)
    except OSError as error:
        if not _is_of_job(meeting, local):
            raise UserError(
                f"port {meeting.endpoint.port} of {meeting.endpoint.host} is in use, and not by the job {meeting.job}: "
                "choose another port for one of the jobs"
            ) from error
        store = TCPStore(local, meeting.endpoint.port)
    store.set_timeout(_answer_timeout(meeting))
    return store


def _connect(meeting: Meeting, route: Route) -> TCPStore:
    if not _is_of_job(meeting, route.target):
        raise UserError(
            f"at {meeting.endpoint} there is something else than the job {meeting.job}: start all nodes with the same "
            "line, and another job with another port"
        )
    store = TCPStore(route.target, meeting.endpoint.port, timeout=_answer_timeout(meeting))
    _end_silent_connections(route.target, meeting.endpoint.port, meeting.node_timeout_s)
    return store


def _answer_timeout(meeting: Meeting) -> timedelta:
    """For what another node has to write; that a node is silent is noticed earlier."""
    return timedelta(seconds=max(_ANSWER_S, meeting.node_timeout_s))


def _end_silent_connections(address: str, port: int, seconds: int) -> None:
    """Lets the kernel end this process's connections to a server that acknowledges nothing for so long (Linux).

    TCPStore's own timeout does not: when it has passed, the client tells the server so, and waits for the answer.
    """
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        return
    for descriptor in descriptors.iterdir():
        try:
            with socket.socket(fileno=os.dup(int(descriptor.name))) as connection:
                peer, peers_port, *_ = connection.getpeername()
                if peers_port == port and _plain(peer) == _plain(address):
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * seconds)
        except (OSError, ValueError):  # no socket, or none that is connected
            continue


def _plain(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address, of IPv4 if it is one that has been dressed up as IPv6."""
    known = ipaddress.ip_address(address)
    return getattr(known, "ipv4_mapped", None) or known


def _is_of_job(meeting: Meeting, address: str) -> bool:
    try:
        store = TCPStore(address, meeting.endpoint.port, timeout=timedelta(seconds=_FIRST_KEY_S))
        deadline = time.monotonic() + _FIRST_KEY_S
        while not store.check([_first_key(meeting.job)]):
            if time.monotonic() > deadline:
                return False
            time.sleep(_RETRY_S)
    except RuntimeError:  # it speaks another language, or not at all
        return False
    return True


def _first_key(job: str) -> str:
    """What torchrun writes of a rendezvous."""
    return f"torch.rendezvous.{job}"


def _dynamic_rendezvous(meeting: Meeting, route: Route, store: TCPStore) -> DynamicRendezvousHandler:
    parameters = RendezvousParameters(
        "c10d",
        str(meeting.endpoint),
        meeting.job,
        meeting.min_nodes,
        meeting.max_nodes,
        local_addr=route.source,
        join_timeout=meeting.join_timeout_s,
        keep_alive_interval=_HEARTBEAT_S,
        keep_alive_max_attempt=max(2, meeting.node_timeout_s // _HEARTBEAT_S),
    )
    return create_handler(store, C10dRendezvousBackend(store, meeting.job), parameters)
