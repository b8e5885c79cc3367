"""Enumerations that all layers use: IP version, transport, runtime."""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class Family(StrEnum):
    """IP version."""

    IPV4 = "ipv4"
    IPV6 = "ipv6"

    @property
    def domain(self) -> int:
        """Domain of its sockets (socket(2)), which is also the address family of rtnetlink."""
        import socket  # not above: it is 2 ms of each command's start

        return socket.AF_INET if self is Family.IPV4 else socket.AF_INET6

    @property
    def wildcard(self) -> str:
        """The address that stands for all of a host's: 0.0.0.0 or ::."""
        return "0.0.0.0" if self is Family.IPV4 else "::"


class Transport(StrEnum):
    """Transport protocol."""

    TCP = "tcp"
    UDP = "udp"


UNPACED = ("cubic", "reno")
"""TCP congestion controls that do not pace, and that every Linux has."""


class Open(StrEnum):
    """An enumeration that other Python distributions extend by entry points.

    The lookup of an unknown value searches the entry points of group `testbed.<class name>s`. A
    value that is found there becomes an ordinary member.
    """

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        from importlib import metadata  # slow to import, and seldom needed

        group = f"testbed.{cls.__name__.lower()}s"
        if not isinstance(value, str) or not metadata.entry_points(group=group, name=value):
            return None
        member = str.__new__(cls, value)
        member._name_, member._value_ = value.upper(), value
        cls._member_map_[member._name_] = cls._value2member_map_[value] = member
        cls._member_names_.append(member._name_)
        return member


class Runtime(Open):
    """Name of what runs a workload: plain process, container, WASM, or a kind of guest.

    Another Python distribution adds a runtime of guests by an entry point of group
    `testbed.runtimes`: the name, and the object reference of its `prepare`.
    """

    PROCESS = "process"
    CONTAINER = "container"
    WASM = "wasm"
    STANDIN = "standin"
    GVISOR = "gvisor"
    LINUX = "linux"
    OSV = "osv"
    FOREIGN = "foreign"

    @property
    def is_guest(self) -> bool:
        """Whether the workload has a network stack of its own."""
        return self not in (Runtime.PROCESS, Runtime.CONTAINER, Runtime.WASM)

    @property
    def is_machine(self) -> bool:
        """Whether it is a guest in a virtual machine."""
        return self in (Runtime.LINUX, Runtime.OSV, Runtime.FOREIGN)

    @property
    def boots(self) -> bool:
        """Whether it is a guest that is booted here, not by somebody else."""
        return self.is_guest and self is not Runtime.FOREIGN
