# SPDX-License-Identifier: Apache-2.0
"""The client end: generates the traffic of one run (client.c)."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager

from .loop import Loop, Task, now_ns
from .net import (
    FAMILIES,
    KINDS,
    LIMIT_NS,
    MAX_MESSAGE,
    RECEIVE_BYTES,
    TICK_NS,
    failure,
    intact,
    pattern,
    readable,
    receive_all,
    send_all,
    writable,
)
from .order import Keys, Refused
from .stream import (
    DATAGRAM_FORMAT,
    END,
    FOREVER_NS,
    OPEN,
    READY,
    REPORT,
    REPORT_FORMAT,
    REQUEST,
    REQUEST_RESPONSE,
    RESPONSE,
    STREAM_DOWN,
    STREAM_UP,
    Order,
    Score,
    head_of,
    send_datagram,
    tcp_receive,
    tcp_send,
    udp_send,
)

MAX_STREAMS = 64


class Run:
    """A run: one order to generate traffic, and the scores of its streams."""

    def __init__(self, loop: Loop, keys: Keys) -> None:
        self._loop = loop
        self._transport, self._family = keys["transport"], keys["family"]
        self._mode, self._host, self._port = keys["mode"], keys["host"], int(keys["port"])
        self._to = "", 0  # the address that the name resolves to
        self._warmup_ns = int(keys.get("warmup_s", 0) * 1e9)
        self._duration_ns = int(keys.get("duration_s", 0) * 1e9)
        self._udp = self._transport == "udp"
        streams = int(keys.get("streams", 1))
        if keys.get("rate_per_s", 0):
            raise Refused("rate_per_s: poll() waits for whole milliseconds")
        down = self._mode == "stream" and keys.get("direction", "up") == "down"
        if down and self._udp:
            raise Refused("direction: UDP streams go up")
        if streams > MAX_STREAMS or not 1 <= keys["size_bytes"] <= MAX_MESSAGE:
            raise Refused("streams or size_bytes: too many")
        mode = REQUEST_RESPONSE
        if self._mode == "stream":
            mode = STREAM_DOWN if down else STREAM_UP
        self._orders = [
            Order(
                mode,
                size=int(keys["size_bytes"]),
                phase=int.from_bytes(os.urandom(4), "big"),
                warmup_ns=self._warmup_ns,
                total_bytes=int(keys.get("bytes", 0)),
                rate_bps=int(keys.get("rate_bps", 0) / streams),
            )
            for _ in range(streams)
        ]
        self._transactions = self._errors = 0
        self._histogram: dict[int, int] = {}
        """Upper bound of a bucket in ns → number of latencies in it."""
        self._scores: list[Score] = []
        self._fault: Refused | None = None
        self._running = streams

    def carry_out(self) -> Keys:
        """Run all streams to their ends, and return the answer. Raises `Refused` if one fails."""
        with self._failing("resolve"):
            found = socket.getaddrinfo(self._host, self._port, FAMILIES[self._family])
            self._to = str(found[0][4][0]), self._port
        tasks = [self._stream(order) for order in self._orders]
        for task in tasks:
            self._loop.start(task)
        self._loop.run(lambda: not self._running or self._fault is not None)
        for task in tasks:
            self._loop.cancel(task)
        if self._fault:
            raise self._fault
        scores = self._scores
        if not sum(s.scored_bytes for s in scores):
            raise Refused(f"{self._naming('stream to')}: nothing arrived after the warm-up")
        return {
            "bytes": sum(s.scored_bytes for s in scores),
            "datagrams": sum(s.datagrams for s in scores),
            "lost": sum(s.lost for s in scores),
            "unanswered": 0,
            "unsent": 0,
            "reordered": sum(s.reordered for s in scores),
            "corrupt": sum(s.corrupt for s in scores),
            "address": self._to[0],
            "duration_s": max(s.elapsed_ns for s in scores) / 1e9,
            "transactions": self._transactions,
            "errors": self._errors,
            "histogram_us": [[ns / 1e3, n] for ns, n in sorted(self._histogram.items())],
        }

    def _naming(self, what: str) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{what} {host}:{self._port}"

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Convert an error in the block to `Refused`: connect localhost:80: Connection refused."""
        try:
            yield
        except OSError as e:
            raise Refused(f"{self._naming(what)}: {e.strerror or e}") from e

    def _stream(self, order: Order) -> Task[None]:
        """Run one stream on a connection of its own."""
        try:
            if self._mode == "crr":
                yield from self._transact(order, None)
                return
            with self._failing("connect"):
                connection = yield from self._connect()
            with closing(connection):
                if self._mode != "stream":
                    yield from self._transact(order, connection)
                elif self._udp:
                    yield from self._udp_stream(order, connection)
                else:
                    yield from self._tcp_stream(order, connection)
        except Refused as e:
            self._fault = self._fault or e
        finally:
            self._running -= 1

    def _connect(self) -> Task[socket.socket]:
        connection = socket.socket(FAMILIES[self._family], KINDS[self._transport])
        try:
            connection.setblocking(False)
            try:
                connection.connect(self._to)
            except BlockingIOError:
                yield from writable(connection)
            if code := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise failure(code)
            if not self._udp and self._mode != "stream":
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            connection.close()
            raise
        return connection

    def _until_ns(self) -> int:
        if not self._duration_ns:
            return FOREVER_NS
        return now_ns() + self._warmup_ns + self._duration_ns

    def _new_score(self, order: Order) -> Score:
        score = Score(order)
        self._scores.append(score)
        return score

    def _tcp_stream(self, order: Order, connection: socket.socket) -> Task[None]:
        score, until_ns = self._new_score(order), self._until_ns()
        with self._failing("stream to"):
            yield from send_all(connection, order.pack())
            if order.mode == STREAM_UP:
                yield from tcp_send(connection, order, until_ns)
                connection.shutdown(socket.SHUT_WR)
                score.unpack((yield from receive_all(connection, REPORT_FORMAT.size)))
            else:
                yield from tcp_receive(connection, order, until_ns, score)
                if not order.total_bytes and score.last_ns < until_ns:
                    raise ConnectionResetError(errno.ECONNRESET, "ended early")
        if order.total_bytes and score.scored_bytes != order.total_bytes:
            raise Refused(f"{self._naming('stream to')}: not all bytes arrived")

    def _udp_stream(self, order: Order, connection: socket.socket) -> Task[None]:
        score, flow = self._new_score(order), order.phase
        with self._failing("stream to"):
            yield from _ask(connection, OPEN, flow, 0, order.pack(), READY)
            sent = yield from udp_send(connection, order, flow, self._until_ns())
            answer = yield from _ask(connection, END, flow, sent, b"", REPORT)
            score.unpack(answer[DATAGRAM_FORMAT.size :])

    def _transact(self, order: Order, connection: socket.socket | None) -> Task[None]:
        """Send requests, each when the last one is answered (client.c).

        Without a connection, each request has a new one.
        """
        score = self._new_score(order)
        begin = now_ns()
        scored_ns, until_ns = begin + self._warmup_ns, self._until_ns()
        first_ns, nth, progress = 0, 0, begin
        while begin < until_ns and (not order.total_bytes or nth * order.size < order.total_bytes):
            scored = begin >= scored_ns
            fully = bool(order.total_bytes) or not scored
            right = None
            try:
                right = yield from self._exchange(order, connection, nth, not nth, fully)
            except OSError as e:
                if connection is not None or not self._transactions:
                    raise Refused(f"{self._naming('request to')}: {e.strerror or e}") from e
            now = now_ns()
            if right is not None:
                progress = now
                score.corrupt += not right
            elif now - progress > LIMIT_NS:
                raise Refused(f"{self._naming('request to')}: {os.strerror(errno.EAGAIN)}")
            if scored:
                first_ns = first_ns or begin
                score.elapsed_ns = now - first_ns
                if right is not None:
                    score.scored_bytes += order.size
                    self._transactions += 1
                    self._add_latency(now - begin)
                elif self._udp:
                    score.lost += 1
                else:
                    self._errors += 1
            begin, nth = now, nth + 1

    def _exchange(
        self, order: Order, connection: socket.socket | None, nth: int, first: bool, fully: bool
    ) -> Task[bool | None]:
        """Send the nth request. Returns whether the response is right, None if there is none."""
        if connection is None:
            with closing((yield from self._connect())) as once:
                return (yield from self._exchange(order, once, nth, True, fully))
        if self._udp:
            return (yield from _exchange_udp(order, connection, nth, fully))
        return (yield from _exchange_tcp(order, connection, nth, first, fully))

    def _add_latency(self, ns: int) -> None:
        """Count a latency in the bucket of histogram.c: at most 1/128 of the value wide."""
        shift = max(0, ns.bit_length() - 8)
        upper = (((ns >> shift) + 1) << shift) - 1
        self._histogram[upper] = self._histogram.get(upper, 0) + 1


def _exchange_tcp(
    order: Order, connection: socket.socket, nth: int, first: bool, fully: bool
) -> Task[bool]:
    """Send a request, after the order if it is the connection's first.

    Returns whether the response is right.
    """
    offset = order.phase + nth * order.size
    start = order.pack() if first else b""
    yield from send_all(connection, start + pattern(offset, order.size))
    response = yield from receive_all(connection, order.size)
    return intact(response, offset, fully, nth)


def _exchange_udp(
    order: Order, connection: socket.socket, nth: int, fully: bool
) -> Task[bool | None]:
    """Send a request. Returns whether the response is right, None if there is none in a tick."""
    offset = order.phase + nth * order.size
    body = pattern(offset, order.size - DATAGRAM_FORMAT.size)
    yield from send_datagram(connection, None, REQUEST, order.phase, nth, body)
    while (data := (yield from _receive_datagram(connection, order.phase))) is not None:
        kind, _, sequence = head_of(data)
        if (kind, sequence) == (RESPONSE, nth) and len(data) == order.size:
            return intact(data[DATAGRAM_FORMAT.size :], offset, fully, nth)
    return None


def _ask(
    connection: socket.socket, kind: int, flow: int, sequence: int, body: bytes, answer: int
) -> Task[bytes]:
    """Repeat a datagram until it is answered; returns the answer. Raises EAGAIN after 5 s."""
    begin = now_ns()
    while now_ns() < begin + LIMIT_NS:
        yield from send_datagram(connection, None, kind, flow, sequence, body)
        while (data := (yield from _receive_datagram(connection, flow))) is not None:
            if head_of(data)[0] == answer:
                return data
    raise failure(errno.EAGAIN)


def _receive_datagram(connection: socket.socket, flow: int) -> Task[bytes | None]:
    """Receive the next datagram of a flow. Returns None after a tick without one."""
    while True:
        try:
            data = connection.recv(RECEIVE_BYTES)
        except BlockingIOError:
            try:
                yield from readable(connection, TICK_NS)
            except TimeoutError:
                return None
        else:
            kind, its_flow, _ = head_of(data)
            if kind and its_flow == flow:
                return data
