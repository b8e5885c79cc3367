"""passt carries the guest's network, as KubeVirt has it: frames of QEMU become sockets of the pod.

A passt per guest, in the pod's namespace. What the guest sends to its gateway, which is the alias,
goes to loopback, from a socket of passt's own; its ports are listened on in the pod, and what comes
in from loopback comes from the gateway. So `localhost` works both ways, between guests too, at the
price of a user-space TCP on the way: it accepts connections before the guest does, and also while
there is none, and acknowledges the guest's SYN with the client's first data only, so that a server
that speaks first waits in accept for ever. What is said here is true of Debian 12's, of March 2023.
Virtual machines only; there is no tap.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator

from testbed import netlink, process
from testbed.datapaths import Attachment, Count, Layout, LinkCounters, Port, Wiring
from testbed.ledger import Scope
from testbed.model import (
    ALIAS_MAC,
    LINK_PREFIX,
    Cell,
    Error,
    Family,
    Pair,
    Transport,
    alias,
    guest_link,
)

LO_IFINDEX = 1
PATIENCE_S = 5
OPTIONS = {Transport.TCP: "-t", Transport.UDP: "-u"}


class Passt:
    name = "passt"
    layout = Layout.SOCKET
    reference = "direct"
    localhost = True
    in_kernel = False
    programs: tuple[str, ...] = ()
    pairs = frozenset(Pair) - {Pair.NATIVE_NATIVE}

    def unsupported(self, cell: Cell) -> str | None:
        if shutil.which("passt") is None:
            return "no passt; apt-get install passt"
        if cell.transport is Transport.UDP and cell.family is Family.IPV6:
            return "passt answers UDP over IPv6 from a link-local address, not the one dialed"
        return None

    def attach(self, wiring: Wiring, owner: Scope) -> Attachment:
        return _Attachment(wiring, owner)


class _Attachment(LinkCounters):
    def __init__(self, wiring: Wiring, owner: Scope) -> None:
        super().__init__(wiring)
        self._scope = owner.part()
        self._cgroup = process.create_cgroup(self._scope, f"{wiring.netns}/passt")
        self._running: list[subprocess.Popen[bytes]] = []
        self._prepare()
        try:
            for port in wiring.ports:
                self._start(port)
        except BaseException:
            self.detach()
            raise

    def carried(self, client: int | None, server: int | None) -> Count:
        """Of `lo`, where passt's sockets meet those of natives and of each other."""
        return super().carried(None, None)

    def detach(self) -> None:
        for running in self._running:
            process.end(running)
        self._scope.undo()

    def _prepare(self) -> None:
        """A link for passt to read a link-local address from, and guests' own addresses.

        There, as at every address of the pod, passt listens for the guest.
        """
        with netlink.open_socket(self.wiring.netns) as ip:
            netlink.create_link(ip, "template", kind="bridge", state="up")
            for port in self.wiring.ports:
                for family in Family:
                    address = guest_link(family, port.n)
                    netlink.add_address(ip, LO_IFINDEX, address, address.max_prefixlen)

    def _start(self, port: Port) -> None:
        assert port.socket is not None, "layout socket"
        log = port.socket.with_suffix(".log")
        running = process.spawn(
            ["passt", "--foreground", "--stderr", *options(self.wiring, port)],
            cgroup=self._cgroup, netns=self.wiring.netns, output=log,
        )  # fmt: skip
        self._running.append(running)
        deadline = time.monotonic() + PATIENCE_S
        while not port.socket.exists():
            if running.poll() is not None or time.monotonic() > deadline:
                lines = log.read_text().splitlines() or ["no message"]
                raise Error(f"passt of guest {port.n} does not start: {lines[-1]}")
            time.sleep(0.005)


def options(wiring: Wiring, port: Port) -> Iterator[str]:
    """What passt is told about one guest."""
    yield from ("--runas", "0", "--socket", str(port.socket), "--interface", "template")
    yield from ("--mac-addr", ALIAS_MAC, "--netmask", str(LINK_PREFIX[Family.IPV4]))
    for family in Family:
        yield from ("--address", str(guest_link(family, port.n)), "--gateway", str(alias(family)))
    yield from ("-t", str(port.control_port))
    for (transport, number), n in wiring.owners.items():
        if n == port.n:
            yield from (OPTIONS[transport], str(number))


DATAPATH = Passt()
