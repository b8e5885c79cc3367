"""What is kept for reference is the campaign, whole; what is derived of it says so, or is stale."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from testbed import cli, paths
from testbed.model.errors import Error
from testbed.model.trials import Status, Trial
from testbed.reports import archive, compare
from testbed.results import store
from testbed.results.results import Results

CELLS = [f"{datapath}/native-guest/ipv4/tcp/throughput/65536x1" for datapath in ("direct", "steer")]
CAMPAIGN = store.Campaign(
    name="little",
    plan={},
    cells=tuple(CELLS),
    blocks=2,
    seed=1,
    references={"direct": "direct", "steer": "direct"},
    guest="standin",
    guest_kernel="",
    accelerator="none",
    kernel="6.18",
    cpu="a CPU",
    governor="none",
    host="here",
    revision="0" * 40,
)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> store.Store:
    with store.create(tmp_path_factory.mktemp("results") / "little", CAMPAIGN) as made:
        for block in (0, 1):
            for order, cell in enumerate(CELLS):
                value = 100.0 + block + order
                made.append(Trial(cell, block, order, Status.OK, value=value))
        made.append(Trial(CELLS[0], 1, 0, Status.FAILED, reason="once more, and failed"))
    (made.path / "conformance.json").write_text("[]")
    (made.path / "consoles/big.log").write_text("boots")
    return store.open(made.path)


@pytest.fixture(scope="module")
def whole(campaign: store.Store) -> Path:
    return archive.keep(campaign, campaign.path.parent / "kept").path


@pytest.fixture
def kept(whole: Path, tmp_path: Path) -> store.Store:
    """A copy of the reference, to be damaged."""
    return store.open(shutil.copytree(whole, tmp_path / "kept"))


def test_a_reference_is_the_campaign_without_its_consoles(
    campaign: store.Store, kept: store.Store
) -> None:
    assert kept.campaign == campaign.campaign
    assert kept.log() == campaign.log()
    assert kept.digest() == campaign.digest()
    assert {p.name for p in kept.path.iterdir()} == {
        "campaign.json",
        "trials.jsonl.gz",
        "conformance.json",
        "trials.csv",
        "trials.parquet",
        "histogram.parquet",
        "ro-crate-metadata.json",
        "campaign.schema.json",
        "trial.schema.json",
        "report.html",
        "figures",
    }
    assert Results(kept).summaries == Results(campaign).summaries


def test_a_campaign_is_held_against_a_reference(campaign: store.Store, kept: store.Store) -> None:
    rows = compare.compare(Results(kept), Results(campaign))
    assert [row.ratio.mean for row in rows] == pytest.approx([1.0] * 2)
    assert cli.main(["compare", str(kept.path), str(campaign.path)]) == 0
    (drawn,) = (campaign.path / "figures").glob("against-kept.pdf")
    assert f"{campaign.digest()} against {kept.digest()}".encode() in drawn.read_bytes()


def test_a_reference_is_neither_continued_nor_written_over(
    campaign: store.Store, kept: store.Store
) -> None:
    with pytest.raises(Error, match="kept for reference, so it is finished"):
        store.resume(kept.path)
    assert not (kept.path / "trials.jsonl").exists()
    with pytest.raises(Error, match=f"there is one already; to replace it: rm -r {kept.path}"):
        archive.keep(campaign, kept.path)


def test_a_damaged_reference_is_one_line(kept: store.Store) -> None:
    file = kept.path / "trials.jsonl.gz"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(Error, match=r"trials.jsonl.gz: .*end-of-stream"):
        kept.trials()
    file.write_bytes(b"<html>")
    with pytest.raises(Error, match=r"trials.jsonl.gz: Not a gzipped file"):
        kept.trials()


@pytest.mark.parametrize("change", ["a trial", "circumstances", "conformance"])
def test_figures_older_than_their_data_are_stale(kept: store.Store, change: str) -> None:
    derived = [*(kept.path / "figures").glob("*.pdf"), kept.path / "report.html"]
    assert len(derived) == 3
    assert archive.stale(kept, derived) == []
    if change == "a trial":
        more = replace(kept.log()[0], value=101.0).as_json()
        text = kept.raw() + json.dumps(more).encode() + b"\n"
        (kept.path / "trials.jsonl.gz").write_bytes(gzip.compress(text))
    elif change == "circumstances":
        file = kept.path / "campaign.json"
        file.write_text(file.read_text().replace("a CPU", "another CPU"))
    else:
        (kept.path / "conformance.json").write_text("[{}]")
    assert archive.stale(kept, derived) == derived


def test_the_references_of_this_project_are_whole_and_fresh() -> None:
    for campaign in sorted(paths.REFERENCE.glob("*/campaign.json")):
        found = store.open(folder := campaign.parent)
        assert found.trials()
        derived = [*(folder / "figures").glob("*.pdf"), folder / "report.html"]
        assert archive.stale(found, derived) == []
