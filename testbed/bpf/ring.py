"""Reads the ring buffers (BPF_MAP_TYPE_RINGBUF) of eBPF programs with libbcc."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from testbed.model.errors import Error


@contextmanager
def reading(fd: int, take: Callable[[bytes], None]) -> Iterator[Callable[[int], None]]:
    """Open a ring buffer, and yield a function that polls it.

    The function passes all new records to `take`. It waits for the given number of milliseconds if
    there are none.
    """
    try:
        from bcc.libbcc import _RINGBUF_CB_TYPE, lib
    except ImportError as e:
        raise Error("no bcc, to read events of programs", hint="./bootstrap") from e

    def call(_: Any, data: int, size: int) -> int:
        take(ctypes.string_at(data, size))
        return 0

    callback = _RINGBUF_CB_TYPE(call)  # kept alive by this frame
    ring = lib.bpf_new_ringbuf(fd, callback, None)
    if not ring:
        raise Error("a ring buffer cannot be read", hint="be root")
    try:
        yield lambda wait_ms: lib.bpf_poll_ringbuf(ring, wait_ms)
    finally:
        lib.bpf_free_ringbuf(ring)
