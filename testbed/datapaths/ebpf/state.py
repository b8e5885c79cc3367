"""A pod's state in its programs: what they count in it, and what they remember of its traffic.

The layout is that of `struct pod_state` in `bpf/state.h`, which explains it. The state is one value
in the kernel, mapped into this process: reading it is no system call, and sees what programs write.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
from contextlib import suppress

from testbed.bpf import ProgramSet

OUTER, TEMPLATE = "pod_states", "pod_state"
"""Map of the states by slot, and the map that all of them are like."""
TABLES = ("fragments", "nonstandard_flows", "guest_connections")
TABLE_ROWS = 1024
OWNED_PORTS = 512
"""Length of each table `owned`."""
FIRST_GUESTS = 16
"""Pairs of guests below this number are counted in the state, others in `guest_counts`."""
GUEST_SERVES, GUEST_DIALS = 0, 1
"""Role of a guest in its traffic with natives: the last index of `with_natives`."""


class Count(ctypes.Structure):
    """Packets and their bytes of layer 3."""

    _fields_ = (("packets", ctypes.c_uint64), ("bytes", ctypes.c_uint64))


class NativeAddresses(ctypes.Structure):
    """Source and destination of a native's packet."""

    _fields_ = (("number", ctypes.c_uint64), ("words", ctypes.c_uint32 * 8))


class ConnectionRow(ctypes.Structure):
    """A row of `guest_connections`, of 64 bits. All but `ended` is its key."""

    _fields_ = (
        ("ended", ctypes.c_uint64, 2),
        ("server_port", ctypes.c_uint64, 16),
        ("client_port", ctypes.c_uint64, 16),
        ("server", ctypes.c_uint64, 8),
        ("client", ctypes.c_uint64, 8),
        ("v6", ctypes.c_uint64, 1),
        ("in_use", ctypes.c_uint64, 1),
    )


class PodState(ctypes.Structure):
    """State of a pod."""

    _fields_ = (
        ("owned", ctypes.c_uint32 * OWNED_PORTS * 2),
        ("counters", Count * 16),
        ("with_natives", Count * 2 * 256 * 2),
        ("between_guests", Count * FIRST_GUESTS * FIRST_GUESTS),
        *((table, ctypes.c_uint64 * TABLE_ROWS) for table in TABLES),
        ("native_addresses", NativeAddresses * 128),
        ("last_number", ctypes.c_uint64),
        ("secret", ctypes.c_uint64),
    )


def create(programs: ProgramSet) -> None:
    """Give the slot of `programs` a state, unless it has one."""
    try:
        state = mapped(programs)
    except KeyError:
        programs.put_inner(OUTER, programs.slot, TEMPLATE)
        state = mapped(programs)
    state.secret = state.secret or secrets.randbits(64) | 1


def clear(programs: ProgramSet) -> None:
    """Empty the state of the slot of `programs`, if it has one.

    It stays in the slot: taking it out would wait for all programs that run (RCU), some 10 ms.
    """
    with suppress(KeyError):
        state = mapped(programs)
        ctypes.memset(ctypes.addressof(state), 0, ctypes.sizeof(state))


def mapped(programs: ProgramSet) -> PodState:
    """The state of the slot of `programs`. Raises KeyError if it has none."""
    fd = programs.open_inner(OUTER, programs.slot)
    try:
        return PodState.from_buffer(mmap.mmap(fd, ctypes.sizeof(PodState)))
    finally:
        os.close(fd)
