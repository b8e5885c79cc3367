"""The address plan of pods, guests and nodes: addresses, MACs and the agent's port.

One plan for every pod: pods never share a link, so the same addresses may stand in each. Guests are
numbered from 1; everything about guest n is arithmetic in n. The same plan stands in
`bpf/addresses.h`, and a test holds the two together.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

from testbed.model.terms import Family

Address = IPv4Address | IPv6Address


MAX_GUESTS = 250

LINK_PREFIX = {Family.IPV4: 20, Family.IPV6: 64}
"""Prefix length of the guest link, 169.254.64.0/20 and fd77::/64. It holds alias, native source,
links and guest views, so that a guest needs no route; it does not hold 169.254.169.254."""

_ALIAS = {Family.IPV4: "169.254.77.1", Family.IPV6: "fd77::1"}
_NATIVE_SOURCE = {Family.IPV4: "169.254.77.2", Family.IPV6: "fd77::2"}
_NATIVE_SOURCE_ODD = {Family.IPV4: "169.254.77.4", Family.IPV6: "fd77::4"}
_POD_LINK = {Family.IPV4: "169.254.77.3", Family.IPV6: "fd77::3"}
_GUEST_LINK = {Family.IPV4: "169.254.78.0", Family.IPV6: "fd77::78:0"}
_GUEST_VIEW = {Family.IPV4: "169.254.79.0", Family.IPV6: "fd77::79:0"}
_NATIVE_VIEW = {Family.IPV4: "127.77.0.0", Family.IPV6: "fd77:0:0:127::"}
_LOOPBACK = {Family.IPV4: "127.0.0.1", Family.IPV6: "::1"}

NATIVE_VIEW_NET6 = "fd77:0:0:127::/64"
"""Routed to `lo` in the pod's namespace (127.77.0.0 is there by nature)."""


def loopback(family: Family) -> Address:
    """127.0.0.1 or ::1."""
    return ip_address(_LOOPBACK[family])


def alias(family: Family) -> Address:
    """What `localhost` resolves to in a guest."""
    return ip_address(_ALIAS[family])


def native_source(family: Family) -> Address:
    """Source address of native clients as a guest sees them; never the alias."""
    return ip_address(_NATIVE_SOURCE[family])


def native_source_odd(family: Family) -> Address:
    """The same, of flows that are not from 127.0.0.1 to 127.0.0.1 (::1), but on `lo` all the same.

    Which, is kept per flow for the way back; the ordinary flow needs no memory.
    """
    return ip_address(_NATIVE_SOURCE_ODD[family])


def pod_link(family: Family) -> Address:
    """The pod's own address on the guest link (control connections, `direct`, `bridge`)."""
    return ip_address(_POD_LINK[family])


def guest_link(family: Family, n: int) -> Address:
    """Guest n's own address on the guest link."""
    return ip_address(_GUEST_LINK[family]) + n


def guest_view(family: Family, n: int) -> Address:
    """Guest n as guests (itself too) see it when it dials `localhost`."""
    return ip_address(_GUEST_VIEW[family]) + n


def native_view(family: Family, n: int) -> Address:
    """Guest n as native servers see it when it dials `localhost`."""
    return ip_address(_NATIVE_VIEW[family]) + n


MAX_PODS = 65000
"""With addresses of one node."""

_NODE = {Family.IPV4: "10.77.0.1", Family.IPV6: "fd77:1::1"}


def node_address(family: Family) -> Address:
    """The node's own on its network, 10.77.0.0/16 and fd77:1::/112. It routes for its pods."""
    return ip_address(_NODE[family])


def pod_address(family: Family, n: int) -> Address:
    """What the n-th pod of the node (from 1) has there: the pod's IP."""
    return node_address(family) + n


_BETWEEN_HOSTS = {Family.IPV4: "10.78.0.0", Family.IPV6: "fd77:2::"}


def address_between_hosts(family: Family, n: int) -> Address:
    """Of a pod that another host's pod dials: of the k-th two of hosts, client's and server's are
    number 2k and 2k + 1.
    """
    return ip_address(_BETWEEN_HOSTS[family]) + n


ALIAS_MAC = "02:77:00:00:00:01"
"""Answered for alias, native source and guest views; source MAC of translated frames."""
POD_MAC = "02:77:00:00:00:03"
"""The pod's own interface on the guest link."""


def guest_mac(n: int) -> str:
    """MAC of guest n's interface."""
    return f"02:77:00:00:01:{n:02x}"


CONTROL_PORT = 4700
"""TCP port on which a traffic agent takes its orders, at the workload's own address."""
