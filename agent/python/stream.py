# SPDX-License-Identifier: Apache-2.0
"""Sends, receives and scores streams, for either end; format of data connections (stream.c)."""

from __future__ import annotations

import errno
import socket
import struct
import time
from typing import NamedTuple

from .loop import Task, now_ns
from .net import (
    CHUNK,
    IN_A_ROW,
    LIMIT_NS,
    MAGIC,
    MAX_MESSAGE,
    RECEIVE_BYTES,
    SECOND_NS,
    TICK_NS,
    Address,
    Bytes,
    failure,
    intact,
    pattern,
    readable,
    receive_some,
    send_some,
    writable,
)

LATE_NS = 4_000_000  # longest delay that a paced sender catches up with
FOREVER_NS = 1 << 63

# Modes of an order and types of a datagram, with the numbers of agent.h.
STREAM_UP, STREAM_DOWN, REQUEST_RESPONSE = 1, 2, 3
OPEN, READY, DATA, END, REPORT, ALIVE, DONE, REQUEST, RESPONSE = range(1, 10)

ORDER_FORMAT = struct.Struct(">IIIIQQQ")
REPORT_FORMAT = struct.Struct(">QQQQQQ")
DATAGRAM_FORMAT = struct.Struct(">IIQ")


class Order(NamedTuple):
    """`struct order` of agent.h: first bytes of a TCP connection, or body of an OPEN."""

    mode: int
    size: int
    """Bytes per write, datagram, request and response."""
    phase: int
    """Offset in the pattern at which the stream's payload begins."""
    warmup_ns: int
    total_bytes: int
    """Length of a stream; 0: until the client ends it."""
    rate_bps: int
    """UDP streams: payload bits per second; 0: as fast as possible."""

    @classmethod
    def unpack(cls, data: Bytes, least_size: int = 1) -> Order:
        """Parse an order. Raises EPROTO if it is none."""
        magic, *values = ORDER_FORMAT.unpack(data)
        order = cls(*values)
        if magic != MAGIC or not least_size <= order.size <= MAX_MESSAGE:
            raise ConnectionAbortedError(errno.EPROTO, "no order")
        return order

    def pack(self) -> bytes:
        """Format the order."""
        return ORDER_FORMAT.pack(MAGIC, *self)


_REPORTED = ("scored_bytes", "elapsed_ns", "datagrams", "lost", "reordered", "corrupt")
"""Attributes of `Score` in the order of `struct report`."""


class Score:
    """The receiver's score of a stream, after the warm-up."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.last_ns = now_ns()
        self.scored_bytes = self.elapsed_ns = self.datagrams = 0
        self.lost = self.reordered = self.corrupt = 0
        self._measuring = not order.warmup_ns
        self._begin_ns = self._first_ns = self.last_ns
        self._total = 0  # bytes (TCP) or datagrams (UDP), with the warm-up
        self._next_sequence = self._first_sequence = 0  # highest + 1; first scored one

    def add_bytes(self, payload: Bytes, nth: int) -> None:
        """Count the data of the nth read from a TCP connection."""
        fully = bool(self.order.total_bytes) or not self._measuring
        self.corrupt += not intact(payload, self.order.phase + self._total, fully, nth)
        self._total += len(payload)
        if self._in_time():
            self.scored_bytes += len(payload)

    def add_datagram(self, data: bytes, sequence: int) -> None:
        """Count a datagram of type DATA."""
        fully, late = bool(self.order.total_bytes) or not self._measuring, self._is_late(sequence)
        offset = self.order.phase + sequence * self.order.size
        self.corrupt += not intact(data[DATAGRAM_FORMAT.size :], offset, fully, self._total)
        self._total += 1
        if not late:
            self._next_sequence = sequence + 1
        if self._in_time():
            self.scored_bytes += len(data)
            self.datagrams += 1
            self.reordered += late
        else:
            self._first_sequence = self._next_sequence

    def finish(self, sent: int | None = None) -> None:
        """End the score. `sent`: number of datagrams that were sent, with the warm-up."""
        self.elapsed_ns = self.last_ns - self._first_ns
        if sent is not None:
            expected = max(sent, self._next_sequence) - self._first_sequence
            self.lost = max(0, expected - self.datagrams)

    def pack(self) -> bytes:
        """Format `struct report` of agent.h."""
        return REPORT_FORMAT.pack(*(getattr(self, name) for name in _REPORTED))

    def unpack(self, data: Bytes) -> None:
        """Replace the score by the one of a peer's report."""
        for name, value in zip(_REPORTED, REPORT_FORMAT.unpack(data), strict=True):
            setattr(self, name, value)

    def _is_late(self, sequence: int) -> bool:
        return sequence < self._next_sequence

    def _in_time(self) -> bool:
        """Note the time of an arrival. Returns whether it is scored.

        The arrival that ends the warm-up is not.
        """
        self.last_ns = now_ns()
        if self._measuring:
            return True
        self._first_ns = self.last_ns
        self._measuring = self.last_ns >= self._begin_ns + self.order.warmup_ns
        return False


def tcp_send(connection: socket.socket, order: Order, until_ns: int) -> Task[None]:
    """Send a stream until all its bytes are sent, or the time is up if it has no given length."""
    sent = turns = 0
    while sent < order.total_bytes if order.total_bytes else now_ns() < until_ns:
        length = min(order.size, order.total_bytes - sent) if order.total_bytes else order.size
        sent += yield from send_some(connection, pattern(order.phase + sent, length))
        turns += 1
        if not turns % IN_A_ROW:
            yield from writable(connection)


def tcp_receive(
    connection: socket.socket, order: Order, until_ns: int | None, score: Score
) -> Task[None]:
    """Receive and score a stream, until its end or until the time is up."""
    buffer, nth = memoryview(bytearray(CHUNK)), 0
    while until_ns is None or score.last_ns < until_ns:
        got = yield from receive_some(connection, buffer)
        if not got:
            break
        score.add_bytes(buffer[:got], nth)
        nth += 1
        if not nth % IN_A_ROW:
            yield from readable(connection)
    score.finish()


def udp_send(connection: socket.socket, order: Order, flow: int, until_ns: int) -> Task[int]:
    """Send datagrams until all are sent or the time is up. Returns their number.

    Raises EAGAIN if nothing was heard from the receiver for too long.
    """
    sent, begin = 0, now_ns()
    heard = listened = begin
    datagrams = -(-order.total_bytes // order.size)
    while not order.total_bytes or sent < datagrams:
        now = now_ns()
        if now >= until_ns:
            break
        if now - listened > TICK_NS:
            heard, listened = (now if _drain(connection) else heard), now
            if now - heard > LIMIT_NS:
                raise failure(errno.EAGAIN)
        due = begin + sent * order.size * 8 * SECOND_NS // order.rate_bps if order.rate_bps else now
        begin += max(0, now - due - LATE_NS)
        if due > now:
            time.sleep(min(due - now, TICK_NS) / 1e9)
            continue
        body = pattern(order.phase + sent * order.size, order.size - DATAGRAM_FORMAT.size)
        yield from send_datagram(connection, None, DATA, flow, sent, body)
        sent += 1
        if not sent % IN_A_ROW:
            yield from writable(connection)
    return sent


def _drain(connection: socket.socket) -> bool:
    """Discard received datagrams. Returns whether there were any."""
    any_arrived = False
    while True:
        try:
            any_arrived = bool(connection.recv(RECEIVE_BYTES)) or any_arrived
        except BlockingIOError:
            return any_arrived


def send_datagram(
    connection: socket.socket,
    to: Address | None,
    kind: int,
    flow: int,
    sequence: int,
    body: Bytes = b"",
) -> Task[None]:
    """Send a datagram with its header, to an address or on a connected socket."""
    data = DATAGRAM_FORMAT.pack(MAGIC ^ kind, flow, sequence) + body
    while True:
        try:
            _ = connection.sendto(data, to) if to else connection.send(data)
        except BlockingIOError:
            yield from writable(connection)
        else:
            return


def head_of(data: bytes) -> tuple[int, int, int]:
    """Type, flow and sequence of a datagram. Type 0: it is not one of the agent's."""
    if len(data) < DATAGRAM_FORMAT.size:
        return 0, 0, 0
    kind, flow, sequence = DATAGRAM_FORMAT.unpack_from(data)
    return kind ^ MAGIC, flow, sequence
