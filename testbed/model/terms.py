"""The field's words as types: IP version, transport, runtime."""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class Family(StrEnum):
    """IP version."""

    IPV4 = "ipv4"
    IPV6 = "ipv6"


class Transport(StrEnum):
    """Layer 4 protocol."""

    TCP = "tcp"
    UDP = "udp"


class Open(StrEnum):
    """A set of names that other distributions add to, by entry points.

    They are looked for when an unknown value is asked for; such a member then is one like others.
    """

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        from importlib import metadata  # takes long, and is hardly ever needed

        group = f"testbed.{cls.__name__.lower()}s"
        if not isinstance(value, str) or not metadata.entry_points(group=group, name=value):
            return None
        member = str.__new__(cls, value)
        member._name_, member._value_ = value.upper(), value
        cls._member_map_[member._name_] = cls._value2member_map_[value] = member
        cls._member_names_.append(member._name_)
        return member


class Runtime(Open):
    """What runs a workload. Guests have a network stack of their own.

    Another distribution adds one, for guests, by an entry point of group `testbed.runtimes`: its
    name, and where its `prepare` is (see `testbed.runtimes`).
    """

    PROCESS = "process"
    CONTAINER = "container"
    WASM = "wasm"
    STANDIN = "standin"
    LINUX = "linux"
    OSV = "osv"

    @property
    def is_guest(self) -> bool:
        return self not in (Runtime.PROCESS, Runtime.CONTAINER, Runtime.WASM)
