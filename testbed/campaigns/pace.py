"""Pace of a campaign: estimates the time left, from how long trials and starts of blocks took.

A block starts with the building of its first pods, and then trials follow each other. The two are
counted apart, because a mean over both would be far too long during the first block. The building
of later pods of the block is counted with the trials.
"""

from __future__ import annotations

from collections.abc import Collection
from statistics import fmean

from testbed.model.trials import Status, Trial


class Pace:
    """Durations of what was run, on all hosts of a campaign, which run their blocks in parallel."""

    def __init__(self, trial_s: float) -> None:
        self.trial_s = trial_s
        """Duration of a trial as planned, which is used until a second one was run."""
        self._last: dict[str, float] = {}
        """Host → time of its last event."""
        self._begun: set[tuple[str, int]] = set()
        """(host, block) of blocks with a trial."""
        self._starts_s: list[float] = []
        """Durations of starts of blocks, each with its first trial."""
        self._trials_s = 0.0
        self._trials: set[tuple[str, int]] = set()
        """(cell, block) of other trials, whose whole duration is `_trials_s`."""
        self._instant: set[str] = set()
        """Cells that are unsupported, which takes no time."""

    def ready(self, host: str, now_s: float) -> None:
        """The worker on this host begins its first block."""
        self._last[host] = now_s

    def ended(self, trial: Trial, now_s: float) -> None:
        """A trial has ended on the trial's host."""
        if trial.status is Status.UNSUPPORTED:
            self._instant.add(trial.cell)
            return
        took_s, self._last[trial.host] = now_s - self._last[trial.host], now_s
        block = trial.host, trial.block
        if block in self._begun:
            self._trials_s += took_s
            self._trials.add((trial.cell, trial.block))
        else:
            self._begun.add(block)
            self._starts_s.append(took_s)

    def left_s(self, left: Collection[tuple[str, int, str]]) -> float | None:
        """Time until the last host has run what is left: (host, block, cell) for each trial.

        None before the first trial.
        """
        if not self._starts_s:
            return None
        left = [each for each in left if each[2] not in self._instant]
        trial_s = self._trials_s / len(self._trials) if self._trials else self.trial_s
        start_s = max(0.0, fmean(self._starts_s) - trial_s)
        starts = {(host, block) for host, block, _ in left} - self._begun
        return max(
            (
                trial_s * sum(each[0] == host for each in left)
                + start_s * sum(each[0] == host for each in starts)
                for host in self._last
            ),
            default=0.0,
        )
