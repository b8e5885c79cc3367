"""What a check is run in: two workloads of a pod in their roles, and how to get at what is around.

A `Stage` is the pod: one that is built here, or one that somebody else made (a namespace, and a
guest's agent in it), in which nothing can be replaced. A `Bed` is one case's view of it.
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
from testbed.model.terms import Family, Transport


class Bed:
    """One case: `client` and `server` are its workloads, `port` is the server's to use.

    `pair` is the pair's shape: to a check a component or a container is one more native.
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
        """One more control connection to a workload. Raises `Unsupported` if there is none."""
        try:
            peer = Peer(name, self.stage.agent(name))
        except OSError as e:
            raise OSError(e.errno, f"the agent of {name} is not to be reached: {e}") from e
        self._opened.append(peer)
        return peer

    def next_port(self, name: str = "") -> int:
        """Another port that the server, or the workload of that name, owns."""
        return next(self._ports[name or self.server_name])

    @property
    def own_pod(self) -> OwnStage:
        """The stage, if it is ours to change. Raises `Unsupported` else."""
        if not isinstance(self.stage, OwnStage):
            raise Unsupported("would have to change a pod that is not ours")
        return self.stage

    @property
    def target(self) -> Address:
        """What the client dials for `localhost`."""
        return self.client.localhost(self.family)

    @property
    def loopback(self) -> Address:
        return loopback(self.family)

    def open(self, peer: Peer, family: Family | None = None) -> Sock:
        """A socket of the case's transport."""
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
        """A socket that serves: bound, and listening if it is TCP's.

        Bound where a program of its kind would that means `localhost`, on `port` of this bed.
        """
        peer = peer or self.server
        sock = self.open(peer, family)
        if self.transport is Transport.TCP:
            sock.set("SO_REUSEADDR", 1)
        if sock.family is Family.IPV6 and "IPV6_V6ONLY" not in options:
            sock.set("IPV6_V6ONLY", 1)
        for option, value in options.items():
            sock.set(option, value)
        sock.bind(at or peer.here(sock.family), port or self.port)
        if self.transport is Transport.TCP:
            sock.listen(backlog)
        return sock

    def dial(self, port: int = 0, *, peer: Peer | None = None) -> Sock:
        """A socket of the client, or of another, connected to `localhost`."""
        peer = peer or self.client
        sock = self.open(peer)
        sock.connect(peer.localhost(self.family), port or self.port)
        return sock

    def connected(self) -> tuple[Sock, Sock]:
        """A TCP connection on a port of its own, client's end first; nobody listens any more."""
        port = self.next_port()
        listener = self.serve(port=port)
        near = self.dial(port)
        far, _ = listener.accept()
        listener.close()
        return near, far

    def close(self) -> None:
        for peer in self._opened:
            peer.close()
