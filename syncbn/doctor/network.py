"""Which way processes reach each other: names, interfaces, and the route to rank 0's host."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from typing import Any

from ..groups import host_identity
from .checks import FAILED, OK, WARNING, Check, by_text, worst

Facts = dict[str, Any]
_ASKED_BY = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def network() -> Facts:
    """What this process sees."""
    name = socket.gethostname()
    return {
        "host": name,
        "host_id": host_identity(),
        "resolves_to": _resolved(name),
        "interfaces": _interfaces(),
        "route": _route(os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")),
        **{variable: os.environ.get(variable) for variable in _ASKED_BY},
    }


def _resolved(name: str) -> str | None:
    try:
        return str(socket.getaddrinfo(name, None)[0][4][0])
    except OSError:
        return None


def _interfaces() -> dict[str, str | None]:
    """Names and IPv4 addresses."""
    with suppress(OSError, AttributeError):
        return {name: _address(name) for _, name in socket.if_nameindex()}
    return {}


def _address(interface: str) -> str | None:
    _SIOCGIFADDR = 0x8915  # Linux
    with suppress(ImportError, OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        import fcntl

        request = struct.pack("256s", interface.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, request)[20:24])
    return None


def _route(address: str | None, port: str | None) -> Facts | None:
    """From which own address, on which interface, the rendezvous host is reached. Nothing is sent."""
    if address is None:
        return None
    try:
        kind, _, _, _, target = socket.getaddrinfo(address, int(port or 29500), type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as asked:
            asked.connect(target)
            own = str(asked.getsockname()[0])
    except (OSError, ValueError) as error:
        return {"to": address, "error": str(error)}
    interface = next((name for name, ip in _interfaces().items() if ip == own), None)
    return {"to": address, "from": own, "interface": interface}


def judge_network(said: list[Facts]) -> Check:
    several = len({each["host_id"] for each in said}) > 1
    found = [(severity, rank, text) for rank, each in enumerate(said) for severity, text in _faults(each, several)]
    lines = list(dict.fromkeys(_line(each) for each in said))
    verdict = worst([severity for severity, *_ in found])
    if found:
        text = by_text([(rank, text) for severity, rank, text in found if severity == verdict])
        return Check("network", verdict, text, said, lines)
    hosts = [each["host"] for each in {each["host_id"]: each for each in said}.values()]
    return Check("network", OK, f"{len(hosts)} host{'s' if len(hosts) > 1 else ''}: {_some(hosts)}", said, lines)


def _some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def _faults(each: Facts, several: bool) -> list[tuple[str, str]]:
    found = []
    for variable in _ASKED_BY:
        missing = _missing(each[variable], each["interfaces"])
        if missing:
            known = ", ".join(each["interfaces"])
            found.append((FAILED, f"{variable}={each[variable]}, but {each['host']} has no {missing}; it has {known}"))
    route, resolved = each["route"], each["resolves_to"]
    if route is not None and "error" in route:
        found.append((FAILED, f"no route to MASTER_ADDR={route['to']}: {route['error']}"))
    if each["GLOO_SOCKET_IFNAME"] is None and resolved is None:
        found.append(
            (WARNING, f"the name {each['host']} does not resolve, so gloo may not start: set GLOO_SOCKET_IFNAME")
        )
    if several and each["GLOO_SOCKET_IFNAME"] is None and (resolved or "").startswith("127."):
        text = f"{each['host']} resolves to {resolved}, where other hosts do not reach gloo: set GLOO_SOCKET_IFNAME"
        found.append((FAILED, text))
    if several and "lo" in (each["GLOO_SOCKET_IFNAME"], each["NCCL_SOCKET_IFNAME"]):
        found.append((FAILED, "talks over the loopback interface, which ends at its host"))
    return found


def _missing(asked: str | None, interfaces: dict[str, str | None]) -> str | None:
    """The interface that was asked for and is not there. NCCL takes prefixes, "=" for a whole name, "^" for all but."""
    if not asked or not interfaces or asked.startswith("^"):
        return None
    wanted = asked.removeprefix("=").split(",")
    return None if any(name.startswith(w.partition(":")[0]) for w in wanted for name in interfaces) else asked


def _line(each: Facts) -> str:
    route = each["route"] or {}
    by = f", rank 0's host {route['to']} by {route.get('interface') or route.get('from')}" if route.get("from") else ""
    asked = "".join(f", {variable}={each[variable]}" for variable in _ASKED_BY if each[variable])
    return f"{each['host']} is {each['resolves_to'] or 'not resolved'}{by}{asked}"
