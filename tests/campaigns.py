"""Reads the trials of a campaign from its log, without the code under test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def trials(campaign: Path) -> list[dict[str, Any]]:
    """Trials in the log of a campaign, without an incomplete last line.

    If a trial was disturbed (this host may be a virtual machine) and repeated, only the repetition.
    """
    log = campaign / "trials.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    found: list[dict[str, Any]] = []
    disturbed: dict[str, dict[str, Any]] = {}
    """Host → its last trial, if that was disturbed and the next one may repeat it."""
    for trial in map(json.loads, lines):
        host = trial.get("host", "")
        before = disturbed.pop(host, None)
        if before and all(before[key] == trial[key] for key in ("cell", "block")):
            found.remove(before)
        elif "disturbed" in trial:
            disturbed[host] = trial
        found.append(trial)
    return found
