"""Creates links, addresses, routes and neighbor entries by rtnetlink (pyroute2).

Features of links are switched by ethtool's ioctl.

Links are made inside namespaces of our own, where neither this host's firewall nor its network
manager sees them. They end with their namespace, so they need no entry in a ledger, unless they
have to go earlier (`remove_link`). This module knows nothing of pods.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import socket
import struct
from collections.abc import Collection
from ipaddress import ip_address
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from testbed.host import facts
from testbed.host.namespaces import inside, open_socket
from testbed.model.addresses import Address
from testbed.model.terms import Family

IFA_F_NODAD = 0x02
NUD_PERMANENT = 0x80
RT_SCOPE_UNIVERSE = 0
SIOCETHTOOL = 0x8946
ETHTOOL_STXCSUM, ETHTOOL_SRXCSUM = 0x17, 0x15


def links(netns: str) -> dict[str, int]:
    """Indices of a namespace's links, by name."""
    return {name: index for index, name in inside(netns, socket.if_nameindex)}


def create_link(ip: IPRoute, ifname: str, **spec: Any) -> int:
    """Make a link and return its index. The link ends with its namespace."""
    ip.link("add", ifname=ifname, **spec)
    return int(ip.link_lookup(ifname=ifname)[0])


def remove_link(netns: str, ifname: str) -> None:
    """Remove a link before its namespace ends. A missing link is no error."""
    try:
        with open_socket(netns) as ip:
            ip.link("del", index=links(netns)[ifname])
    except (FileNotFoundError, KeyError):
        pass
    except NetlinkError as e:  # it went with its other end meanwhile
        if e.code != errno.ENODEV:
            raise


def set_checksum_offload(netns: str, ifname: str, *, on: bool, received: bool = True) -> None:
    """Whether a link leaves checksums to the device (struct ethtool_value, linux/ethtool.h).

    Without, segmentation is not left to it either. `received`: also those of what it receives,
    which a tap cannot switch.
    """

    def change() -> None:
        with socket.socket() as any_socket:
            for command in (ETHTOOL_STXCSUM, *((ETHTOOL_SRXCSUM,) if received else ())):
                value = ctypes.create_string_buffer(struct.pack("=II", command, on), 8)
                request = struct.pack("16sP", ifname.encode(), ctypes.addressof(value))
                fcntl.ioctl(any_socket, SIOCETHTOOL, request.ljust(40, b"\0"))

    inside(netns, change)


def outside_addresses(ip: IPRoute, without: Collection[str]) -> list[tuple[int, Address]]:
    """Addresses of global scope: (index of the link, address).

    Those of `lo` and of the links `without` are left out.
    """
    ours = {index for name in ("lo", *without) for index in ip.link_lookup(ifname=name)}
    return [
        (each["index"], ip_address(each.get("local") or each.get("address")))
        for each in ip.get_addr(scope=RT_SCOPE_UNIVERSE)
        if each["index"] not in ours
    ]


def add_address(ip: IPRoute, ifindex: int, address: Address, prefix_length: int) -> None:
    """Give a link an address that is usable at once. An address that it has already is no error.

    This and the following functions do nothing for IPv6 on a kernel without it.
    """
    if _family(address) not in facts.families():
        return
    ip.addr(
        "replace",
        index=ifindex,
        address=str(address),
        prefixlen=prefix_length,
        flags=IFA_F_NODAD if address.version == 6 else 0,
    )


def add_route(ip: IPRoute, ifindex: int, address: Address) -> None:
    """Add a route to one address that is directly reachable at a link."""
    if _family(address) not in facts.families():
        return
    ip.route(
        "replace",
        dst=f"{address}/{address.max_prefixlen}",
        oif=ifindex,
        **({"scope": "link"} if address.version == 4 else {}),
    )


def add_default_route(ip: IPRoute, ifindex: int, gateway: Address) -> None:
    """Add a default route by a gateway that is directly reachable at a link."""
    if _family(gateway) not in facts.families():
        return
    ip.route(
        "replace",
        dst="0.0.0.0/0" if gateway.version == 4 else "::/0",
        gateway=str(gateway),
        oif=ifindex,
    )


def add_neighbor(ip: IPRoute, ifindex: int, address: Address, mac: str) -> None:
    """Add a permanent neighbor entry (ARP, NDP).

    A booting guest misses requests, and they are repeated only after a second.
    """
    if _family(address) not in facts.families():
        return
    ip.neigh(
        "replace",
        dst=str(address),
        lladdr=mac,
        ifindex=ifindex,
        state=NUD_PERMANENT,
        family=_family(address).domain,
    )


def _family(address: Address) -> Family:
    return Family(f"ipv{address.version}")


def traffic(ip: IPRoute, ifindex: int) -> tuple[int, int]:
    """Packets and bytes that a link has carried in both directions (rtnl_link_stats64)."""
    stats = ip.get_links(ifindex)[0].get("stats64")
    return (stats["rx_packets"] + stats["tx_packets"], stats["rx_bytes"] + stats["tx_bytes"])
