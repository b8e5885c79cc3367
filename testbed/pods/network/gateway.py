"""The pod as its guests' gateway: NAT rules by which guests share the pod's address outside.

The rules are in the pod's namespace, for an uplink that exists already. Packets of guests to the
outside get the pod's address as source. Packets to a port that a guest owns, from outside or from
the pod itself, go to that guest, with their source unchanged. Between other interfaces nothing is
forwarded, and packets from outside with an address of the pod's inside are dropped (`guard`).

Traffic of `localhost` is not translated here. That of eBPF datapaths is even excluded from
connection tracking, whose table a busy pod would fill.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from testbed.host import facts, namespaces, netlink, nft
from testbed.host.ledger import Scope
from testbed.model.addresses import (
    GUEST_NETS,
    LINK_NETS,
    NATIVE_VIEW_NET6,
    Address,
    guest_link,
)
from testbed.model.errors import Error
from testbed.model.terms import Family, Transport

TABLE, GUARD = "testbed-gateway", "testbed-guard"

_IP = {Family.IPV4: "ip", Family.IPV6: "ip6"}
_LINKS = {family: ", ".join(LINK_NETS[family]) for family in Family}
_LOOPBACK = {Family.IPV4: "127.0.0.0/8", Family.IPV6: "::1"}
_INSIDE = {
    Family.IPV4: f"{_LOOPBACK[Family.IPV4]}, {_LINKS[Family.IPV4]}",
    Family.IPV6: f"{_LOOPBACK[Family.IPV6]}, {_LINKS[Family.IPV6]}, {NATIVE_VIEW_NET6}",
}
"""Addresses that are valid only within a pod."""
_GUESTS = {family: ", ".join(GUEST_NETS[family]) for family in Family}


def guard(owner: Scope, netns: str, links: Collection[str]) -> None:
    """Drop packets from outside that have an address of the pod's inside, ahead of other rules.

    `links`: names of guests' links and the pod's own. All other interfaces of the namespace are
    outside, also those that are added later. Raises `Error` if the kernel lacks such rules.
    """
    if why := nft.unsupported():
        raise Error(f"guests of {netns} would be reached from outside: {why}")
    owner.defer(unguard, netns=netns)
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
        f"iifname {_names(('lo', *links))} accept",
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
    owner: Scope,
    netns: str,
    links: Collection[str],
    addresses: Mapping[Family, Sequence[Address]],
    owners: Mapping[tuple[Transport, int], int],
    families: Mapping[int, Collection[Family]],
    *,
    needs_conntrack: bool,
    foreign: bool,
) -> None:
    """Route between guests and the other interfaces of the namespace, which are there already.

    `links`: names of guests' links. `addresses`: the pod's on the other interfaces. `owners`:
    (transport, port) → n of the guest that serves it. `families`: n of a guest → its IP versions.
    `needs_conntrack`: see `Attachment`; else connections to `localhost` are not tracked. `foreign`:
    the namespace is somebody else's, and gets back what it had; else all goes with it. A family
    that was not forwarded before is not forwarded between the other interfaces that are there now.
    Raises `Error` if the kernel lacks such rules.
    """
    now = _sysctls(netns)
    left = [entry.arguments for entry in owner.left(close)]
    before: dict[str, str] = next((a["before"] for a in left if a["netns"] == netns), now)
    if foreign:
        owner.defer(close, netns=netns, before=before)
    inside, others = _names(("lo", *links)), _links_in(before) - {"lo", *links}
    text = [
        f"table inet {TABLE}",  # else the deletion fails
        f"delete table inet {TABLE}",
        f"table inet {TABLE} {{",
        *(
            _of_family(inside, family, of_pod, owners, families)
            for family, of_pod in addresses.items()
        ),
        "chain through { type filter hook forward priority filter",
        # What a bridge forwards, and br_netfilter shows here.
        'meta iifkind "bridge" meta oifkind "bridge" accept',
        *(
            f"meta nfproto {family} iifname {_names(others)} oifname {_names(others)} drop"
            for family in Family
            if others and (not foreign or before.get(f"net/{family}/conf/all/forwarding") != "1")
        ),
        "}",
    ]
    if not needs_conntrack:
        text += _untracked(foreign=foreign)
    nft.load(netns, "\n".join((*text, "}")))
    _forward(netns, now)


def close(netns: str, before: Mapping[str, str]) -> None:
    """Undo `open` in a foreign namespace, as far as it and its links still exist."""
    if (namespaces.NETNS / netns).exists():
        new = netlink.links(netns).keys() - _links_in(before)
        of_new = {
            key.replace("/default/", f"/{link}/"): value
            for key, value in before.items()
            for link in new
            if "/default/" in key
        }
        namespaces.set_sysctls(netns, {**before, **of_new})
        nft.load(netns, f"table inet {TABLE}\ndelete table inet {TABLE}")


def _sysctls(netns: str) -> dict[str, str]:
    """All sysctls that `_forward` changes, in the order in which they are to be set back.

    What is set for all links changes those of each, so it comes first.
    """
    each = ("default", *netlink.links(netns))
    keys = [f"net/{family}/conf/all/forwarding" for family in facts.families()]
    keys += [f"net/{family}/conf/{link}/forwarding" for family in facts.families() for link in each]
    keys += ["net/ipv4/conf/all/accept_redirects"]
    keys += [f"net/ipv4/conf/{link}/send_redirects" for link in ("all", *each)]
    if Family.IPV6 in facts.families():
        keys += [f"net/ipv6/conf/{link}/accept_ra" for link in each]
    return namespaces.sysctls(netns, *keys)


def _forward(netns: str, now: Mapping[str, str]) -> None:
    """Let a namespace forward whose `_sysctls` are `now`.

    With IPv6 it is enough if that is set for all: the links stay a host's, which take router
    advertisements. What they have taken would be forgotten, unless accept_ra is 2 at that moment.
    """
    of_ra = [key for key, value in now.items() if key.endswith("/accept_ra") and value != "0"]
    of_links = {key: value for key, value in now.items() if key.startswith("net/ipv6/")}
    namespaces.set_sysctls(netns, dict.fromkeys(of_ra, 2))
    of_links["net/ipv6/conf/all/forwarding"] = "1"
    namespaces.set_sysctls(netns, of_links)
    of_ipv4 = [key for key in now if key.startswith("net/ipv4/")]
    values = {key: int(key.endswith("/forwarding")) for key in of_ipv4}
    namespaces.set_sysctls(netns, values)


def _untracked(*, foreign: bool) -> list[str]:
    """Chains that keep `localhost` out of connection tracking.

    In a foreign namespace that is traffic of guests alone: others may have rules for natives'.
    """
    here = _GUESTS if foreign else _INSIDE
    return [
        f"chain {hook}_untracked {{ type filter hook {hook} priority raw; "
        + "; ".join(
            f"{_IP[f]} {one} {{ {here[f]} }} {_IP[f]} {other} {{ {_INSIDE[f]} }} notrack"
            for f in Family
            for one, other in (("saddr", "daddr"), ("daddr", "saddr"))[: 1 + foreign]
        )
        + "; }"
        for hook in ("prerouting", "output")
    ]


def _links_in(sysctls: Iterable[str]) -> set[str]:
    """Names of the links that such sysctls are about."""
    return {key.split("/")[3] for key in sysctls} - {"all", "default"}


def _names(links: Iterable[str]) -> str:
    """These links as a set of nft's."""
    return "{ " + ", ".join(f'"{name}"' for name in sorted(links)) + " }"


def _of_family(
    inside: str,
    family: Family,
    of_pod: Sequence[Address],
    owners: Mapping[tuple[Transport, int], int],
    families: Mapping[int, Collection[Family]],
) -> str:
    ip, version, guests = _IP[family], family[3], f"{{ {_LINKS[family]} }}"
    served = (
        f"{transport} . {port} : {guest_link(family, n)}"
        for (transport, port), n in owners.items()
        if family in families[n]
    )
    outside = f"""
chain from_guest{version} {{
    type nat hook postrouting priority srcnat
    oifname != {inside} {ip} saddr {guests} masquerade
}}
"""
    if not of_pod:
        return outside
    pod = f"{ip} daddr {{ {', '.join(map(str, of_pod))} }}"
    to_owner = f"dnat {ip} to meta l4proto . th dport map @owners{version}"
    # With the pod's address as source, answers pass the gateway, too.
    from_guest_to_pod = f"{ip} saddr {guests} ct original {pod} snat {ip} to {of_pod[0]}"
    # Rules of others come first (+ 5). What is sent from a loopback address goes by `lo`.
    return (
        nft.elements(f"map owners{version}", f"inet_proto . inet_service : {family}_addr", served)
        + f"""{outside}
chain to_owner{version} {{
    type nat hook prerouting priority dstnat + 5
    {pod} {to_owner}
}}
chain to_owner_from_here{version} {{
    type nat hook output priority -95
    {ip} saddr != {_LOOPBACK[family]} {pod} {to_owner}
}}
chain from_guest_to_pod{version} {{
    type nat hook postrouting priority srcnat
    {from_guest_to_pod}
}}
chain from_guest_to_native{version} {{
    type nat hook input priority 100
    {from_guest_to_pod}
}}
"""
    )
