"""Protocol between a campaign and its workers: a job in, events out, each as one line of JSON.

The campaign also sends a heartbeat on the worker's standard input. The worker ends when the
heartbeat stops.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from testbed.datapaths.between_hosts import Side
from testbed.host import interrupts

BEAT_S = 5
"""Period of the heartbeat."""
SILENCE_S = 20
"""Time without a heartbeat after which a worker ends."""


@dataclass(frozen=True)
class Job:
    """The blocks that a worker runs, and how."""

    blocks: tuple[tuple[int, tuple[str, ...]], ...]
    """(number of the block, ids of its cells in the order in which they run)."""
    warmup_s: float
    duration_s: float
    guest: str
    """A runtime, or `best`."""
    directory: str
    """The campaign's directory on the worker's host; output of workloads goes to `consoles/`."""
    osv_kernel: str | None = None
    hosts_patch: bool = True
    keep: bool = False
    """Stop at the first pod that fails, and leave it standing."""
    noise_s: float = 0.0
    """Duration of the A/A by which the worker finds out how quiet its host is; 0: none."""
    side: Side | None = None
    """The clients' end of cells between this host and another. None: no such cells."""
    applications: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name → application of cells, as plain data (`testbed.application.Application`)."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        """The inverse of `dataclasses.asdict` after JSON."""
        blocks = tuple((number, tuple(cells)) for number, cells in data["blocks"])
        side = Side.from_json(data["side"]) if data["side"] else None
        return cls(**{**data, "blocks": blocks, "side": side})


Event = dict[str, Any]


def end_when_nobody_listens() -> None:
    """Raise `KeyboardInterrupt` in the main thread when the results are no longer wanted.

    That is: at a signal (`interrupts`), at the end of standard input, or after `SILENCE_S` without
    a line on it.
    """

    def listen() -> None:
        while select.select([0], [], [], SILENCE_S)[0] and os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    interrupts.raise_once()
    threading.Thread(target=listen, daemon=True).start()
