"""The address plan of pods, guests and nodes: IP addresses, MAC addresses and the agent's port.

All pods have the same plan: pods never share a link, so each can use the same addresses. Guests are
numbered from 1, and the addresses of guest n are computed from n. `bpf/addresses.h` has the same
plan, and a test compares the two.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

from testbed.model.terms import Family

Address = IPv4Address | IPv6Address


MAX_GUESTS = 250

LINK_PREFIX = {Family.IPV4: 20, Family.IPV6: 64}
"""Prefix length of the guest link, 169.254.64.0/20 and fd77::/64. The prefix covers alias, native
source, link addresses and guest views, so that a guest needs no route. It does not cover
169.254.169.254."""

_ALIAS = {Family.IPV4: "169.254.77.1", Family.IPV6: "fd77::1"}
_NATIVE_SOURCE = {Family.IPV4: "169.254.77.2", Family.IPV6: "fd77::2"}
_NATIVE_SOURCE_ODD = {Family.IPV4: "169.254.77.4", Family.IPV6: "fd77::4"}
_POD_LINK = {Family.IPV4: "169.254.77.3", Family.IPV6: "fd77::3"}
_GUEST_LINK = {Family.IPV4: "169.254.78.0", Family.IPV6: "fd77::78:0"}
_GUEST_VIEW = {Family.IPV4: "169.254.79.0", Family.IPV6: "fd77::79:0"}
_NATIVE_VIEW = {Family.IPV4: "127.77.0.0", Family.IPV6: "fd77:0:0:127::"}
_LOOPBACK = {Family.IPV4: "127.0.0.1", Family.IPV6: "::1"}

NATIVE_VIEW_NET6 = "fd77:0:0:127::/64"
"""IPv6 prefix that the pod's namespace routes to `lo` (all of 127.0.0.0/8 is local anyway)."""


LINK_NETS = {
    Family.IPV4: ("169.254.77.0/24", "169.254.78.0/24", "169.254.79.0/24"),
    Family.IPV6: ("fd77::/64",),
}
"""Networks with all addresses of the guest link. KubeVirt uses others of 169.254.64.0/20."""


def authority(host: Address | str, port: int) -> str:
    """Host and port together, as in a URL (RFC 3986): 127.0.0.1:80, [::1]:80."""
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def loopback(family: Family) -> Address:
    """The loopback address: 127.0.0.1 or ::1."""
    return ip_address(_LOOPBACK[family])


def alias(family: Family) -> Address:
    """The alias: the address that `localhost` resolves to in a guest."""
    return ip_address(_ALIAS[family])


def native_source(family: Family) -> Address:
    """Source address of native clients as a guest sees them. It is never the alias."""
    return ip_address(_NATIVE_SOURCE[family])


def native_source_odd(family: Family) -> Address:
    """Nonstandard native source: source of native clients that use other addresses of `lo`.

    Ordinary flows go from 127.0.0.1 to 127.0.0.1 (::1 to ::1) and need no state. The addresses of
    other flows are kept in a map, for their replies.
    """
    return ip_address(_NATIVE_SOURCE_ODD[family])


def pod_link(family: Family) -> Address:
    """The pod's own address on the guest link, for control connections, `direct` and `bridge`."""
    return ip_address(_POD_LINK[family])


def guest_link(family: Family, n: int) -> Address:
    """Guest n's own address on the guest link."""
    return ip_address(_GUEST_LINK[family]) + n


def guest_view(family: Family, n: int) -> Address:
    """Source address of guest n, as guests see it (itself included), when it dials `localhost`."""
    return ip_address(_GUEST_VIEW[family]) + n


def native_view(family: Family, n: int) -> Address:
    """Source address of guest n, as native servers see it, when it dials `localhost`."""
    return ip_address(_NATIVE_VIEW[family]) + n


GUEST_NETS = {
    Family.IPV4: (f"{_NATIVE_VIEW[Family.IPV4]}/24", *LINK_NETS[Family.IPV4]),
    Family.IPV6: (NATIVE_VIEW_NET6, *LINK_NETS[Family.IPV6]),
}
"""Networks with all addresses of the plan that are valid only within a pod, but loopback."""

MAX_PODS = 65000
"""Largest number of pods that have addresses on one node."""

_NODE = {Family.IPV4: "10.77.0.1", Family.IPV6: "fd77:1::1"}


def node_address(family: Family) -> Address:
    """The node's own address on its pod network, 10.77.0.0/16 and fd77:1::/112.

    The node is the router of its pods.
    """
    return ip_address(_NODE[family])


def pod_address(family: Family, n: int) -> Address:
    """The pod IP of the n-th pod of the node, counted from 1."""
    return node_address(family) + n


_BETWEEN_HOSTS = {Family.IPV4: "10.78.0.0", Family.IPV6: "fd77:2::"}


def address_between_hosts(family: Family, n: int) -> Address:
    """Address of a pod in cells between two hosts.

    In the k-th pair of hosts, the client's pod has number 2k and the server's pod 2k + 1.
    """
    return ip_address(_BETWEEN_HOSTS[family]) + n


ALIAS_MAC = "02:77:00:00:00:01"
"""MAC address that alias, native source and guest views resolve to (ARP, neighbor discovery).

It is also the source of translated frames."""
POD_MAC = "02:77:00:00:00:03"
"""MAC address of the pod's own interface on the guest link."""


def guest_mac(n: int) -> str:
    """MAC address of guest n's interface."""
    return f"02:77:00:00:01:{n:02x}"


CONTROL_PORT = 4700
"""TCP port of a traffic agent's control connection, at the workload's own address."""
