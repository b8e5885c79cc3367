"""Attachments of datapaths without eBPF programs: traffic is read from counters of links."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Any

from testbed.datapaths.interface import Count, Wiring
from testbed.host import cgroups, namespaces, netlink
from testbed.host.ledger import Scope
from testbed.model.addresses import alias
from testbed.model.errors import Error
from testbed.model.terms import Family


class LinkCounters:
    """Attachment that reads traffic from counters of links, and makes nothing itself."""

    needs_conntrack = True

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring

    def carried(self, client: int | None, server: int | None) -> Count:
        """Traffic of the guests' ports of client and server; between natives, that of `lo`."""
        ports = {p.n: p.ifindex for p in self.wiring.ports}
        ends = {ports[n] for n in (client, server) if n is not None}
        netns = self.wiring.link_netns if ends else self.wiring.netns
        with namespaces.open_socket(netns) as ip:
            total = sum((Count(*netlink.traffic(ip, i)) for i in ends or {1}), Count())
        if (client is None) is (server is None):  # each packet was counted at both ends
            return Count(total.packets // 2, total.bytes // 2)
        return total

    def counters(self) -> dict[str, Count]:
        return {}

    def missing_programs(self) -> set[str]:
        return set()

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


class ProcessAttachment(LinkCounters):
    """Attachment of a datapath whose work is done by processes in user space.

    They run in a cgroup of their own, which ends with the attachment.
    """

    def __init__(self, wiring: Wiring, owner: Scope, name: str) -> None:
        super().__init__(wiring)
        self._scope = owner.part()
        self._cgroup = cgroups.create(self._scope, f"{wiring.netns}/{name}")

    def detach(self) -> None:
        self._scope.undo()


def add_aliases(wiring: Wiring) -> None:
    """Give the alias to the pod's end of each guest's link (layout `pod`), unless it has it.

    The addresses go with the links.
    """
    with namespaces.open_socket(wiring.netns) as ip:
        for port in wiring.ports:
            for family in Family:
                netlink.add_address(ip, port.ifindex, alias(family), alias(family).max_prefixlen)
