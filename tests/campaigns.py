"""What a campaign has stored so far, read from its log and not through the code under test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def trials(campaign: Path) -> list[dict[str, Any]]:
    """The lines of its log that are whole.

    Of a trial that was disturbed (this host may be a guest, too) and repeated, the repetition.
    """
    log = campaign / "trials.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    found: list[dict[str, Any]] = []
    disturbed: dict[str, dict[str, Any]] = {}
    """Each host's last one, if it is to be repeated next."""
    for trial in map(json.loads, lines):
        host = trial.get("host", "")
        before = disturbed.pop(host, None)
        if before and all(before[key] == trial[key] for key in ("cell", "block")):
            found.remove(before)
        elif "disturbed" in trial:
            disturbed[host] = trial
        found.append(trial)
    return found
