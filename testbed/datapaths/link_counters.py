"""Attachment of datapaths without programs: the links count."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Any

from testbed.datapaths.interface import Count, Wiring
from testbed.host import namespaces, netlink
from testbed.model.addresses import alias
from testbed.model.errors import Error
from testbed.model.terms import Family


class LinkCounters:
    """The attachment of datapaths without programs: the links count."""

    tracked = True

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring

    def carried(self, client: int | None, server: int | None) -> Count:
        """Of the guests' ports among the two; between natives, of `lo`."""
        ports = {p.n: p.ifindex for p in self.wiring.ports}
        ends = {ports[n] for n in (client, server) if n is not None}
        netns = self.wiring.link_netns if ends else self.wiring.netns
        with namespaces.open_socket(netns) as ip:
            total = sum((Count(*netlink.traffic(ip, i)) for i in ends or {1}), Count())
        if (client is None) is (server is None):  # a packet goes into one end and out of the other
            return Count(total.packets // 2, total.bytes // 2)
        return total

    def counters(self) -> dict[str, Count]:
        return {}

    def rewire(self, wiring: Wiring) -> None:
        self.wiring = wiring

    def attach_deferred(self) -> None:
        pass

    def guest_ended(self, n: int) -> None:
        pass

    def trace(self, lock: threading.RLock) -> AbstractContextManager[dict[str, Any]]:
        raise Error(
            "this pod's datapath has no programs to trace", hint="testbed up --datapath steer"
        )

    def detach(self) -> None:
        pass


def add_aliases(wiring: Wiring) -> None:
    """Give the alias to the pod's end of every guest's link (layout `pod`), where it is not yet.

    It goes with the links.
    """
    with namespaces.open_socket(wiring.netns) as ip:
        for port in wiring.ports:
            for family in Family:
                netlink.add_address(ip, port.ifindex, alias(family), alias(family).max_prefixlen)
