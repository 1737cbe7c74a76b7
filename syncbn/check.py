"""``SYNCBN_CHECK=1``: before each exchange the processes compare who is calling.

It costs a second small collective and a wait of the host per exchange. It finds, at the first exchange that differs,
what would otherwise be a wrong sum, an aborted process or a wait without end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch.distributed as dist

from .communicator import Communicator
from .host import HostCommunicator, new_group_on_host
from .progress import Comparison, DisagreementError, Entry
from .whereabouts import in_words, ranks_in_words

VARIABLE = "SYNCBN_CHECK"


def asked_for() -> bool:
    """Whether the environment asks for the comparison.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"expected {VARIABLE} to be 0 or 1, got {value!r}")
    return value == "1"


def comparison(communicator: Communicator) -> Comparison:
    """What compares an exchange on this communicator with those of the other processes. Collective.

    They are compared on a process group for nothing else: what else is sent could be mixed up with them.
    """
    everyone = len(communicator.ranks) == dist.get_world_size()
    host = HostCommunicator(new_group_on_host(None if everyone else communicator.group))

    def compare(own: Entry) -> None:
        rows = host.read(host.post(list(map(int, own))))
        entries = [Entry(number, tag, size, bool(differentiable)) for number, tag, size, differentiable in rows]
        if any(entry != own for entry in entries):
            raise DisagreementError(_difference(host, entries, communicator.layer_name))

    return compare


def _difference(host: HostCommunicator, entries: Sequence[Entry], name: Callable[[int], str]) -> str:
    ranks_of: dict[Entry, list[int]] = {}
    for rank, entry in zip(host.ranks, entries, strict=True):
        ranks_of.setdefault(entry, []).append(rank)
    places = [
        f"  {ranks_in_words(ranks)}: exchange {entry.number}, {in_words(entry, name)}"
        for entry, ranks in ranks_of.items()
    ]
    return (
        "the processes meet in different exchanges. In training, every process of the group runs the same layers in "
        "the same order, forward and backward:\n" + "\n".join(places)
    )
