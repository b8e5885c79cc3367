"""Compiles the traffic agent, and controls a running one over its control connection.

`build` compiles `agent/` once per content. `Agent` sends orders to a running agent, and returns
results as plain data. The protocol is described in `agent/README.md`. Runtimes start agents.
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

COMMON_CFLAGS = ("-std=gnu17", "-O2", "-pthread")
"""gnu17: newer standards bind strtol to a symbol of newer C libraries, which OSv lacks."""
CFLAGS = (*COMMON_CFLAGS, "-fPIE", "-pie")
STATIC_CFLAGS = (*COMMON_CFLAGS, "-static")

SLACK_S = 30.0
"""Time that a run may take beyond its duration. The agent gives up 5 s after the last progress, in
each of several phases (name, connection, streams, score)."""
BYTES_LIMIT_S = 600.0
"""Time limit of a run by bytes."""

Histogram = tuple[tuple[float, int], ...]
Mode = Literal["stream", "rr", "crr"]
Direction = Literal["up", "down"]


def build(static: bool = False) -> Path:
    """Path of the compiled agent: a dynamic position-independent executable that needs only libc.

    With `static`, and in a bundle always, it is static and needs no library. Raises `Error` if
    there is no compiler or it fails.
    """
    if paths.is_bundle():
        return paths.BUNDLED_AGENT
    flags = STATIC_CFLAGS if static else CFLAGS
    return compiler.build("the traffic agent", "agent", paths.AGENT, flags)


@dataclass(frozen=True)
class Hello:
    """Version, families and clocks of an agent."""

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
    """Result of a run without its warm-up, counted by the receiver, timed by its clock."""

    address: Address
    """Address to which the dialed name resolved."""
    bytes: int
    """Payload that arrived: of streams at the receiver, of transactions in responses."""
    duration_s: float
    """Duration; of several streams the longest."""
    transactions: int
    """Responses, each to a request on an open (`rr`) or a fresh (`crr`) connection."""
    datagrams: int
    """Datagrams of UDP streams that arrived."""
    errors: int
    """`crr`: transactions that failed. (If the first one fails, the run fails.)"""
    lost: int
    """UDP: datagrams that never arrived, or, without a rate, requests without a response for
    250 ms."""
    reordered: int
    """UDP streams: datagrams after one with a higher number, or a second time."""
    corrupt: int
    """Buffers, datagrams or responses with wrong payload, including the warm-up. The payload is
    checked in full in warm-up and in runs by bytes, else at the beginning of every 16th."""
    histogram_us: Histogram
    """Times of transactions (`crr`: from connect to close) as (upper bound in µs, count)."""
    unanswered: int = 0
    """At a given rate: requests without a response 250 ms after the end, or, over UDP, when 16384
    later ones were sent."""
    unsent: int = 0
    """At a given rate: requests that could not be sent when due, since 16384 before were waiting
    for a response (UDP: for the socket)."""


class Agent:
    """A control connection to a running agent. Closing it stops the servers started over it."""

    def __init__(self, connection: socket.socket) -> None:
        """Take over a connected socket of any network namespace."""
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
        """Ask for version, families and clocks. Raises `Error` if there is no answer in time."""
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

        `localhost` is the loopback address 127.0.0.1 or ::1, without a look-up. Responses to
        requests are delayed by `delay_us`.
        """
        delay = {"delay_us": delay_us} if delay_us else {}
        answer = self._order(
            op="serve", transport=transport, family=family, port=port, bind=bind, **delay
        )
        return Server(answer["server"], answer["port"])

    def stop(self, server: Server) -> None:
        """Stop serving. When this returns, connections are closed and the port is free."""
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
        """Order a run: dial `host`, a name that the agent looks up anew, and generate traffic.

        `size_bytes`: size of a write, a datagram (with its header of 16 bytes), a request and a
        response. Give either `duration_s` or `bytes` (per stream, in whole datagrams; without
        warm-up, since all are checked). `direction`: of a `stream`. `rate_bps`: payload rate of all
        UDP streams together (0: as fast as possible). `rate_per_s`: rate of `rr` requests, each
        sent when due and timed from then (0: each is sent when the last one is answered).

        Raises `Error` with the agent's message: `connect localhost:8080: Connection refused`.
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
        """Close the control connection. The agent stops the servers started over it."""
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, **order: Any) -> None:
        """Send an order (agent/README.md) without waiting. Answers come in the order of orders."""
        try:
            self._socket.sendall(json.dumps(order).encode() + b"\n")
        except OSError as e:
            raise Error(f"traffic agent: {order['op']}: {e}") from e

    def answer(self, limit_s: float = SLACK_S) -> dict[str, Any]:
        """Wait for the next answer. Raises `Error` with the agent's message if it refused."""
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
