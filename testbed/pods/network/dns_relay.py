"""DNS relay for guests of a pod whose name server is at a loopback address other than 127.0.0.1.

Docker's is at 127.0.0.11, systemd-resolved at 127.0.0.53. Guests reach only `localhost` of the
pod's loopback. So their resolv.conf names the alias, and the relay forwards what arrives at
127.0.0.1, port 53, unchanged, by UDP and TCP. It is not a resolver: it parses no questions and
caches no answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Self, cast

from testbed.host import namespaces
from testbed.model.addresses import Address, alias, loopback
from testbed.model.terms import Family

PORT = 53
AT = str(loopback(Family.IPV4))
ANSWER_LIMIT_S = 10
POLL_S = 0.05


def of_guests(resolv_conf: str) -> str:
    """resolv.conf of guests: loopback addresses become the IPv4 alias, which all guests reach."""
    lines = []
    for line in resolv_conf.splitlines():
        server = _server(line)
        is_local = server is not None and server.is_loopback
        lines.append(f"nameserver {alias(Family.IPV4)}" if is_local else line)
    return "".join(f"{line}\n" for line in dict.fromkeys(lines))


def to_relay(resolv_conf: str) -> Address | None:
    """The name server on loopback that guests cannot dial as `localhost`, or None."""
    servers = (_server(line) for line in resolv_conf.splitlines())
    local = [server for server in servers if server is not None and server.is_loopback]
    return local[0] if local and str(local[0]) != AT else None


def _server(line: str) -> Address | None:
    match line.split():
        case ["nameserver", address, *_]:
            with contextlib.suppress(ValueError):
                return ip_address(address)
    return None


class Relay:
    """The relay in a namespace, as a context manager.

    If a process there listens at 127.0.0.1 already, the relay does nothing. With `waits`, it first
    waits for a DNS server of the pod, which may want to listen at all addresses.
    """

    def __init__(self, netns: str, server: Address, *, waits: bool) -> None:
        self._netns, self._server, self._waits = netns, str(server), waits
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="dns_relay")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            namespaces.inside(self._netns, lambda: self._loop.run_until_complete(self._serve()))
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        while self._waits and not self._stop.is_set() and not _is_bound():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), POLL_S)
        try:
            datagrams, _ = await self._loop.create_datagram_endpoint(
                lambda: _Questions(self._server), local_addr=(AT, PORT)
            )
        except OSError:
            return
        try:
            server = await asyncio.start_server(self._connected, AT, PORT)
        except OSError:
            datagrams.close()
            return
        async with server:
            await self._stop.wait()
        datagrams.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            server_reader, server_writer = await asyncio.open_connection(self._server, PORT)
            await asyncio.gather(_copy(reader, server_writer), _copy(server_reader, writer))
            server_writer.close()
        writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


class _Questions(asyncio.DatagramProtocol):
    """Relays datagrams of guests. Each gets a socket of its own, at which the answer arrives."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._asking: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        task = asyncio.get_running_loop().create_task(self._ask(data, addr))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _ask(self, question: bytes, asker: tuple[str, int]) -> None:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bytes] = loop.create_future()
        transport, _ = await loop.create_datagram_endpoint(
            functools.partial(_Answer, answer), remote_addr=(self._server, PORT)
        )
        try:
            transport.sendto(question)
            self._transport.sendto(await asyncio.wait_for(answer, ANSWER_LIMIT_S), asker)
        except (OSError, TimeoutError):
            pass  # the guest repeats its question
        finally:
            transport.close()


class _Answer(asyncio.DatagramProtocol):
    def __init__(self, answer: asyncio.Future[bytes]) -> None:
        self._answer = answer

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if not self._answer.done():
            self._answer.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self._answer.done():
            self._answer.set_exception(exc)


def _is_bound() -> bool:
    """Whether a UDP socket of this thread's namespace is bound to port 53."""
    tables = (Path("/proc/thread-self/net", name).read_text() for name in ("udp", "udp6"))
    return any(
        line.split()[1].endswith(f":{PORT:04X}")
        for table in tables
        for line in table.splitlines()[1:]
    )
