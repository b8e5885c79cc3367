"""What a plan may claim, and when a campaign bears it out."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from testbed import cli, plan
from testbed.model.errors import Error
from testbed.model.trials import Status, Trial
from testbed.reports import claims
from testbed.reports.claims import Verdict
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


def campaign(path: Path, spread: float, **factors: float) -> store.Store:
    """Throughput and cost of `steer` with two guests, times a factor; all else is alike."""
    read, rng = plan.parse(PLAN, "tiny.toml"), random.Random(1)
    kept: dict[str, Any] = {"claims": [vars(claim) for claim in read.claims]}
    made = store.create(
        path,
        store.Campaign(
            name="tiny",
            plan=kept,
            cells=tuple(c.id for c in read.cells),
            blocks=6,
            seed=1,
            references={"steer": "direct", "direct": "direct"},
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
            for block in range(6):
                fast, dear = (factors.get(k, 1.0) if about else 1.0 for k in ("fast", "dear"))
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
    campaign(tmp_path / "out", spread, **factors)
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
        ('"cpu"', '"p50"', "quantity: expected one of value, p50_us, p99_us, cpu"),
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
