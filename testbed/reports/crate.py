"""Describes a campaign's directory as a research object, for people and programs of elsewhere.

    ro-crate-metadata.json  what the files are, and what made them (RO-Crate, by rocrate)
    campaign.schema.json    JSON Schema of campaign.json
    trial.schema.json       JSON Schema of a line of trials.jsonl

The same campaign gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from testbed.model.errors import Error
from testbed.model.trials import Trial
from testbed.reports.words import guests_of
from testbed.results.results import Results
from testbed.results.store import Campaign

SCHEMAS: Mapping[str, type] = {"campaign.schema.json": Campaign, "trial.schema.json": Trial}
FILES = {
    "campaign.json": ("application/json", "Plan, machine, guests and versions"),
    "trials.jsonl": ("application/jsonl", "Every trial, in the order in which they were run"),
    "trials.jsonl.gz": ("application/gzip", "Every trial, in the order in which they were run"),
    "trials.parquet": ("application/vnd.apache.parquet", "Tidy table of the trials that count"),
    "trials.csv": ("text/csv", "Tidy table of the trials that count"),
    "histogram.parquet": ("application/vnd.apache.parquet", "Histograms of times"),
    "conformance.json": ("application/json", "Results of conformance checks"),
    "report.html": ("text/html", "Tables, figures and circumstances in one file"),
    "campaign.schema.json": ("application/schema+json", "JSON Schema of campaign.json"),
    "trial.schema.json": ("application/schema+json", "JSON Schema of a line of trials.jsonl"),
}
"""Files of a campaign → media type and description."""
FOLDERS = {
    "figures": "Figure",
    "hosts": "Machine, versions and guests of a host",
    "consoles": "What a guest or another workload printed",
}
"""Folders of a campaign → description of each file in it."""
MEDIA_TYPES = {
    ".png": "image/png",
    ".pdf": "application/pdf",
    ".json": "application/json",
    ".log": "text/plain",
}
"""Suffix of files in `FOLDERS` → media type."""
LICENSE = "https://spdx.org/licenses/Apache-2.0"
"""This project's. Who publishes a campaign under another license changes it in the file."""


def write(results: Results) -> list[Path]:
    """Write the schemas and the description; returns their files."""
    from rocrate.model.contextentity import ContextEntity  # not above: it brings an HTTP client
    from rocrate.rocrate import ROCrate

    campaign, path = results.campaign, results.path
    try:
        for name, kind in SCHEMAS.items():
            (path / name).write_text(json.dumps(schema(kind), indent=1) + "\n")
        crate = ROCrate()
        crate.name = f"Campaign of plan {campaign.name} on {campaign.host}"
        crate.description = f"{_blocks(results)}, {guests_of(campaign)}"
        license = ContextEntity(
            crate, LICENSE, {"@type": "CreativeWork", "name": "Apache License 2.0"}
        )
        crate.license = license
        crate.root_dataset["datePublished"] = campaign.started
        crate.root_dataset["identifier"] = results.digest
        made = [
            crate.add_file(path / name, dest_path=name, properties=said)
            for name, said in _files(path)
        ]
        program = ContextEntity(
            crate,
            "#testbed",
            {"@type": "SoftwareSourceCode", "name": "testbed", "version": campaign.revision},
        )
        run = ContextEntity(
            crate,
            "#run",
            {
                "@type": "CreateAction",
                "name": f"testbed run --plan {campaign.name} --guest {campaign.guest} "
                f"--blocks {campaign.blocks} --seed {campaign.seed}",
                "description": crate.description,
                "startTime": campaign.started,
                "endTime": _ended(results),
            },
        )
        crate.add(program, run, license)
        run["instrument"], run["result"] = program, made
        crate.root_dataset["mentions"] = [run]
        crate.metadata.write(path)
    except OSError as e:
        raise Error(f"{e.filename or path}: {e.strerror}", "it goes into the campaign") from e
    return [path / "ro-crate-metadata.json", *(path / name for name in SCHEMAS)]


def schema(kind: type) -> dict[str, Any]:
    """JSON Schema of what is stored of a campaign or trial, with the fields' descriptions."""
    from pydantic import TypeAdapter

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **TypeAdapter(kind).json_schema(),
    }


def _files(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Files of a campaign that are there, with what is said of each."""
    found = [
        (name, {"encodingFormat": kind, "description": text})
        for name, (kind, text) in FILES.items()
        if (path / name).exists()
    ]
    return found + [
        (
            str(file.relative_to(path)),
            {"encodingFormat": MEDIA_TYPES[file.suffix], "description": text},
        )
        for folder, text in FOLDERS.items()
        for file in sorted((path / folder).glob("*"))
        if file.suffix in MEDIA_TYPES
    ]


def _blocks(results: Results) -> str:
    """Number of blocks that were measured: `3 blocks`."""
    blocks = len(results.blocks)
    return f"{blocks} block{'' if blocks == 1 else 's'}"


def _ended(results: Results) -> str:
    """When the last trial ended (UTC, ISO 8601); the campaign's start if there is none."""
    ends = [
        datetime.fromisoformat(trial.started) + timedelta(seconds=trial.machine.get("elapsed_s", 0))
        for trial in results.log
        if trial.started
    ]
    return max(ends).isoformat(timespec="seconds") if ends else results.campaign.started
