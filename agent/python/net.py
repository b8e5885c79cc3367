# SPDX-License-Identifier: Apache-2.0
"""Sockets, time limits, pattern of the payload (net.c)."""

from __future__ import annotations

import errno
import os
import select
import socket
from contextlib import suppress

from .loop import Task, now_ns

SECOND_NS = 1_000_000_000
LIMIT_NS = 5 * SECOND_NS  # a run ends after so long without progress
TICK_NS = SECOND_NS // 4  # time limit of a wait for one datagram
MAX_MESSAGE = 1 << 20  # bytes of one write, request or response over TCP
RECEIVE_BYTES = 1 << 16  # holds any datagram
CHUNK = 128 << 10  # bytes of one read from a TCP stream
IN_A_ROW = 64  # calls after which a task waits once, so that others can run
MAGIC = 0x74626137  # "tba7"

FAMILIES = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}

Address = tuple[str, int]
Bytes = bytes | bytearray | memoryview

_PERIOD = 4093
_SAMPLE_EVERY = 16  # outside of the warm-up, one buffer in so many is checked
_SAMPLE_BYTES = 64


def _make_pattern() -> bytes:
    """Make the pattern: its period, repeated so that each piece of a stream is contiguous in it."""
    state, period = MAGIC, bytearray()
    for _ in range(_PERIOD):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        period.append(state >> 24)
    return bytes(period) * (MAX_MESSAGE // _PERIOD + 2)


_PATTERN = _make_pattern()


def pattern(offset: int, length: int) -> bytes:
    """Payload of a stream at an offset."""
    start = offset % _PERIOD
    return _PATTERN[start : start + length]


def intact(payload: Bytes, offset: int, fully: bool, nth: int) -> bool:
    """Whether the nth buffer has the pattern. Without `fully`, only a sample is checked."""
    if not fully and nth % _SAMPLE_EVERY:
        return True
    piece = bytes(payload if fully else payload[:_SAMPLE_BYTES])
    return piece == pattern(offset, len(piece))


def failure(code: int) -> OSError:
    """The exception of an error number."""
    return OSError(code, os.strerror(code))


def bound(family: socket.AddressFamily, kind: socket.SocketKind, address: Address) -> socket.socket:
    """Make a non-blocking socket that is bound to an address."""
    new = socket.socket(family, kind)
    try:
        if family == socket.AF_INET6:
            with suppress(OSError):  # WASI's are always IPv6-only
                new.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == socket.SOCK_STREAM:
            new.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        new.bind(address)
        new.setblocking(False)
    except BaseException:
        new.close()
        raise
    return new


def readable(waiting: socket.socket, limit_ns: int = LIMIT_NS) -> Task[None]:
    """Wait until a socket is readable. Raises `TimeoutError` after the limit."""
    yield waiting, select.POLLIN, now_ns() + limit_ns


def writable(waiting: socket.socket, limit_ns: int = LIMIT_NS) -> Task[None]:
    """Wait until a socket is writable. Raises `TimeoutError` after the limit."""
    yield waiting, select.POLLOUT, now_ns() + limit_ns


def receive_some(connection: socket.socket, into: memoryview) -> Task[int]:
    """Receive at least one byte. Returns the number of bytes, 0 at the end."""
    while True:
        try:
            return connection.recv_into(into)
        except BlockingIOError:
            yield from readable(connection)


def receive_all(connection: socket.socket, length: int) -> Task[bytearray]:
    """Receive exactly `length` bytes. Raises ECONNRESET if the peer ends earlier."""
    data = bytearray(length)
    view, got = memoryview(data), 0
    while got < length:
        more = yield from receive_some(connection, view[got:])
        if not more:
            raise failure(errno.ECONNRESET)
        got += more
    return data


def send_some(connection: socket.socket, data: Bytes) -> Task[int]:
    """Send as much as the socket takes. Returns the number of bytes."""
    while True:
        try:
            return connection.send(data)
        except BlockingIOError:
            yield from writable(connection)


def send_all(connection: socket.socket, data: Bytes) -> Task[None]:
    """Send all of the data."""
    view = memoryview(data)
    while view:
        sent = yield from send_some(connection, view)
        view = view[sent:]
