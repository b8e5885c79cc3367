"""Test bed of one conformance case: its client, its server, their sockets and ports.

The pod is a `stage.Stage`. A `Bed` is the view of one case on it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from testbed.campaigns.roles import ROLES
from testbed.conformance.check import Case, Unsupported
from testbed.conformance.sockets import Peer, Sock
from testbed.conformance.stage import (
    PORTS,
    OwnStage,
    Stage,
)
from testbed.model.addresses import Address, loopback
from testbed.model.cells import Pair
from testbed.model.terms import Family, Transport


class Bed:
    """Client, server and port of one case.

    `port` is a port that the server owns. `pair` is the shape of the case's pair, because checks
    treat components and containers like other natives.
    """

    _ports: Mapping[str, Iterator[int]] = {
        name: itertools.cycle(ports) for name, ports in PORTS.items()
    }

    def __init__(self, stage: Stage, case: Case) -> None:
        self.stage, self.case = stage, case
        self.pair, self.family, self.transport = case.pair.shape, case.family, case.transport
        self._opened: list[Peer] = []
        try:
            self.client_name, self.server_name = ROLES[case.pair]
            self.client, self.server = self.peer(self.client_name), self.peer(self.server_name)
        except BaseException:
            self.close()
            raise
        self.port = self.next_port()

    def peer(self, name: str) -> Peer:
        """Open another control connection to a workload. Raises `Unsupported` if it is missing."""
        try:
            peer = Peer(name, self.stage.agent(name))
        except OSError as e:
            raise OSError(e.errno, f"the agent of {name} cannot be reached: {e}") from e
        self._opened.append(peer)
        return peer

    def another_client(self) -> Peer:
        """A workload that is neither the client nor the server, and dials the server, too."""
        return self.peer("native2" if self.pair is Pair.GUEST_GUEST else "guest2")

    def next_port(self, name: str = "") -> int:
        """Another port that the server, or the named workload, owns."""
        return next(self._ports[name or self.server_name])

    @property
    def own_pod(self) -> OwnStage:
        """The stage, if the pod can be changed. Raises `Unsupported` for somebody else's pod."""
        if not isinstance(self.stage, OwnStage):
            raise Unsupported("would have to change a pod that is not ours")
        return self.stage

    @property
    def target(self) -> Address:
        """The address that the client dials for `localhost`."""
        return self.client.localhost(self.family)

    @property
    def loopback(self) -> Address:
        return loopback(self.family)

    def open(self, peer: Peer, family: Family | None = None) -> Sock:
        """A new socket of the case's transport."""
        return peer.socket(self.transport, family or self.family)

    def serve(
        self,
        at: Address | str = "",
        *,
        port: int = 0,
        peer: Peer | None = None,
        family: Family | None = None,
        backlog: int = 128,
        options: Mapping[str, int | str] = {},
    ) -> Sock:
        """A server's socket: bound, and listening if it is a TCP socket.

        The default address is the one that a program binds for `localhost` (`Peer.bind_address`),
        the default port that of the bed.
        """
        peer = peer or self.server
        sock = self.open(peer, family)
        if self.transport is Transport.TCP:
            sock.set("SO_REUSEADDR", 1)
        if sock.family is Family.IPV6 and "IPV6_V6ONLY" not in options:
            sock.set("IPV6_V6ONLY", 1)
        for option, value in options.items():
            sock.set(option, value)
        sock.bind(at or peer.bind_address(sock.family), port or self.port)
        if self.transport is Transport.TCP:
            sock.listen(backlog)
        return sock

    def serve_by_agent(self, peer: Peer | None = None) -> None:
        """Have the server's traffic agent, or that of another peer, serve on the bed's port."""
        peer = peer or self.server
        at = peer.bind_address(self.family)
        peer.agent.serve(self.transport, self.family, self.port, at)

    def dial(
        self, port: int = 0, *, peer: Peer | None = None, family: Family | None = None
    ) -> Sock:
        """A socket of the client, or of another peer, connected to `localhost`."""
        peer = peer or self.client
        sock = self.open(peer, family)
        sock.connect(peer.localhost(sock.family), port or self.port)
        return sock

    def connected(self) -> tuple[Sock, Sock]:
        """A new TCP connection on another port: client's socket, server's socket.

        The listener is closed.
        """
        port = self.next_port()
        listener = self.serve(port=port)
        near = self.dial(port)
        far, _ = listener.accept()
        listener.close()
        return near, far

    def close(self) -> None:
        for peer in self._opened:
            peer.close()
