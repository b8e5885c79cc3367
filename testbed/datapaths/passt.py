"""Datapath `passt`: passt translates the guest's frames to sockets of the pod, as in KubeVirt.

One passt runs in the pod's namespace per boot of a guest, as libvirt runs it: it starts when QEMU
connects, and ends with QEMU. (A passt that waits for QEMU accepts connections meanwhile, and Debian
13's, of May 2025, crashes on the first.)

The guest's gateway is the alias. What the guest sends there, passt sends to loopback from a socket
of its own. It listens on the guest's ports in the pod, and gives connections from loopback to the
guest as from the gateway. So `localhost` works in both directions, and between guests.

The price is a TCP in user space: passt accepts connections before the guest does. Debian 12's, of
March 2023, completes a connection with the guest only with the client's first data, so a server
that sends first waits in accept for ever. It is for virtual machines only, and there is no tap.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress

from testbed.datapaths.interface import Attachment, Count, Datapath, Layout, Port, Wiring
from testbed.datapaths.link_counters import ProcessAttachment
from testbed.host import namespaces, netlink, process
from testbed.host.ledger import Scope
from testbed.model.addresses import ALIAS_MAC, LINK_PREFIX, alias, guest_link
from testbed.model.cells import Cell, Pair
from testbed.model.looks import Look
from testbed.model.terms import Family, Transport

LO_IFINDEX = 1
OPTIONS = {Transport.TCP: "-t", Transport.UDP: "-u"}


class Passt(Datapath):
    """A passt for each guest."""

    name = "passt"
    look = Look(90, "#CC79A7", hatch="||||", line=(3, 1, 1, 1), marker=">")
    layout = Layout.SOCKET
    reference = "direct"
    in_kernel = False
    pairs = frozenset(Pair) - {Pair.NATIVE_NATIVE}

    def unsupported(self, cell: Cell) -> str | None:
        if shutil.which("passt") is None:
            return "no passt; apt-get install passt"
        if cell.transport is Transport.UDP and cell.family is Family.IPV6:
            return "passt answers UDP over IPv6 from a link-local address, not the one dialed"
        return None

    def attach(self, wiring: Wiring, owner: Scope) -> Attachment:
        return _Attachment(wiring, owner)


class _Attachment(ProcessAttachment):
    def __init__(self, wiring: Wiring, owner: Scope) -> None:
        super().__init__(wiring, owner, "passt")
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._listening: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._prepare()
        for port in wiring.ports:
            self._listen(port)

    def carried(self, client: int | None, server: int | None) -> Count:
        """Traffic of `lo`, over which passt's sockets reach those of natives and each other."""
        return super().carried(None, None)

    def detach(self) -> None:
        for listening in self._listening:
            with suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)  # wakes the thread
        for thread in self._threads:
            thread.join()
        for listening in self._listening:
            listening.close()
        for running in self._running.values():
            process.end(running)
        super().detach()

    def _prepare(self) -> None:
        """Make a link from which passt reads a link-local address, and add guests' own addresses.

        passt listens for the guest at all addresses of the pod, so at the guest's own, too.
        """
        with namespaces.open_socket(self.wiring.netns) as ip:
            netlink.create_link(ip, "template", kind="bridge", state="up")
            for port in self.wiring.ports:
                for family in Family:
                    address = guest_link(family, port.n)
                    netlink.add_address(ip, LO_IFINDEX, address, address.max_prefixlen)

    def _listen(self, port: Port) -> None:
        """Start a thread that starts a passt for each QEMU that connects."""
        listening = socket.socket(socket.AF_UNIX)
        self._listening.append(listening)
        listening.bind(str(port.socket))
        listening.listen()
        thread = threading.Thread(target=self._serve, args=(port, listening), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self, port: Port, listening: socket.socket) -> None:
        assert port.socket is not None, "layout socket"
        while True:
            try:
                guest, _ = listening.accept()
            except OSError:  # `detach`
                return
            with guest:
                if before := self._running.pop(port.n, None):
                    process.end(before)
                self._running[port.n] = process.spawn(
                    [
                        "passt",
                        "--foreground",
                        "--stderr",
                        "--fd",
                        str(guest.fileno()),
                        *options(self.wiring, port),
                    ],
                    cgroup=self._cgroup,
                    netns=self.wiring.netns,
                    pass_fds=[guest.fileno()],
                    output=port.socket.with_suffix(".log"),
                )


def options(wiring: Wiring, port: Port) -> Iterator[str]:
    """Options of passt for one guest."""
    yield from ("--runas", "0", "--interface", "template")
    yield from ("--mac-addr", ALIAS_MAC, "--netmask", str(LINK_PREFIX[Family.IPV4]))
    for family in Family:
        yield from ("--address", str(guest_link(family, port.n)), "--gateway", str(alias(family)))
    owned = [where for where, n in wiring.owners.items() if n == port.n]
    for transport, number in dict.fromkeys(((Transport.TCP, port.control_port), *owned)):
        yield from (OPTIONS[transport], str(number))


DATAPATH = Passt()
