"""What a campaign and its workers say to each other: a job goes in, events come out, lines of JSON.

A worker hears a heartbeat on its standard input, and ends when it falls silent.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from testbed.datapaths.between_hosts import Side

BEAT_S = 5
SILENCE_S = 20


@dataclass(frozen=True)
class Job:
    """What a worker is asked to do."""

    blocks: tuple[tuple[int, tuple[str, ...]], ...]
    """(number of the block, ids of its cells in the order to run them)."""
    warmup_s: float
    duration_s: float
    guest: str
    """A runtime, or `best`."""
    directory: str
    """The campaign's, on this host: what workloads print goes to `consoles` in it."""
    osv_kernel: str | None = None
    hosts_patch: bool = True
    keep: bool = False
    """Leave a pod that failed standing."""
    side: Side | None = None
    """The client's end of cells between this host and another, if it is given one."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        """The inverse of `dataclasses.asdict` after JSON."""
        blocks = tuple((number, tuple(cells)) for number, cells in data["blocks"])
        side = Side.from_json(data["side"]) if data["side"] else None
        return cls(**{**data, "blocks": blocks, "side": side})


Event = dict[str, Any]


def ignore_signals() -> None:
    """A second signal would interrupt the taking down that the first led to.

    It gets a handler that does nothing: ignored, one that has come already is an OSError in Python.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)


def end_when_nobody_listens() -> None:
    """Raise `KeyboardInterrupt` in the main thread at a signal, at the end of standard input, or
    after `SILENCE_S` without a line there.
    """

    def listen() -> None:
        while select.select([0], [], [], SILENCE_S)[0] and os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    def stop(*_: object) -> None:
        ignore_signals()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    threading.Thread(target=listen, daemon=True).start()
