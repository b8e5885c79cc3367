"""Datapath `tun`: guests without loopback, and a TUN device that takes 127.0.0.0/8.

It is the idea that was given up first. In the guest, 127.0.0.0/8 takes the default route. In the
pod, policy routing sends to a TUN device what guests send to that network, and what natives send to
a guest's port there. A process at the device (`main`, below) translates the addresses of packets,
so that they reach the port's owner, and writes them back. It has no state. Fragments and ICMP
errors are lost.

It shows what the idea breaks in guests: all that needs `lo`, and IPv6. It is written in Python, so
it says little about speed. OSv has its loopback in the kernel, and would have to be changed.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
from collections.abc import Mapping

from testbed.datapaths.interface import Attachment, Datapath, Layout, Wiring
from testbed.datapaths.link_counters import ProcessAttachment
from testbed.host import namespaces, netlink, process
from testbed.host.ledger import Scope
from testbed.model.addresses import guest_link, guest_view, loopback, native_source
from testbed.model.cells import Cell, Pair
from testbed.model.looks import Look
from testbed.model.terms import Family, Transport

DEVICE = "tun0"
TABLE = 77
"""Routing table of the device, which is looked up before the table of local addresses."""
LOCAL_TABLE, LOCAL_PREF = 255, 100
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000
NUMBERS = {Transport.TCP: socket.IPPROTO_TCP, Transport.UDP: socket.IPPROTO_UDP}
LOOPBACK_NET = "127.0.0.0/8"


class Tun(Datapath):
    """A TUN device that takes 127.0.0.0/8."""

    name = "tun"
    look = Look(100, "#555555", line=(1, 3), marker="*")
    layout = Layout.NO_LOOPBACK
    reference = "direct"
    in_kernel = False
    pairs = frozenset(Pair) - {Pair.NATIVE_NATIVE}

    def unsupported(self, cell: Cell) -> str | None:
        if cell.family is Family.IPV6:
            return "kernels drop packets from or to ::1 at links that are not loopback"
        return None

    def attach(self, wiring: Wiring, owner: Scope) -> Attachment:
        return _Attachment(wiring, owner)


class _Attachment(ProcessAttachment):
    def __init__(self, wiring: Wiring, owner: Scope) -> None:
        super().__init__(wiring, owner, "tun")
        self._route()
        self._set_sysctls()
        self._running = process.spawn(
            [
                sys.executable,
                "-m",
                "testbed.datapaths.tun",
                DEVICE,
                *(f"{transport}/{port}/{n}" for (transport, port), n in wiring.owners.items()),
            ],
            cgroup=self._cgroup,
            netns=wiring.netns,
        )

    def rewire(self, wiring: Wiring) -> None:
        super().rewire(wiring)
        self._set_sysctls()

    def detach(self) -> None:
        """End the process. Routes and settings go with the pod's namespace."""
        process.end(self._running)
        super().detach()

    def _route(self) -> None:
        """Make the device, and routes and rules to it, ahead of the rule for local addresses."""
        with namespaces.open_socket(self.wiring.netns) as ip:
            device = netlink.create_link(ip, DEVICE, kind="tuntap", mode="tun")
            ip.link("set", index=device, state="up")
            ip.route("add", dst=f"{guest_view(Family.IPV4, 0)}/24", oif=device)
            ip.route("add", dst=f"{native_source(Family.IPV4)}/32", oif=device)
            ip.route(
                "add", dst=LOOPBACK_NET, oif=device, table=TABLE, prefsrc=str(loopback(Family.IPV4))
            )
            for port in self.wiring.ports:
                ip.rule("add", priority=1, iifname=port.ifname, dst=LOOPBACK_NET, table=TABLE)
            for transport, number in self.wiring.owners:
                ip.rule(
                    "add",
                    priority=2,
                    iifname="lo",
                    dst=LOOPBACK_NET,
                    table=TABLE,
                    ip_proto=NUMBERS[transport],
                    dport_range=f"{number}:{number}",
                )
            ip.rule("add", priority=LOCAL_PREF, table=LOCAL_TABLE)
            ip.rule("del", priority=0, table=LOCAL_TABLE)

    def _set_sysctls(self) -> None:
        """Allow packets with loopback addresses on the device, and from guests."""
        wiring = self.wiring
        namespaces.set_sysctls(
            wiring.netns,
            {
                "net/ipv4/conf/all/forwarding": 1,
                f"net/ipv4/conf/{DEVICE}/route_localnet": 1,
                f"net/ipv4/conf/{DEVICE}/accept_local": 1,
                **{f"net/ipv4/conf/{p.ifname}/route_localnet": 1 for p in wiring.ports},
                **{f"net/ipv4/conf/{p.ifname}/proxy_arp": 1 for p in wiring.ports},
            },
        )


# --- the process behind the device ----------------------------------------------------------


class Translator:
    """Translates the addresses of packets, so that they reach the owner of their port."""

    def __init__(self, owners: Mapping[tuple[int, int], int]) -> None:
        """`owners`: (IP protocol, port) → guest."""
        self._owners = owners
        self._loopback = loopback(Family.IPV4).packed
        self._native = native_source(Family.IPV4).packed
        self._link = guest_link(Family.IPV4, 0).packed
        self._view = guest_view(Family.IPV4, 0).packed

    def translate(self, packet: bytearray) -> bool:
        """Change addresses and checksums in place. Returns False if the packet is to be dropped."""
        if packet[0] >> 4 != 4 or packet[9] not in (6, 17) or packet[6] & 0x3F or packet[7]:
            return False
        l4 = (packet[0] & 15) * 4
        source, destination = bytes(packet[12:16]), bytes(packet[16:20])
        client = source[3] if source[:3] == self._link[:3] else 0
        if destination[0] == 127:
            port = packet[l4 + 2] << 8 | packet[l4 + 3]
            owner = self._owners.get((packet[9], port), 0)
            new = (self._view[:3] + bytes([client]) if client else self._native) + (
                self._link[:3] + bytes([owner]) if owner else self._loopback
            )
        elif destination == self._native:
            new = self._loopback * 2
        elif destination[:3] == self._view[:3]:
            new = self._loopback + self._link[:3] + destination[3:]
        else:
            return False
        old = bytes(packet[12:20])
        packet[12:20] = new
        _correct(packet, 10, old, new)
        checksum = l4 + (16 if packet[9] == 6 else 6)
        if packet[9] == 6 or packet[checksum] or packet[checksum + 1]:
            _correct(packet, checksum, old, new)
        return True


def _correct(packet: bytearray, at: int, old: bytes, new: bytes) -> None:
    """Update the checksum at offset `at` after a change from `old` to `new` (RFC 1624, eqn. 3)."""
    total = ~struct.unpack_from("!H", packet, at)[0] & 0xFFFF
    total += sum(struct.unpack("!4H", new)) + sum(~x & 0xFFFF for x in struct.unpack("!4H", old))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    struct.pack_into("!H", packet, at, ~total & 0xFFFF)


def main() -> None:
    """Run the process: `python -m testbed.datapaths.tun DEVICE TRANSPORT/PORT/GUEST…`."""
    device, *owned = sys.argv[1:]
    words = (word.split("/") for word in owned)
    translator = Translator({(NUMBERS[Transport(t)], int(port)): int(n) for t, port, n in words})
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI))
    while packet := bytearray(os.read(tun, 65536)):
        if translator.translate(packet):
            os.write(tun, packet)


DATAPATH = Tun()

if __name__ == "__main__":
    main()
