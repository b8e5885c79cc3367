"""Progress of long work, as commands display it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Progress of a campaign, or of a conformance run."""

    text: str
    done: int
    total: int
    left_s: float | None = None
    """Estimate of the remaining time in seconds; None if there is none yet."""
    stays: bool = False
    """Whether the text is to be read afterwards, too, and not only until the next one."""
