# SPDX-License-Identifier: Apache-2.0
"""The server end (server.c)."""

from __future__ import annotations

import select
import socket
from typing import Any

from .loop import Loop, Task, now_ns
from .net import (
    FAMILIES,
    IN_A_ROW,
    KINDS,
    RECEIVE_BYTES,
    SECOND_NS,
    Address,
    bound,
    receive_all,
    send_all,
)
from .stream import (
    ALIVE,
    DATA,
    DATAGRAM_FORMAT,
    END,
    FOREVER_NS,
    OPEN,
    ORDER_FORMAT,
    READY,
    REPORT,
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
)


class Server:
    """A server of one port, until `stop`."""

    def __init__(
        self, loop: Loop, transport: str, family: str, address: Address, delay_ns: int
    ) -> None:
        self._loop, self._delay_ns = loop, delay_ns
        self._tasks: dict[socket.socket, Task[None]] = {}
        """Socket → the task that serves it."""
        self._socket = bound(FAMILIES[family], KINDS[transport], address)
        self.port: int = self._socket.getsockname()[1]
        if transport == "tcp":
            self._socket.listen(1024)
        self._start(
            self._socket, self._accept() if transport == "tcp" else self._receive_datagrams()
        )

    def stop(self) -> None:
        """Close its connections and free the port."""
        for task in list(self._tasks.values()):
            self._loop.cancel(task)
        self._socket.close()

    def _start(self, serving: socket.socket, task: Task[None]) -> None:
        self._tasks[serving] = task
        self._loop.start(task)

    def _delay(self) -> None:
        """Wait before a response, busily, for as long as the order says."""
        until = now_ns() + self._delay_ns
        while now_ns() < until:
            pass

    def _accept(self) -> Task[None]:
        while True:
            yield self._socket, select.POLLIN, None
            try:
                connection, _ = self._socket.accept()
            except OSError:
                continue
            connection.setblocking(False)
            self._start(connection, self._serve(connection))

    def _serve(self, connection: socket.socket) -> Task[None]:
        try:
            order = Order.unpack((yield from receive_all(connection, ORDER_FORMAT.size)))
            if order.mode == STREAM_UP:
                score = Score(order)
                yield from tcp_receive(connection, order, None, score)
                yield from send_all(connection, score.pack())
            elif order.mode == STREAM_DOWN:
                yield from tcp_send(connection, order, FOREVER_NS)
            elif order.mode == REQUEST_RESPONSE:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while True:
                    request = yield from receive_all(connection, order.size)
                    self._delay()
                    yield from send_all(connection, request)
        finally:
            connection.close()
            del self._tasks[connection]

    def _receive_datagrams(self) -> Task[None]:
        flows: dict[int, Flow] = {}
        while True:
            yield self._socket, select.POLLIN, None
            for _ in range(IN_A_ROW):
                try:
                    data, peer = self._socket.recvfrom(RECEIVE_BYTES)
                except OSError:
                    break
                yield from self._handle_datagram(flows, data, peer)

    def _handle_datagram(self, flows: dict[int, Flow], data: bytes, peer: Any) -> Task[None]:
        kind, flow_id, sequence = head_of(data)
        if kind == REQUEST:
            self._delay()
            body = data[DATAGRAM_FORMAT.size :]
            yield from send_datagram(self._socket, peer, RESPONSE, flow_id, sequence, body)
            return
        is_order = len(data) == DATAGRAM_FORMAT.size + ORDER_FORMAT.size
        if kind == OPEN and flow_id not in flows and is_order:
            order = Order.unpack(data[DATAGRAM_FORMAT.size :], DATAGRAM_FORMAT.size)
            flows[flow_id] = Flow(order)
        flow = flows.get(flow_id)
        if flow is None:
            return
        if kind == OPEN:
            yield from send_datagram(self._socket, peer, READY, flow_id, 0)
        elif kind == DATA:
            flow.add(data, sequence)
            if flow.score.last_ns - flow.told_ns > SECOND_NS:
                yield from send_datagram(self._socket, peer, ALIVE, flow_id, 0)
                flow.told_ns = flow.score.last_ns
        elif kind == END:
            flow.finish(sequence)
            yield from send_datagram(self._socket, peer, REPORT, flow_id, 0, flow.score.pack())


class Flow:
    """A UDP stream at its server."""

    def __init__(self, order: Order) -> None:
        self.score = Score(order)
        self.told_ns = 0  # last time that ALIVE was sent to the client
        self._finished = False

    def add(self, data: bytes, sequence: int) -> None:
        """Score a datagram, if the stream has not ended."""
        if len(data) == self.score.order.size and not self._finished:
            self.score.add_datagram(data, sequence)

    def finish(self, sent: int) -> None:
        """End the stream. A repeated END has no effect."""
        if not self._finished:
            self.score.finish(sent)
        self._finished = True
