"""What a plan may claim, and when a campaign bears it out."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from testbed import cli, plan
from testbed.model.errors import Error
from testbed.model.trials import Status, Trial
from testbed.reports import claims
from testbed.reports.claims import Verdict
from testbed.reports.figures import claims as figures
from testbed.results import store
from testbed.results.results import Results

PLAN = """
name = "tiny"
blocks = 6
warmup_s = 0
duration_s = 0.5
[[cells]]
datapath = ["direct", "steer"]
pair = "native-guest"
family = "ipv4"
transport = "tcp"
metric = "throughput"
size_bytes = 65536
guests = [2, 64]
[preregistration]
estimator = "signed-rank"
seed = 7
revision = "0123abc"
[[claims]]
text = "fast"
cells = "steer/*,guests=2"
at_least = 0.97
[[claims]]
text = "frugal"
cells = "steer/*,guests=2"
quantity = "cpu"
at_most = 1.03
[[claims]]
text = "many"
cells = "*,guests=64"
to = { guests = 2 }
"""


def campaign(
    path: Path, spread: float, text: str = PLAN, seed: int = 7, **factors: float
) -> store.Store:
    """Throughput and cost of `steer` with two guests, times a factor, and of `steer~again`, times
    `again`; all else is alike.
    """
    read, rng = plan.parse(text, "tiny.toml"), random.Random(1)
    assert read.preregistration
    kept: dict[str, Any] = {
        "claims": [vars(claim) for claim in read.claims],
        "preregistration": vars(read.preregistration),
        "sha256": "0" * 64,
    }
    made = store.create(
        path,
        store.Campaign(
            name="tiny",
            plan=kept,
            cells=tuple(c.id for c in read.cells),
            blocks=read.blocks,
            seed=seed,
            references={"steer": "direct", "direct": "direct", "steer~again": "steer"},
            guest="standin",
            guest_kernel="",
            accelerator="none",
            kernel="6.18",
            cpu="a CPU",
            governor="none",
            host="",
            revision="",
        ),
    )
    with made:
        for cell in read.cells:
            about = cell.datapath == "steer" and cell.guests == 2
            for block in range(read.blocks):
                fast, dear = (factors.get(k, 1.0) if about else 1.0 for k in ("fast", "dear"))
                if cell.datapath == "steer~again":
                    fast = factors["again"]
                made.append(
                    Trial(
                        cell.id,
                        block,
                        0,
                        Status.OK,
                        payload_bytes=10**9,
                        duration_s=1.0,
                        value=1e9 * fast * rng.lognormvariate(0, spread),
                        machine={
                            "cpu_s": dear * rng.lognormvariate(0, spread),
                            "active_s": 1.0,
                            "softirq_s": 1.0,
                            "system_s": 0,
                            "user_s": 0,
                            "guest_s": 0,
                        },
                    )
                )
    return store.open(path)


@pytest.mark.parametrize(
    ("spread", "factors", "verdicts", "status"),
    [
        (0.001, {}, (Verdict.HOLDS, Verdict.HOLDS), 0),
        (0.001, {"fast": 0.9}, (Verdict.FAILS, Verdict.HOLDS), 1),
        (0.001, {"dear": 1.1}, (Verdict.HOLDS, Verdict.FAILS), 1),
        (0.1, {}, (Verdict.UNCLEAR, Verdict.UNCLEAR), 3),
    ],
)
def test_a_claim_holds_if_the_whole_interval_keeps_to_the_bound(
    tmp_path: Path,
    spread: float,
    factors: dict[str, float],
    verdicts: tuple[Verdict, ...],
    status: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    campaign(tmp_path / "out", spread, PLAN, 7, **factors)
    assert cli.main(["claims", str(tmp_path / "out"), "--json"]) == status
    found = json.loads(capsys.readouterr().out)
    assert tuple(row["verdict"] for row in found) == (*verdicts, Verdict.STATED, Verdict.STATED)
    assert found[0]["to"].startswith("direct/")
    assert found[2]["to"] == found[2]["cell"].replace("=64", "=2")


def test_the_table_says_what_is_divided_by_what(tmp_path: Path) -> None:
    made = campaign(tmp_path / "out", 0.001)
    rows = claims.judge(Results(made))
    assert [claims.bound(row.claim) for row in rows] == ["≥ 0.97", "≤ 1.03", "", ""]
    assert claims.what(rows[0], "standin") == (
        "steer, process→standin, IPv4 TCP, 64 KiB, 2 guests : direct"
    )


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('text = "fast"\n', "", "text: expected what is claimed"),
        ('"steer/*,guests=2"', '"proxy/*"', "cells: expected a glob of ids that some cell"),
        ('"cpu"', '"p50"', "quantity: expected one of value, p50_us, p99_us, memory_bytes, cpu"),
        ("at_least", "atleast", "atleast: no such key"),
        ("0.97", '"0.97"', "at_least: expected a number"),
        ("{ guests = 2 }", "{ guest = 2 }", "to: expected what a cell"),
        ("{ guests = 2 }", "{ gests = 2 }", "to: expected what a cell"),
    ],
)
def test_bad_claims_are_refused(old: str, new: str, expected: str) -> None:
    with pytest.raises(Error) as caught:
        plan.parse(PLAN.replace(old, new), "tiny.toml")
    assert str(caught.value).startswith("plan tiny.toml: [[claims]] ")
    assert expected in str(caught.value)


AGAIN = PLAN.replace('["direct", "steer"]', '["direct", "steer", "steer~again"]')


def test_the_estimator_that_was_laid_down_decides_and_the_other_stands_beside_it(
    tmp_path: Path,
) -> None:
    found = {}
    for estimator in plan.Estimator:
        text = PLAN.replace('"signed-rank"', f'"{estimator}"').replace("blocks = 6", "blocks = 12")
        made = Results(campaign(tmp_path / estimator, 0.005, text))
        found[estimator] = claims.judge(made)[0]
        assert claims.estimator_of(made.campaign) == estimator
    ranks, t = found[plan.Estimator.SIGNED_RANK], found[plan.Estimator.T]
    assert (ranks.ratio, ranks.other) == (t.other, t.ratio)
    assert ranks.ratio != ranks.other


def test_nothing_is_measured_where_controls_fail(tmp_path: Path) -> None:
    for name, again, verdict in (("same", 1.0, Verdict.HOLDS), ("other", 1.2, Verdict.UNMEASURED)):
        made = Results(campaign(tmp_path / name, 0.001, AGAIN, again=again))
        found = claims.judge(made)
        assert [row.verdict for row in found if row.claim.bounded] == [verdict] * 2
        assert claims.exit_status(found) == (0 if verdict is Verdict.HOLDS else 3)


def test_a_campaign_that_is_not_what_was_laid_down_says_so(tmp_path: Path) -> None:
    made = Results(campaign(tmp_path / "so", 0.001))
    assert claims.departures(made) == []
    other = Results(campaign(tmp_path / "other", 0.001, seed=8))
    assert claims.departures(other) == ["its seed is 8, not 7"]
    (_, last) = claims.preregistration_lines(other)
    assert last == "Not as it was laid down: its seed is 8, not 7."
    assert "0123abc" in next(claims.preregistration_lines(made))


def test_a_campaign_that_left_out_cells_or_has_no_data_of_a_control_measured_nothing(
    tmp_path: Path,
) -> None:
    """What was left out may be the controls."""
    made = campaign(tmp_path / "fewer", 0.001)
    made.campaign = replace(made.campaign, cells=made.campaign.cells[:-1])
    fewer = Results(made)
    assert claims.departures(fewer) == ["it has 3 of 4 cells"]
    lacking = campaign(tmp_path / "lacking", 0.001, AGAIN, again=1.0)
    log = lacking.path / "trials.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if "steer~again" not in line))
    for results in (fewer, Results(store.open(lacking.path))):
        found = claims.judge(results)
        assert {row.verdict for row in found if row.claim.bounded} == {Verdict.UNMEASURED}
        assert claims.exit_status(found) == 3


def test_a_campaign_that_was_stopped_early_says_so(tmp_path: Path) -> None:
    made = campaign(tmp_path / "out", 0.001, PLAN.replace("blocks = 6", "blocks = 8"))
    log = made.path / "trials.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if json.loads(line)["block"] < 6))
    assert claims.departures(Results(store.open(made.path))) == ["it has 6 blocks, not 8"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('estimator = "signed-rank"\n', "", "estimator: expected one of signed-rank, t"),
        ('"signed-rank"', '"median"', "estimator: expected one of signed-rank, t"),
        ('"0123abc"', '"today"', "revision: expected the git revision"),
        ("seed = 7", "sead = 7", "sead: no such key"),
    ],
)
def test_claims_with_bounds_need_a_preregistration(old: str, new: str, expected: str) -> None:
    with pytest.raises(Error) as caught:
        plan.parse(PLAN.replace(old, new), "tiny.toml")
    assert "[preregistration], which claims with bounds need: " in str(caught.value)
    assert expected in str(caught.value)


def test_a_preregistration_lays_down_the_blocks_so_no_target_width_adds_some() -> None:
    text = PLAN.replace("blocks = 6", "blocks = 6\ntarget_width = 0.05\nlimit_s = 60")
    with pytest.raises(Error, match=r"target_width and \[preregistration\], which lays down"):
        plan.parse(text, "tiny.toml")


def test_the_figure_has_a_line_for_each_verdict_and_every_block(tmp_path: Path) -> None:
    made = Results(campaign(tmp_path / "out", 0.001, PLAN, 7, fast=0.9))
    [(name, drawing)] = figures.figures(made)
    assert name == "claims-steer"
    (axes,) = drawing.panels.axes
    written = [text.get_text() for text in axes.texts]
    assert written == ["fast", "does not hold", "frugal", "holds"]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["process→standin, IPv4 TCP, 64 KiB, 2 guests : direct"] * 2
    assert sum(np.size(line.get_xdata()) == 6 for line in axes.lines) == 2
