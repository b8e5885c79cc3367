"""Remote sockets: sockets in a workload, called through the control connection of its agent.

Calls raise `OSError` as local sockets do, and the message names the call and the workload. Each
call has a time-out (`TimeoutError`). All runtimes have the same interface.
"""

from __future__ import annotations

import builtins
import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from testbed.agent import Agent
from testbed.conformance.check import Unsupported
from testbed.model.addresses import Address, loopback
from testbed.model.terms import Family, Transport

TIMEOUT_S = 3.0
CONTROL_SLACK_S = 30.0
LACKS = (errno.ENOPROTOOPT, errno.EOPNOTSUPP)
FLAGS = {"oob": "MSG_OOB", "peek": "MSG_PEEK"}
LOCALHOST = ("localhost", "ip6-localhost")
"""Names of loopback. The second is tried if the resolver knows the first in one family only."""

Name = tuple[Address, int]


@dataclass(frozen=True)
class Received:
    """Result of one receive call."""

    bytes: int
    text: builtins.bytes
    """The first 32 bytes of the data."""
    intact: bool
    """Whether all data has the expected pattern."""
    ended: bool
    """Whether the end of the stream was reached."""
    sender: Name | None
    """Sender of a datagram."""


@dataclass(frozen=True)
class Readiness:
    """Result of poll(2)."""

    readable: bool
    writable: bool
    urgent: bool
    error: bool
    hangup: bool


class Peer:
    """A control connection to a workload, which its sockets belong to. Closing it closes them."""

    def __init__(self, name: str, agent: Agent) -> None:
        self.name, self.agent = name, agent
        self.is_guest = name.startswith("guest")
        self.api = "WASI" if name.startswith("wasm") else f"the kernel of {name}"

    def socket(self, transport: Transport, family: Family) -> Sock:
        """Open a socket. Raises `Unsupported` if the workload's kernel lacks the family."""
        try:
            answer = self.call("socket", transport=transport, family=family)
        except OSError as e:
            if e.errno != errno.EAFNOSUPPORT:
                raise
            raise Unsupported(f"{self.name} has no {family.replace('ip', 'IP')}") from e
        return Sock(self, answer["socket"], transport, family)

    def resolve(self, name: str, family: Family | None = None) -> list[Address]:
        """Call getaddrinfo(3). Raises `Unsupported` if the name has no address in that family."""
        answer = self.call("resolve", name=name, family=family or "any")
        if answer["failure"]:
            raise Unsupported(f"{self.name} cannot resolve {name}: {answer['failure']}")
        return [ip_address(a) for a in answer["addresses"].split()]

    def localhost(self, family: Family) -> Address:
        """The address that a program in the workload dials for `localhost`, in one family."""
        for name in LOCALHOST:
            try:
                found = self.resolve(name, family)
            except Unsupported:
                continue
            return found[0]
        raise Unsupported(f"{self.name} has no name for localhost in {family}")

    def bind_address(self, family: Family) -> str:
        """The address that a server for `localhost` binds: loopback, or in guests the wildcard.

        A guest's server is reached through the guest's link.
        """
        if self.is_guest:
            return family.wildcard
        return str(loopback(family))

    def call(self, op: str, limit_s: float = CONTROL_SLACK_S, **keys: Any) -> dict[str, Any]:
        """Send one order to the agent and wait for the answer. Raises its error as `OSError`."""
        self.agent.ask(op=op, **keys)
        return self.checked(op, keys, self.agent.answer(limit_s))

    def checked(self, op: str, keys: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        """The answer itself. Raises its error as `OSError`."""
        if code := answer["errno"]:
            detail = keys.get("address") or keys.get("option") or ""
            where = f"{detail}:{keys['port']}" if "port" in keys else detail
            raise OSError(
                code, f"{self.name}: {' '.join(filter(None, (op, where)))}: {os.strerror(code)}"
            )
        return answer

    def close(self) -> None:
        self.agent.close()


class Sock:
    """A socket in a workload."""

    def __init__(self, peer: Peer, id: int, transport: Transport, family: Family) -> None:
        self.peer, self.id, self.transport, self.family = peer, id, transport, family

    def set(self, option: str, value: int | str) -> None:
        """Call setsockopt(2). Raises `Unsupported` if the workload's kernel lacks the option."""
        keys: dict[str, Any] = {"text": value} if isinstance(value, str) else {"value": value}
        self._tried(option, "set", option=option, **keys)

    def get(self, option: str) -> int:
        return int(self._tried(option, "get", option=option)["value"])

    def bind(self, address: Address | str, port: int = 0) -> None:
        self._call("bind", address=str(address), port=port)

    def listen(self, backlog: int = 128) -> None:
        self._call("listen", backlog=backlog)

    def connect(self, address: Address | str, port: int, timeout_s: float = TIMEOUT_S) -> None:
        self._call("connect", timeout_s=timeout_s, address=str(address), port=port)

    def begin_connect(self, address: Address | str, port: int) -> None:
        """Start a non-blocking connect; returns when the handshake has started."""
        with suppress(BlockingIOError):  # EINPROGRESS
            self.connect(address, port, timeout_s=0)

    def finish_connect(self, timeout_s: float = TIMEOUT_S) -> None:
        self._call("connect", timeout_s=timeout_s)

    def accept(self, timeout_s: float = TIMEOUT_S) -> tuple[Sock, Name]:
        answer = self._call("accept", timeout_s=timeout_s)
        sock = Sock(self.peer, answer["socket"], self.transport, self.family)
        return sock, (ip_address(answer["address"]), answer["port"])

    @property
    def own_name(self) -> Name:
        answer = self._call("names")
        return ip_address(answer["own_address"]), answer["own_port"]

    @property
    def peer_name(self) -> Name:
        """The peer's address and port. Raises `OSError` if the socket is not connected."""
        answer = self._call("names")
        if not answer["peer_address"]:
            raise OSError(errno.ENOTCONN, f"{self.peer.name}: no peer name")
        return ip_address(answer["peer_address"]), answer["peer_port"]

    def send(
        self,
        what: str | int,
        *,
        phase: int = 0,
        to: Name | None = None,
        flag: str = "",
        timeout_s: float = TIMEOUT_S,
    ) -> int:
        """Send a text, or a number of bytes of the pattern. Returns the number of bytes sent.

        Raises `TimeoutError` if the kernel does not take all of it in time.
        """
        keys = self._sending(what, phase, to, flag, timeout_s)
        return int(self._tried(FLAGS.get(flag, ""), "send", **keys)["bytes"])

    def ask_send(self, what: int, timeout_s: float) -> None:
        """Start a `send`; `answer` waits for its end."""
        self.peer.agent.ask(
            op="send", socket=self.id, **self._sending(what, 0, None, "", timeout_s)
        )

    def ask_receive(self, size: int, timeout_s: float, *, some: bool = False) -> None:
        """Start a `receive`; `answer` waits for its end."""
        self.peer.agent.ask(
            op="receive", socket=self.id, size=size, timeout_s=timeout_s, some=int(some)
        )

    def answer(self) -> dict[str, Any]:
        """Wait for the end of what was started: the agent's answer, with its error number."""
        return self.peer.agent.answer()

    def _sending(
        self, what: str | int, phase: int, to: Name | None, flag: str, timeout_s: float
    ) -> dict[str, Any]:
        keys: dict[str, Any] = {"timeout_s": timeout_s}
        keys |= {"text": what} if isinstance(what, str) else {"size": what, "phase": phase}
        if to:
            keys |= {"address": str(to[0]), "port": to[1]}
        if flag:
            keys["flag"] = flag
        return keys

    def receive(
        self,
        size: int = 1 << 20,
        *,
        phase: int = 0,
        flag: str = "",
        some: bool = False,
        timeout_s: float = TIMEOUT_S,
    ) -> Received:
        """Receive a datagram, or from a stream `size` bytes or all bytes up to the end.

        With `some`, return the first bytes of a stream as soon as there are any.
        """
        keys: dict[str, Any] = {"flag": flag} if flag else {}
        answer = self._tried(
            FLAGS.get(flag, ""),
            "receive",
            size=size,
            phase=phase,
            some=int(some),
            timeout_s=timeout_s,
            **keys,
        )
        sender = (ip_address(answer["address"]), answer["port"]) if answer["address"] else None
        return Received(
            answer["bytes"],
            bytes.fromhex(answer["hex"]),
            bool(answer["intact"]),
            bool(answer["ended"]),
            sender,
        )

    def poll(self, wish: str, timeout_s: float = TIMEOUT_S) -> Readiness:
        """Wait until the socket is ready to `read`, `write` or `urgent`, or has an `error`."""
        lacked = "POLLPRI" if wish == "urgent" else ""
        answer = self._tried(lacked, "poll", timeout_s=timeout_s, **{"for": wish})
        return Readiness(**{k: bool(answer[k]) for k in Readiness.__dataclass_fields__})

    def shutdown(self, how: str = "write") -> None:
        self._call("shutdown", how=how)

    def close(self) -> None:
        self._call("close")

    def reset(self) -> None:
        """Close the connection by RST."""
        self.set("SO_LINGER", 0)
        self.close()

    def _call(self, op: str, **keys: Any) -> dict[str, Any]:
        limit_s = keys.get("timeout_s", 0) + CONTROL_SLACK_S
        return self.peer.call(op, limit_s, socket=self.id, **keys)

    def _tried(self, what: str, op: str, **keys: Any) -> dict[str, Any]:
        """Call an operation that needs `what`. Raises `Unsupported` if the kernel lacks it."""
        try:
            return self._call(op, **keys)
        except OSError as e:
            if what and (e.errno in LACKS or (op == "get" and e.errno == errno.EINVAL)):
                raise Unsupported(f"{self.peer.api} has no {what}") from e
            raise


def connect_many(client: Peer, family: Family, to: Name, count: int) -> list[Sock]:
    """Open many connections at the same time, in batches. Raises the first error."""
    made: list[Sock] = []
    keys = {"transport": Transport.TCP, "family": family}
    for start in range(0, count, BATCH):
        n = min(BATCH, count - start)
        for _ in range(n):
            client.agent.ask(op="socket", **keys)
        answers = [client.checked("socket", {}, client.agent.answer()) for _ in range(n)]
        socks = [Sock(client, a["socket"], Transport.TCP, family) for a in answers]
        where = {"address": str(to[0]), "port": to[1]}
        for sock in socks:
            client.agent.ask(op="connect", socket=sock.id, timeout_s=10, **where)
        for _ in range(
            n
        ):  # one after the other: if one gets no answer, others will get none either
            client.checked("connect", where, client.agent.answer(60))
        made += socks
    return made


BATCH = 100
"""Number of unanswered orders; more would fill the control connection."""
