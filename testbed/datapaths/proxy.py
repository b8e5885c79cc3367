"""Datapath `proxy`: proxies in user space, HAProxy for TCP and nginx's stream module for UDP.

Ports that a guest owns have a listener at the pod's loopback. Ports that any workload owns have one
at the alias, which is an address of the pod. Each forwards to the owner's own address in the same
family.

The proxy accepts a connection before the owner does, and is the owner's peer. So a port that nobody
serves is not refused, but closed. Ports that the manifest does not name are not carried. A native
server cannot bind the wildcard address, since the proxy has the port at the alias.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from testbed.datapaths.interface import Attachment, Datapath, Wiring
from testbed.datapaths.link_counters import ProcessAttachment, add_aliases
from testbed.host import ledger, process
from testbed.host.ledger import Scope
from testbed.model.addresses import alias, authority, guest_link, loopback
from testbed.model.cells import Cell, Pair
from testbed.model.errors import Error
from testbed.model.looks import Look
from testbed.model.terms import Family, Transport

STREAM_MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
"""Path of nginx's stream module in Debian."""
IDLE_S = 3600
"""Time after which an idle TCP connection is closed. HAProxy needs such a limit."""
UDP_SESSION_S = 60
"""Time for which answers to a client's datagram are forwarded."""


class Proxy(Datapath):
    """HAProxy for TCP, nginx for UDP."""

    name = "proxy"
    look = Look(80, "#F0E442", hatch="o", line=(5, 1), marker="X")
    reference = "direct"
    in_kernel = False
    pairs = frozenset(Pair) - {Pair.NATIVE_NATIVE}

    def unsupported(self, cell: Cell) -> str | None:
        if cell.transport is Transport.TCP and shutil.which("haproxy") is None:
            return "no haproxy; apt-get install haproxy"
        if cell.transport is Transport.UDP and not (
            shutil.which("nginx") and STREAM_MODULE.exists()
        ):
            return "no nginx with streams; apt-get install nginx-light libnginx-mod-stream"
        return None

    def attach(self, wiring: Wiring, owner: Scope) -> Attachment:
        return _Attachment(wiring, owner)


class _Attachment(ProcessAttachment):
    def __init__(self, wiring: Wiring, owner: Scope) -> None:
        super().__init__(wiring, owner, "proxy")
        add_aliases(wiring)
        folder = ledger.create_folder(self._scope, f"{wiring.netns}-proxy")
        if shutil.which("haproxy"):
            config = folder / "haproxy.conf"
            config.write_text(haproxy_conf(wiring))
            self._start(["haproxy", "-D", "-f", config], folder)
        if shutil.which("nginx") and STREAM_MODULE.exists():
            config = folder / "nginx.conf"
            config.write_text(nginx_conf(wiring, folder))
            self._start(["nginx", "-e", folder / "nginx.log", "-c", config], folder)

    def rewire(self, wiring: Wiring) -> None:
        """Add the aliases again. The proxies' sockets outlive the addresses of their bind."""
        super().rewire(wiring)
        add_aliases(wiring)

    def _start(self, argv: list[str | Path], folder: Path) -> None:
        """Start a proxy. It becomes a daemon, and its first process ends when listeners are ready.

        Raises `Error` with its last message if that process fails.
        """
        output = folder / f"{argv[0]}.out"
        starting = process.spawn(argv, cgroup=self._cgroup, netns=self.wiring.netns, output=output)
        if starting.wait():
            lines = output.read_text().splitlines() or ["no message"]
            raise Error(f"{argv[0]} of pod {self.wiring.pod} does not start: {lines[-1]}")


class Route(NamedTuple):
    """A listener, and the server to which it forwards."""

    listen: str
    """Address and port, in the notation of both programs."""
    to: str
    """Address and port of the server."""


def routes(wiring: Wiring, transport: Transport) -> Iterator[Route]:
    """All listeners of one transport."""
    guests = [(port, n) for (t, port), n in sorted(wiring.owners.items()) if t is transport]
    natives = [port for t, port in sorted(wiring.native_ports) if t is transport]
    for family in Family:
        for port, n in guests:
            to = authority(guest_link(family, n), port)
            yield Route(authority(loopback(family), port), to)
            yield Route(authority(alias(family), port), to)
        for port in natives:
            yield Route(authority(alias(family), port), authority(loopback(family), port))


def haproxy_conf(wiring: Wiring) -> str:
    """HAProxy's configuration: one proxy per listener."""
    lines = [
        "defaults",
        " mode tcp",
        " retries 0",
        " timeout connect 5s",
        f" timeout client {IDLE_S}s",
        f" timeout server {IDLE_S}s",
    ]
    for i, route in enumerate(routes(wiring, Transport.TCP)):
        lines += [f"listen l{i}", f" bind {route.listen}", f" server s {route.to}"]
    return "\n".join(lines) + "\n"


def nginx_conf(wiring: Wiring, folder: Path) -> str:
    """nginx's configuration.

    It has one worker: with more, the datagrams of one client could become several sessions.
    """
    servers = (
        f"server {{ listen {route.listen} udp; proxy_pass {route.to}; }}\n"
        for route in routes(wiring, Transport.UDP)
    )
    return (
        f"load_module {STREAM_MODULE};\nuser root;\nworker_processes 1;\npid {folder}/nginx.pid;\n"
        f"events {{ worker_connections 4096; }}\n"
        f"stream {{\nproxy_timeout {UDP_SESSION_S}s;\n{''.join(servers)}}}\n"
    )


DATAPATH = Proxy()
