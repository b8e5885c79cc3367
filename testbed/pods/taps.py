"""Connects the taps of guests that somebody else boots with the links of these guests.

The programs of `bpf/tap.c` do it. A tap may be there, or appear later; when it vanishes and comes
back, the guest is a new one. Whatever else is attached to a tap stays, and gets all that is not for
the pod's inside.

    guest ── tap    t1 ── g1    (`links`)
              └──────┘
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import closing
from ipaddress import ip_address
from typing import Any, NamedTuple

from testbed import bpf
from testbed.bpf import ProgramSet
from testbed.host import namespaces, netlink
from testbed.host.ledger import Scope
from testbed.model.addresses import Address
from testbed.model.errors import Error
from testbed.model.manifest import Tap

AT_TAP = {"tap_ingress": bpf.INGRESS, "tap_egress": bpf.EGRESS}
AT_INNER = {"inner_ingress": bpf.INGRESS, "inner_egress": bpf.EGRESS}
"""Programs at a tap, and at the other end of the guest's link."""
ROW = "=4s16s6s6s4I8Q"
"""`struct tap` of the programs."""
GUESSED = {"mac": 1, "ip4": 2, "ip6": 4}
"""`enum guessed` of the programs."""
COUNTS = ("from_guest", "to_guest", "refused", "unreachable")


class TapRow(NamedTuple):
    """A row of the map `taps`. What is zero is not known."""

    ip4: bytes
    ip6: bytes
    mac: bytes
    pod_mac: bytes
    tap_ifindex: int
    inner_ifindex: int
    guessed: int
    padding: int
    from_guest: int
    from_guest_bytes: int
    to_guest: int
    to_guest_bytes: int
    refused: int
    refused_bytes: int
    unreachable: int
    unreachable_bytes: int

    @property
    def addresses(self) -> list[Address]:
        """The known addresses of the guest."""
        return [ip_address(packed) for packed in (self.ip4, self.ip6) if any(packed)]

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """What was counted → its packets, and their bytes of layer 3."""
        values = self._asdict()
        return {
            name: {"packets": values[name], "bytes": values[f"{name}_bytes"]} for name in COUNTS
        }


class Taps:
    """The taps of one pod. Nothing is attached before `build`."""

    def __init__(self, owner: Scope, netns: str, taps: Mapping[int, Tap]) -> None:
        """`taps`: by the guests' numbers. Raises `Error` if the kernel lacks what they need."""
        if taps and not bpf.has_tcx():
            raise Error("guests that somebody else boots need tcx", hint="use Linux 6.6 or later")
        self.taps, self._owner, self._netns = taps, owner, netns
        self._ours: Collection[str] = ()
        self._programs: ProgramSet | None = None
        self._connected: dict[int, tuple[int, int]] = {}
        """n → indices of the tap and of the inner link, once they are connected."""
        for n in taps if owner.continues else ():
            row, links = self._row(n), netlink.links(netns)
            is_there = links.get(taps[n].name) == row.tap_ifindex
            if is_there and row.inner_ifindex in links.values():
                self._connect(n, row.tap_ifindex, row.inner_ifindex, row.pod_mac)

    def changed(self) -> set[str]:
        """Names of the taps that appeared or vanished since the last `build`."""
        if not self.taps:
            return set()
        existing = netlink.links(self._netns)
        return {
            tap.name
            for n, tap in self.taps.items()
            if existing.get(tap.name, 0) != self._connected.get(n, (0, 0))[0]
        }

    def build(self, inner: Mapping[int, tuple[int, str]], ours: Collection[str]) -> None:
        """Connect those taps that are there.

        `inner`: n → index of its inner link, and the MAC that the pod has on the guest's link.
        `ours`: names of our links in the namespace.
        """
        self._ours = ours
        existing = netlink.links(self._netns)
        for n, (inner_ifindex, pod_mac) in inner.items():
            ifindex = existing.get(self.taps[n].name, 0)
            if self._connected.get(n) == (ifindex, inner_ifindex) and not self._lacks(n):
                continue
            self._connect(n, ifindex, inner_ifindex, _packed(pod_mac))

    def missing_programs(self) -> set[str]:
        """Names of programs that somebody else removed."""
        return {name for n in self._connected for name in self._lacks(n)}

    def _lacks(self, n: int) -> set[str]:
        """Names of the programs that the tap and the link of a guest lack, if both are there."""
        tap, inner = self._connected[n]
        places = {
            (link, hook): name
            for link, programs in ((tap, AT_TAP), (inner, AT_INNER))
            for name, hook in programs.items()
        }
        links = netlink.links(self._netns).values()
        places = {place: name for place, name in places.items() if place[0] in links}
        attached = bpf.attached_tc(self._netns, places)
        return {name for place, name in places.items() if place not in attached}

    def data(self) -> list[dict[str, Any]]:
        """What is known of each guest, and what was counted of its packets."""
        rows = {n: self._row(n) for n in self.taps}
        return [
            {
                "name": tap.name,
                "guest": n,
                "connected": bool(rows[n].tap_ifindex),
                "mac": rows[n].mac.hex(":") if any(rows[n].mac) else "",
                "addresses": [str(address) for address in rows[n].addresses],
                **rows[n].counts,
            }
            for n, tap in self.taps.items()
        ]

    def _connect(self, n: int, ifindex: int, inner_ifindex: int, pod_mac: bytes) -> None:
        """Connect a tap with an inner link, or only prepare that if there is no tap (0)."""
        self._connected.pop(n, None)
        with closing(self._load()) as programs:
            known = self._row(n)
            if known.tap_ifindex != ifindex:  # another guest
                if known.tap_ifindex:
                    disconnect(self._netns, known.tap_ifindex)
                known = self._guessed(self.taps[n], ifindex)
            row: tuple[Any, ...] = known._replace(
                pod_mac=pod_mac, tap_ifindex=ifindex, inner_ifindex=inner_ifindex
            )
            _rows(programs)[programs.slot << 8 | n,] = row
            classid = programs.slot << 8 | n
            for name, hook in AT_INNER.items():
                place = self._netns, inner_ifindex, hook
                bpf.attach_tc(self._owner, *place, programs.program(name), name, classid)
            if ifindex:
                self._connected[n] = ifindex, inner_ifindex
                self._owner.defer(disconnect, netns=self._netns, ifindex=ifindex)
                for number, (name, hook) in enumerate(AT_TAP.items()):
                    with programs.entry(name, classid, number) as entry:
                        bpf.attach_tcx(self._netns, ifindex, hook, entry)

    def _guessed(self, tap: Tap, ifindex: int) -> TapRow:
        """The row of a new guest: the pod's own addresses for those that the user does not say.

        urunc, Kata and others give these to their machine, with the MAC of the pod's link. Raises
        `Error` if the tap has such an address, and so is no tap.
        """
        row = _told(tap)
        with namespaces.open_socket(self._netns) as ip:
            found = netlink.outside_addresses(ip, self._ours)
            if ifindex in dict(found):
                raise Error(f"{tap.name!r} is no guest's tap: it has an address of the pod")
            guess: dict[str, Any] = {f"ip{a.version}": a.packed for _, a in reversed(found)}
            if found:
                guess["mac"] = _packed(ip.get_links(found[0][0])[0].get("address"))
        if len(self.taps) > 1:
            return row
        guess = {name: value for name, value in guess.items() if not any(getattr(row, name))}
        return row._replace(**guess, guessed=sum(GUESSED[name] for name in guess))

    def _load(self) -> ProgramSet:
        """The programs, loaded at the first call."""
        if self._programs is None:
            self._programs = bpf.load("tap", self._owner)
            bpf.own_rows(self._owner, self._programs, "taps", ROW, self.taps)
            self._programs.make_calls(self._owner, len(AT_TAP))
            self._programs.set_calls(self._programs, AT_TAP)
        return self._programs

    def _row(self, n: int) -> TapRow:
        """The row of a guest; what the user says of it, if it has none."""
        with closing(self._load()) as programs:
            try:
                row: tuple[Any, ...] = _rows(programs)[programs.slot << 8 | n,]
            except KeyError:
                return _told(self.taps[n])
        return TapRow(*row)


def disconnect(netns: str, ifindex: int) -> None:
    """Detach the programs from a tap. A missing tap is no error."""
    for name, hook in AT_TAP.items():
        bpf.detach_tcx(netns, ifindex, hook, name)


def _rows(programs: ProgramSet) -> bpf.Map:
    return programs.map("taps", "=I", ROW)


def _told(tap: Tap) -> TapRow:
    """The row of a guest of which nothing is known but what the user says."""
    told = {address.version: address.packed for address in tap.addresses}
    ip4, ip6 = told.get(4, bytes(4)), told.get(6, bytes(16))
    return TapRow(ip4, ip6, _packed(tap.mac), bytes(6), *[0] * 12)


def _packed(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", "")) or bytes(6)
