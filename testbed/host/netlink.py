"""Namespaces, links and addresses, by netlink (pyroute2), and calls made from inside a namespace.

Every function that makes something has the owner's ledger told first. All links are made inside
namespaces of our own, so that neither a firewall of this host nor its network manager meets them.
Nothing here knows what a pod is.
"""

from __future__ import annotations

import errno
import socket
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from testbed.host import facts
from testbed.host.namespaces import (
    inside,
    open_socket,
)
from testbed.model.addresses import Address
from testbed.model.terms import Family

IFA_F_NODAD = 0x02
NUD_PERMANENT = 0x80


def links(netns: str) -> dict[str, int]:
    """Indices of a namespace's links, by name."""
    return {name: index for index, name in inside(netns, socket.if_nameindex)}


def create_link(ip: IPRoute, ifname: str, **spec: Any) -> int:
    """Make a link and return its index. It goes with its namespace."""
    ip.link("add", ifname=ifname, **spec)
    return int(ip.link_lookup(ifname=ifname)[0])


def remove_link(netns: str, ifname: str) -> None:
    """Remove a link, where it does not go with its namespace. One that is gone is no error."""

    try:
        with open_socket(netns) as ip:
            ip.link("del", index=links(netns)[ifname])
    except (FileNotFoundError, KeyError):
        pass
    except NetlinkError as e:  # whatever was its other end went
        if e.code != errno.ENODEV:
            raise


def add_address(ip: IPRoute, ifindex: int, address: Address, prefix_length: int) -> None:
    """Give a link an address, usable at once. One that it has already is no error.

    This and what follows leave out IPv6 where the kernel has none.
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
    """Route one address to a link that it is on."""
    if _family(address) not in facts.families():
        return
    ip.route(
        "replace",
        dst=f"{address}/{address.max_prefixlen}",
        oif=ifindex,
        **({"scope": "link"} if address.version == 4 else {}),
    )


def add_default_route(ip: IPRoute, ifindex: int, gateway: Address) -> None:
    """Route all else to a gateway that is on the link."""
    if _family(gateway) not in facts.families():
        return
    ip.route(
        "replace",
        dst="0.0.0.0/0" if gateway.version == 4 else "::/0",
        gateway=str(gateway),
        oif=ifindex,
    )


def add_neighbor(ip: IPRoute, ifindex: int, address: Address, mac: str) -> None:
    """A permanent neighbor entry: a booting guest misses requests, repeated a second later."""
    if _family(address) not in facts.families():
        return
    ip.neigh(
        "replace",
        dst=str(address),
        lladdr=mac,
        ifindex=ifindex,
        state=NUD_PERMANENT,
        family=socket.AF_INET6 if address.version == 6 else socket.AF_INET,
    )


def _family(address: Address) -> Family:
    return Family(f"ipv{address.version}")


def traffic(ip: IPRoute, ifindex: int) -> tuple[int, int]:
    """(packets, bytes) that a link has carried, both directions (rtnl_link_stats64)."""
    stats = ip.get_links(ifindex)[0].get("stats64")
    return (stats["rx_packets"] + stats["tx_packets"], stats["rx_bytes"] + stats["tx_bytes"])
