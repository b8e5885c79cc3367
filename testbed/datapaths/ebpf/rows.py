"""Fills, reads and clears a pod's rows in the maps of its programs (`bpf/maps.h`)."""

from __future__ import annotations

import socket
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from testbed import bpf
from testbed.bpf import ProgramSet
from testbed.datapaths.ebpf import state
from testbed.datapaths.ebpf.challenge_ack import GuestConnection
from testbed.datapaths.ebpf.loopback_side import Owners
from testbed.datapaths.ebpf.state import PodState
from testbed.host.ledger import Scope
from testbed.model import addresses
from testbed.model.terms import Family, Transport

IPV4_ONLY = 0x100
"""Flag in a value of the map `owners`: the guest has no IPv6."""
PROTOCOLS = {Transport.TCP: socket.IPPROTO_TCP, Transport.UDP: socket.IPPROTO_UDP}


@dataclass(frozen=True)
class Rows:
    """A pod's rows in the maps of `bpf/maps.h`, and its state. Counts: packets, layer 3 bytes."""

    programs: ProgramSet
    reasons: tuple[str, ...]
    """Names of the counters, in the order of the programs' `enum reason`."""

    def fill(self, owner: Scope, owners: Owners, guests: Mapping[int, Collection[Family]]) -> None:
        """Write the owners of ports and the families of guests, and make the pod's state."""
        slot = self.programs.slot
        keys = [[slot << 24 | PROTOCOLS[transport] << 16 | port] for transport, port in owners]
        rows: dict[str, Any] = {
            "pins": str(self.programs.pins),
            "slot": slot,
            "owners": keys,
            "guests": list(guests),
        }
        owner.defer(clear, **rows)
        if not owner.continues:
            clear(**rows)
        state.create(self.programs)
        for key, ((transport, port), n) in zip(keys, owners.items(), strict=True):
            row = n if Family.IPV6 in guests[n] else n | IPV4_ONLY
            _owners(self.programs)[tuple(key)] = (row,)
            table = self._state.owned[transport is Transport.UDP]
            if not table[port % state.OWNED_PORTS]:
                table[port % state.OWNED_PORTS] = port << 16 | row

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
        if client is not None and server is not None:
            if max(client, server) < state.FIRST_GUESTS:
                count = self._state.between_guests[client][server]
                return count.packets, count.bytes
            try:
                return _guest_counts(self.programs)[self.programs.slot, client, server]
            except KeyError:  # they never talked
                return (0, 0)
        n, role = (client, state.GUEST_DIALS) if server is None else (server, state.GUEST_SERVES)
        counts = [direction[n][role] for direction in self._state.with_natives]
        return sum(count.packets for count in counts), sum(count.bytes for count in counts)

    def take_connections(self, n: int) -> list[GuestConnection]:
        """Remove and return guest n's TCP connections with other guests, as these see them."""
        taken = []
        rows = self._state.guest_connections
        for i, row in enumerate(rows):
            of = state.ConnectionRow.from_buffer_copy(row.to_bytes(8, sys.byteorder))
            if not of.in_use or n not in (of.client, of.server):
                continue
            if rows[i] == row:  # else a program has just moved it
                rows[i] = 0
            family = Family.IPV6 if of.v6 else Family.IPV4
            if of.client != n:
                alias = addresses.alias(family)
                taken.append(GuestConnection(of.client, of.client_port, alias, of.server_port))
            elif of.server != n:
                dialed_by = addresses.guest_view(family, n)
                taken.append(GuestConnection(of.server, of.server_port, dialed_by, of.client_port))
        return taken

    def counters(self) -> dict[str, tuple[int, ...]]:
        """Counters of the pod, by reason."""
        counts = zip(self.reasons, self._state.counters, strict=False)
        return {reason: (count.packets, count.bytes) for reason, count in counts}

    @cached_property
    def _state(self) -> PodState:
        return state.mapped(self.programs)


def clear(pins: str, slot: int, owners: list[list[int]], guests: list[int]) -> None:
    """Clear a pod's rows and its state. Missing programs and rows are no error."""
    if not Path(pins, "users").exists():
        return
    programs = ProgramSet(Path(pins), slot)
    try:
        for n in guests:
            _guests(programs)[slot << 8 | n,] = (0,)
        for owned in owners:
            with suppress(KeyError):
                del _owners(programs)[tuple(owned)]
        if max(guests, default=0) >= state.FIRST_GUESTS:
            counts = _guest_counts(programs)
            for key in counts:
                if key[0] == slot:
                    with suppress(KeyError):
                        del counts[key]
        state.clear(programs)
    finally:
        programs.close()


def _guests(programs: ProgramSet) -> bpf.Map:
    return programs.map("guests", "=I", "=I")


def _owners(programs: ProgramSet) -> bpf.Map:
    return programs.map("owners", "=I", "=I")


def _guest_counts(programs: ProgramSet) -> bpf.Map:
    return programs.map("guest_counts", "=BBBx", "=QQ")
