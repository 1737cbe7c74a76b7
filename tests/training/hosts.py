"""Two hosts on one machine: network namespaces, joined by a virtual cable that can be slow, or cut."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
from types import TracebackType

ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "cable"  # in both, and on no real machine
_numbers = itertools.count()


class Hosts:
    """``with Hosts() as hosts:`` hosts 0 and 1 exist, with an address each; afterwards nothing of them is left.

    A host has the machine's files and processor, and a network of its own: what listens in one is reached from the
    other one by its address alone.
    """

    def __init__(self) -> None:
        number = next(_numbers)
        self.names = tuple(f"syncbn-{os.getpid()}-{number}-{host}" for host in (0, 1))

    def __enter__(self) -> Hosts:
        try:
            for name in self.names:
                _ip("netns", "add", name)
            first, second = self.names
            _ip("-n", first, "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", second)
            for name, address in zip(self.names, ADDRESSES, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "link", "set", INTERFACE, "up")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove()

    def on(self, host: int, command: list[str]) -> list[str]:
        """The command that runs a command on a host."""
        return ["ip", "netns", "exec", self.names[host], *command]

    def cut(self) -> None:
        """Takes the cable out, on host 1; what is under way is lost."""
        _ip("-n", self.names[1], "link", "set", INTERFACE, "down")

    def mend(self) -> None:
        """Puts the cable back."""
        _ip("-n", self.names[1], "link", "set", INTERFACE, "up")

    def slow(self, rate: str) -> None:
        """Lets no more than a rate, such as "1mbit", through the cable, in each direction."""
        for name in self.names:
            limit = ["tbf", "rate", rate, "burst", "16kb", "latency", "400ms"]
            subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", *limit], check=True)

    def _remove(self) -> None:
        for name in self.names:
            known = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for process in known.stdout.split():
                os.kill(int(process), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def unavailable() -> str | None:
    """Why there can be no hosts here, or None if there can."""
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        return f"two hosts need {' and '.join(missing)} of iproute2"
    if os.geteuid() != 0:
        return "two hosts need network namespaces, which only root can make"
    try:
        with Hosts():
            return None
    except subprocess.CalledProcessError as error:
        return f"two hosts need network namespaces: {error.stderr.strip()}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
