"""Completes the checksums of IPv6 packets before the taps of guests that take no partial ones.

Their network devices have checksum offload all the same, since IPv4 without it is several times
slower. IPv6 packets go by a veth pair without offloads, where the kernel completes them. The
programs of `bpf/checksum.c` lead them there and back.

    ... ── g1 ── guest 1
            │
           c1 ── c1-back
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import closing

from pyroute2 import IPRoute

from testbed import bpf
from testbed.bpf import ProgramSet
from testbed.host import namespaces, netlink
from testbed.host.ledger import Scope

ROW = "=3I"
"""`struct pair` of the programs."""
MTU = 65535
"""MTU of the pairs. Packets out of `lo` may be so large; the port's programs decide about them."""


def out_name(n: int) -> str:
    """Name of the end of guest n's pair that sends, and so completes."""
    return f"c{n}"


def back_name(n: int) -> str:
    """Name of the end that packets come back by."""
    return f"c{n}-back"


class Checksums:
    """The pairs of one pod. Nothing is made before `build`."""

    def __init__(self, owner: Scope, netns: str, guests: Collection[int]) -> None:
        """`netns`: name of the namespace of the taps. `guests`: numbers of those that need it."""
        self._owner, self._netns, self._guests = owner, netns, guests
        self._programs: ProgramSet | None = None
        self._built: dict[int, tuple[int, int, int]] = {}
        """n → indices of the tap and of both ends, once their programs are attached."""

    @property
    def names(self) -> set[str]:
        """Names of the links."""
        return {name(n) for n in self._guests for name in (out_name, back_name)}

    def build(self, ip: IPRoute, taps: Mapping[int, int]) -> None:
        """Make pairs and attach programs that are missing, before others are at the taps.

        `ip`: a socket in the namespace. `taps`: n → index of its tap.
        """
        existing = netlink.links(self._netns)
        for n in self._guests:
            out, back = out_name(n), back_name(n)
            if not {out, back} <= existing.keys():
                for end in {out, back} & existing.keys():  # somebody took the other one away
                    netlink.remove_link(self._netns, end)
                peer = {"ifname": back, "mtu": MTU}
                netlink.create_link(ip, out, kind="veth", mtu=MTU, peer=peer)
        existing = netlink.links(self._netns)
        for n in self._guests:
            self._set_up(ip, n, existing)
            links = taps[n], existing[out_name(n)], existing[back_name(n)]
            if self._built.get(n) != links or self._lacks(n):
                self._attach(n, links)

    def missing_programs(self) -> set[str]:
        """Names of programs that somebody else removed."""
        return {name for n in self._built for name in self._lacks(n)}

    def _set_up(self, ip: IPRoute, n: int, existing: Mapping[str, int]) -> None:
        """Make what a pair is to be, whoever made its links and was interrupted then."""
        out, back = out_name(n), back_name(n)
        netlink.set_checksum_offload(self._netns, out, on=False)
        off = {f"net/ipv6/conf/{name}/disable_ipv6": 1 for name in (out, back)}
        namespaces.set_sysctls(self._netns, off)
        for name in (back, out):  # the latter, where packets leave, sends as soon as it is up then
            ip.link("set", index=existing[name], state="up")

    def _attach(self, n: int, links: tuple[int, int, int]) -> None:
        tap, out, back = links
        self._built.pop(n, None)
        with closing(self._load()) as programs:
            classid = programs.slot << 8 | n
            _rows(programs)[classid,] = links
            for name, (ifindex, hook) in _places(out, back).items():
                place = self._netns, ifindex, hook
                bpf.attach_tc(self._owner, *place, programs.program(name), name, classid)
            with programs.entry("detour", classid, 0) as entry:
                bpf.attach_tcx(self._netns, tap, bpf.EGRESS, entry, first=True)
        self._built[n] = links

    def _lacks(self, n: int) -> set[str]:
        """Names of the programs that a guest's links lack, if all of these are there."""
        tap, out, back = self._built[n]
        if not {tap, out, back} <= set(netlink.links(self._netns).values()):
            return set()
        places = {place: name for name, place in _places(out, back).items()}
        attached = bpf.attached_tc(self._netns, places)
        lacking = {name for place, name in places.items() if place not in attached}
        if not bpf.runs_by_tcx(self._netns, tap, bpf.EGRESS, "detour"):
            lacking.add("detour")
        return lacking

    def _load(self) -> ProgramSet:
        """The programs, loaded at the first call."""
        if self._programs is None:
            self._programs = programs = bpf.load("checksum", self._owner)
            bpf.own_rows(self._owner, programs, "pairs", ROW, self._guests)
            programs.make_calls(self._owner, 1)
            programs.set_calls(programs, ["detour"])
        return self._programs


def _places(out: int, back: int) -> dict[str, tuple[int, int]]:
    """Program → (ifindex, hook), at a pair."""
    return {"enter": (out, bpf.EGRESS), "leave": (back, bpf.INGRESS)}


def _rows(programs: ProgramSet) -> bpf.Map:
    return programs.map("pairs", "=I", ROW)
