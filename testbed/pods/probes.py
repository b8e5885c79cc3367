"""Probes of a workload: when to ask next, and what the last answers come to."""

from __future__ import annotations

import time

from testbed.model.manifest import Probe

EAGER_PERIOD_S = 0.02
"""Between questions to a workload that was not ready yet; later the probe's own period counts."""
EAGER_CONNECT_S = 0.05
"""Then an unready guest is asked anew: while it boots it hears nothing, and the kernel's own second
attempt comes a second later."""


class Question:
    """When to ask next, and what the last answers come to (`verdict`; None: not yet known)."""

    def __init__(self, probe: Probe, *, eager: bool = False) -> None:
        self.probe, self.eager = probe, eager
        wait_s = probe.delay_s if eager else max(probe.delay_s, probe.period_s)
        self.due: float | None = time.monotonic() + wait_s
        self.verdict: bool | None = None
        self._streak = 0

    def is_due(self) -> bool:
        return self.due is not None and self.due <= time.monotonic()

    def answered(self, yes: bool) -> None:
        self._streak = max(1, self._streak + 1) if yes else min(-1, self._streak - 1)
        if self._streak >= self.probe.successes:
            self.verdict = True
        elif -self._streak >= self.probe.failures:
            self.verdict = False
        waiting = self.eager and not self.verdict
        self.due = time.monotonic() + (EAGER_PERIOD_S if waiting else self.probe.period_s)
