"""Archive of campaigns: copies a campaign as a reference, compressed enough for git.

A reference is a campaign's directory like any other (`testbed.results.store`), so figures, table,
report and comparison can be made from it. It contains the measured data (campaign.json,
trials.jsonl.gz, hosts/, conformance.json), and derived files for people without this software: tidy
tables, figures as PDF, report.html, a description as a research object (`crate`). Consoles are left
out. Each derived file but the schemas names the digest of the data that it was made from; `stale`
finds files with another digest.
"""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Iterable
from pathlib import Path

from testbed.model.errors import Error
from testbed.reports import crate, html
from testbed.reports.figures import draw
from testbed.results import store
from testbed.results.results import Results
from testbed.results.store import Store


def keep(campaign: Store, folder: Path) -> Store:
    """Archive a campaign as a reference in `folder`. Raises `Error` if `folder` exists."""
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
        file.write(gzip.compress(campaign.raw(), mtime=0))  # without a time: reproducible bytes
    made = store.open(folder)
    made.derive()
    results = Results(made)
    html.write(results, folder / "report.html")
    for picture in (folder / "figures").glob("*.png"):  # the report contains them
        picture.unlink()
    draw.draw(results, kinds=("pdf",))
    crate.write(results)
    return made


def stale(campaign: Store, files: Iterable[Path]) -> list[Path]:
    """Those of the files that do not name the present digest of the campaign's data."""
    digest = campaign.digest().encode()
    return [file for file in files if digest not in file.read_bytes()]
