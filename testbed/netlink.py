"""Namespaces, links and addresses, by netlink (pyroute2), and calls made from inside a namespace.

Every function that makes something has the owner's ledger told first. All links are made inside
namespaces of our own, so that neither a firewall of this host nor its network manager meets them.
Nothing here knows what a pod is.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyroute2.netns
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from testbed.ledger import Scope
from testbed.model import Address, Error

NETNS = Path("/run/netns")
IFA_F_NODAD = 0x02
NUD_PERMANENT = 0x80

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)


def create_netns(owner: Scope, name: str) -> IPRoute:
    """Make a namespace with `lo` up and no IPv6 duplicate address detection; a netlink socket in it."""
    owner.defer(remove_netns, name=name)
    pyroute2.netns.create(name)
    ip = IPRoute(netns=name)
    ip.link("set", index=1, state="up")
    set_sysctls(
        name,
        {f"net/ipv6/conf/{which}/{key}": 0 for which in ("all", "default")
         for key in ("accept_dad", "accept_ra", "autoconf")},
    )  # fmt: skip
    return ip


def remove_netns(name: str) -> None:
    """Remove a namespace. Its links go with it, a moment later."""
    if (NETNS / name).exists():
        pyroute2.netns.remove(name)


def create_link(owner: Scope, ip: IPRoute, netns: str, ifname: str, **spec: Any) -> int:
    """Make a link in the namespace `netns`, whose socket is `ip`; returns its index there."""
    owner.defer(remove_link, netns=netns, ifname=ifname)
    ip.link("add", ifname=ifname, **spec)
    return index(ip, ifname)


def remove_link(netns: str, ifname: str) -> None:
    """Remove a link (of a veth pair: both ends). One that is gone, or whose namespace is, is no error."""
    try:
        with IPRoute(netns=netns, flags=0) as ip:
            for found in ip.link_lookup(ifname=ifname):
                ip.link("del", index=found)
    except FileNotFoundError:
        pass
    except NetlinkError as e:
        if e.code != errno.ENODEV:
            raise


def index(ip: IPRoute, ifname: str) -> int:
    """Index of a link. Raises `Error` if it is not there."""
    found = ip.link_lookup(ifname=ifname)
    if not found:
        raise Error(f"link {ifname} is gone from its namespace")
    return int(found[0])


def add_address(ip: IPRoute, ifindex: int, address: Address, prefix_length: int) -> None:
    """Give a link an address, usable at once."""
    ip.addr("add", index=ifindex, address=str(address), prefixlen=prefix_length,
            flags=IFA_F_NODAD if address.version == 6 else 0)  # fmt: skip


def add_neighbor(ip: IPRoute, ifindex: int, address: Address, mac: str) -> None:
    """A permanent neighbor entry, so that nobody waits for a resolution that a booting guest misses."""
    ip.neigh("replace", dst=str(address), lladdr=mac, ifindex=ifindex, state=NUD_PERMANENT,
             family=socket.AF_INET6 if address.version == 6 else socket.AF_INET)  # fmt: skip


def inside(netns: str, call: Callable[[], T]) -> T:
    """Run a short call in a thread that has entered the namespace (setns(2)); sockets stay there."""
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            fd = os.open(NETNS / netns, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _libc.setns(fd, 0x40000000):  # CLONE_NEWNET
                    raise OSError(ctypes.get_errno(), f"cannot enter namespace {netns}")
            finally:
                os.close(fd)
            result.append(call())
        except BaseException as e:
            failure.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def set_sysctls(netns: str, values: dict[str, int | str]) -> None:
    """Write sysctls (`net/…`, with slashes) of a namespace."""

    def write() -> None:
        for key, value in values.items():
            Path("/proc/sys", key).write_text(str(value))

    inside(netns, write)


def traffic(ip: IPRoute, ifindex: int) -> tuple[int, int]:
    """(packets, bytes) that a link has carried, both directions (rtnl_link_stats64)."""
    stats = ip.get_links(ifindex)[0].get("stats64")
    return (stats["rx_packets"] + stats["tx_packets"], stats["rx_bytes"] + stats["tx_bytes"])
