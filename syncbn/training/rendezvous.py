"""A rendezvous for one node that nobody outside the node can reach.

torchrun's own rendezvous store listens on all network interfaces, whatever address it is given: any machine
that reaches the port can read and write the keys of the job. This one binds its socket to the loopback
interface, on a port that the system chooses, so two jobs on a node never collide.
"""

import socket

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

BACKEND = "loopback"
_LOOPBACK = "127.0.0.1"


class LoopbackRendezvous(RendezvousHandler):
    """One agent, always complete; its store serves the agent and the training processes."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self._store: TCPStore | None = None
        self._round = 0

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        # A new store for each round: restarted processes must not find the keys of those before them.
        self._store = loopback_store()
        self._round += 1
        return RendezvousInfo(
            PrefixStore(f"{self.run_id}/{self._round}", self._store),
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


def loopback_store() -> TCPStore:
    """A store's server on a free port of the loopback interface."""
    listener = socket.create_server((_LOOPBACK, 0))
    port = listener.getsockname()[1]
    # The store owns the descriptor from here on.
    return TCPStore(_LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def register() -> None:
    """Makes `--rdzv-backend=loopback` known to torchrun in this process."""
    if BACKEND not in rendezvous_handler_registry._registry:

        def create(parameters: RendezvousParameters) -> RendezvousHandler:
            return LoopbackRendezvous(parameters.run_id)

        rendezvous_handler_registry.register(BACKEND, create)
