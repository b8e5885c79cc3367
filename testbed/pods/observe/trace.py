"""Reads packet traces of a pod's eBPF programs from their ring buffer (`bpf/trace.h`).

An event is one packet at one program: the packet before and after, the verdict, and the reason that
it was counted under. The supervisor process of the pod replaces the programs by traced ones while
somebody traces; nothing here changes the pod.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from testbed.bpf import ProgramSet, ring
from testbed.model.errors import Error
from testbed.pods import control
from testbed.pods.observe import pcapng

_EVENT = struct.Struct("=QIIiHBB16s8x")
WAIT_MS = 200
VERDICTS = {-1: "passed", 0: "passed", 2: "dropped", 7: "redirected"}
"""Verdicts (TC_ACT_*) that our programs return."""
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmp"}
_FLAGS = "FSRPAU"


@dataclass(frozen=True)
class Seen:
    """A packet at one time: its first bytes, and the parsed headers."""

    data: bytes
    length: int
    """Length of the whole packet, with the Ethernet header."""
    protocol: str
    source: str
    destination: str
    ports: tuple[int, int] | None
    flags: str

    def __str__(self) -> str:
        if not self.source:
            return self.protocol
        ends = [f"[{a}]" if ":" in a and self.ports else a for a in (self.source, self.destination)]
        if self.ports:
            ends = [f"{a}:{port}" for a, port in zip(ends, self.ports, strict=True)]
        return f"{' > '.join(ends)} {self.protocol}{f' {self.flags}' if self.flags else ''}"


@dataclass(frozen=True)
class Event:
    """One packet at one program."""

    time_ns: int
    """Time of its arrival, since 1970."""
    program: str
    at: str
    """Guest at whose port the program is, or empty."""
    verdict: str
    reason: str
    """Reason that it was counted under, or empty."""
    came: Seen
    """The packet before the program."""
    went: Seen
    """The packet after the program."""

    @property
    def place(self) -> str:
        """Text: the program, and the guest at whose port it is."""
        return f"{self.program} {self.at}".rstrip()

    def has_port(self, port: int) -> bool:
        """Whether the packet has this port, before or after the program."""
        return any(port in (seen.ports or ()) for seen in (self.came, self.went))

    def data(self) -> dict[str, Any]:
        """The event as plain data, for `--json`."""
        return {
            "time_ns": self.time_ns,
            "program": self.program,
            "guest": self.at or None,
            "came": str(self.came),
            "went": str(self.went),
            "verdict": self.verdict,
            "reason": self.reason or None,
            "bytes": self.came.length,
        }

    def __str__(self) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(self.time_ns // 10**9))
        changed = f" => {self.went}" if str(self.went) != str(self.came) else ""
        what = f"{self.verdict}{f': {self.reason}' if self.reason else ''}"
        return (
            f"{clock}.{self.time_ns // 1000 % 10**6:06} {self.place:<24} {self.came}"
            f"{changed} ({self.came.length} bytes) {what}"
        )


@contextmanager
def opened(pod: str) -> Iterator[Trace]:
    """Trace a pod while the context lasts."""
    with control.trace(pod) as facts:
        with closing(ProgramSet(Path(facts["pins"]), facts["slot"])) as programs:
            yield Trace(facts, programs)


@dataclass(frozen=True)
class Trace:
    """The trace of a pod."""

    facts: dict[str, Any]
    """Names of the numbers in events, from the pod's supervisor process."""
    programs: ProgramSet

    @property
    def missed(self) -> int:
        """Number of events that were lost, since the ring buffer was full."""
        return self.programs.map("lost_events", "=I", "=Q")[0,][0]

    def events(self) -> Iterator[Event]:
        """Yield events as they come. Raises `Error` if the pod goes down."""
        came: dict[tuple[int, str, int], Seen] = {}
        found: list[Event] = []

        def take(record: bytes) -> None:
            time_ns, length, snapped, verdict, reason, n, leaves, name = _EVENT.unpack_from(record)
            program = name.rstrip(b"\0").decode()
            seen = parse(record[_EVENT.size : _EVENT.size + snapped], length)
            key = time_ns, program, n
            if not leaves:
                came[key] = seen
            elif before := came.pop(key, None):
                found.append(self._event(time_ns, program, n, verdict, reason, before, seen))

        with ring.reading(self.programs.map("events", "", "").fd, take) as read:
            while True:
                read(WAIT_MS)
                yield from found
                found.clear()
                if not self.programs.pins.exists():
                    raise Error("the pod was taken down")

    def _event(
        self, time_ns: int, program: str, n: int, verdict: int, reason: int, came: Seen, went: Seen
    ) -> Event:
        return Event(
            time_ns + time.time_ns() - time.monotonic_ns(),
            program,
            self.facts["guests"].get(str(n), ""),
            VERDICTS.get(verdict, str(verdict)),
            self.facts["reasons"][reason - 1] if reason else "",
            came,
            went,
        )


def write(capture: pcapng.Writer, event: Event) -> None:
    """Write the packet before the program, and after it, if it was changed and not dropped.

    Each has an interface of its own in the capture.
    """
    what = f"{event.verdict}{f': {event.reason}' if event.reason else ''}"
    came, went = event.came, event.went
    capture.write(event.place, event.time_ns, came.data, came.length, what)
    if went.data != came.data and event.verdict != "dropped":
        place = f"{event.place}, rewritten"
        capture.write(place, event.time_ns, went.data, went.length, what)


def parse(data: bytes, length: int) -> Seen:
    """Parse an Ethernet frame. The protocol of a frame that is cut off or unknown says so."""
    try:
        kind = struct.unpack_from("!12xH", data)[0]
        if kind == 0x0800:
            ip, l4 = 14, 14 + (data[14] & 15) * 4
            number, fragment = data[ip + 9], struct.unpack_from("!H", data, ip + 6)[0] & 0x1FFF
            ends = data[ip + 12 : ip + 16], data[ip + 16 : ip + 20]
        elif kind == 0x86DD:
            ip, l4 = 14, 54
            number, fragment = data[ip + 6], 0
            ends = data[ip + 8 : ip + 24], data[ip + 24 : ip + 40]
        else:
            protocol = "arp" if kind == 0x0806 else f"ethertype 0x{kind:04x}"
            return Seen(data, length, protocol, "", "", None, "")
        source, destination = (str(ip_address(end)) for end in ends)
        ports, flags = None, ""
        if number in (6, 17) and not fragment:
            ports = struct.unpack_from("!HH", data, l4)
        if number == 6 and ports:
            flags = "".join(f for i, f in enumerate(_FLAGS) if data[l4 + 13] >> i & 1)
        protocol = _PROTOCOLS.get(number, f"protocol {number}")
        return Seen(data, length, protocol, source, destination, ports, flags)
    except (struct.error, IndexError, ValueError):
        return Seen(data, length, "cut off", "", "", None, "")
