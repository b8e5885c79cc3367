# SPDX-License-Identifier: Apache-2.0
"""Command line and control connections: accepts orders, one JSON object per line (main.c)."""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from contextlib import closing

from .client import Run
from .loop import Loop, Task, now_ns
from .net import CHUNK, FAMILIES, bound, send_all
from .order import Keys, Refused
from .server import Server
from .sockets import Sockets

VERSION = "1"
ANY = {"ipv4": "0.0.0.0", "ipv6": "::"}
LOOPBACK = {"ipv4": "127.0.0.1", "ipv6": "::1"}


class Session:
    """A control connection. Its servers and sockets end with it."""

    def __init__(self, loop: Loop, connection: socket.socket) -> None:
        self._loop, self._connection = loop, connection
        self._servers: dict[int, Server] = {}
        self._sockets = Sockets()
        self._orders = {
            "hello": self._hello,
            "serve": self._serve,
            "stop": self._stop,
            "run": self._run,
        }
        connection.setblocking(False)

    def obey(self) -> Task[None]:
        """Carry out orders until the controller ends the connection."""
        data = b""
        try:
            while True:
                try:
                    got = self._connection.recv(CHUNK)
                except BlockingIOError:
                    yield self._connection, select.POLLIN, None
                    continue
                if not got:
                    return
                *lines, data = (data + got).split(b"\n")
                for line in lines:
                    answer = json.dumps((yield from self._answer(line))) + "\n"
                    yield from send_all(self._connection, answer.encode())
        finally:
            for server in self._servers.values():
                server.stop()
            self._sockets.close()
            self._connection.close()

    def _answer(self, line: bytes) -> Task[Keys]:
        try:
            keys = json.loads(line)
            op = keys.get("op")
            if self._sockets.has(op):
                return {"ok": True, **(yield from self._sockets.carry_out(keys))}
            carry_out = self._orders.get(op)
            if carry_out is None:
                raise Refused("op: no such order")
            return {"ok": True, **carry_out(keys)}
        except Refused as e:
            return {"ok": False, "error": str(e)}
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
            return {"ok": False, "error": f"order: {e!r}"}

    def _hello(self, keys: Keys) -> Keys:
        return {
            "version": VERSION,
            "monotonic_ns": now_ns(),
            "realtime_ns": time.time_ns(),
            **{family: works(family) for family in FAMILIES},
        }

    def _serve(self, keys: Keys) -> Keys:
        family, bind = keys["family"], keys.get("bind", "any")
        address = str({"any": ANY, "localhost": LOOPBACK}.get(bind, {}).get(family, bind))
        port, delay_ns = int(keys.get("port", 0)), int(keys.get("delay_us", 0) * 1e3)
        try:
            server = Server(self._loop, keys["transport"], family, (address, port), delay_ns)
        except OSError as e:
            raise Refused(f"bind {bind}:{port}: {e.strerror}") from e
        free = min(set(range(len(self._servers) + 1)) - self._servers.keys())
        self._servers[free] = server
        return {"server": free, "port": server.port}

    def _stop(self, keys: Keys) -> Keys:
        server = self._servers.pop(int(keys["server"]), None)
        if server is None:
            raise Refused("server: no such server")
        server.stop()
        return {}

    def _run(self, keys: Keys) -> Keys:
        return Run(self._loop, keys).carry_out()


def works(family: str) -> bool:
    """Whether sockets of a family work."""
    try:
        bound(FAMILIES[family], socket.SOCK_STREAM, (ANY[family], 0)).close()
    except OSError:
        return False
    return True


def control(loop: Loop, listening: socket.socket) -> Task[None]:
    """Accept control connections."""
    with closing(listening):
        listening.listen(16)
        while True:
            yield listening, select.POLLIN, None
            try:
                connection, _ = listening.accept()
            except OSError:
                continue
            loop.start(Session(loop, connection).obey())


def main() -> None:
    """Accept orders at the control port, in each family that works."""
    port = int(sys.argv[sys.argv.index("--control-port") + 1])
    loop = Loop()
    for family in filter(works, FAMILIES):
        listening = bound(FAMILIES[family], socket.SOCK_STREAM, (ANY[family], port))
        port = listening.getsockname()[1]
        loop.start(control(loop, listening))
    print("agent: control port", port, flush=True)
    loop.run(lambda: False)
