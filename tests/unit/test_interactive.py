"""Interactive figures hold what was measured; in a browser they answer to hover and clicks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from testbed import datapaths
from testbed.model.cells import Cell
from testbed.model.metrics import Metric
from testbed.model.trials import Status, Trial
from testbed.reports import html, interactive
from testbed.results import store
from testbed.results.results import PALETTE, UNKNOWN, Results
from tests.browser import answered

P50_US = {"direct": 20.0, "steer": 10.0}
PLACES = ("native-guest/ipv4/tcp/latency/64x1", "native-guest/ipv6/tcp/latency/64x1")
BLOCKS = 3
CAMPAIGN = store.Campaign(
    name="little",
    plan={},
    cells=tuple(f"{datapath}/{place}" for datapath in P50_US for place in PLACES),
    blocks=BLOCKS,
    seed=7,
    references={"direct": "direct", "steer": "direct"},
    guest="standin",
    guest_kernel="",
    accelerator="none",
    kernel="6.18",
    cpu="a CPU whose name " + 70 * "x",
    governor="none",
    host="here",
    revision="0123456789ab",
    looks={
        "direct": {"rank": 1, "color": "#56B4E9", "marker": "s", "line": [1, 1]},
        "steer": {"rank": 2, "color": "#009E73", "marker": "P", "line": "-."},
    },
)


def trial(id: str, block: int) -> Trial:
    """Steer's last block over IPv6 is disturbed; IPv6 is slower."""
    cell = Cell.parse(id)
    us = P50_US[cell.datapath] * (1 + block / 100) * (3 if cell.family == "ipv6" else 1)
    buckets = ((us, 9000), (2 * us, 990), (9 * us, 10))
    made = Trial(id, block, 0, Status.OK, value=us, transactions=10_000, histogram_us=buckets)
    noisy = (cell.datapath, cell.family, block) == ("steer", "ipv6", BLOCKS - 1)
    return replace(made, disturbed="something ran") if noisy else made


def stored(folder: Path, campaign: store.Campaign = CAMPAIGN) -> Results:
    with store.create(folder, campaign) as made:
        for block in range(BLOCKS):
            for id in campaign.cells:
                made.append(trial(id, block))
    return Results(store.open(folder))


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return stored(tmp_path / "little")


def marks(results: Results, quantity: str = "p50_us") -> dict[str, Any]:
    """Datapath → the columns of its marks."""
    made = interactive.MetricFigures(Metric.LATENCY, results)
    lines = made.lines([row for row in made.rows if row.quantity == quantity])
    return {datapath: source.data for datapath, source in made.sources(lines).items()}


def test_a_mark_says_what_the_table_says(results: Results) -> None:
    of = marks(results)
    assert list(of) == ["direct", "steer"]
    steer = of["steer"]
    assert steer["cell"] == [f"process→standin, {family} TCP, 64 B" for family in ("IPv4", "IPv6")]
    assert steer["value_said"] == ["10.1 [9.9, 10.4] µs", "30.3 [29.6, 31.1] µs"]
    assert steer["ratio_said"] == ["0.500 [0.500, 0.500] to direct"] * 2
    assert of["direct"]["ratio_said"] == ["", ""]
    assert steer["note"] == ["", "1 of 3 blocks disturbed"]
    assert steer["value"] == [10.1, 30.3]


def test_a_mark_is_filled_if_the_value_is_sound(results: Results, tmp_path: Path) -> None:
    steer = marks(results)["steer"]
    assert steer["value_fill"] == steer["ratio_fill"] == ["#009E73", "white"]
    emulated = stored(tmp_path / "tcg", replace(CAMPAIGN, accelerator="tcg"))
    steer = marks(emulated)["steer"]
    assert steer["value_fill"] == steer["ratio_fill"] == ["white", "white"]
    assert "functional, not a speed claim" in str(steer["note"])


def test_a_cell_has_its_blocks_and_which_were_disturbed(results: Results) -> None:
    made = interactive.MetricFigures(Metric.LATENCY, results)
    (row,) = [
        row
        for row in made.measured
        if row.cell.id == CAMPAIGN.cells[3] and row.quantity == "p50_us"
    ]
    points = made.points(row)
    assert [point["value"] for point in points] == [30.0, 30.3, 30.6]
    assert [point["block"] for point in points] == [0, 1, 2]
    assert [point["disturbed"] for point in points] == ["no", "no", "yes"]
    assert {point["place"] for point in points} == {"1"}


def test_a_distribution_is_that_of_the_raw_histograms(results: Results) -> None:
    blocks = results.histograms[Cell.parse(CAMPAIGN.cells[0])]
    us, shares = interactive.distribution(blocks)
    assert us[:3] == [20.0, 20.2, 20.4]
    assert shares[:3] == [0.7, 0.4, 0.1]
    assert us[-1] == 181.8, "above the largest time there is nothing"
    assert shares[-1] == pytest.approx(10 / 30_000, rel=1e-3)
    assert interactive.distribution([[(5.0, 10)]]) == ([], [])


def test_a_long_distribution_is_thinned_and_keeps_its_ends() -> None:
    histogram = [(float(us), 10 if us < 5000 else 1) for us in range(1, 10_001)]
    us, shares = interactive.distribution([histogram])
    assert 50 < len(us) <= interactive.POINTS
    assert (us[0], us[-1]) == (1.0, 9999.0)
    assert us == sorted(us)
    assert shares == sorted(shares, reverse=True)
    exact = {
        float(f"{upper:.4g}"): sum(count for other, count in histogram if other > upper) / 54_991
        for upper, _ in histogram
    }
    assert shares == pytest.approx([exact[x] for x in us], rel=0.02)


def test_every_marker_of_the_design_has_one_of_its_own() -> None:
    markers = {datapaths.get(name).look.marker for name in datapaths.names()} | {
        look.marker for look in (*PALETTE, UNKNOWN)
    }
    assert markers <= set(interactive.MARKERS)
    assert len(set(interactive.MARKERS.values())) == len(interactive.MARKERS)


def test_a_campaign_without_values_has_no_figures(tmp_path: Path) -> None:
    with store.create(tmp_path / "empty", CAMPAIGN) as made:
        assert interactive.section(Results(made)) == ""


def test_ids_are_those_of_the_figures_alone() -> None:
    text = """{"id":"p1234"} 'p1001' "p1234" p99 6a9e7b60-1b1f-4d3c-9e2a-0123456789ab"""
    assert interactive.renumbered(text) == """{"id":"id0"} 'id1' "id0" p99 id2"""


# --- in a browser -----------------------------------------------------------------------------


@pytest.fixture
def page(results: Results) -> Path:
    html.write(results, results.path / "report.html")
    return results.path / "report.html"


READER = """
const figures = Bokeh.documents[0].roots();
const [means, ratios, blocks] = figures, distributions = figures.at(-1);
const within = root => [...root.querySelectorAll("*")].flatMap(
  element => element.shadowRoot ? [element, ...within(element.shadowRoot)] : [element]);
const of = name => within(document).filter(element => element.classList.contains(name));
const texts = name => of(name).map(element => element.textContent.trim());
const pause = () => new Promise(resolve => setTimeout(resolve, 500));
const pointer = (element, type, more = {}) => element.dispatchEvent(new PointerEvent(type, {
  bubbles: true, isPrimary: true, pointerId: 1, view: window, pointerType: "mouse",
  buttons: Number(type == "pointerdown"), ...more}));
const on = async (figure, x, y, ...types) => {
  const {frame, canvas_view} = Bokeh.index.get(figure), layer = canvas_view.events_el;
  layer.scrollIntoView();
  const {left, top} = layer.getBoundingClientRect();
  const at = {clientX: left + frame.x_scale.compute(x), clientY: top + frame.y_scale.compute(y)};
  for (const type of types) pointer(layer, type, at);
  await pause();
};
const shown = (figure, column) => Object.fromEntries(
  figure.renderers.filter(({name, visible}) => name && visible).map(
    ({name, view, data_source: {data}}) => [name, [...view.indices].map(row => data[column]?.[row])]
  ));
"""
"""What a reader has: figures, a pointer, and eyes."""


def test_a_mark_tells_its_numbers_and_a_click_shows_blocks_and_distribution(page: Path) -> None:
    script = """
      const found = {blocks: shown(blocks, "value"), title: blocks.title.text};
      await on(means, 30.3, 6, "pointermove");
      found.told = texts("bk-tooltip-row-value");
      await on(means, 30.3, 6, "pointerdown", "pointerup");
      found.blocks_after = shown(blocks, "value");
      found.titles_after = [blocks, distributions].map(figure => figure.title.text);
      await on(distributions, 30.3, 0.4, "pointermove");
      found.told_after = texts("bk-tooltip-row-value").slice(-3);
      return found;
    """
    found = answered(page, READER + script)
    assert found["blocks"] == {"direct": [20.0, 20.2, 20.4], "steer": [10.0, 10.1, 10.2]}
    assert found["title"] == "process→standin, IPv4 TCP, 64 B"
    assert found["told"] == [
        "steer",
        "process→standin, IPv6 TCP, 64 B",
        "30.3 [29.6, 31.1] µs",
        "0.500 [0.500, 0.500] to direct",
        "3",
        "1 of 3 blocks disturbed",
    ]
    assert found["blocks_after"] == {"direct": [60.0, 60.6, 61.2], "steer": [30.0, 30.3, 30.6]}
    assert found["titles_after"] == ["process→standin, IPv6 TCP, 64 B"] * 2
    assert found["told_after"] == ["steer", "0.400000", "30.300 µs"]


def test_a_click_on_a_name_in_the_key_hides_a_datapath_everywhere_and_shows_it(page: Path) -> None:
    script = """
      const names = () => figures.map(figure => Object.keys(shown(figure, "x")).join());
      const click = async () => {
        pointer(of("bk-item").find(item => item.textContent.trim() == "steer"), "pointerdown");
        await pause();
      };
      const found = {before: names()};
      await click();
      found.hidden = names();
      await on(means, 30.3, 6, "pointermove");
      found.told = texts("bk-tooltip-row-value");
      await click();
      found.after = names();
      return found;
    """
    found = answered(page, READER + script)
    assert set(found["before"]) == {"direct,steer"}
    assert set(found["hidden"]) == {"direct"}
    assert found["told"] == []
    assert found["after"] == found["before"]


@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_is_as_wide_as_its_window_and_fetches_nothing(page: Path, width: int) -> None:
    script = """
      const loaded = performance.getEntriesByType("resource").map(entry => entry.name);
      const canvas = of("bk-events")[0].getBoundingClientRect();
      return {loaded, wide: document.documentElement.scrollWidth, canvas: canvas.width};
    """
    found = answered(page, READER + script, width)
    assert found["loaded"] == []
    assert found["wide"] <= width
    assert 300 < found["canvas"] < width
