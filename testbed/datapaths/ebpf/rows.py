"""Fills, reads and clears a pod's rows in the maps of its programs (`bpf/maps.h`)."""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed import bpf
from testbed.bpf import ProgramSet
from testbed.datapaths.ebpf.challenge_ack import GuestConnection
from testbed.datapaths.ebpf.loopback_side import Owners
from testbed.host.ledger import Scope
from testbed.model import addresses
from testbed.model.errors import Error
from testbed.model.terms import Family, Transport

NATIVE_FLOW_GUESTS = 64
"""The map `native_flow_counts` counts flows with natives of guests below this number."""
IPV4_ONLY = 0x100
"""Flag in a value of the map `owners`: the guest has no IPv6."""
LEARNED = (("fragments", "=8IIBBBB", "=HH", 9), ("nonstandard_flows", "=BBBBHH", "=8I", 0))
"""Maps that programs fill: name, layouts of key and value, and where in the key the slot is."""
PROTOCOLS = {Transport.TCP: socket.IPPROTO_TCP, Transport.UDP: socket.IPPROTO_UDP}


@dataclass(frozen=True)
class Rows:
    """A pod's rows in the maps of `bpf/maps.h`. Counts are (packets, layer 3 bytes)."""

    programs: ProgramSet
    reasons: tuple[str, ...]
    """Names of the counters, in the order of the programs' `enum reason`."""

    def fill(self, owner: Scope, owners: Owners, guests: Mapping[int, Collection[Family]]) -> None:
        """Write the owners of ports and the families of guests, and add entries for flow counts.

        Raises `Error` if there is no room for them: all pods share `flow_counts`.
        """
        slot = self.programs.slot
        keys = [[slot << 24 | PROTOCOLS[transport] << 16 | port] for transport, port in owners]
        rows: dict[str, Any] = {
            "pins": str(self.programs.pins),
            "slot": slot,
            "owners": keys,
            "guests": list(guests),
            "reasons": len(self.reasons),
        }
        owner.defer(clear, **rows)
        if not owner.continues:
            clear(**rows)
        for key, n in zip(keys, owners.values(), strict=True):
            flags = 0 if Family.IPV6 in guests[n] else IPV4_ONLY
            _owners(self.programs)[tuple(key)] = (n | flags,)
        try:
            for flow in _flows(slot, guests):
                _flow_counts(self.programs).add(flow, (0, 0))
        except OSError as e:
            if e.errno != errno.E2BIG:
                raise
            raise Error(
                f"there is no room to count what each pair of {len(guests)} guests carries",
                hint="all pods share 16384 entries, and n guests take about n²: use at most 127 "
                "guests, or take other pods down",
            ) from e

    def port(self, n: int) -> int:
        """Index of guest n's link; 0 while the guest is down."""
        return int(_guests(self.programs)[self.programs.slot << 8 | n,][0])

    def set_port(self, n: int, ifindex: int) -> None:
        """Set the index of guest n's link, 0: it is down. When it sends, programs set it again."""
        _guests(self.programs)[self.programs.slot << 8 | n,] = (ifindex,)

    def carried(self, client: int | None, server: int | None) -> tuple[int, ...]:
        """Traffic between two workloads in both directions, of which at least one is a guest.

        Guests by number, None for natives.
        """
        c, s = client or 0, server or 0
        if not (c and s) and c + s < NATIVE_FLOW_GUESTS:
            row = 2 * ((c + s) << 1 | (not c))
            return _native_flow_counts(self.programs)[self.programs.slot,][row : row + 2]
        try:
            return _flow_counts(self.programs)[self.programs.slot, c, s]
        except KeyError:
            return (0, 0)

    def take_connections(self, n: int) -> list[GuestConnection]:
        """Remove and return guest n's TCP connections with other guests, as these see them."""
        taken = []
        for client, server, v6, client_port, server_port in _take_connections(self.programs, [n]):
            family = Family.IPV6 if v6 else Family.IPV4
            if client != n:
                taken.append(
                    GuestConnection(client, client_port, addresses.alias(family), server_port)
                )
            elif server != n:
                dialed_by = addresses.guest_view(family, n)
                taken.append(GuestConnection(server, server_port, dialed_by, client_port))
        return taken

    def counters(self) -> dict[str, tuple[int, ...]]:
        """Counters of the pod, by reason."""
        counters, first = _counters(self.programs), self.programs.slot * len(self.reasons)
        return {reason: counters[first + i,] for i, reason in enumerate(self.reasons)}


def clear(pins: str, slot: int, owners: list[list[int]], guests: list[int], reasons: int) -> None:
    """Clear a pod's rows. Missing programs and rows are no error."""
    if not Path(pins, "users").exists():
        return
    programs = ProgramSet(Path(pins), slot)
    try:
        for n in guests:
            _guests(programs)[slot << 8 | n,] = (0,)
        for reason in range(reasons):
            _counters(programs)[slot * reasons + reason,] = (0, 0)
        _native_flow_counts(programs)[slot,] = (0,) * 4 * NATIVE_FLOW_GUESTS
        for owned in owners:
            with suppress(KeyError):
                del _owners(programs)[tuple(owned)]
        for flow in _flows(slot, guests):
            with suppress(KeyError):
                del _flow_counts(programs)[flow]
        _take_connections(programs, guests)
        for name, key, value, at in LEARNED:
            learned = programs.map(name, key, value)
            for row in learned:
                if row[at] == slot:
                    with suppress(KeyError):
                        del learned[row]
    finally:
        programs.close()


def _guests(programs: ProgramSet) -> bpf.Map:
    return programs.map("guests", "=I", "=I")


def _owners(programs: ProgramSet) -> bpf.Map:
    return programs.map("owners", "=I", "=I")


def _flow_counts(programs: ProgramSet) -> bpf.Map:
    return programs.map("flow_counts", "=BBBx", "=QQ")


def _native_flow_counts(programs: ProgramSet) -> bpf.Map:
    return programs.map("native_flow_counts", "=I", f"={4 * NATIVE_FLOW_GUESTS}Q")


def _counters(programs: ProgramSet) -> bpf.Map:
    return programs.map("counters", "=I", "=QQ")


def _take_connections(programs: ProgramSet, guests: list[int]) -> list[tuple[int, ...]]:
    """Remove the connections of some guests from `guest_connections`, and return their keys.

    The slot is left out. There are none if the programs have no such map.
    """
    taken = []
    with suppress(FileNotFoundError):
        connections = programs.map("guest_connections", "=BBBBHH", "=B")
        for key in connections:
            slot, client, server, *_ = key
            if slot == programs.slot and (client in guests or server in guests):
                taken.append(key[1:])
                with suppress(KeyError):
                    del connections[key]
    return taken


def _flows(slot: int, guests: Iterable[int]) -> list[tuple[int, int, int]]:
    """Keys of `flow_counts`: all pairs, but not natives alone nor those in `native_flow_counts`."""
    workloads = [0, *guests]
    pairs = ((client, server) for client in workloads for server in workloads)
    return [(slot, c, s) for c, s in pairs if (c and s) or c + s >= NATIVE_FLOW_GUESTS]
