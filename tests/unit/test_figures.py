"""Figures can be read: no text lies over another, none is cut off, and what is said is there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axis import Tick
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from testbed import datapaths, paths, plan
from testbed.model.cells import Cell, Pair
from testbed.model.metrics import Metric
from testbed.model.terms import Family
from testbed.model.trials import Status, Trial
from testbed.reports.figures import bars, curves, draw, forest, slots, stacks
from testbed.reports.figures.style import RC, Drawing, surround
from testbed.results import store
from testbed.results.analysis import block_values
from testbed.results.results import Results
from testbed.results.statistics import Estimate, estimate
from tests.children import ending
from tests.unit import test_report

TOLERANCE_PX = 0.5
PAIRS = ("native-native", "native-guest", "guest-native", "wasm-container")
NAMES = ("loopback", "direct", "capture", "steer", "broadcast", "tun")
PLAN = plan.parse(
    f"""
    name = "wide"
    blocks = 3
    warmup_s = 0
    duration_s = 1
    [[cells]]
    datapath = {list(NAMES)}
    pair = {list(PAIRS)}
    family = ["ipv4", "ipv6"]
    transport = "tcp"
    metric = ["throughput", "latency", "connections", "startup", "memory"]
    size_bytes = 64
    [[cells]]
    datapath = ["direct", "steer"]
    pair = "native-guest"
    family = ["ipv4", "ipv6"]
    transport = "tcp"
    metric = "latency"
    size_bytes = [1024, 8192, 65536]
    [[cells]]
    datapath = ["direct", "steer"]
    pair = "native-guest"
    family = "ipv4"
    transport = "tcp"
    metric = ["throughput", "latency", "startup", "memory"]
    size_bytes = 64
    guests = [4, 16, 64]
    [[cells]]
    datapath = {list(NAMES[1:])}
    pair = ["native-guest", "guest-native"]
    family = ["ipv4", "ipv6"]
    transport = "tcp"
    metric = "requests"
    application = "redis.set-pipelined"
    size_bytes = 64
    streams = 16
    [[cells]]
    datapath = {list(NAMES[1:])}
    pair = ["native-guest", "guest-native"]
    family = "ipv4"
    transport = "tcp"
    metric = "requests"
    application = "sidecar.rate"
    rate_per_s = 1500
    [preregistration]
    estimator = "t"
    seed = 1
    revision = "0123abc"
    [[claims]]
    text = "steer and capture: throughput at least 0.97 of direct"
    cells = "[cs]*/*/throughput/64x1"
    at_least = 0.97
    [[claims]]
    text = "steer: host CPU per gigabyte between 0.9 and 1.1 of direct"
    cells = "steer/*/throughput/64x1*"
    quantity = "cpu"
    at_least = 0.9
    at_most = 1.1
    """,
    "wide.toml",
)
CAMPAIGN = replace(
    test_report.CAMPAIGN,
    name="wide",
    cells=tuple(cell.id for cell in PLAN.cells),
    plan={"claims": [vars(c) for c in PLAN.claims], "preregistration": vars(PLAN.preregistration)},
    references={name: "direct" for name in NAMES if name != "loopback"},
    looks={name: vars(datapaths.get(name).look) for name in NAMES},
)
PARTS = {
    Metric.STARTUP: dict.fromkeys(stacks.STEPS, 1.0),
    Metric.MEMORY: dict.fromkeys(stacks.OWNERS, 1e6),
}


def trial(cell: Cell, block: int) -> Trial:
    """Values over four orders of magnitude, with intervals of all widths; `tun` has no IPv6."""
    made = Trial(cell.id, block, 0, Status.OK)
    if cell.family is Family.IPV6 and cell.datapath == "tun":
        return replace(made, status=Status.UNSUPPORTED, reason="it has no IPv6")
    rank = 1 + NAMES.index(cell.datapath)
    factor = (1 + block * rank / 3) * (100 if cell.pair is Pair.NATIVE_NATIVE else 1) / rank
    factor *= 0.01 if cell.datapath == "tun" else 1
    if cell.metric.of_building:
        parts = {part: factor * value for part, value in PARTS[cell.metric].items()}
        return replace(made, value=sum(parts.values()), parts=parts)
    value = test_report.SCALE[cell.metric] * factor
    times = {"p50_us": 1e7 / value, "p99_us": 1e8 / value, "memory_bytes": 1e6 * factor}
    return replace(
        made,
        value=value,
        quantities=times if cell.application else {},
        histogram_us=((value, 19_600), (30 * value, 400)) if cell.metric is Metric.LATENCY else (),
        duration_s=1.0,
        payload_bytes=int(value),
        transactions=20_000 if cell.metric is Metric.LATENCY else max(1, int(value)),
        machine={
            "cpu_s": 1.0,
            "active_s": 1.0,
            "softirq_s": 0.25,
            "system_s": 0.25,
            "user_s": 0.5,
            "guest_s": 0.0,
        },
    )


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    with store.create(tmp_path_factory.mktemp("results") / "wide", CAMPAIGN) as made:
        for block in range(3):
            for cell in PLAN.cells:
                made.append(trial(cell, block))
        yield Results(made)


@cache
def drawn(kind: str, results: Results) -> dict[str, Drawing]:
    """All figures of one kind, by name, with title, key and footer."""
    with mpl.rc_context(RC):
        figures = dict(import_module(f"testbed.reports.figures.{kind}").figures(results))
        for drawing in figures.values():
            surround(drawing)
    return figures


def outside(tick: Tick, limits: tuple[float, float]) -> bool:
    """Whether a tick is beyond the ends of its axis: Matplotlib has such ticks, and hides them."""
    low, high = sorted(limits)
    return not low <= tick.get_loc() <= high


def texts(figure: Figure) -> dict[Text, Any]:
    """Every text that is to be seen, and its box in pixels."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    hidden = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        if outside(tick, axis.get_view_interval())
        for label in (tick.label1, tick.label2)
    }
    found = [t for t in figure.findobj(Text) if isinstance(t, Text) and t not in hidden]
    shown = [t for t in found if t.get_visible() and t.get_text().strip()]
    return {text: text.get_window_extent(canvas.get_renderer()) for text in shown}


def faults(figure: Figure) -> list[str]:
    """Texts that leave the figure, and pairs of texts of which one lies over the other."""
    boxes, page = texts(figure), figure.bbox
    leaving = [
        f"{text.get_text()!r} leaves the figure"
        for text, box in boxes.items()
        if min(box.x0, box.y0, page.x1 - box.x1, page.y1 - box.y1) < -TOLERANCE_PX
    ]
    over = [
        f"{a.get_text()!r} over {b.get_text()!r}"
        for (a, one), (b, other) in combinations(boxes.items(), 2)
        if min(one.x1, other.x1) - max(one.x0, other.x0) > TOLERANCE_PX
        and min(one.y1, other.y1) - max(one.y0, other.y0) > TOLERANCE_PX
    ]
    return leaving + over


@pytest.mark.parametrize("kind", draw.KINDS)
def test_no_text_lies_over_another_or_leaves_the_figure(wide: Results, kind: str) -> None:
    figures = drawn(kind, wide)
    assert figures
    found = {name: faults(drawing.panels) for name, drawing in figures.items()}
    assert found == {name: [] for name in figures}


def test_texts_that_collide_or_leave_the_figure_are_found() -> None:
    figure = Figure()
    for at, text in ((0.1, "one"), (0.11, "two"), (0.99, "three")):
        figure.text(at, 0.5, text)
    assert faults(figure) == ["'three' leaves the figure", "'one' over 'two'"]


def test_the_key_of_a_stack_has_what_some_bar_has(wide: Results) -> None:
    for drawing in drawn("stacks", wide).values():
        assert "guests' QEMU" not in [name for _, name in drawing.keys]
    assert {name for _, name in drawn("stacks", wide)["cpu-latency-tcp"].keys} == {
        "softirq",
        "system",
        "user",
    }


def test_panels_of_a_stack_have_no_slot_without_a_bar(wide: Results) -> None:
    ipv4, ipv6 = drawn("stacks", wide)["cpu-throughput-tcp"].panels.axes
    names = [[label.get_text() for label in axes.get_xticklabels()] for axes in (ipv4, ipv6)]
    assert names[0].count("tun") == len(PAIRS)
    assert names[1].count("tun") == 0


def test_groups_whose_bars_are_far_apart_have_scales_of_their_own(wide: Results) -> None:
    panels = drawn("bars", wide)["throughput-tcp"].panels.axes
    titles = [axes.get_title(loc="left") for axes in panels]
    assert titles == ["IPv4", "IPv4, other scale", "IPv6", "IPv6, other scale"]
    tops = [axes.get_ylim()[1] for axes in panels]
    assert tops[0] == tops[2] > 50 * tops[1] == 50 * tops[3]


def test_a_family_without_rows_of_a_group_has_an_empty_panel(wide: Results) -> None:
    rows = [
        row
        for row in wide.summaries
        if row.cell.metric is Metric.THROUGHPUT and row.cell.guests == 1
        if row.cell.pair is Pair.NATIVE_GUEST or row.cell.id.startswith("steer/native-native/ipv4")
    ]
    panels = bars.bars_figure(rows, wide).panels.axes
    assert [len(axes.patches) for axes in panels] == [1, 6, 0, 6]


def test_a_very_long_bar_leaves_the_others_readable() -> None:
    axes = Figure().subplots()
    means = [1.0, 1.2, 1.1, 50.0]
    slots.set_height(axes, [Estimate(mean, mean / 1.1, mean * 1.1, 3) for mean in means], 1)
    assert 1.2 < axes.get_ylim()[1] < 1.5


def test_whiskers_that_leave_a_panel_end_with_an_arrow(wide: Results) -> None:
    [axes, *_] = drawn("stacks", wide)["cpu-throughput-tcp"].panels.axes
    top = axes.get_ylim()[1]
    ends = [(line.get_marker(), np.asarray(line.get_xydata())[:, 1].max()) for line in axes.lines]
    assert {end for marker, end in ends if marker == "^"} == {top}
    assert max(end for _, end in ends) == top


def test_marks_of_curves_are_the_numbers_of_the_table(wide: Results) -> None:
    id = "steer/native-guest/ipv4/tcp/latency/64x1"
    axes = Figure().subplots()
    curves._curve(axes, wide.look("steer"), wide.histograms[Cell.parse(id)])
    marks = {share: x for x, share in np.asarray(axes.lines[1].get_xydata())}
    of_table = {
        share: estimate(block_values(wide.tables[id], quantity).values()).mean
        for share, quantity in ((0.5, "p50_us"), (0.99, "p99_us"))
    }
    assert marks == pytest.approx(of_table)


def test_no_mark_of_an_emulated_guest_is_filled_and_no_footer_speaks_of_filled_ones(
    wide: Results, tmp_path: Path
) -> None:
    emulated = drawn("forest", wide)["ratios-tcp"]
    guests = [r for r in wide.summaries if r.cell.pair.guests and r.ratio.blocks]
    assert "filled" not in " ".join(forest.ratios(guests, wide).paragraphs)
    with store.create(tmp_path / "real", replace(CAMPAIGN, accelerator="kvm")) as made:
        for cell in PLAN.cells:
            for block in range(3):
                made.append(trial(cell, block))
        real = drawn("forest", Results(made))["ratios-tcp"]
    assert "filled: the interval excludes 1" in real.paragraphs[0]
    assert _filled(emulated) < _filled(real)


def test_marks_of_disturbed_ratios_are_hollow_and_every_figure_with_such_values_says_so(
    wide: Results, tmp_path: Path
) -> None:
    real = replace(CAMPAIGN, accelerator="kvm")
    with (
        store.create(tmp_path / "quiet", real) as quiet,
        store.create(tmp_path / "shaken", real) as shaken,
    ):
        for cell in PLAN.cells:
            for block in range(3):
                made = trial(cell, block)
                quiet.append(made)
                noisy = cell.datapath == "direct" and block == 1 and made.status is Status.OK
                shaken.append(replace(made, disturbed="something ran") if noisy else made)
        for kind in draw.KINDS:
            undisturbed, disturbed = drawn(kind, Results(quiet)), drawn(kind, Results(shaken))
            for name, drawing in disturbed.items():
                text = " ".join(drawing.paragraphs)
                assert "1 of 3 blocks disturbed" in text, name
                assert "disturbed" not in " ".join(undisturbed[name].paragraphs), name
                if kind == "forest":
                    assert "and at most 25% of the blocks were disturbed" in text
                    assert 0 <= _filled(drawing) < _filled(undisturbed[name])


def test_footers_of_one_block_speak_of_no_interval(wide: Results, tmp_path: Path) -> None:
    with store.create(tmp_path / "once", replace(CAMPAIGN, blocks=1)) as made:
        for cell in PLAN.cells:
            made.append(trial(cell, 0))
        once = Results(made)
        for kind in ("bars", "stacks", "sweeps", "forest"):
            for name, drawing in drawn(kind, once).items():
                [said, *_] = drawing.paragraphs
                assert "no interval from one" in said, name
                assert "t-intervals" not in said, name
                assert "t-intervals" in drawn(kind, wide)[name].paragraphs[0], name


def test_only_figures_with_streams_over_tcp_warn_of_pacing(wide: Results, tmp_path: Path) -> None:
    with store.create(tmp_path / "paced", replace(CAMPAIGN, congestion_control="bbr")) as made:
        for cell in PLAN.cells:
            made.append(trial(cell, 0))
        figures = drawn("bars", Results(made)) | drawn("sweeps", Results(made))
    warn = {name for name, of in figures.items() if "throughput" in " ".join(of.paragraphs)}
    assert warn == {"throughput-tcp", "scaling-tcp"}


def _filled(drawing: Drawing) -> int:
    """Number of filled marks of a forest plot."""
    lines = [line for axes in drawing.panels.axes for line in axes.lines]
    return sum(
        line.get_markersize() == 3.8 and line.get_markerfacecolor() != "white" for line in lines
    )


def test_a_footer_denies_no_ratio_that_the_figure_shows(wide: Results) -> None:
    rows = [
        replace(row, ratio=Estimate(float("nan"), float("nan"), float("nan"), 0), no_ratio="none")
        if row.cell.metric is Metric.CONNECTIONS and row.cell.pair is Pair.GUEST_NATIVE
        else row
        for row in wide.summaries
        if row.cell.datapath == "steer" and row.cell.size_bytes == 64 and row.cell.guests == 1
    ]
    rows = [row for row in rows if not row.cell.metric.of_building]
    [footer] = forest.ratios(rows, wide).paragraphs[1:]
    cells = "osv→process IPv4 connections 64 B; osv→process IPv6 connections 64 B"
    assert footer == f"No ratio of steer for {cells}: none."


@pytest.mark.parametrize(("low", "high"), [(0.9, 1.1), (0.3, 2.8), (0.02, 20), (0.004, 3)])
def test_an_axis_of_ratios_has_three_ticks_or_more_with_room_between(
    low: float, high: float
) -> None:
    ticks = forest._ticks(low, high, 1.4)
    assert 3 <= len(ticks) <= 1.4 / forest.TICK_IN + 1
    assert 1 in ticks
    assert ticks == sorted(ticks)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells a process so")
def test_processes_that_draw_end_with_the_main_one(tmp_path: Path) -> None:
    campaign = shutil.copytree(paths.REFERENCE / "proof", tmp_path / "proof")
    command = [sys.executable, "-m", "testbed.cli", "figures", str(campaign)]
    with ending(subprocess.Popen(command)) as drawing:
        children = Path(f"/proc/{drawing.pid}/task/{drawing.pid}/children")
        deadline = time.monotonic() + 120
        while len(found := children.read_text().split()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)
        drawing.kill()
        drawing.wait()
        while any(Path(f"/proc/{pid}").exists() for pid in found):
            assert time.monotonic() < deadline
            time.sleep(0.01)
