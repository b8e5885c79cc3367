"""The field's words as types: IP version, transport, runtime."""

from __future__ import annotations

from enum import StrEnum


class Family(StrEnum):
    """IP version."""

    IPV4 = "ipv4"
    IPV6 = "ipv6"


class Transport(StrEnum):
    """Layer 4 protocol."""

    TCP = "tcp"
    UDP = "udp"


class Runtime(StrEnum):
    """What runs a workload. Guests have a network stack of their own."""

    PROCESS = "process"
    CONTAINER = "container"
    WASM = "wasm"
    STANDIN = "standin"
    LINUX = "linux"
    OSV = "osv"

    @property
    def is_guest(self) -> bool:
        return self in (Runtime.STANDIN, Runtime.LINUX, Runtime.OSV)
