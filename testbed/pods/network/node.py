"""The node's network (namespace tb-node), which connects the pods of this machine.

         pod's namespace     ┊     the node's, tb-node
    pod_address(n) ── eth0 ──┊── p<n> ── node_address

All connected pods share it, whichever process built them. It is made with the first of them, and
removed with the last. It stands for a cluster's node. It has no link to this machine's own
networks; what the machine itself sends to pods is refused meanwhile. Ports that pods have on the
node (hostPort) are reached at the node's address. Addresses and ports of each pod are in one file,
beside the ledgers. Guests are connected by `gateway`.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Network, IPv6Network, ip_network
from itertools import count
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from testbed.host import facts, ledger, namespaces, netlink, nft
from testbed.host.ledger import Scope
from testbed.model.addresses import MAX_PODS, node_address, pod_address
from testbed.model.errors import Error
from testbed.model.manifest import HostPort
from testbed.model.terms import Family

NETNS = "tb-node"
UPLINK = "eth0"
"""Name of the pod's link to the node."""
TABLE = "testbed-node"
POD_BITS = 16
"""Bits of an address that tell pods apart (`MAX_PODS`)."""
RT_TABLE_MAIN = 254
METRIC = (1 << 32) - 2
"""Of our routes on this machine: another one to the same addresses wins."""

_IP = {Family.IPV4: "ip", Family.IPV6: "ip6"}


def join(owner: Scope, pod: str, netns: str, ports: Collection[HostPort]) -> int:
    """Link a pod's namespace to the node's, and return the number of its `pod_address`.

    A link that a dead owner left is used again. Raises `Error` if another pod has one of the ports,
    or the node has no address left.
    """
    with _leases() as leases:
        own = next(
            (n for n, lease in leases.items() if (lease["id"], lease["pod"]) == (owner.id, pod)),
            None,
        )
        for n, lease in leases.items():
            taken = {(t, p) for t, p, _ in lease["ports"]} if n != own else ()
            for port in ports:
                if (port.transport, port.host_port) in taken:
                    raise Error(
                        f"pod {lease['pod']!r} has {port.transport} port {port.host_port} "
                        "of the node already",
                        hint="choose another hostPort",
                    )
        is_there = namespaces.is_namespace(namespaces.NETNS / NETNS)
        links = netlink.links(NETNS) if is_there else {}
        # The link of a pod that was removed may exist for a moment.
        n = own or next(n for n in count(1) if n not in leases and _link(n) not in links)
        if n > MAX_PODS:
            raise Error(f"{len(leases)} pods have addresses of the node", hint="take one down")
        leases[n] = {
            "pod": pod,
            "id": owner.id,
            "ports": [[p.transport, p.host_port, p.port] for p in ports],
        }
        owner.defer(leave, n=n, id=owner.id)
        with namespaces.make(NETNS) as node:
            (_folder() / f"{n}-{owner.id}").write_text(json.dumps(leases[n]))
            # Each time: whoever made the namespace may have been killed then.
            refuse()
            forwarding = {f"net/{ip}/conf/all/forwarding": 1 for ip in ("ipv4", "ipv6")}
            namespaces.set_sysctls(NETNS, forwarding)
            _load(leases)
            _connect(node, netns, n, links.get(_link(n)))
    return n


def leave(n: int, id: str) -> None:
    """Give an address back. The link goes with the pod's namespace, tb-node with the last pod."""
    with _leases() as leases:
        mine = _folder() / f"{n}-{id}"
        had = leases.pop(n)["ports"] if mine.exists() else ()
        mine.unlink(missing_ok=True)
        if not leases:
            namespaces.remove_netns(NETNS)
            refuse_no_longer()
        elif had:
            _load(leases)


def refuse() -> None:
    """Have this machine refuse what it sends to pods: its default route would take that outside.

    A wider route of the machine's own to these addresses is left alone.
    """
    with IPRoute() as machine:
        for family in facts.families():
            pods = pod_range(family)
            routes = machine.get_routes(family=family.domain, table=RT_TABLE_MAIN)
            wide = (r for r in routes if 0 < r["dst_len"] <= pods.prefixlen)
            known = (ip_network(f"{r.get('dst')}/{r['dst_len']}") for r in wide)
            if not any(node_address(family) in network for network in known):
                machine.route("add", dst=str(pods), type="unreachable", priority=METRIC)


def refuse_no_longer() -> None:
    """Take back what `refuse` did. A missing route is no error."""
    with IPRoute() as machine:
        for family in facts.families():
            with suppress(NetlinkError):
                dst = str(pod_range(family))
                machine.route("del", dst=dst, type="unreachable", priority=METRIC)


def pod_range(family: Family) -> IPv4Network | IPv6Network:
    """All addresses that the node's and its pods can be."""
    node = node_address(family)
    return ip_network(f"{node}/{node.max_prefixlen - POD_BITS}", strict=False)


def _link(n: int) -> str:
    return f"p{n}"


def _folder() -> Path:
    return ledger.ROOT / "node"


@contextmanager
def _leases() -> Iterator[dict[int, dict[str, Any]]]:
    """Lock and read the addresses and ports of pods, by pod number."""
    folder = _folder()
    folder.mkdir(mode=0o700, exist_ok=True)
    directory = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        leases = {}
        for path in folder.iterdir():
            # A process that was killed while it wrote the file had not made anything yet.
            with suppress(ValueError):
                leases[int(path.name.partition("-")[0])] = json.loads(path.read_text())
        yield leases
    finally:
        os.close(directory)


def _connect(node: IPRoute, netns: str, n: int, link: int | None) -> None:
    """Make the link if it is missing, and its addresses and routes."""
    if link is None:
        peer = {"ifname": UPLINK, "net_ns_fd": netns}
        link = netlink.create_link(node, _link(n), kind="veth", state="up", peer=peer)
    with namespaces.open_socket(netns) as pod:
        uplink = netlink.links(netns)[UPLINK]
        pod.link("set", index=uplink, state="up")
        for family in Family:
            node_ip, pod_ip = node_address(family), pod_address(family, n)
            length = node_ip.max_prefixlen
            netlink.add_address(node, link, node_ip, length)
            netlink.add_route(node, link, pod_ip)
            netlink.add_address(pod, uplink, pod_ip, length)
            netlink.add_route(pod, uplink, node_ip)
            netlink.add_default_route(pod, uplink, node_ip)


def _load(leases: dict[int, dict[str, Any]]) -> None:
    """Load the rules: pods send only from their own addresses; hostPorts are forwarded to pods."""
    text = [
        f"table inet {TABLE}",  # else the deletion fails
        f"delete table inet {TABLE}",
        f"table inet {TABLE} {{",
        "chain own_source { type filter hook prerouting priority raw",
        f'iifname "{_link(0)[:-1]}*" fib saddr . iif oif missing drop',
        "}",
    ]
    for family in Family:
        ip, version, node = _IP[family], family[3], node_address(family)
        text.append(
            nft.elements(
                f"map ports{version}",
                f"inet_proto . inet_service : {family}_addr . inet_service",
                (
                    f"{transport} . {host_port} : {pod_address(family, n)} . {port}"
                    for n, lease in leases.items()
                    for transport, host_port, port in lease["ports"]
                ),
            )
        )
        to_pod = f"{ip} daddr {node} dnat {ip} to meta l4proto . th dport map @ports{version}"
        pods = (f"{pod_address(family, n)} . {pod_address(family, n)}" for n in leases)
        text += [
            nft.elements(f"set selves{version}", f"{family}_addr . {family}_addr", pods),
            f"chain from_pods{version} {{ type nat hook prerouting priority dstnat",
            to_pod,
            "}",
            f"chain from_here{version} {{ type nat hook output priority -100",
            to_pod,
            "}",
            # A pod that dials its own hostPort would reject packets with its own source address.
            f"chain to_itself{version} {{ type nat hook postrouting priority srcnat",
            f"{ip} saddr . {ip} daddr @selves{version} snat {ip} to {node}",
            "}",
        ]
    nft.load(NETNS, "\n".join((*text, "}")))
