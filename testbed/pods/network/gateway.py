"""The pod as its guests' gateway: NAT rules by which guests share the pod's address outside.

The rules are in the pod's namespace, for an uplink that exists already. Packets of guests to the
outside get the pod's address as source. Packets to a port that a guest owns, from outside or from
the pod itself, go to that guest, with their source unchanged. From outside, only packets to the
pod's own address are accepted. Those with an address of the pod's inside are dropped (`guard`).

Traffic of `localhost` is not translated here. That of eBPF datapaths is even excluded from
connection tracking, whose table a busy pod would fill.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from testbed.host import namespaces, netlink, nft
from testbed.host.ledger import Scope
from testbed.model.addresses import LINK_PREFIX, NATIVE_VIEW_NET6, Address, alias, guest_link
from testbed.model.errors import Error
from testbed.model.terms import Family, Transport

TABLE, GUARD = "testbed-gateway", "testbed-guard"

_IP = {Family.IPV4: "ip", Family.IPV6: "ip6"}
_LINKS = {f: f"{alias(f)}/{LINK_PREFIX[f]}" for f in Family}
_INSIDE = {
    Family.IPV4: f"127.0.0.0/8, {_LINKS[Family.IPV4]}",
    Family.IPV6: f"::1, {_LINKS[Family.IPV6]}, {NATIVE_VIEW_NET6}",
}
"""Addresses that are valid only within a pod."""
_NEIGHBORS = {Family.IPV4: "", Family.IPV6: ", fe80::/10, ff00::/8"}


def guard(owner: Scope, netns: str, links: Collection[str]) -> None:
    """Drop packets from outside that have an address of the pod's inside, ahead of other rules.

    `links`: names of guests' links and the pod's own. All other interfaces of the namespace are
    outside, also those that are added later. Raises `Error` if the kernel lacks such rules.
    """
    if why := nft.unsupported():
        raise Error(f"guests of {netns} would be reached from outside: {why}")
    owner.defer(unguard, netns=netns)
    names = ", ".join(f'"{name}"' for name in ("lo", *sorted(links)))
    drops = (
        f"{_IP[family]} {end} {{ {_INSIDE[family]} }} drop"
        for family in Family
        for end in ("saddr", "daddr")
    )
    text = (
        f"table inet {GUARD}",  # else the deletion fails
        f"delete table inet {GUARD}",
        f"table inet {GUARD} {{",
        "chain from_outside {",
        "type filter hook prerouting priority raw - 10",
        f"iifname {{ {names} }} accept",
        *drops,
        "}",
        "}",
    )
    nft.load(netns, "\n".join(text))


def unguard(netns: str) -> None:
    """Remove the rules of `guard`. A missing namespace is no error."""
    if (namespaces.NETNS / netns).exists():
        nft.load(netns, f"table inet {GUARD}\ndelete table inet {GUARD}")


def open(
    netns: str,
    uplink: str,
    addresses: Mapping[Family, Address],
    owners: Mapping[tuple[Transport, int], int],
    families: Mapping[int, Collection[Family]],
    *,
    needs_conntrack: bool,
) -> None:
    """Route between guests and the uplink of the namespace. The rules go with the namespace.

    `addresses`: the pod's on the uplink. `owners`: (transport, port) → n of the guest that serves
    it. `families`: n of a guest → its IP versions. `needs_conntrack`: see `Attachment`; else
    connections to `localhost` are not tracked. Raises `Error` if the kernel lacks such rules.
    """
    text = [
        f"table inet {TABLE}",  # else the deletion fails
        f"delete table inet {TABLE}",
        f"table inet {TABLE} {{",
    ]
    text += [
        _of_family(uplink, family, address, owners, families)
        for family, address in addresses.items()
    ]
    if not needs_conntrack:
        text += [
            f"chain {hook}_untracked {{ type filter hook {hook} priority raw; "
            + "; ".join(
                f"{_IP[f]} saddr {{ {_INSIDE[f]} }} {_IP[f]} daddr {{ {_INSIDE[f]} }} notrack"
                for f in Family
            )
            + "; }"
            for hook in ("prerouting", "output")
        ]
    nft.load(netns, "\n".join((*text, "}")))
    namespaces.set_sysctls(
        netns,
        {
            **{
                f"net/ipv4/conf/{link}/send_redirects": 0
                for link in ("all", "default", *netlink.links(netns))
            },
            "net/ipv4/conf/all/forwarding": 1,
            "net/ipv6/conf/all/forwarding": 1,
        },
    )


def _of_family(
    uplink: str,
    family: Family,
    pod: Address,
    owners: Mapping[tuple[Transport, int], int],
    families: Mapping[int, Collection[Family]],
) -> str:
    ip, version = _IP[family], family[3]
    served = (
        f"{transport} . {port} : {guest_link(family, n)}"
        for (transport, port), n in owners.items()
        if family in families[n]
    )
    to_owner = f"{ip} daddr {pod} dnat {ip} to meta l4proto . th dport map @owners{version}"
    # With the pod's address as source, answers pass the gateway, too.
    from_guest_to_pod = (
        f"{ip} saddr {_LINKS[family]} ct original {ip} daddr {pod} snat {ip} to {pod}"
    )
    return (
        nft.elements(f"map owners{version}", f"inet_proto . inet_service : {family}_addr", served)
        + f"""
chain from_outside{version} {{
    type filter hook prerouting priority raw
    iifname "{uplink}" {ip} daddr != {{ {pod}{_NEIGHBORS[family]} }} drop
}}
chain to_owner{version} {{
    type nat hook prerouting priority dstnat
    {to_owner}
}}
chain to_owner_from_here{version} {{
    type nat hook output priority -100
    {to_owner}
}}
chain from_guest{version} {{
    type nat hook postrouting priority srcnat
    oifname "{uplink}" {ip} saddr {_LINKS[family]} snat {ip} to {pod}
    {from_guest_to_pod}
}}
chain from_guest_to_native{version} {{
    type nat hook input priority 100
    {from_guest_to_pod}
}}
"""
    )
