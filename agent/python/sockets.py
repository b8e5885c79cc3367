# SPDX-License-Identifier: Apache-2.0
"""Single socket calls, one per order (sockets.c). Errors have Linux's numbers, not WASI's."""

from __future__ import annotations

import errno
import select
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .loop import Task, now_ns
from .net import (
    CHUNK,
    FAMILIES,
    KINDS,
    MAX_MESSAGE,
    SECOND_NS,
    Address,
    failure,
    intact,
    pattern,
)
from .order import Keys, Refused

LINUX = {
    "EPERM": 1,
    "EINTR": 4,
    "EIO": 5,
    "EBADF": 9,
    "EAGAIN": 11,
    "ENOMEM": 12,
    "EACCES": 13,
    "EINVAL": 22,
    "EMFILE": 24,
    "EPIPE": 32,
    "EPROTO": 71,
    "EDESTADDRREQ": 89,
    "EMSGSIZE": 90,
    "ENOPROTOOPT": 92,
    "EOPNOTSUPP": 95,
    "EAFNOSUPPORT": 97,
    "EADDRINUSE": 98,
    "EADDRNOTAVAIL": 99,
    "ENETDOWN": 100,
    "ENETUNREACH": 101,
    "ECONNABORTED": 103,
    "ECONNRESET": 104,
    "ENOBUFS": 105,
    "EISCONN": 106,
    "ENOTCONN": 107,
    "ETIMEDOUT": 110,
    "ECONNREFUSED": 111,
    "EHOSTUNREACH": 113,
    "EALREADY": 114,
    "EINPROGRESS": 115,
}
"""Numbers of errors on Linux, which are those in answers."""

MAX_SOCKETS = 4096
SHOWN = 32  # received bytes that the answer contains; all of them are compared

_LINUX_OF = {getattr(errno, name): number for name, number in LINUX.items()}
_LEVELS = {
    "SO": socket.SOL_SOCKET,
    "TCP": socket.IPPROTO_TCP,
    "IP": socket.IPPROTO_IP,
    "IPV6": socket.IPPROTO_IPV6,
}
_FLAGS = {"oob": "MSG_OOB", "peek": "MSG_PEEK"}
_DIRECTIONS = {"read": socket.SHUT_RD, "write": socket.SHUT_WR, "both": socket.SHUT_RDWR}
_URGENT = select.POLLPRI if hasattr(socket, "MSG_OOB") else 0
_EVENTS = {"read": select.POLLIN, "write": select.POLLOUT, "urgent": _URGENT, "error": 0}
_READINESS = {
    "readable": select.POLLIN,
    "writable": select.POLLOUT,
    "urgent": _URGENT,
    "error": select.POLLERR,
    "hangup": select.POLLHUP,
}


class Sockets:
    """The sockets of one controller, and the calls on them.

    A call fills the answer step by step, so that an answer with an error also has the results
    before the error. A call that waits is a task.
    """

    def __init__(self) -> None:
        self._held: dict[int, socket.socket] = {}
        self._calls: dict[str, Callable[[Keys, Keys], Task[None] | None]] = {
            "socket": self._socket,
            "set": self._set,
            "get": self._get,
            "bind": self._bind,
            "listen": self._listen,
            "connect": self._connect,
            "accept": self._accept,
            "names": self._names,
            "send": self._send,
            "receive": self._receive,
            "poll": self._poll,
            "shutdown": self._shutdown,
            "close": self._close,
            "resolve": self._resolve,
        }

    def close(self) -> None:
        """Close all sockets."""
        for held in self._held.values():
            held.close()

    def has(self, op: Any) -> bool:
        """Whether an order is a socket call."""
        return op in self._calls

    def carry_out(self, keys: Keys) -> Task[Keys]:
        """Make the call. Returns the answer, whose `errno` is 0 or the call's error."""
        answer: Keys = {"errno": 0}
        try:
            task = self._calls[keys["op"]](keys, answer)
            if task is not None:
                yield from task
        except TimeoutError:
            answer["errno"] = LINUX["ETIMEDOUT"]
        except OSError as e:
            answer["errno"] = _LINUX_OF.get(e.errno, LINUX["EIO"])
        return answer

    def _socket_of(self, keys: Keys) -> socket.socket:
        held = self._held.get(int(keys["socket"]))
        if held is None:
            raise Refused("socket: no such socket")
        return held

    def _hold(self, made: socket.socket, answer: Keys) -> None:
        if len(self._held) == MAX_SOCKETS:
            made.close()
            raise failure(errno.EMFILE)
        made.setblocking(False)
        answer["socket"] = next(n for n in range(MAX_SOCKETS) if n not in self._held)
        self._held[answer["socket"]] = made

    def _socket(self, keys: Keys, answer: Keys) -> None:
        answer["socket"] = -1
        made = socket.socket(FAMILIES[keys["family"]], KINDS[keys["transport"]])
        self._hold(made, answer)

    def _set(self, keys: Keys, answer: Keys) -> None:
        held = self._socket_of(keys)
        value = keys["text"].encode() if "text" in keys else int(keys["value"])
        try:
            held.setsockopt(*_option_of(keys), value)
        except OSError as e:
            only = (errno.ENOPROTOOPT, "IPV6_V6ONLY", 1)  # WASI's are always IPv6-only
            if (e.errno, keys["option"], value) != only:
                raise

    def _get(self, keys: Keys, answer: Keys) -> None:
        answer["value"] = 0
        answer["value"] = self._socket_of(keys).getsockopt(*_option_of(keys))

    def _bind(self, keys: Keys, answer: Keys) -> None:
        self._socket_of(keys).bind(_address_of(keys))

    def _listen(self, keys: Keys, answer: Keys) -> None:
        self._socket_of(keys).listen(int(keys.get("backlog", 128)))

    def _connect(self, keys: Keys, answer: Keys) -> Task[None]:
        held, deadline = self._socket_of(keys), _deadline_of(keys)
        with suppress(BlockingIOError):
            if "address" in keys:
                held.connect(_address_of(keys))
                return
        if not keys.get("timeout_s", 1):
            with suppress(TimeoutError):  # WASI begins to connect at the first poll
                yield held, select.POLLOUT, deadline
            raise failure(errno.EINPROGRESS)
        yield held, select.POLLOUT, deadline
        if code := held.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise failure(code)

    def _accept(self, keys: Keys, answer: Keys) -> Task[None]:
        answer.update(socket=-1, address="", port=0)
        held, deadline = self._socket_of(keys), _deadline_of(keys)
        yield held, select.POLLIN, deadline
        made, name = held.accept()
        self._hold(made, answer)
        answer.update(address=name[0], port=name[1])

    def _names(self, keys: Keys, answer: Keys) -> None:
        held = self._socket_of(keys)
        answer["own_address"], answer["own_port"] = held.getsockname()[:2]
        answer.update(peer_address="", peer_port=0)
        with suppress(OSError):
            answer["peer_address"], answer["peer_port"] = held.getpeername()[:2]

    def _send(self, keys: Keys, answer: Keys) -> Task[None]:
        answer["bytes"] = sent = 0
        held, deadline, flag = self._socket_of(keys), _deadline_of(keys), _flag_of(keys)
        text, phase = keys.get("text", "").encode(), int(keys.get("phase", 0))
        size = len(text) if "text" in keys else int(keys.get("size", 0))
        to = _address_of(keys) if "address" in keys else None
        while True:
            piece = text[sent:] or pattern(phase + sent, min(size - sent, CHUNK))
            try:
                sent += held.sendto(piece, flag, to) if to else held.send(piece, flag)
            except BlockingIOError:
                yield held, select.POLLOUT, deadline
            answer["bytes"] = sent
            if sent >= size:
                return

    def _receive(self, keys: Keys, answer: Keys) -> Task[None]:
        answer.update(bytes=0, intact=1, ended=0, address="", port=0, hex="")
        held, deadline, flag = self._socket_of(keys), _deadline_of(keys), _flag_of(keys)
        size, phase = int(keys.get("size", MAX_MESSAGE)), int(keys.get("phase", 0))
        udp = held.type == socket.SOCK_DGRAM
        while True:
            length = min(size - answer["bytes"], CHUNK)
            try:
                if udp:
                    data, (answer["address"], answer["port"], *_) = held.recvfrom(length, flag)
                else:
                    data = held.recv(length, flag)
            except BlockingIOError as e:
                if now_ns() > deadline:  # after a refusal, WASI reports ready for ever
                    raise failure(errno.ETIMEDOUT) from e
                yield held, _URGENT if keys.get("flag") == "oob" else select.POLLIN, deadline
                continue
            answer["ended"] = int(not data and not udp and length > 0)
            answer["hex"] += data[: SHOWN - len(answer["hex"]) // 2].hex()
            answer["intact"] &= intact(data, phase + answer["bytes"], True, 0)
            answer["bytes"] += len(data)
            if udp or flag or keys.get("some") or answer["ended"] or answer["bytes"] >= size:
                return

    def _poll(self, keys: Keys, answer: Keys) -> Task[None]:
        answer.update(dict.fromkeys(_READINESS, 0))
        held, deadline = self._socket_of(keys), _deadline_of(keys)
        if keys["for"] == "urgent" and not _URGENT:
            raise failure(errno.EOPNOTSUPP)
        yield held, _EVENTS[keys["for"]], deadline
        poll = select.poll()
        poll.register(held, select.POLLIN | select.POLLOUT | _URGENT)
        for _, events in poll.poll(0):
            answer.update({key: int(bool(events & bit)) for key, bit in _READINESS.items()})

    def _shutdown(self, keys: Keys, answer: Keys) -> None:
        self._socket_of(keys).shutdown(_DIRECTIONS[keys["how"]])

    def _close(self, keys: Keys, answer: Keys) -> None:
        self._socket_of(keys).close()
        del self._held[int(keys["socket"])]

    def _resolve(self, keys: Keys, answer: Keys) -> None:
        answer.update(addresses="", failure="")
        family = FAMILIES.get(keys["family"], socket.AF_UNSPEC)
        try:
            found = socket.getaddrinfo(keys["name"], None, family, socket.SOCK_STREAM)
        except socket.gaierror as e:
            answer["failure"] = e.strerror
        else:
            answer["addresses"] = " ".join(str(name[0]) for *_, name in found)
            answer["failure"] = "" if found else "no address"  # WASI returns an empty list


def _option_of(keys: Keys) -> tuple[int, int]:
    """Level and number of an option."""
    name = keys["option"]
    number = getattr(socket, name, None)
    # WASI accepts TCP_NODELAY without effect.
    if number is None or (sys.platform, name) == ("wasi", "TCP_NODELAY"):
        raise failure(errno.ENOPROTOOPT)
    return _LEVELS[name.partition("_")[0]], number


def _flag_of(keys: Keys) -> int:
    if not keys.get("flag"):
        return 0
    flag = getattr(socket, _FLAGS[keys["flag"]], None)
    if flag is None:
        raise failure(errno.EOPNOTSUPP)
    return int(flag)


def _address_of(keys: Keys) -> Address:
    text = keys["address"]
    try:
        socket.inet_pton(FAMILIES["ipv6" if ":" in text else "ipv4"], text)
    except OSError as e:
        raise Refused("address: not an IPv4 or IPv6 address") from e
    return text, int(keys.get("port", 0))


def _deadline_of(keys: Keys) -> int:
    return now_ns() + int(keys.get("timeout_s", 2) * SECOND_NS)
