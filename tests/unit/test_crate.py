"""A campaign's directory describes itself, and its schemas hold for what is stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from testbed import cli, paths
from testbed.model.trials import Trial
from testbed.reports import crate
from testbed.results.results import Results, read
from testbed.results.store import Campaign


@pytest.fixture
def kept(tmp_path: Path) -> Results:
    """A copy of a reference."""
    return read(Path(shutil.copytree(paths.REFERENCE / "proof", tmp_path / "proof")))


def test_every_file_that_is_described_is_there_and_the_same_campaign_gives_the_same_bytes(
    kept: Results,
) -> None:
    written = {file: file.read_bytes() for file in crate.write(kept)}
    assert {file: file.read_bytes() for file in crate.write(kept)} == written
    graph = json.loads((kept.path / "ro-crate-metadata.json").read_text())["@graph"]
    described = {entity["@id"]: entity for entity in graph}
    files = {id for id, entity in described.items() if entity["@type"] == "File"}
    there = {str(f.relative_to(kept.path)) for f in kept.path.rglob("*") if f.is_file()}
    assert files == there - {"ro-crate-metadata.json"}
    assert described["./"]["identifier"] == kept.digest
    assert described["#testbed"]["version"] == kept.campaign.revision
    assert described["./"]["license"]["@id"] in described
    assert {part["@id"] for part in described["./"]["hasPart"]} == files


def test_the_run_says_guest_blocks_and_both_times_and_consoles_are_files(kept: Results) -> None:
    (kept.path / "consoles").mkdir()
    (kept.path / "consoles/block0-a.log").write_text("boots")
    crate.write(kept)
    graph = json.loads((kept.path / "ro-crate-metadata.json").read_text())["@graph"]
    described = {entity["@id"]: entity for entity in graph}
    run, console = described["#run"], described["consoles/block0-a.log"]
    seed = kept.campaign.seed
    assert run["name"] == f"testbed run --plan proof --guest standin --blocks 75 --seed {seed}"
    assert run["description"] == "75 blocks, guest standin, accelerator none"
    assert run["startTime"] == kept.campaign.started < run["endTime"]
    assert console["encodingFormat"] == "text/plain"
    assert console["description"] == "What a guest or another workload printed"


def test_figures_that_are_drawn_later_are_described(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = read(Path(shutil.copytree(paths.REFERENCE / "load", tmp_path / "load")))
    shutil.rmtree(kept.path / "figures")
    crate.write(kept)
    assert cli.main(["figures", str(kept.path)]) == 0
    drawn = {str(Path(line).relative_to(kept.path)) for line in capsys.readouterr().out.split()}
    graph = json.loads((kept.path / "ro-crate-metadata.json").read_text())["@graph"]
    assert drawn
    assert drawn <= {entity["@id"] for entity in graph}


@pytest.mark.parametrize("name", ["paper", "proof", "load", "applications"])
def test_schemas_hold_for_what_is_stored(name: str) -> None:
    kept = read(paths.REFERENCE / name)
    stored = json.loads((kept.path / "campaign.json").read_text())
    campaign, trial = (Draft202012Validator(crate.schema(kind)) for kind in (Campaign, Trial))
    assert campaign.is_valid(stored)
    assert not campaign.is_valid(stored | {"blocks": "many"})
    trials = [json.loads(line) for line in kept.store.raw().splitlines()[::50]]
    assert all(map(trial.is_valid, trials))
    assert not trial.is_valid({"cell": trials[0]["cell"]})


def test_a_schema_explains_fields() -> None:
    properties = crate.schema(Campaign)["properties"]
    assert properties["cells"]["description"] == "Ids of the cells to run in each block."
