"""Campaigns that are kept for reference: small enough for git, and whole.

A reference is a campaign's directory like any other (`testbed.results.store`), so that figures,
table, report and comparison come from it. It holds what was measured, compressed
(campaign.json, trials.jsonl.gz, hosts/, conformance.json), and what is derived of that for people
who have not this software: tidy tables, figures as PDF, report.html. Consoles stay behind. All that
is derived says the digest of what was measured, and `stale` tells where it is not the present one.
"""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Iterable
from pathlib import Path

from testbed.model.errors import Error
from testbed.reports import html
from testbed.reports.figures import draw
from testbed.results import store
from testbed.results.results import Results
from testbed.results.store import Store


def keep(campaign: Store, folder: Path) -> Store:
    """Make a reference of a campaign. Raises `Error` if `folder` is there already."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError as e:
        raise Error(f"{folder}: there is one already", f"to replace it: rm -r {folder}") from e
    for name in ("campaign.json", "conformance.json"):
        if (campaign.path / name).exists():
            shutil.copy(campaign.path / name, folder)
    if (campaign.path / "hosts").exists():
        shutil.copytree(campaign.path / "hosts", folder / "hosts")
    with (folder / "trials.jsonl.gz").open("wb") as file:
        file.write(gzip.compress(campaign.raw(), mtime=0))  # no time: the same bytes each time
    made = store.open(folder)
    made.derive()
    results = Results(made)
    html.write(results, folder / "report.html")
    for picture in (folder / "figures").glob("*.png"):  # the report holds them
        picture.unlink()
    draw.draw(results, kinds=("pdf",))
    return made


def stale(campaign: Store, files: Iterable[Path]) -> list[Path]:
    """Which of these files do not say the digest of the campaign's data as it is now."""
    digest = campaign.digest().encode()
    return [file for file in files if digest not in file.read_bytes()]
