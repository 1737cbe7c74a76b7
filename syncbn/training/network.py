"""Which of this node's addresses and interfaces leads to another node."""

import array
import ipaddress
import socket
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from syncbn.training.errors import UserError

_IF_INET6 = Path("/proc/net/if_inet6")
_LISTS_INTERFACES = 0x8912  # Linux: SIOCGIFCONF


@dataclass(frozen=True)
class Endpoint:
    """A host, as the user has written it, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Route:
    """From this node to another one, or to itself."""

    target: str  # the other one's address
    source: str  # this node's address on the way there
    interface: str | None  # that has the address `source`; None where it cannot be told

    @property
    def stays_here(self) -> bool:
        """Whether the other node is this one."""
        return self.source == self.target or ipaddress.ip_address(self.target).is_loopback


def parse_endpoint(text: str, default_port: int) -> Endpoint:
    """HOST, HOST:PORT or [IPV6]:PORT.

    Raises:
        UserError: it is none of these.
    """
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        port = port.removeprefix(":")
    elif text.count(":") > 1:  # a bare IPv6 address
        host, port = text, ""
    else:
        host, _, port = text.partition(":")
    if not host or not (port or str(default_port)).isdigit() or not 0 < int(port or default_port) < 2**16:
        raise UserError(f"expected HOST or HOST:PORT, got {text!r}")
    return Endpoint(host, int(port or default_port))


def route_to(endpoint: Endpoint) -> Route:
    """How packets from here to there leave this node. None is sent.

    Raises:
        OSError: the name is unknown, or no route leads there. Either may be a matter of time.
    """
    *_, (family, _, _, _, address) = reversed(socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_DGRAM))
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        source = str(probe.getsockname()[0])
    return Route(str(address[0]), source, interface_of(source))


def interface_of(address: str) -> str | None:
    """The name of the network interface that has an address (Linux)."""
    if sys.platform != "linux":
        return None
    if ":" in address:
        return _ipv6_interfaces().get(ipaddress.ip_address(address.partition("%")[0]).exploded.replace(":", ""))
    return _ipv4_interfaces().get(address)


def _ipv4_interfaces() -> dict[str, str]:
    """Interfaces by address, second addresses of an interface included."""
    import fcntl

    record = 40 if struct.calcsize("P") == 8 else 32  # the size of a struct ifreq
    buffer = array.array("B", bytes(256 * record))
    place, _ = buffer.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, _LISTS_INTERFACES, struct.pack("iP", len(buffer), place))
    used = struct.unpack("iP", answer)[0]
    records = [buffer[start : start + record].tobytes() for start in range(0, used, record)]
    # A second address may be listed under an alias, such as eth0:1.
    return {socket.inet_ntoa(record[20:24]): record[:16].rstrip(b"\0").decode().partition(":")[0] for record in records}


def _ipv6_interfaces() -> dict[str, str]:
    if not _IF_INET6.exists():
        return {}
    rows = [line.split() for line in _IF_INET6.read_text().splitlines()]
    return {row[0]: row[5] for row in rows}
