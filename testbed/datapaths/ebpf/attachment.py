"""Attachment of the eBPF datapaths: the part that is the same for all (`bpf/pod.h`)."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from testbed import bpf
from testbed.datapaths.ebpf import loopback_side, rows
from testbed.datapaths.ebpf.challenge_ack import Challenges
from testbed.datapaths.interface import Count, Wiring
from testbed.datapaths.link_counters import LinkCounters
from testbed.host import netlink
from testbed.host.ledger import Scope

AT_PORTS = {"port_ingress": bpf.INGRESS, "port_egress": bpf.EGRESS}
"""Programs at guests' ports in the pod's own namespace."""


class EbpfAttachment:
    """Base of the attachments of eBPF datapaths.

    Subclasses say which programs are attached where, by `_attach_lo`, which is called once, and
    `_attach_links`, which is called again whenever links were replaced or programs removed: what is
    attached already is not touched then.
    """

    needs_conntrack = False
    deferred = frozenset({"lo_egress"})
    """Names of the programs that links run by tcx in the end: those that most packets meet. The
    kernel takes 10 ms to attach each, in which nobody else can change links, and 20 to detach."""

    def __init__(
        self,
        name: str,
        reasons: tuple[str, ...],
        wiring: Wiring,
        owner: Scope,
        local: Sequence[str] = (),
    ) -> None:
        """`reasons`: in the order of the programs' `enum reason`. `local`: see `prepare_lo`."""
        self.name, self.reasons = name, reasons
        self._wiring = wiring
        self._scope = owner.part()
        self._links: dict[tuple[str, int], Scope] = {}
        """(namespace, ifindex) → the scope of what is attached there."""
        self._challenges = Challenges()
        self._held: list[socket.socket] = []
        self._places: dict[tuple[str, int, int], tuple[str, int]] = {}
        """(namespace, ifindex, hook) → name and class of the attached program."""
        self._by_tcx: set[tuple[str, int, int]] = set()
        """Those of `_places` where the link runs the program by tcx, and not by a filter."""
        self._calls: list[str] = []
        """Names of the programs in the program array of `make_calls`, once it exists."""
        self._at_cgroup: dict[str, bpf.ProgramSet] = {}
        """Hook of the cgroup → the set whose program of that name is attached there."""
        try:
            # Before hold_ports, which needs what it allows: locked memory, before Linux 5.11.
            self._programs = self._at_work = bpf.load(name, self._scope)
            self._held = loopback_side.hold_ports(wiring.pod, wiring.netns, wiring.owners)
            self._rows = rows.Rows(self._programs, reasons)
            self._rows.fill(self._scope, wiring.owners, {p.n: p.families for p in wiring.ports})
            for port in wiring.ports:
                self._rows.set_port(port.n, port.ifindex)
            loopback_side.prepare_lo(self._scope, wiring.netns, wiring.owners, local)
            self._attach_lo()
            self._attach_links()
        except BaseException:
            self.detach()
            raise
        self._close_programs()  # opened again when they are needed: many pods are many files

    def carried(self, client: int | None, server: int | None) -> Count:
        if client is None and server is None:
            return LinkCounters(self._wiring).carried(None, None)
        return Count(*self._rows.carried(client, server))

    def counters(self) -> dict[str, Count]:
        return {reason: Count(*count) for reason, count in self._rows.counters().items()}

    def rewire(self, wiring: Wiring) -> None:
        self._wiring = wiring
        existing = {netns: set(netlink.links(netns).values()) for netns, _ in self._links}
        for link in [link for link in self._links if link[1] not in existing[link[0]]]:
            self._links.pop(link).undo()
            self._places = {at: what for at, what in self._places.items() if at[:2] != link}
            self._by_tcx &= self._places.keys()
        for port in wiring.ports:
            # The index is 0 if the link vanished again, the row if the guest is down.
            if port.ifindex and self._rows.port(port.n):
                self._rows.set_port(port.n, port.ifindex)
        self._attach_links()  # first: a link without programs lets anything through
        missing = set(self._places_without_program())
        for place in missing - self._by_tcx:
            name, classid = self._places[place]
            bpf.replace_tc(*place, self._at_work.program(name), name, classid)
        if lost := missing & self._by_tcx:  # somebody else may have the place of our filter now
            self._by_tcx -= lost
            self.attach_deferred()
        for hook in self._hooks_without_program():
            self._attach_cgroup(hook, self._at_cgroup[hook])

    def missing_programs(self) -> set[str]:
        at_links = {self._places[place][0] for place in self._places_without_program()}
        return at_links | self._hooks_without_program()

    def _places_without_program(self) -> list[tuple[str, int, int]]:
        """Those of `_places` whose link is there, but not the program."""
        missing = []
        for netns in {netns for netns, _, _ in self._places}:
            links = set(netlink.links(netns).values())
            places = {
                (ifindex, hook): name
                for (where, ifindex, hook), (name, _) in self._places.items()
                if where == netns and ifindex in links
            }
            attached = bpf.attached_tc(netns, places)
            missing += [(netns, *place) for place in places.keys() - attached]
        return missing

    def _hooks_without_program(self) -> set[str]:
        """Hooks of the cgroup whose program somebody else detached; none if the cgroup is gone."""
        if not self._wiring.cgroup.exists():
            return set()
        return {
            hook
            for hook, programs in self._at_cgroup.items()
            if not bpf.runs_in_cgroup(self._wiring.cgroup, hook, programs.program(hook))
        }

    def guest_ended(self, n: int) -> None:
        self._rows.set_port(n, 0)
        if waiting := self._rows.take_connections(n):
            links = {port.n: port.ifname for port in self._wiring.ports}
            self._challenges.send(self._wiring.link_netns, [(c, links[c.n]) for c in waiting])

    def detach(self) -> None:
        self._challenges.close()
        self._scope.undo()
        loopback_side.release_ports(self._held)
        self._close_programs()

    def _close_programs(self) -> None:
        for programs in self._at_cgroup.values():
            programs.close()
        if hasattr(self, "_programs"):
            self._programs.close()

    def attach_deferred(self) -> None:
        """Attach the `deferred` programs by tcx instead, if the kernel has it."""
        if not bpf.has_tcx():
            return
        if not self._calls:
            self._calls = sorted(self.deferred)
            self._programs.make_calls(self._scope, len(self._calls))
            self._programs.set_calls(self._at_work, self._calls)
        for place, (name, classid) in self._places.items():
            if name not in self.deferred or place in self._by_tcx:
                continue
            netns, ifindex, hook = place
            if ifindex == loopback_side.LO_IFINDEX:  # in a pod of others it stays
                at = {"netns": netns, "ifindex": ifindex, "hook": hook, "name": name}
                self._links[netns, ifindex].defer(bpf.detach_tcx, **at)
            with self._programs.entry(name, classid, self._calls.index(name)) as entry:
                bpf.attach_tcx(*place, entry)
            self._by_tcx.add(place)

    def _attach_lo(self) -> None:
        self._attach(loopback_side.LO_IFINDEX, bpf.EGRESS, "lo_egress")

    def _attach_links(self) -> None:
        for port in self._wiring.ports:
            for name, hook in AT_PORTS.items():
                self._attach(port.ifindex, hook, name, port.n)

    def _show_names(self) -> None:
        """Attach programs of `bpf/names.c`, which show guests to natives as peers at localhost."""
        names = bpf.load("names", self._scope)
        for hook in ("getpeername4", "getpeername6"):
            self._attach_cgroup(hook, names)

    def _attach_cgroup(self, hook: str, programs: bpf.ProgramSet) -> None:
        """Attach a program to the pod's cgroup, at the hook that has its name."""
        bpf.attach_cgroup(self._scope, self._wiring.cgroup, hook, programs.program(hook))
        self._at_cgroup[hook] = programs

    def _attach(
        self, ifindex: int, hook: int, name: str, n: int = 0, netns: str | None = None
    ) -> None:
        """Attach a tc program to a link of the pod's namespace, or of `netns`, unless it is there.

        `n` is the guest's number if the link is a guest's port.
        """
        link = netns or self._wiring.netns, ifindex
        place, classid = (*link, hook), self._class_of(n)
        if place in self._places:
            return
        if link not in self._links:
            self._links[link] = self._scope.part()
        bpf.attach_tc(self._links[link], *place, self._at_work.program(name), name, classid)
        self._places[place] = name, classid

    def _class_of(self, n: int) -> int:
        """Class of a link, which tells programs its pod and guest (`port_of` in `bpf/maps.h`)."""
        return self._programs.slot << 8 | n

    @contextmanager
    def trace(self, lock: threading.RLock) -> Iterator[dict[str, Any]]:
        """Replace the programs by their traced variant while the context lasts."""
        with self._scope.part() as part:
            variant = bpf.load_traced(self._programs, part)
            try:
                self._replace(variant, lock)
                yield {
                    "pins": str(variant.pins),
                    "slot": variant.slot,
                    "reasons": self.reasons,
                }
            finally:
                self._replace(self._programs, lock)
                variant.close()

    def _replace(self, programs: bpf.ProgramSet, lock: threading.RLock) -> None:
        with lock:
            self._at_work = programs
            for place, (name, classid) in self._places.items():
                if place not in self._by_tcx:
                    with suppress(OSError):  # that link is gone
                        bpf.replace_tc(*place, programs.program(name), name, classid)
            self._programs.set_calls(programs, self._calls)
