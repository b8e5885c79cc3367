"""Client of port forwarding as kubectl has it: SPDY/3.1 to the server of a container runtime.

A forwarded connection is two streams of a SPDY session: one for data, one for errors. Each end
closes its half of a stream by itself. Only what that needs is here. Headers are sent without the
dictionary of the protocol, headers of the server are not read, and there is no flow control.
"""

from __future__ import annotations

import socket
import struct
import zlib
from types import TracebackType
from typing import Self

CONTROL, VERSION, SYN_STREAM = 1 << 15, 3, 1
FIN = 1
ERROR, DATA = 1, 3
"""Numbers of the streams. Those of a client are odd."""


class Forward:
    """A connection to a port of a pod."""

    def __init__(self, session: socket.socket, path: str, port: int) -> None:
        """`session` is connected to the server. `path` is that of the URL that was given for it."""
        self._session, self._file = session, session.makefile("rb")
        session.sendall(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
            "Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: portforward.k8s.io\r\n\r\n".encode()
        )
        status, *_ = iter(self._file.readline, b"\r\n")
        assert status.split()[1] == b"101", status
        compressor = zlib.compressobj()
        for stream, kind in ((ERROR, "error"), (DATA, "data")):
            headers = {"streamtype": kind, "port": str(port), "requestid": "0"}
            words = (word.encode() for pair in headers.items() for word in pair)
            block = struct.pack(">I", len(headers)) + b"".join(
                struct.pack(">I", len(word)) + word for word in words
            )
            packed = compressor.compress(block) + compressor.flush(zlib.Z_SYNC_FLUSH)
            head = struct.pack(
                ">HHIIIH", CONTROL | VERSION, SYN_STREAM, 10 + len(packed), stream, 0, 0
            )
            session.sendall(head + packed)

    def send(self, data: bytes, *, last: bool = False) -> None:
        """Send data, and with `last` close this half."""
        self._session.sendall(struct.pack(">II", DATA, last * FIN << 24 | len(data)) + data)

    def receive(self, size: int | None = None) -> bytes:
        """Receive that many bytes; without a size, all until the server closes both streams.

        Raises `ConnectionError` with what the server writes to the stream of errors.
        """
        received, streams = b"", {ERROR, DATA}
        while streams if size is None else len(received) < size:
            stream, second = struct.unpack(">II", self._file.read(8))
            payload = self._file.read(second & 0xFFFFFF)
            if stream == ERROR and payload:
                raise ConnectionError(payload.decode())
            if stream == DATA:
                received += payload
            if second >> 24 & FIN:
                streams.discard(stream)
        return received

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._file.close()
        self._session.close()
