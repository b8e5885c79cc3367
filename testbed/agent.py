"""The traffic agent's build and its control client.

`build` compiles `agent/` once per content; `Agent` gives orders to a running agent over its control
connection (the protocol is described in `agent/README.md`) and hands results back as plain data.
It does not start agents: that is what runtimes do, each in its own way.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from testbed import paths
from testbed.host import compiler, facts
from testbed.model.addresses import CONTROL_PORT, Address
from testbed.model.errors import Error
from testbed.model.terms import Family, Transport

CFLAGS = ("-std=gnu17", "-O2", "-fPIE", "-pie", "-pthread")
"""gnu17: newer defaults bind strtol to a symbol of newer C libraries, which OSv has not."""

SLACK_S = 30.0
"""How much longer than its duration a run may take: the agent gives up 5 s after the last progress,
in any of several phases (name, connection, streams, score)."""
BYTES_LIMIT_S = 600.0
"""How long a run by bytes may take."""

Histogram = tuple[tuple[float, int], ...]
Mode = Literal["stream", "rr", "crr"]
Direction = Literal["up", "down"]


def build() -> Path:
    """Path of the compiled agent: a dynamic position-independent executable that needs only libc.

    Raises `Error` if there is no compiler or it fails.
    """
    return compiler.build("the traffic agent", "agent", paths.AGENT, CFLAGS)


@dataclass(frozen=True)
class Hello:
    """What an agent says of itself and of the stack it runs on."""

    version: str
    families: frozenset[Family]
    """Families whose sockets work."""
    monotonic_ns: int
    realtime_ns: int


@dataclass(frozen=True)
class Server:
    """A port that an agent serves, until it is stopped or the control connection ends."""

    id: int
    port: int


@dataclass(frozen=True)
class Result:
    """What a run came to, without its warm-up, scored by the receiver on its own clock."""

    address: Address
    """What the dialed name resolved to."""
    bytes: int
    """Payload that arrived: of streams at the receiver, of transactions as responses."""
    duration_s: float
    """Of several streams the longest."""
    transactions: int
    """Responses, each to a request on an open (`rr`) or a fresh (`crr`) connection."""
    datagrams: int
    """Datagrams of UDP streams that arrived."""
    errors: int
    """`crr`: transactions that failed (a first one that fails, fails the run)."""
    lost: int
    """UDP: datagrams that never arrived, or requests without a response for 250 ms."""
    reordered: int
    """UDP streams: datagrams after one with a higher number, or a second time."""
    corrupt: int
    """Buffers, datagrams or responses whose payload was wrong, those of the warm-up too. All are
    looked at in warm-up and in runs by bytes, else the beginning of every 16th."""
    histogram_us: Histogram
    """Times of transactions (`crr`: from connect to close) as (upper bound in µs, count)."""


class Agent:
    """A control connection to a running agent. Closing it stops the servers it ordered."""

    def __init__(self, connection: socket.socket) -> None:
        """Takes over a connected socket, of whatever network namespace."""
        self._socket = connection
        self._lines = connection.makefile("rb")

    @classmethod
    def connect(
        cls, address: Address | str, port: int = CONTROL_PORT, timeout_s: float = 5.0
    ) -> Self:
        """Connect from the caller's network namespace. Raises `Error` if nobody answers."""
        try:
            return cls(socket.create_connection((str(address), port), timeout_s))
        except OSError as e:
            raise Error(f"no traffic agent at {address} port {port}: {e}") from e

    def hello(self, limit_s: float = SLACK_S) -> Hello:
        """Version, families and clocks of the agent. Raises `Error` if it does not say in time."""
        answer = self._order(limit_s, op="hello")
        families = frozenset(f for f in Family if answer[f.value])
        return Hello(answer["version"], families, answer["monotonic_ns"], answer["realtime_ns"])

    def serve(
        self,
        transport: Transport,
        family: Family,
        port: int = 0,
        bind: str = "any",
        *,
        delay_us: float = 0.0,
    ) -> Server:
        """Serve every mode on a port (0: any free one) of `any`, `localhost` or an address.

        `localhost` is the loopback address itself, 127.0.0.1 or ::1, not looked up. Responses to
        requests leave `delay_us` later than they might.
        """
        delay = {"delay_us": delay_us} if delay_us else {}
        answer = self._order(
            op="serve", transport=transport, family=family, port=port, bind=bind, **delay
        )
        return Server(answer["server"], answer["port"])

    def stop(self, server: Server) -> None:
        """Stop serving; when this returns, connections are closed and the port is free."""
        self._order(op="stop", server=server.id)

    def run(
        self,
        transport: Transport,
        family: Family,
        host: str,
        port: int,
        mode: Mode,
        size_bytes: int,
        *,
        direction: Direction = "up",
        streams: int = 1,
        duration_s: float = 0.0,
        bytes: int = 0,
        warmup_s: float = 0.0,
        rate_bps: float = 0.0,
        rate_per_s: float = 0.0,
    ) -> Result:
        """Dial `host`, a name that the agent looks up afresh, and make traffic.

        `size_bytes` is that of one write, datagram (its 16-byte header counted in), request and
        response. Give either `duration_s` or `bytes` (per stream, in whole datagrams; without
        warm-up, as all of them are checked). `direction` is that of a `stream`, `rate_bps` the
        payload rate of all UDP streams together (0: as fast as it goes), `rate_per_s` that of `rr`
        requests, timed from when each was due (0: each when the last is answered). Raises `Error`
        with what the agent says: `connect localhost:8080: Connection refused`.
        """
        order: dict[str, Any] = {
            "transport": transport,
            "family": family,
            "host": host,
            "port": port,
            "mode": mode,
            "size_bytes": size_bytes,
            "streams": streams,
            "duration_s": duration_s,
            "bytes": bytes,
            "warmup_s": warmup_s,
        }
        if mode == "stream":
            order["direction"] = direction
            if transport is Transport.UDP:
                order["rate_bps"] = rate_bps
        if rate_per_s:
            order["rate_per_s"] = rate_per_s
        limit_s = (duration_s or BYTES_LIMIT_S) + warmup_s + SLACK_S
        answer = self._order(limit_s, op="run", **order)
        histogram = tuple((float(upper), int(count)) for upper, count in answer["histogram_us"])
        return Result(
            address=ip_address(answer["address"]),
            histogram_us=histogram,
            **{k: answer[k] for k in Result.__dataclass_fields__ if k not in _CONVERTED},
        )

    def close(self) -> None:
        """End the control connection, and with it the servers that were ordered over it."""
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, **order: Any) -> None:
        """Send an order (agent/README.md) without waiting; answers come in the order of asking."""
        try:
            self._socket.sendall(json.dumps(order).encode() + b"\n")
        except OSError as e:
            raise Error(f"traffic agent: {order['op']}: {e}") from e

    def answer(self, limit_s: float = SLACK_S) -> dict[str, Any]:
        """The next answer. Raises `Error` with what the agent says if an order was refused."""
        try:
            self._socket.settimeout(limit_s * facts.slowness())
            line = self._lines.readline()
        except OSError as e:
            raise Error(f"traffic agent: {e}") from e
        if not line.endswith(b"\n"):
            raise Error("traffic agent: the agent has ended")
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            raise Error(f"traffic agent: {answer['error']}")
        return answer

    def _order(self, limit_s: float = SLACK_S, **order: Any) -> dict[str, Any]:
        self.ask(**order)
        return self.answer(limit_s)


_CONVERTED = ("address", "histogram_us")
