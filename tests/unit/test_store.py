"""A campaign survives kills, full disks and rivals, and says what is wrong with a damaged one."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pandas as pd
import pytest

from testbed.model.errors import Error
from testbed.model.trials import Status, Trial
from testbed.results import store
from tests.children import ending

CELL = "capture/native-guest/ipv4/tcp/latency/64x1"
CAMPAIGN = store.Campaign(
    name="quick",
    plan={"blocks": 2},
    cells=(CELL,),
    blocks=2,
    seed=1,
    references={"capture": "bridge"},
    guest="linux",
    guest_kernel="Linux 6.1",
    accelerator="tcg",
    kernel="Linux 6.18",
    cpu="a CPU",
    governor="none",
    host="here",
    revision="0" * 40,
    images={"agent": "sha256:0"},
    started="2026-11-23T18:00:00Z",
)
OK = Trial(
    CELL,
    0,
    3,
    Status.OK,
    value=12.5,
    duration_s=1.0,
    transactions=100,
    histogram_us=((12.0, 49), (12.5, 50), (80.0, 1)),
    carried={"packets": 200},
    counters={"to_guest": 100},
    machine={"load1": 0.5},
    dialed="localhost",
)
FAILED = Trial(CELL, 0, 3, Status.FAILED, reason="guest not ready")


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    with store.create(tmp_path / "c", CAMPAIGN) as made:
        made.append(OK)
        made.console("block0-a").write_text("boots")
    again = store.open(tmp_path / "c")
    assert again.campaign == CAMPAIGN
    assert again.trials() == [OK]


def test_a_second_campaign_is_not_written_over_the_first(tmp_path: Path) -> None:
    store.create(tmp_path, CAMPAIGN).close()
    with pytest.raises(Error, match="campaign already; continue it: testbed run --resume"):
        store.create(tmp_path, CAMPAIGN)


def test_resume_cuts_off_a_torn_line_and_reading_ignores_it(tmp_path: Path) -> None:
    with store.create(tmp_path, CAMPAIGN) as made:
        made.append(OK)
    log = tmp_path / "trials.jsonl"
    log.write_bytes(log.read_bytes() + b'{"cell": "capt')
    assert store.open(tmp_path).trials() == [OK]
    with store.resume(tmp_path) as again:
        again.append(replace(OK, block=1))
        assert again.trials() == [OK, replace(OK, block=1)]


def test_the_last_that_is_ok_counts(tmp_path: Path) -> None:
    with store.create(tmp_path, CAMPAIGN) as made:
        for trial in (FAILED, OK, replace(OK, value=13.0), replace(FAILED, reason="later")):
            made.append(trial)
        made.append(replace(FAILED, block=1))
        made.append(replace(FAILED, block=1, reason="later"))
        assert [(t.block, t.value, t.reason) for t in made.trials()] == [
            (0, 13.0, None),
            (1, None, "later"),
        ]


def test_of_disturbed_trials_the_other_run_counts_and_all_are_kept(tmp_path: Path) -> None:
    shaken = replace(OK, value=99.0, disturbed="7 % of the CPUs' time was stolen")
    with store.create(tmp_path, CAMPAIGN) as made:
        for trial in (shaken, OK, shaken):
            made.append(trial)
        again = replace(shaken, block=1)
        for trial in (again, replace(again, value=98.0), replace(FAILED, block=1)):
            made.append(trial)
        assert [t.value for t in made.trials()] == [12.5, 98.0]
        assert len(made.log()) == 6
        assert made.done() == {(CELL, 0), (CELL, 1)}


@pytest.mark.parametrize("taken", ["steal_s", "others_s"])
def test_of_two_disturbed_trials_the_less_disturbed_one_counts(tmp_path: Path, taken: str) -> None:
    def shaken(value: float, taken_s: float) -> Trial:
        machine = {taken: taken_s, "elapsed_s": value}
        return replace(OK, value=value, machine=machine, disturbed="something else ran")

    with store.create(tmp_path, CAMPAIGN) as made:
        for trial in (shaken(1.0, 0.3), shaken(2.0, 0.4), shaken(1.5, 0.45)):
            made.append(trial)
        assert [t.value for t in made.trials()] == [2.0]


def test_failed_trials_are_run_again_on_resume_others_not(tmp_path: Path) -> None:
    with store.create(tmp_path, CAMPAIGN) as made:
        made.append(OK)
        made.append(replace(FAILED, block=1))
        made.append(Trial(CELL, 2, 0, Status.UNSUPPORTED, reason="no IPv6"))
        assert made.done() == {(CELL, 0), (CELL, 2)}


def test_a_malformed_line_is_named_by_its_number(tmp_path: Path) -> None:
    with store.create(tmp_path, CAMPAIGN) as made:
        made.append(OK)
        for line in (
            "not json",
            '{"status": "ok"}',
            "[]",
            '{"cell":"x","block":0,"order":0,"status":"ok"}',
        ):
            text = (tmp_path / "trials.jsonl").read_text()
            (tmp_path / "trials.jsonl").write_text(text + line + "\n")
            with pytest.raises(Error, match=r"trials.jsonl line 2: not a trial"):
                made.trials()
            (tmp_path / "trials.jsonl").write_text(text)


WRITER = """
import sys, time
from pathlib import Path
from testbed.results import store
held = store.resume(Path(sys.argv[1]))
held.append(held.trials()[0])
print("held", flush=True)
time.sleep(60)
"""


def test_two_processes_cannot_write_one_campaign_and_a_kill_frees_it(tmp_path: Path) -> None:
    with store.create(tmp_path, CAMPAIGN) as made:
        made.append(OK)
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with ending(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) as rival:
        assert rival.stdout is not None
        assert rival.stdout.readline() == "held\n"
        with pytest.raises(Error, match="another process is writing this campaign"):
            store.resume(tmp_path)
        assert store.open(tmp_path).trials() == [OK]
        rival.kill()
    store.resume(tmp_path).close()


def test_a_full_disk_is_one_line_and_leaves_whole_lines(tmp_path: Path) -> None:
    """A limit on the file's size ends a write half-way, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with store.create(tmp_path, CAMPAIGN) as made:
        made.append(OK)
        before = (tmp_path / "trials.jsonl").read_bytes()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
            with pytest.raises(
                Error, match=r"trials.jsonl: File too large; then go on with testbed run --resume"
            ):
                made.append(replace(OK, block=1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, ignored)
        assert (tmp_path / "trials.jsonl").read_bytes() == before


def test_no_campaign_an_unreadable_one_and_a_foreign_format_are_told_apart(tmp_path: Path) -> None:
    for opening in (store.open, store.resume):
        with pytest.raises(Error, match="no campaign there"):
            opening(tmp_path)
    store.create(tmp_path, CAMPAIGN).close()
    good = json.loads((tmp_path / "campaign.json").read_text())
    for bad, said in (
        ("{", "not a campaign"),
        ("[]", "not a campaign"),
        (json.dumps(good | {"format": 99}), "format 99, and this testbed reads format 1"),
        (json.dumps(good | {"novel": 1}), "not a campaign .*novel"),
    ):
        (tmp_path / "campaign.json").write_text(bad)
        with pytest.raises(Error, match=said):
            store.open(tmp_path)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Error, match="file/c: Not a directory"):
        store.create(tmp_path / "file" / "c", CAMPAIGN)


def test_derived_tables_hold_every_trial_and_every_bucket(tmp_path: Path) -> None:
    with store.create(tmp_path, CAMPAIGN) as made:
        made.append(OK)
        made.append(replace(FAILED, block=1))
        files = made.derive()
    assert [f.name for f in files] == ["trials.parquet", "trials.csv", "histogram.parquet"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["campaign.json", "trials.jsonl", "consoles", *(f.name for f in files)]
    )
    for table in (pd.read_parquet(files[0]), pd.read_csv(files[1])):
        assert list(table.datapath) == ["capture", "capture"]
        assert list(table.status) == ["ok", "failed"]
        assert table.p50_us[0] == 12.5
        assert table.p99_us[0] == 12.5
        assert table["carried.packets"][0] == 200
        assert pd.isna(table.value[1])
    histogram = pd.read_parquet(files[2])
    assert list(histogram["count"]) == [49, 50, 1]


def test_tables_of_an_empty_campaign_have_their_columns(tmp_path: Path) -> None:
    with store.create(tmp_path, CAMPAIGN) as made:
        files = made.derive()
    assert "p99_us" in pd.read_parquet(files[0]).columns


def test_the_usual_directory_is_named_by_time_and_plan() -> None:
    noon = datetime(2026, 11, 23, 12, 0, tzinfo=timezone(timedelta(hours=1)))
    assert store.directory("quick", noon) == Path("results/20261123T110000Z-quick")
    assert store.directory("quick").name[:4] == f"{datetime.now(UTC):%Y}"
