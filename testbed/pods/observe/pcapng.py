"""Writes packet captures in pcapng format (draft-ietf-opsawg-pcapng), for Wireshark.

A file has one section block, an interface block for each place where packets are captured, and a
block for each packet.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

LINKTYPE_ETHERNET = 1
_SECTION, _INTERFACE, _PACKET = 0x0A0D0D0A, 1, 6
_COMMENT, _IF_NAME, _IF_TSRESOL = 1, 2, 9


class Writer:
    """Writes packets to an open file. Times are in ns since 1970."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._interfaces = file, {}  # type: BinaryIO, dict[str, int]
        self._block(_SECTION, struct.pack("=IHHq", 0x1A2B3C4D, 1, 0, -1))

    def write(self, interface: str, time_ns: int, packet: bytes, length: int, comment: str) -> None:
        """Write a packet of `length` bytes, of which `packet` has the first."""
        if interface not in self._interfaces:
            self._interfaces[interface] = len(self._interfaces)
            options = _option(_IF_NAME, interface.encode()) + _option(_IF_TSRESOL, b"\x09")
            self._block(_INTERFACE, struct.pack("=HxxI", LINKTYPE_ETHERNET, 0) + options + _END)
        head = struct.pack(
            "=IIIII",
            self._interfaces[interface],
            time_ns >> 32,
            time_ns & 0xFFFFFFFF,
            len(packet),
            length,
        )
        self._block(_PACKET, head + _padded(packet) + _option(_COMMENT, comment.encode()) + _END)

    def _block(self, kind: int, body: bytes) -> None:
        size = struct.pack("=I", 12 + len(body))
        self._file.write(struct.pack("=I", kind) + size + body + size)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("=HH", code, len(value)) + _padded(value)


_END = struct.pack("=HH", 0, 0)
