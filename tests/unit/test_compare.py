"""Verdicts on two campaigns, what stands against a comparison, and the exit status for CI."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from testbed import cli
from testbed.model.trials import Status, Trial
from testbed.reports import compare
from testbed.reports.compare import Change
from testbed.reports.figures import draw
from testbed.results import store
from testbed.results.results import Results

CELLS = tuple(
    f"{datapath}/native-guest/ipv4/tcp/{metric}"
    for datapath in ("bridge", "capture")
    for metric in ("throughput/65536x1", "latency/64x1")
)
CAMPAIGN = store.Campaign(
    name="little",
    plan={},
    cells=CELLS,
    blocks=6,
    seed=1,
    references={"bridge": "bridge", "capture": "bridge"},
    guest="standin",
    guest_kernel="",
    accelerator="none",
    kernel="6.18",
    cpu="a CPU",
    governor="none",
    host="here",
    revision="a" * 12,
)


def campaign(
    path: Path, seed: int, factors: dict[str, float], blocks: int = 6, **changes: object
) -> Results:
    """Values around 100 with 1 % of spread, times a factor per cell; factor 0: it failed."""
    rng = random.Random(seed)
    with store.create(path, replace(CAMPAIGN, **changes)) as made:  # type: ignore[arg-type]
        for cell in made.campaign.cells:
            for block in range(blocks):
                value = 100 * factors.get(cell, 1.0) * rng.lognormvariate(0, 0.01)
                trial = Trial(
                    cell,
                    block,
                    0,
                    Status.OK,
                    value=value,
                    transactions=10_000,
                    histogram_us=((value, 98), (3 * value, 2)) if "latency" in cell else (),
                )
                if not value:
                    trial = Trial(cell, block, 0, Status.FAILED, reason="guest not ready")
                made.append(trial)
    return Results(store.open(path))


def verdicts(rows: list[compare.Comparison]) -> list[Change]:
    return [row.verdict for row in rows]


def test_faster_is_more_throughput_and_less_latency(tmp_path: Path) -> None:
    before = campaign(tmp_path / "a", 1, {})
    after = campaign(tmp_path / "b", 2, {CELLS[0]: 1.2, CELLS[1]: 1.2, CELLS[3]: 0.8})
    rows = compare.compare(before, after)
    assert [(r.cell.id, r.quantity) for r in rows] == [
        (CELLS[0], "value"),
        (CELLS[1], "p50_us"),
        (CELLS[1], "p99_us"),
        (CELLS[2], "value"),
        (CELLS[3], "p50_us"),
        (CELLS[3], "p99_us"),
    ]
    faster, slower, same = Change.FASTER, Change.SLOWER, Change.EQUIVALENT
    assert verdicts(rows) == [faster, slower, slower, same, faster, faster]
    assert compare.exit_status(rows) == 1


def test_a_sure_change_within_the_band_is_equivalent_and_one_beyond_a_narrower_is_not(
    tmp_path: Path,
) -> None:
    before, after = campaign(tmp_path / "a", 1, {}), campaign(tmp_path / "b", 2, {CELLS[0]: 0.97})
    (row, *_), (narrow, *_) = (compare.compare(before, after, band) for band in (0.08, 0.01))
    assert row.ratio.high < 1
    assert (row.verdict, narrow.verdict) == (Change.EQUIVALENT, Change.SLOWER)


def test_a_cell_that_no_longer_works_is_lost_and_one_left_out_is_not(tmp_path: Path) -> None:
    before = campaign(tmp_path / "a", 1, {})
    broken = campaign(tmp_path / "b", 2, {CELLS[2]: 0.0})
    rows = compare.compare(before, broken)
    lost = next(r for r in rows if r.cell.id == CELLS[2])
    assert (lost.verdict, lost.reason) == (Change.UNCLEAR, "later: guest not ready")
    assert compare.exit_status(rows) == 3
    fewer = campaign(tmp_path / "c", 3, {}, cells=CELLS[:2])
    rows = compare.compare(before, fewer)
    assert [r.reason for r in rows[3:]] == ["not in the later campaign"] * 3
    assert compare.exit_status(rows) == 0


def test_the_figure_of_a_comparison_with_one_block_speaks_of_no_interval(tmp_path: Path) -> None:
    before, after = (campaign(tmp_path / name, 1, {}) for name in ("a", "b"))
    once = campaign(tmp_path / "c", 2, {}, blocks=1)
    for later, welch in ((after, True), (once, False)):
        rows = compare.compare(before, later)
        *_, how = draw.comparison(rows, before, later, compare.BAND).paragraphs
        assert ("95 % Welch t-intervals; filled" in how) is welch
        assert ("no interval from one" in how) is not welch


def test_one_block_or_no_common_cell_cannot_be_compared(tmp_path: Path) -> None:
    before = campaign(tmp_path / "a", 1, {})
    once = campaign(tmp_path / "b", 2, {}, blocks=1)
    rows = compare.compare(before, once)
    assert {r.reason for r in rows} == {
        "one block in the later campaign says nothing of its spread"
    }
    assert compare.exit_status(rows) == 3
    other = campaign(tmp_path / "c", 2, {}, cells=(CELLS[0].replace("ipv4", "ipv6"),))
    assert compare.exit_status(compare.compare(before, other)) == 3


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_says_verdicts_counts_and_what_else_changed(tmp_path: Path, width: int) -> None:
    before = campaign(tmp_path / "a", 1, {})
    after = campaign(tmp_path / "b", 2, {CELLS[0]: 0.5}, kernel="7.0", accelerator="tcg")
    console = Console(file=StringIO(), width=width)
    console.print(compare.table(compare.compare(before, after), before, after, 0.05, width))
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert max(len(line) for line in text.splitlines()) <= width
    assert "1 slower, 5 equivalent." in text
    assert "kernel differs: 6.18 | 7.0" in text
    assert "functional, not a speed claim" in text


def test_the_command_prints_strict_json_draws_the_figure_and_ends_with_the_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    campaign(tmp_path / "a", 1, {})
    campaign(tmp_path / "b", 2, {CELLS[0]: 0.5, CELLS[2]: 0.0})
    arguments = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]
    assert cli.main(arguments) == 1
    plain = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert plain["verdicts"]["slower"] == 1
    assert plain["exit_status"] == 1
    slower = next(c for c in plain["cells"] if c["verdict"] == "slower")
    assert slower["ratio"]["mean"] == pytest.approx(0.5, rel=0.02)
    assert (tmp_path / "b/figures/against-a.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "nowhere")]) == 3
    with pytest.raises(SystemExit, match="2"):
        cli.main([*arguments, "--band", "2"])


def test_ratios_are_compared_where_a_machine_is_slower_as_a_whole(tmp_path: Path) -> None:
    before = campaign(tmp_path / "a", 1, {})
    slower = campaign(tmp_path / "b", 2, dict.fromkeys(CELLS, 0.5))
    throughput = CELLS[2]
    worse = campaign(tmp_path / "c", 3, dict.fromkeys(CELLS, 0.5) | {throughput: 0.4})
    assert Change.SLOWER in verdicts(compare.compare(before, slower))
    rows = compare.compare(before, slower, ratios=True)
    assert {row.cell.datapath for row in rows} == {"capture"}  # bridge is the reference
    assert {row.to.datapath for row in rows if row.to} == {"bridge"}
    assert set(verdicts(rows)) == {Change.EQUIVALENT}
    rows = compare.compare(before, worse, ratios=True)
    assert [row.cell.id for row in rows if row.verdict is Change.SLOWER] == [throughput]
    assert rows[0].before.mean == pytest.approx(1, abs=0.02)


def test_the_earlier_claims_are_judged_by_the_later_campaign(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    claim = {"text": "as fast", "cells": "capture/*/throughput/*", "at_least": 0.95}
    before = campaign(tmp_path / "a", 1, {}, plan={"claims": [claim]})
    verdicts = {0: "holds", 1: "does not hold", 3: "can't tell"}
    for name, factor, status in (("b", 0.99, 0), ("c", 0.9, 1), ("d", 0.95, 3)):
        later = campaign(tmp_path / name, 2, {CELLS[2]: factor})
        command = ["compare", "--ratios", "--band", "0.2", str(before.path), str(later.path)]
        assert cli.main([*command, "--json"]) == status
        printed = json.loads(capsys.readouterr().out)
        assert printed["exit_status"] == status
        assert [judged["verdict"] for judged in printed["claims"]] == [verdicts[status]]
        assert cli.main(command) == status
        shown = capsys.readouterr().out
        assert "The earlier campaign's claims" in shown
        assert "throughput : bridge" in shown
