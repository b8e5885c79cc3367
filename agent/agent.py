# SPDX-License-Identifier: Apache-2.0
"""The traffic agent's twin for WebAssembly: the orders and the traffic of `agent.h`, in Python.

componentize-py makes it a WASI component, which has sockets and poll, but no threads: everything
that may wait is a generator that yields what it waits for, and one loop goes on with whichever can.
Runs as plain Python just as well. Not here: UDP streams down. What WASI has no call for (an option,
a flag, closing by reset) is ENOPROTOOPT or EOPNOTSUPP, as from a kernel that lacks it. A socket
that is forgotten instead of closed would end the component.
"""

import errno
import json
import os
import select
import socket
import struct
import sys
import time
from contextlib import closing, suppress

VERSION = "1"
LIMIT_NS = 5_000_000_000
TICK_NS = 250_000_000
SECOND_NS = 1_000_000_000
LATE_NS = 4_000_000
CHUNK = 128 << 10
MAX_MESSAGE, MAX_DATAGRAM, MAX_STREAMS = 1 << 20, 65507, 64
SAMPLE_EVERY, SAMPLE_BYTES = 16, 64
IN_A_ROW = 64  # so many sends before others have their turn

ORDER = struct.Struct(">IIIIQQQ")
REPORT = struct.Struct(">QQQQQQ")
DATAGRAM = struct.Struct(">IIQ")
MAGIC = 0x74626137
STREAM_UP, STREAM_DOWN, REQUEST_RESPONSE = 1, 2, 3
OPEN, READY, DATA, END, TOLD, ALIVE, _, REQUEST, RESPONSE = range(1, 10)

FAMILIES = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
ANY = {"ipv4": "0.0.0.0", "ipv6": "::"}
LOOPBACK = {"ipv4": "127.0.0.1", "ipv6": "::1"}

PERIOD = 4093


def _pattern():
    state, out = MAGIC, bytearray()
    for _ in range(PERIOD):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        out.append(state >> 24)
    return bytes(out) * (MAX_MESSAGE // PERIOD + 2)


PATTERN = _pattern()


def pattern(offset, length):
    at = offset % PERIOD
    return PATTERN[at : at + length]


def intact(payload, offset, fully, nth):
    if not fully and nth % SAMPLE_EVERY:
        return True
    piece = bytes(payload if fully else payload[:SAMPLE_BYTES])
    return piece == pattern(offset, len(piece))


now_ns = time.monotonic_ns


class Refused(Exception):
    """An order that is not carried out, and why."""


# --- waiting --------------------------------------------------------------------------------


class Loop:
    """Goes on with tasks: generators that yield (socket, events, deadline in ns or None).

    A task that has waited too long gets TimeoutError where it waits. Its errors end it alone.
    """

    def __init__(self):
        self._poll = select.poll()
        self._waiting = {}

    def start(self, task):
        self._go_on(task, late=False)
        return task

    def end(self, task):
        """Close a task, wherever it waits."""
        for fd, (waiting, _) in list(self._waiting.items()):
            if waiting is task:
                del self._waiting[fd]
                self._poll.unregister(fd)
        task.close()

    def run(self, until):
        while not until():
            now = now_ns()
            deadlines = [d for _, d in self._waiting.values() if d is not None]
            wait_ms = max(0, (min(deadlines) - now + 999_999) // 1_000_000) if deadlines else -1
            ready = [fd for fd, _ in self._poll.poll(wait_ms)]
            now = now_ns()
            late = [fd for fd, (_, d) in self._waiting.items() if d is not None and d <= now]
            seen = dict(self._waiting)
            for fd in dict.fromkeys(ready + late):
                if fd in seen and self._waiting.get(fd) is seen[fd]:  # a run has a loop in the loop
                    task, _ = self._waiting.pop(fd)
                    self._poll.unregister(fd)
                    self._go_on(task, late=fd not in ready)

    def _go_on(self, task, late):
        try:
            waits = task.throw(TimeoutError(errno.EAGAIN, "timed out")) if late else next(task)
        except (StopIteration, OSError):
            return
        waiting, events, deadline = waits
        self._waiting[waiting.fileno()] = task, deadline
        self._poll.register(waiting.fileno(), events)


LOOP = Loop()


def readable(waiting, limit_ns=LIMIT_NS):
    yield waiting, select.POLLIN, now_ns() + limit_ns


def writable(waiting, limit_ns=LIMIT_NS):
    yield waiting, select.POLLOUT, now_ns() + limit_ns


def failure(code):
    return OSError(code, os.strerror(code))


def receive_some(connection, into):
    while True:
        try:
            return connection.recv_into(into)
        except BlockingIOError:
            yield from readable(connection)


def receive_all(connection, length):
    """Exactly so many bytes."""
    data = bytearray(length)
    view, got = memoryview(data), 0
    while got < length:
        more = yield from receive_some(connection, view[got:])
        if not more:
            raise failure(errno.ECONNRESET)
        got += more
    return data


def send_some(connection, data):
    while True:
        try:
            return connection.send(data)
        except BlockingIOError:
            yield from writable(connection)


def send_all(connection, data):
    view = memoryview(data)
    while view:
        sent = yield from send_some(connection, view)
        view = view[sent:]


def send_datagram(connection, to, kind, flow, sequence, body=b""):
    data = DATAGRAM.pack(MAGIC ^ kind, flow, sequence) + body
    while True:
        try:
            return connection.sendto(data, to) if to else connection.send(data)
        except BlockingIOError:
            yield from writable(connection)


def head_of(data):
    """(type, flow, sequence) of a datagram; type 0: none of ours."""
    if len(data) < DATAGRAM.size:
        return 0, 0, 0
    kind, flow, sequence = DATAGRAM.unpack_from(data)
    return kind ^ MAGIC, flow, sequence


# --- scores ---------------------------------------------------------------------------------


class Order:
    def __init__(self, mode, size, phase, warmup_ns, total, rate_bps):
        self.mode, self.size, self.phase = mode, size, phase
        self.warmup_ns, self.bytes, self.rate_bps = warmup_ns, total, rate_bps

    @classmethod
    def unpack(cls, data, least=1):
        magic, *values = ORDER.unpack(data)
        order = cls(*values)
        if magic != MAGIC or not least <= order.size <= MAX_MESSAGE:
            raise ConnectionAbortedError(errno.EPROTO, "no order")
        return order

    def pack(self):
        return ORDER.pack(MAGIC, self.mode, self.size, self.phase, self.warmup_ns, self.bytes,
                          self.rate_bps)  # fmt: skip


class Score:
    """What the receiver saw, without the warm-up."""

    def __init__(self, order):
        self.order, self.measuring = order, not order.warmup_ns
        self.begin_ns = self.first_ns = self.last_ns = now_ns()
        self.total = self.next = self.first_sequence = 0
        self.bytes = self.elapsed_ns = self.datagrams = 0
        self.lost = self.reordered = self.corrupt = 0

    def _count(self):
        self.last_ns = now_ns()
        if self.measuring:
            return True
        self.first_ns = self.last_ns
        self.measuring = self.last_ns >= self.begin_ns + self.order.warmup_ns
        return False

    def took(self, payload, nth):
        fully = bool(self.order.bytes) or not self.measuring
        self.corrupt += not intact(payload, self.order.phase + self.total, fully, nth)
        self.total += len(payload)
        if self._count():
            self.bytes += len(payload)

    def took_datagram(self, data, sequence):
        fully, late = bool(self.order.bytes) or not self.measuring, sequence < self.next
        offset = self.order.phase + sequence * self.order.size
        self.corrupt += not intact(data[DATAGRAM.size :], offset, fully, self.total)
        self.total += 1
        if not late:
            self.next = sequence + 1
        if self._count():
            self.bytes += len(data)
            self.datagrams += 1
            self.reordered += late
        else:
            self.first_sequence = self.next

    def finish(self, sent=None):
        self.elapsed_ns = self.last_ns - self.first_ns
        if sent is not None:
            self.lost = max(0, max(sent, self.next) - self.first_sequence - self.datagrams)

    def pack(self):
        return REPORT.pack(self.bytes, self.elapsed_ns, self.datagrams, self.lost, self.reordered,
                           self.corrupt)  # fmt: skip

    def unpack(self, data):
        (self.bytes, self.elapsed_ns, self.datagrams, self.lost, self.reordered,
         self.corrupt) = REPORT.unpack(data)  # fmt: skip


def tcp_send(connection, order, until_ns):
    sent = turns = 0
    while sent < order.bytes if order.bytes else now_ns() < until_ns:
        length = min(order.size, order.bytes - sent) if order.bytes else order.size
        sent += yield from send_some(connection, pattern(order.phase + sent, length))
        turns += 1
        if not turns % IN_A_ROW:
            yield from writable(connection)


def tcp_receive(connection, order, until_ns, score):
    buffer, nth = memoryview(bytearray(CHUNK)), 0
    while until_ns is None or score.last_ns < until_ns:
        got = yield from receive_some(connection, buffer)
        if not got:
            break
        score.took(buffer[:got], nth)
        nth += 1
        if not nth % IN_A_ROW:
            yield from readable(connection)
    score.finish()


def udp_send(connection, order, flow, until_ns):
    """Datagrams until the time is up or all are sent; returns how many."""
    sent, begin = 0, now_ns()
    heard = listened = begin
    datagrams = -(-order.bytes // order.size)
    while sent < datagrams if order.bytes else True:
        now = now_ns()
        if now >= until_ns:
            break
        if now - listened > TICK_NS:
            heard, listened = (now if drained(connection) else heard), now
            if now - heard > LIMIT_NS:
                raise TimeoutError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        due = begin + sent * order.size * 8 * SECOND_NS // order.rate_bps if order.rate_bps else now
        begin += max(0, now - due - LATE_NS)
        if due > now:
            time.sleep(min(due - now, TICK_NS) / 1e9)
            continue
        body = pattern(order.phase + sent * order.size, order.size - DATAGRAM.size)
        yield from send_datagram(connection, None, DATA, flow, sent, body)
        sent += 1
        if not sent % IN_A_ROW:
            yield from writable(connection)
    return sent


def drained(connection):
    """Whether anything had come."""
    came = False
    while True:
        try:
            came = bool(connection.recv(1 << 16)) or came
        except BlockingIOError:
            return came


# --- the serving end ------------------------------------------------------------------------


class Server:
    """A port that is served until `stop`."""

    def __init__(self, transport, family, port, address, delay_ns):
        self.delay_ns, self.tasks = delay_ns, []
        self.socket = bound(FAMILIES[family], KINDS[transport], (address, port))
        self.port = self.socket.getsockname()[1]
        if transport == "tcp":
            self.socket.listen(1024)
        self._start(self._accept() if transport == "tcp" else self._datagrams())

    def stop(self):
        for task in self.tasks:
            LOOP.end(task)
        self.socket.close()

    def _start(self, task):
        self.tasks = [t for t in self.tasks if t.gi_frame]
        self.tasks.append(task)
        LOOP.start(task)

    def _respond(self):
        until = now_ns() + self.delay_ns
        while now_ns() < until:
            pass

    def _accept(self):
        while True:
            yield self.socket, select.POLLIN, None
            try:
                connection, _ = self.socket.accept()
            except OSError:
                continue
            connection.setblocking(False)
            self._start(self._serve(connection))

    def _serve(self, connection):
        with closing(connection):
            order = Order.unpack((yield from receive_all(connection, ORDER.size)))
            if order.mode == STREAM_UP:
                score = Score(order)
                yield from tcp_receive(connection, order, None, score)
                yield from send_all(connection, score.pack())
            elif order.mode == STREAM_DOWN:
                yield from tcp_send(connection, order, 1 << 63)
            elif order.mode == REQUEST_RESPONSE:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while True:
                    request = yield from receive_all(connection, order.size)
                    self._respond()
                    yield from send_all(connection, request)

    def _datagrams(self):
        flows = {}
        while True:
            yield self.socket, select.POLLIN, None
            for _ in range(IN_A_ROW):
                try:
                    data, peer = self.socket.recvfrom(1 << 16)
                except OSError:
                    break
                yield from self._take(flows, data, peer)

    def _take(self, flows, data, peer):
        kind, id, sequence = head_of(data)
        if kind == REQUEST:
            self._respond()
            body = data[DATAGRAM.size :]
            yield from send_datagram(self.socket, peer, RESPONSE, id, sequence, body)
            return
        if kind == OPEN and id not in flows and len(data) == DATAGRAM.size + ORDER.size:
            flows[id] = Flow(Order.unpack(data[DATAGRAM.size :], DATAGRAM.size))
        flow = flows.get(id)
        if flow is None:
            return
        if kind == OPEN:
            yield from send_datagram(self.socket, peer, READY, id, 0)
        elif kind == DATA:
            if len(data) == flow.score.order.size and not flow.finished:
                flow.score.took_datagram(data, sequence)
            if flow.score.last_ns - flow.told_ns > SECOND_NS:
                yield from send_datagram(self.socket, peer, ALIVE, id, 0)
                flow.told_ns = flow.score.last_ns
        elif kind == END:
            if not flow.finished:
                flow.score.finish(sequence)
            flow.finished = True
            yield from send_datagram(self.socket, peer, TOLD, id, 0, flow.score.pack())


class Flow:
    """A UDP stream at its server."""

    def __init__(self, order):
        self.score = Score(order)
        self.told_ns, self.finished = 0, False


def bound(family, kind, address):
    made = socket.socket(family, kind)
    try:
        if family == socket.AF_INET6:
            with suppress(OSError):  # WASI has no other sockets
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == socket.SOCK_STREAM:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.setblocking(False)
    except BaseException:
        made.close()
        raise
    return made


# --- the dialing end ------------------------------------------------------------------------


class Run:
    """One order to make traffic, and what its streams came to."""

    def __init__(self, order):
        self.transport, self.family = order["transport"], order["family"]
        self.mode, self.host, self.port = order["mode"], order["host"], int(order["port"])
        self.warmup_ns = int(order.get("warmup_s", 0) * 1e9)
        self.duration_ns = int(order.get("duration_s", 0) * 1e9)
        self.udp = self.transport == "udp"
        streams, per_s = int(order.get("streams", 1)), order.get("rate_per_s", 0)
        down = self.mode == "stream" and order.get("direction", "up") == "down"
        if down and self.udp:
            raise Refused("direction: UDP streams go up")
        if streams > MAX_STREAMS or not 1 <= order["size_bytes"] <= MAX_MESSAGE:
            raise Refused("streams or size_bytes: too many")
        kind = REQUEST_RESPONSE if self.mode != "stream" else STREAM_DOWN if down else STREAM_UP
        self.gap_ns = int(streams / per_s * SECOND_NS) if per_s else 0
        self.orders = [
            Order(kind, int(order["size_bytes"]), int.from_bytes(os.urandom(4), "big"),
                  self.warmup_ns, int(order.get("bytes", 0)),
                  int(order.get("rate_bps", 0) / streams))
            for _ in range(streams)
        ]  # fmt: skip
        self.transactions = self.errors = 0
        self.histogram = {}
        self.scores, self.fault, self.left = [], None, streams

    def carry_out(self):
        """The answer. Raises `Refused` with what failed."""
        with self._failing("resolve"):
            found = socket.getaddrinfo(self.host, self.port, FAMILIES[self.family])
            self.to = found[0][4][:2]
        tasks = [LOOP.start(self._stream(order)) for order in self.orders]
        LOOP.run(lambda: not self.left or self.fault)
        for task in tasks:
            LOOP.end(task)
        if self.fault:
            raise self.fault
        if not sum(score.bytes for score in self.scores):
            raise Refused(f"{self._place('stream to')}: nothing arrived after the warm-up")
        summed = ("bytes", "datagrams", "lost", "reordered", "corrupt")
        return {
            **{key: sum(getattr(s, key) for s in self.scores) for key in summed},
            "address": self.to[0],
            "duration_s": max(s.elapsed_ns for s in self.scores) / 1e9,
            "transactions": self.transactions, "errors": self.errors,
            "histogram_us": [[ns / 1e3, n] for ns, n in sorted(self.histogram.items())],
        }  # fmt: skip

    def _place(self, what):
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{what} {host}:{self.port}"

    def _failing(self, what):
        return Failing(self, what)

    def _stream(self, order):
        connection = None
        try:
            if self.mode != "crr":
                with self._failing("connect"):
                    connection = yield from self._connect()
            if self.mode != "stream":
                yield from self._transactions(order, connection)
            elif self.udp:
                yield from self._udp_stream(order, connection)
            else:
                yield from self._tcp_stream(order, connection)
        except Refused as e:
            self.fault = self.fault or e
        finally:
            self.left -= 1
            if connection:
                connection.close()

    def _connect(self):
        connection = socket.socket(FAMILIES[self.family], KINDS[self.transport])
        try:
            connection.setblocking(False)
            try:
                connection.connect(self.to)
            except BlockingIOError:
                yield from writable(connection)
            if code := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise failure(code)
            if not self.udp and self.mode != "stream":
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            connection.close()
            raise
        return connection

    def _until(self):
        return now_ns() + self.warmup_ns + self.duration_ns if self.duration_ns else 1 << 63

    def _tcp_stream(self, order, connection):
        score, until_ns = Score(order), self._until()
        self.scores.append(score)
        with self._failing("stream to"):
            yield from send_all(connection, order.pack())
            if order.mode == STREAM_UP:
                yield from tcp_send(connection, order, until_ns)
                connection.shutdown(socket.SHUT_WR)
                score.unpack((yield from receive_all(connection, REPORT.size)))
            else:
                yield from tcp_receive(connection, order, until_ns, score)
                if not order.bytes and score.last_ns < until_ns:
                    raise ConnectionResetError(errno.ECONNRESET, "ended early")
        if order.bytes and score.bytes != order.bytes:
            raise Refused(f"{self._place('stream to')}: not all bytes arrived")

    def _udp_stream(self, order, connection):
        score, flow = Score(order), order.phase
        self.scores.append(score)
        with self._failing("stream to"):
            yield from self._ask(connection, OPEN, flow, 0, order.pack(), READY)
            sent = yield from udp_send(connection, order, flow, self._until())
            answer = yield from self._ask(connection, END, flow, sent, b"", TOLD)
            score.unpack(answer[DATAGRAM.size :])

    def _ask(self, connection, kind, flow, sequence, body, answer):
        """Send a datagram until it is answered."""
        begin = now_ns()
        while now_ns() < begin + LIMIT_NS:
            yield from send_datagram(connection, None, kind, flow, sequence, body)
            while (data := (yield from self._datagram(connection, flow))) is not None:
                if head_of(data)[0] == answer:
                    return data
        raise TimeoutError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def _datagram(self, connection, flow):
        """The next of this flow; None after a tick without one."""
        while True:
            try:
                data = connection.recv(1 << 16)
            except BlockingIOError:
                try:
                    yield from readable(connection, TICK_NS)
                except TimeoutError:
                    return None
            else:
                if head_of(data)[0] and head_of(data)[1] == flow:
                    return data

    def _transactions(self, order, connection):
        """One request after the other, or each at its time, as the C agent's."""
        score = Score(order)
        self.scores.append(score)
        begin = now_ns()
        scored_ns, until_ns = begin + self.warmup_ns, self._until()
        first_ns, nth, progress = None, 0, begin
        while begin < until_ns and (not order.bytes or nth * order.size < order.bytes):
            scored = begin >= scored_ns
            if (ahead := begin - now_ns()) > 0:
                time.sleep(ahead / 1e9)
            offset, fully = order.phase + nth * order.size, order.bytes or not scored
            right = None
            try:
                with self._failing("request to"):
                    right = yield from self._exchange(order, connection, nth, offset, fully)
            except Refused:
                if self.mode != "crr" or not self.transactions:
                    raise
            now = now_ns()
            if right is not None:
                progress = now
                score.corrupt += not right
            elif now - progress > LIMIT_NS:
                raise Refused(f"{self._place('request to')}: {os.strerror(errno.EAGAIN)}")
            if scored:
                first_ns = first_ns or begin
                score.elapsed_ns = now - first_ns
                if right is not None:
                    score.bytes += order.size
                    self.transactions += 1
                    self._add(now - begin)
                elif self.udp:
                    score.lost += 1
                else:
                    self.errors += 1
            begin, nth = begin + self.gap_ns if self.gap_ns else now, nth + 1

    def _exchange(self, order, connection, nth, offset, fully):
        """Whether the response was right; None if there was none."""
        if self.udp:
            body = pattern(offset, order.size - DATAGRAM.size)
            yield from send_datagram(connection, None, REQUEST, order.phase, nth, body)
            while (data := (yield from self._datagram(connection, order.phase))) is not None:
                if head_of(data)[::2] == (RESPONSE, nth) and len(data) == order.size:
                    return intact(data[DATAGRAM.size :], offset, fully, nth)
            return None
        once = None
        try:
            if self.mode == "crr":
                connection = once = yield from self._connect()
            start = order.pack() if once or not nth else b""
            yield from send_all(connection, start + pattern(offset, order.size))
            response = yield from receive_all(connection, order.size)
            return intact(response, offset, fully, nth)
        finally:
            if once:
                once.close()

    def _add(self, ns):
        """To the bucket that the C agent has for it: at most 1/128 of the value wide."""
        shift = max(0, ns.bit_length() - 8)
        upper = ((ns >> shift) + 1 << shift) - 1
        self.histogram[upper] = self.histogram.get(upper, 0) + 1


class Failing:
    """Says of an error in its block what failed: `connect localhost:80: Connection refused`."""

    def __init__(self, run, what):
        self.run, self.what = run, what

    def __enter__(self):
        return self

    def __exit__(self, kind, e, at):
        if isinstance(e, OSError):
            raise Refused(f"{self.run._place(self.what)}: {e.strerror or e}") from e


# --- single socket calls --------------------------------------------------------------------

LINUX = {
    "EPERM": 1, "EINTR": 4, "EIO": 5, "EBADF": 9, "EAGAIN": 11, "ENOMEM": 12, "EACCES": 13,
    "EINVAL": 22, "EMFILE": 24, "EPIPE": 32, "EPROTO": 71, "EDESTADDRREQ": 89, "EMSGSIZE": 90,
    "ENOPROTOOPT": 92, "EOPNOTSUPP": 95, "EAFNOSUPPORT": 97, "EADDRINUSE": 98,
    "EADDRNOTAVAIL": 99, "ENETDOWN": 100, "ENETUNREACH": 101, "ECONNABORTED": 103,
    "ECONNRESET": 104, "ENOBUFS": 105, "EISCONN": 106, "ENOTCONN": 107, "ETIMEDOUT": 110,
    "ECONNREFUSED": 111, "EHOSTUNREACH": 113, "EALREADY": 114, "EINPROGRESS": 115,
}  # fmt: skip
"""Errors by the numbers that answers have; WASI's own are others."""
NUMBERS = {getattr(errno, name): number for name, number in LINUX.items()}
LEVELS = {"SO": socket.SOL_SOCKET, "TCP": socket.IPPROTO_TCP, "IP": socket.IPPROTO_IP,
          "IPV6": socket.IPPROTO_IPV6}  # fmt: skip
FLAGS = {"oob": "MSG_OOB", "peek": "MSG_PEEK"}
WAYS = {"read": socket.SHUT_RD, "write": socket.SHUT_WR, "both": socket.SHUT_RDWR}
READINESS = {"readable": select.POLLIN, "writable": select.POLLOUT, "error": select.POLLERR,
             "hangup": select.POLLHUP}  # fmt: skip
URGENT = select.POLLPRI if hasattr(socket, "MSG_OOB") else 0
WISHES = {"read": select.POLLIN, "write": select.POLLOUT, "urgent": URGENT, "error": 0}
MAX_SOCKETS, SHOWN = 4096, 32


class Sockets:
    """The sockets of one controller, and the calls on them that it orders."""

    def __init__(self):
        self._held = {}
        self.orders = {
            "socket": self._socket, "set": self._set, "get": self._get, "bind": self._bind,
            "listen": self._listen, "connect": self._connect, "accept": self._accept,
            "names": self._names, "send": self._send, "receive": self._receive,
            "poll": self._poll, "shutdown": self._shutdown, "close": self._close,
            "resolve": self._resolve,
        }  # fmt: skip

    def end(self):
        for held in self._held.values():
            held.close()

    def carry_out(self, order):
        """The answer, which has what came before an error, too."""
        answer = {"errno": 0}
        try:
            yield from self.orders[order["op"]](order, answer) or ()
        except TimeoutError:
            answer["errno"] = LINUX["ETIMEDOUT"]
        except OSError as e:
            answer["errno"] = NUMBERS.get(e.errno, LINUX["EIO"])
        return answer

    def _of(self, order):
        held = self._held.get(int(order["socket"]))
        if held is None:
            raise Refused("socket: no such socket")
        return held

    def _hold(self, made, answer):
        if len(self._held) == MAX_SOCKETS:
            made.close()
            raise failure(errno.EMFILE)
        made.setblocking(False)
        answer["socket"] = next(n for n in range(MAX_SOCKETS) if n not in self._held)
        self._held[answer["socket"]] = made

    def _socket(self, order, answer):
        answer["socket"] = -1
        self._hold(socket.socket(FAMILIES[order["family"]], KINDS[order["transport"]]), answer)

    def _set(self, order, answer):
        value = order["text"].encode() if "text" in order else int(order["value"])
        try:
            self._of(order).setsockopt(*option_of(order), value)
        except OSError as e:
            only = (errno.ENOPROTOOPT, "IPV6_V6ONLY", 1)  # WASI has no other sockets
            if (e.errno, order["option"], value) != only:
                raise

    def _get(self, order, answer):
        answer["value"] = 0
        answer["value"] = self._of(order).getsockopt(*option_of(order))

    def _bind(self, order, answer):
        self._of(order).bind(address_of(order))

    def _listen(self, order, answer):
        self._of(order).listen(int(order.get("backlog", 128)))

    def _connect(self, order, answer):
        held, deadline = self._of(order), deadline_of(order)
        with suppress(BlockingIOError):
            if "address" in order:
                held.connect(address_of(order))
                return
        if not order.get("timeout_s", 1):
            with suppress(TimeoutError):  # WASI begins to dial when it is first polled
                yield held, select.POLLOUT, deadline
            raise failure(errno.EINPROGRESS)
        yield held, select.POLLOUT, deadline
        if code := held.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise failure(code)

    def _accept(self, order, answer):
        answer.update(socket=-1, address="", port=0)
        held, deadline = self._of(order), deadline_of(order)
        yield held, select.POLLIN, deadline
        made, name = held.accept()
        self._hold(made, answer)
        answer.update(address=name[0], port=name[1])

    def _names(self, order, answer):
        held = self._of(order)
        answer["own_address"], answer["own_port"] = held.getsockname()[:2]
        answer.update(peer_address="", peer_port=0)
        with suppress(OSError):
            answer["peer_address"], answer["peer_port"] = held.getpeername()[:2]

    def _send(self, order, answer):
        answer["bytes"] = sent = 0
        held, deadline, flag = self._of(order), deadline_of(order), flag_of(order)
        text, phase = order.get("text", "").encode(), int(order.get("phase", 0))
        size = len(text) if "text" in order else int(order.get("size", 0))
        to = (address_of(order),) if "address" in order else ()
        while True:
            piece = text[sent:] or pattern(phase + sent, min(size - sent, CHUNK))
            try:
                sent += held.sendto(piece, flag, *to) if to else held.send(piece, flag)
            except BlockingIOError:
                yield held, select.POLLOUT, deadline
            answer["bytes"] = sent
            if sent >= size:
                return

    def _receive(self, order, answer):
        answer.update(bytes=0, intact=1, ended=0, address="", port=0, hex="")
        held, deadline, flag = self._of(order), deadline_of(order), flag_of(order)
        size, phase = int(order.get("size", MAX_MESSAGE)), int(order.get("phase", 0))
        udp = held.type == socket.SOCK_DGRAM
        while True:
            length = min(size - answer["bytes"], CHUNK)
            try:
                if udp:
                    data, (answer["address"], answer["port"], *_) = held.recvfrom(length, flag)
                else:
                    data = held.recv(length, flag)
            except BlockingIOError as e:
                if now_ns() > deadline:  # WASI says ready for good when refused
                    raise failure(errno.ETIMEDOUT) from e
                yield held, URGENT if order.get("flag") == "oob" else select.POLLIN, deadline
                continue
            answer["ended"] = int(not data and not udp and length > 0)
            answer["hex"] += data[: SHOWN - len(answer["hex"]) // 2].hex()
            answer["intact"] &= intact(data, phase + answer["bytes"], True, 0)
            answer["bytes"] += len(data)
            if udp or flag or order.get("some") or answer["ended"] or answer["bytes"] >= size:
                return

    def _poll(self, order, answer):
        answer.update(readable=0, writable=0, urgent=0, error=0, hangup=0)
        held, deadline = self._of(order), deadline_of(order)
        if order["for"] == "urgent" and not URGENT:
            raise failure(errno.EOPNOTSUPP)
        yield held, WISHES[order["for"]], deadline
        asking = select.poll()
        asking.register(held, select.POLLIN | select.POLLOUT | URGENT)
        for _, events in asking.poll(0):
            answer.update({key: int(bool(events & bit)) for key, bit in READINESS.items()})
            answer["urgent"] = int(bool(events & URGENT))

    def _shutdown(self, order, answer):
        self._of(order).shutdown(WAYS[order["how"]])

    def _close(self, order, answer):
        self._of(order).close()
        del self._held[int(order["socket"])]

    def _resolve(self, order, answer):
        answer.update(addresses="", failure="")
        family = FAMILIES.get(order["family"], socket.AF_UNSPEC)
        try:
            found = socket.getaddrinfo(order["name"], None, family, socket.SOCK_STREAM)
        except socket.gaierror as e:
            answer["failure"] = e.strerror
        else:
            answer["addresses"] = " ".join(name[0] for *_, name in found)
            answer["failure"] = "" if found else "no address"  # so says WASI


def option_of(order):
    """Level and number of an option."""
    name = order["option"]
    number = getattr(socket, name, None)
    if number is None or (sys.platform, name) == ("wasi", "TCP_NODELAY"):  # taken, to no effect
        raise failure(errno.ENOPROTOOPT)
    return LEVELS[name.partition("_")[0]], number


def flag_of(order):
    name = FLAGS[order["flag"]] if order.get("flag") else ""
    flag = getattr(socket, name, None) if name else 0
    if flag is None:
        raise failure(errno.EOPNOTSUPP)
    return flag


def address_of(order):
    text = order["address"]
    try:
        socket.inet_pton(FAMILIES["ipv6" if ":" in text else "ipv4"], text)
    except OSError as e:
        raise Refused("address: not an IPv4 or IPv6 address") from e
    return text, int(order.get("port", 0))


def deadline_of(order):
    return now_ns() + int(order.get("timeout_s", 2) * SECOND_NS)


# --- control --------------------------------------------------------------------------------


class Session:
    """One controller. Its servers and sockets end with its connection."""

    def __init__(self, connection):
        self.connection, self.servers, self.sockets = connection, {}, Sockets()
        connection.setblocking(False)

    def serve(self):
        data = b""
        try:
            while True:
                try:
                    got = self.connection.recv(CHUNK)
                except BlockingIOError:
                    yield self.connection, select.POLLIN, None
                    continue
                if not got:
                    return
                *lines, data = (data + got).split(b"\n")
                for line in lines:
                    answer = json.dumps((yield from self._answer(line))) + "\n"
                    yield from send_all(self.connection, answer.encode())
        finally:
            for server in self.servers.values():
                server.stop()
            self.sockets.end()
            self.connection.close()

    def _answer(self, line):
        try:
            order = json.loads(line)
            if order.get("op") in self.sockets.orders:
                return {"ok": True, **(yield from self.sockets.carry_out(order))}
            carry_out = {
                "hello": self._hello,
                "serve": self._serve,
                "stop": self._stop,
                "run": lambda order: Run(order).carry_out(),
            }.get(order.get("op"))
            if carry_out is None:
                raise Refused("op: no such order")
            return {"ok": True, **carry_out(order)}
        except Refused as e:
            return {"ok": False, "error": str(e)}
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
            return {"ok": False, "error": f"order: {e!r}"}

    def _hello(self, order):
        return {
            "version": VERSION, "monotonic_ns": now_ns(), "realtime_ns": time.time_ns(),
            **{family: works(family) for family in FAMILIES},
        }  # fmt: skip

    def _serve(self, order):
        family, where = order["family"], order.get("bind", "any")
        address = {"any": ANY, "localhost": LOOPBACK}.get(where, {}).get(family, where)
        port, delay_ns = int(order.get("port", 0)), int(order.get("delay_us", 0) * 1e3)
        try:
            server = Server(order["transport"], family, port, address, delay_ns)
        except OSError as e:
            raise Refused(f"bind {where}:{port}: {e.strerror}") from e
        id = min(set(range(len(self.servers) + 1)) - self.servers.keys())
        self.servers[id] = server
        return {"server": id, "port": server.port}

    def _stop(self, order):
        server = self.servers.pop(int(order["server"]), None)
        if server is None:
            raise Refused("server: no such server")
        server.stop()
        return {}


def works(family):
    try:
        bound(FAMILIES[family], socket.SOCK_STREAM, (ANY[family], 0)).close()
    except OSError:
        return False
    return True


def control(listening):
    """Takes connections of controllers."""
    with closing(listening):
        listening.listen(16)
        while True:
            yield listening, select.POLLIN, None
            try:
                connection, _ = listening.accept()
            except OSError:
                continue
            LOOP.start(Session(connection).serve())


def main():
    port = int(sys.argv[sys.argv.index("--control-port") + 1])
    for family in filter(works, FAMILIES):
        listening = bound(FAMILIES[family], socket.SOCK_STREAM, (ANY[family], port))
        port = listening.getsockname()[1]
        LOOP.start(control(listening))
    print("agent: control port", port, flush=True)
    LOOP.run(lambda: False)


if __name__ == "__main__":
    main()
