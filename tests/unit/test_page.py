"""The HTML page: it holds what was stored, needs nothing else, and works in a real browser."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from testbed import cli, plan
from testbed.model.errors import Error
from testbed.model.trials import Status, Trial
from testbed.reports import html
from testbed.results import store
from testbed.results.results import Results
from tests.browser import rendered

VALUES = {"bridge": 2e9, "capture": 10e9, "steer": 9e9}
CELLS = tuple(f"{d}/native-guest/ipv4/tcp/throughput/65536x1" for d in VALUES)
CAMPAIGN = store.Campaign(
    name="little",
    plan={},
    cells=(*CELLS, CELLS[2].replace("ipv4", "ipv6")),
    blocks=3,
    seed=7,
    references={"bridge": "bridge", "capture": "bridge", "steer": "bridge"},
    guest="standin",
    guest_kernel="",
    accelerator="none",
    kernel="6.18",
    cpu="a <CPU> & more",
    governor="none",
    host="here",
    revision="0123456789ab",
    versions={"qemu": "7.2"},
    started="2026-11-23T18:00:00Z",
)
RESULT = {
    "check": "refused-at-once",
    "datapath": "capture",
    "guest": "standin",
    "pair": "native-guest",
    "family": "ipv4",
    "transport": "tcp",
    "status": "pass",
    "reason": "",
    "duration_s": 0.1,
}


@pytest.fixture
def campaign(tmp_path: Path) -> Path:
    with store.create(tmp_path / "little", CAMPAIGN) as made:
        for block in range(3):
            for cell in CELLS:
                value = VALUES[cell.partition("/")[0]] * (1 + block / 100)
                made.append(Trial(cell, block, 0, Status.OK, value=value))
            reason = "no <IPv6> here"
            made.append(Trial(CAMPAIGN.cells[3], block, 0, Status.UNSUPPORTED, reason=reason))
    failed = {**RESULT, "family": "ipv6", "status": "fail", "reason": "took 3 s"}
    other = {**RESULT, "datapath": "steer"}
    (made.path / "conformance.json").write_text(json.dumps([RESULT, failed, other]))
    return made.path


@pytest.fixture
def page(campaign: Path) -> Path:
    assert cli.main(["report", str(campaign)]) == 0
    return campaign / "report.html"


def test_the_page_is_whole_by_itself(page: Path) -> None:
    text = re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.DOTALL)
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "http" not in re.sub(r"http-equiv|base64,[^\"]*", "", text)
    assert "default-src 'none'; img-src data:;" in text
    assert "data:image/png" not in text, "interactive figures show all that was measured"
    assert "a &lt;CPU&gt; &amp; more" in text
    assert "no &lt;IPv6&gt; here" in text
    assert "1 of 2" in text
    assert "capture (standin)" in text
    assert "took 3 s" in text


def test_a_page_is_the_same_from_the_same_data(page: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.html"
    assert cli.main(["report", str(page.parent), "-o", str(again)]) == 0
    assert again.read_bytes() == page.read_bytes()


@pytest.mark.parametrize(("accelerator", "bold"), [("kvm", 2), ("tcg", 0)])
def test_no_ratio_of_an_emulated_guest_is_bold(campaign: Path, accelerator: str, bold: int) -> None:
    file = campaign / "campaign.json"
    text = file.read_text().replace('"accelerator": "none"', f'"accelerator": "{accelerator}"')
    file.write_text(text)
    html.write(Results(store.open(campaign)), campaign / "report.html")
    rows = re.findall("<tr>.*</tr>", (campaign / "report.html").read_text())
    assert sum('class="number bold"' in row for row in rows) == bold


def test_a_search_for_a_rate_is_shown_attempt_by_attempt(campaign: Path) -> None:
    cell = "bridge/native-guest/ipv4/udp/throughput/1400x1"
    searched = ((4e8, 3e8, 0.25), (2.5e8, 2.499e8, 0.0004))
    with store.resume(campaign) as resumed:
        resumed.append(Trial(cell, 0, 9, Status.OK, value=2.499e8, searched=searched))
    html.write(Results(store.open(campaign)), campaign / "report.html")
    text = (campaign / "report.html").read_text()
    searches = text[text.index('id="searches"') :]
    assert shown(searches, "searches", 2) == ["1", "2"]
    assert shown(searches, "searches", 4) == ["300.0", "249.9"]
    assert shown(searches, "searches", 5) == ["25.000%", "0.040%"]


def test_the_command_repeats_the_campaign() -> None:
    shipped = plan.load("quick")
    every = replace(CAMPAIGN, name="quick", cells=tuple(c.id for c in shipped.cells))
    words = shlex.split(html.command(every))
    assert words[:3] == ["./bootstrap", "testbed", "run"]
    parsed = cli.parser().parse_args(words[2:])
    assert (parsed.plan, parsed.guest, parsed.blocks, parsed.seed) == ("quick", "standin", 3, 7)
    assert parsed.cells is None
    narrow = replace(every, plan={"target_width": 0.05})
    assert "--blocks" not in html.command(narrow)
    some = replace(every, cells=every.cells[:2])
    parsed = cli.parser().parse_args(shlex.split(html.command(some))[2:])
    assert parsed.cells == list(some.cells)


def test_conformance_that_is_none_is_refused(campaign: Path) -> None:
    (campaign / "conformance.json").write_text("[{}]")
    with pytest.raises(Error, match=r"conformance.json: not results of checks .*--json prints"):
        html.write(Results(store.open(campaign)), campaign / "report.html")


# --- in a browser -----------------------------------------------------------------------------


def shown(document: str, table: str, column: int) -> list[str]:
    """A column of the rows that are shown."""
    part = document[document.index(f'id="{table}"') :]
    body = part[part.index("<tbody>") : part.index("</tbody>")]
    rows = re.findall(r"<tr>(.*?)</tr>", body)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row)[column] for row in rows]


DATAPATH, MEAN = 3, 6


def test_a_click_on_a_head_sorts_by_number_and_back_and_what_is_missing_stays_last(
    page: Path,
) -> None:
    click = f'document.querySelectorAll("#results thead button")[{MEAN}].click();'
    up = shown(rendered(page, click), "results", MEAN)
    assert up == ["2.02", "9.09", "10.1", "unsupported"]
    down = shown(rendered(page, 2 * click), "results", DATAPATH)
    assert down == ["capture", "steer", "bridge", "steer"]


def test_the_box_filters_by_words(page: Path) -> None:
    type_in = (
        'const box = document.querySelector("#results input"); box.value = "steer IPv4";'
        'box.dispatchEvent(new Event("input"));'
    )
    document = rendered(page, type_in)
    assert shown(document, "results", DATAPATH) == ["steer"]
    assert "<output>1 of 4</output>" in document
