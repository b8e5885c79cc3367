"""Table and figures say everything that was stored, and what is missing they say too."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from testbed import cli, datapaths, paths, plan
from testbed.campaigns import campaign
from testbed.campaigns.places import Share
from testbed.campaigns.protocol import Job
from testbed.model.cells import Cell, Pair
from testbed.model.errors import Error
from testbed.model.metrics import Metric
from testbed.model.terms import Family
from testbed.model.trials import Status, Trial
from testbed.reports import html, table, words
from testbed.reports.figures import draw, forest, stacks
from testbed.results import analysis, statistics, store
from testbed.results.results import Results, read

PLAN = plan.parse(
    """
    name = "little"
    blocks = 3
    warmup_s = 0
    duration_s = 1
    [[cells]]
    datapath = "loopback"
    pair = "native-native"
    family = ["ipv4", "ipv6"]
    transport = "tcp"
    metric = ["throughput", "latency"]
    size_bytes = 64
    [[cells]]
    datapath = ["bridge", "capture"]
    pair = ["native-guest", "guest-guest"]
    family = ["ipv4", "ipv6"]
    transport = "tcp"
    metric = ["throughput", "latency", "connections"]
    size_bytes = 64
    """,
    "little.toml",
)
CAMPAIGN = store.Campaign(
    name="little",
    plan={},
    cells=tuple(c.id for c in PLAN.cells),
    blocks=3,
    seed=1,
    references={"bridge": "bridge", "capture": "bridge", "loopback": "loopback"},
    guest="osv",
    guest_kernel="OSv master",
    accelerator="tcg",
    kernel="6.18",
    cpu="a CPU",
    governor="none",
    host="here",
    revision="0" * 40,
)
LEVEL = {"loopback": 10.0, "bridge": 2.0, "capture": 1.0}
SCALE = {
    Metric.THROUGHPUT: 1e9,
    Metric.LATENCY: 100.0,
    Metric.CONNECTIONS: 1e3,
    Metric.REQUESTS: 1e5,
}


def trial(cell: Cell, block: int) -> Trial:
    """IPv6 guests are unsupported, bridge never has two guests; else a value that jitters a bit."""
    made = Trial(cell.id, block, 0, Status.OK, transactions=10_000)
    if cell.family is Family.IPV6 and cell.pair is not Pair.NATIVE_NATIVE:
        return replace(made, status=Status.UNSUPPORTED, reason="this OSv kernel speaks IPv4 only")
    if cell.pair is Pair.GUEST_GUEST and cell.datapath == "bridge":
        return replace(made, status=Status.FAILED, reason="guest 2 not ready:\n[booting] \n oops")
    value = LEVEL[cell.datapath] * SCALE[cell.metric] * (1 + block / 100)
    return replace(made, value=value, histogram_us=((value, 98), (3 * value, 2)))


@pytest.fixture
def little(tmp_path: Path) -> Iterator[store.Store]:
    with store.create(tmp_path / "little", CAMPAIGN) as made:
        for block in range(3):
            for cell in PLAN.cells:
                made.append(trial(cell, block))
        yield made


def printed(of: store.Store, width: int) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(table.table(Results(of), width))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_the_table_shows_values_intervals_and_ratios_in_human_units(little: store.Store) -> None:
    text = printed(little, 120)
    assert "process→osv" in text
    assert re.search(r"bridge +2\.02 \[1\.97, 2\.07\] +202 \[197, 207\] +606 \[591, 621\]", text)
    assert "×0.500 [0.500, 0.500]" in text
    assert "Gbit/s" in text
    assert "bridge by bridge" not in text
    assert "capture by bridge" in text


def test_what_is_missing_stands_there_with_its_reason_once(little: store.Store) -> None:
    text = printed(little, 120)
    number = re.search(r"(.) this OSv kernel speaks IPv4 only", text)
    assert number
    assert text.count(f"unsupported{number[1]}") == 16
    assert text.count("this OSv kernel speaks IPv4 only") == 1
    assert "guest 2 not ready: [booting] oops" in text
    assert "no ratio" in text
    assert "functional, not a speed claim" in text


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_the_table_fits_and_nothing_is_cut_off(little: store.Store, width: int) -> None:
    text = printed(little, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    assert ("±" in text) == (width < 116)


def test_ratios_of_disturbed_trials_are_marked_and_never_bold(tmp_path: Path) -> None:
    def page(name: str, disturbed: str | None) -> tuple[str, str]:
        with store.create(tmp_path / name, replace(CAMPAIGN, accelerator="kvm")) as made:
            for cell in PLAN.cells:
                for block in range(3):
                    noisy = disturbed if cell.datapath == "bridge" and block else None
                    made.append(replace(trial(cell, block), disturbed=noisy))
            html.write(Results(made), tmp_path / "report.html")
            return printed(made, 120), (tmp_path / "report.html").read_text()

    text, report = page("quiet", None)
    assert "disturbed" not in text
    assert 'class="number bold"' in report
    text, report = page("noisy", "something ran")
    (number,) = re.findall("(.) 2 of 3 blocks disturbed", text)
    assert re.search(rf"×0\.500 \[0\.500, 0\.500\]{number}", text)
    assert 'class="number bold"' not in report


@pytest.mark.parametrize("width", [80, 120])
def test_a_table_of_many_quantities_breaks_no_word(width: int) -> None:
    results = read(paths.REFERENCE / "paper")
    text = printed(results.store, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert all(head in text for head in ("connections", "first answer", "latency p99.9"))
    assert not re.search(r"\brefere\b|\bthroug\b", text)
    starts = [line for line in lines if line.startswith("pair ")]
    assert len(starts) > 1, "quantities that do not fit stand below"


def test_an_end_that_bounds_nothing_is_no_number(tmp_path: Path) -> None:
    with store.create(tmp_path / "wild", replace(CAMPAIGN, blocks=2)) as made:
        for cell in PLAN.cells:
            for block, factor in enumerate((1, 30)):
                of = trial(cell, block)
                made.append(replace(of, value=of.value and of.value * factor))
        html.write(Results(made), tmp_path / "report.html")
        assert re.search(r"\[0\.\d+, no bound\]", printed(made, 160))
    report = (tmp_path / "report.html").read_text()
    assert ">no bound</td>" in report
    assert not re.search(r"class=\"number[^>]*>\d{9,}", report)


def test_cells_that_were_not_run_yet_are_in_the_table(tmp_path: Path) -> None:
    with store.create(tmp_path / "empty", CAMPAIGN) as made:
        text = printed(made, 120)
        assert "not run yet" in text
        assert "loopback" in text
        assert draw.draw(Results(made))


def test_data_is_strict_json_with_null_for_what_there_is_not(little: store.Store) -> None:
    plain = json.loads(json.dumps(table.data(Results(little)), allow_nan=False))
    assert plain["campaign"]["functional"] is True
    by_id = {(row["id"], row["quantity"]): row for row in plain["cells"]}
    capture = by_id["capture/native-guest/ipv4/tcp/latency/64x1", "p99_us"]
    assert capture["estimate"]["mean"] == pytest.approx(303, rel=1e-3)
    assert capture["ratio"]["mean"] == pytest.approx(0.5)
    absent = by_id["capture/native-guest/ipv6/tcp/latency/64x1", "p99_us"]
    assert (absent["status"], absent["estimate"]["mean"]) == ("unsupported", None)
    assert len(plain["cells"]) == sum(2 if c.metric is Metric.LATENCY else 1 for c in PLAN.cells)


def test_the_99_9th_percentile_stands_where_there_are_samples_for_it(little: store.Store) -> None:
    assert "p99.9" not in printed(little, 160)
    cell = Cell.parse("capture/native-guest/ipv4/tcp/latency/64x1")
    little.append(replace(trial(cell, 0), histogram_us=((100.0, 99_000), (4321.0, 1_000))))
    text = printed(little, 160)
    assert "latency p99.9" in text
    assert text.count("4321") == 1
    assert "p99.9: of all blocks together, where 100 samples or more lie above it." in text
    assert "nan" not in text


def test_a_congestion_control_that_may_pace_is_warned_of(tmp_path: Path) -> None:
    for name, paces in (("bbr", True), ("cubic", False), ("unknown", False)):
        with store.create(tmp_path / name, replace(CAMPAIGN, congestion_control=name)) as made:
            html.write(Results(made), tmp_path / f"{name}.html")
            said = " ".join(printed(made, 120).split())
        page = (tmp_path / f"{name}.html").read_text()
        for text in (said, page.replace("&#x27;", "'")):
            assert (f"TCP's congestion control is {name}, not cubic" in text) is paces


def test_values_of_disturbed_trials_are_counted(little: store.Store) -> None:
    assert "disturbed" not in printed(little, 160)
    cell = Cell.parse("capture/native-guest/ipv4/tcp/latency/64x1")
    little.append(replace(trial(cell, 7), disturbed="by another"))
    little.append(replace(trial(cell, 8), disturbed="by another"))
    little.append(trial(cell, 8))
    values = sum(t.value is not None for t in Results(little).trials)
    assert f"1 of {values} values are of disturbed trials" in printed(little, 160)


def test_a_campaign_notes_its_guests_and_a_congestion_control_that_may_pace() -> None:
    share = Share("one", None, Job((), 0, 1, "best", ""))
    ready = {
        "event": "ready",
        "guest": {"runtime": "linux"},
        "why": "no OSv here",
        "machine": {"congestion_control": "bbr"},
        "noise": {"ratios": 20, "spread": 0.1, "others": 0.012},
    }
    guests, warning, quiet = campaign._notes(share, ready, plan.load("paper"))
    assert guests == "one: guests are linux: no OSv here"
    assert warning.startswith("one: TCP's congestion control is bbr, not cubic")
    assert quiet == (
        "one: others use 1.2% of the CPUs, and A/A ratios of 0.2 s trials spread by 10.0%: "
        "expect ±28.2% after 3 blocks; ±5.0% takes 19 blocks"
    )


def test_claims_are_not_measured_where_tcp_may_pace() -> None:
    share = Share("one", None, Job((), 0, 1, "best", ""))
    ready = {"event": "ready", "machine": {"congestion_control": "bbr"}}
    with pytest.raises(Error, match="one: TCP's congestion control is bbr.* plan proof claims"):
        campaign._refuse_pacing(plan.load("proof"), share, ready)
    campaign._refuse_pacing(plan.load("paper"), share, ready)
    ready["machine"] = {"congestion_control": "cubic"}
    campaign._refuse_pacing(plan.load("proof"), share, ready)


def test_figures_come_out_the_same_bytes_from_stored_data(little: store.Store) -> None:
    little.close()
    stored = store.open(little.path)
    files = draw.draw(Results(stored))
    assert [f.name for f in files] == [
        f"{name}-tcp.{kind}"
        for name in ("throughput", "latency", "connections", "ratios")
        for kind in ("png", "pdf")
    ]
    first = [f.read_bytes() for f in files]
    assert all(b.startswith((b"\x89PNG", b"%PDF")) for b in first)
    assert [f.read_bytes() for f in draw.draw(Results(stored))] == first
    for kind in ("png", "pdf"):  # no file depends on those that are saved before it
        alone = draw.draw(Results(stored), kinds=(kind,))
        assert [f.read_bytes() for f in alone] == [
            content for file, content in zip(files, first, strict=True) if file.suffix == f".{kind}"
        ]


@pytest.mark.parametrize(("low", "high"), [(0.93, 1.07), (0.66, 1.55), (0.56, 1.75), (0.3, 4.0)])
def test_an_axis_of_ratios_has_numbers_besides_1_however_many_panels(
    little: store.Store, low: float, high: float
) -> None:
    rows = analysis.summarise(store.frame(little.trials()), CAMPAIGN.references)
    near = statistics.Estimate(0.95, low, high, 3)
    axes = forest.forest(
        [replace(r, ratio=near) for r in rows if r.ratio.blocks], Results(little)
    ).axes
    assert len(axes) == 4
    assert {"1"} < {label.get_text() for label in axes[0].get_xticklabels()}


def test_sizes_get_figures_of_their_own(tmp_path: Path) -> None:
    cells = [Cell.parse(f"bridge/native-guest/ipv4/udp/latency/{size}x1") for size in (64, 1400)]
    campaign = replace(CAMPAIGN, cells=tuple(c.id for c in cells), blocks=1)
    with store.create(tmp_path / "sizes", campaign) as made:
        for cell in cells:
            made.append(trial(cell, 0))
        names = [f.name for f in draw.draw(Results(made)) if f.suffix == ".png"]
        assert names == ["latency-udp-64x1.png", "latency-udp-1400x1.png"]
        text = printed(made, 120)
        assert "1400 B" in text
        assert "one block: no intervals" in text


def test_what_takes_three_values_has_a_figure_along_them_and_one_of_the_commonest(
    tmp_path: Path,
) -> None:
    ids = [f"bridge/native-guest/ipv4/tcp/latency/{size}x1" for size in (64, 256, 1024)]
    ids += [f"bridge/native-guest/ipv6/tcp/latency/64x1@{rate}" for rate in (100, 200, 400)]
    ids += ["bridge/guest-native/ipv4/tcp/latency/64x1"]
    ids += [f"{name}/native-guest/ipv4/tcp/latency/64x1" for name in ("capture", "capture~again")]
    campaign = replace(
        CAMPAIGN,
        cells=tuple(ids),
        blocks=2,
        references={**CAMPAIGN.references, "capture~again": "capture"},
    )
    with store.create(tmp_path / "sweeps", campaign) as made:
        for block in range(2):
            for cell in map(Cell.parse, ids):
                like = replace(cell, datapath="bridge", family=Family.IPV4)
                made.append(replace(trial(like, block), cell=cell.id))
        names = [f.name for f in draw.draw(Results(made)) if f.suffix == ".png"]
        assert names == [
            "latency-tcp.png",
            "latency-tcp-by-size.png",
            "latency-tcp-by-rate.png",
            "ratios-tcp.png",
        ]
        text = " ".join(printed(made, 120).split())
        assert "64 B, 100/s" in text
        assert (
            "A/A: 0 of 2 intervals exclude 1, at most 1 would by chance: as it should be." in text
        )


def test_a_place_that_cannot_be_drawn_into_is_one_line(little: store.Store) -> None:
    (little.path / "figures").write_text("in the way")
    with pytest.raises(Error, match="figures: File exists"):
        draw.draw(Results(little))


def test_every_datapath_of_the_design_has_a_look_of_its_own() -> None:
    looks = [datapaths.get(name).look for name in datapaths.names()]
    assert len({(look.color, look.hatch) for look in looks}) == len(looks)
    assert len({(look.line, look.marker) for look in looks}) == len(looks)
    assert len({look.color for look in looks}) == len(looks)
    assert len({look.rank for look in looks}) == len(looks)


def test_datapaths_of_a_campaign_without_looks_differ_in_every_way(tmp_path: Path) -> None:
    names = datapaths.names()
    cells = tuple(f"{name}/native-guest/ipv4/tcp/latency/64x1" for name in names)
    with store.create(tmp_path / "old", replace(CAMPAIGN, cells=cells, looks={})) as made:
        looks = [Results(made).look(name) for name in names]
    assert len({look.rank for look in looks}) == len(looks)
    assert len({look.color for look in looks}) == len(looks)
    assert len({(look.line, look.marker) for look in looks}) == len(looks)


def test_starts_memory_and_scaling_have_figures_and_guests_that_cells_name_their_own(
    tmp_path: Path,
) -> None:
    text = """
    name = "scale"
    blocks = 2
    warmup_s = 0
    duration_s = 1
    [[cells]]
    datapath = ["direct", "steer"]
    pair = "native-guest"
    family = "ipv4"
    transport = "tcp"
    metric = ["throughput", "startup", "memory"]
    size_bytes = 64
    guest = "standin"
    guests = [1, 4, 16]
    """
    cells = plan.parse(text, "scale.toml").cells
    campaign = replace(
        CAMPAIGN,
        cells=tuple(c.id for c in cells),
        references={"steer": "direct"},
        guests={"standin": {"kernel": "", "accelerator": "none"}},
    )
    parts = {
        Metric.STARTUP: dict.fromkeys(stacks.STEPS, 20.0),
        Metric.MEMORY: {"processes": 3e6, "kernel": -1e3},
    }
    with store.create(tmp_path / "scale", campaign) as made:
        for cell in cells:
            for block in range(2):
                of = parts.get(cell.metric, {})
                value = (sum(of.values()) or 1e9) * (1 + block / 50)
                made.append(Trial(cell.id, block, 0, Status.OK, value=value, parts=of))
        names = [f.name for f in draw.draw(Results(made)) if f.suffix == ".png"]
        warnings = words.warnings_of(Results(made))
    assert names == [
        "throughput-tcp-standin.png",
        "scaling-tcp-standin.png",
        "startup-tcp.png",
        "memory-tcp.png",
        "ratios-tcp-standin.png",
    ]
    assert warnings == [], "nothing is said of the campaign's own guests, which no cell has"
    assert not any(made.campaign.is_functional(cell) for cell in cells)


def test_a_campaign_speaks_of_the_guests_that_its_cells_have() -> None:
    own, named = (f"steer/native-guest/ipv4/tcp/latency/64x1{of}" for of in ("", ",guest=standin"))
    native = "loopback/native-native/ipv4/tcp/latency/64x1"
    standins = replace(CAMPAIGN, cells=(native, named), guests={"standin": {"accelerator": "none"}})
    assert words.guests_of(standins) == "guest standin, accelerator none"
    assert not standins.functional
    both = replace(standins, cells=(own, named))
    standin = "guest standin, accelerator none"
    assert words.guests_of(both) == f"guest osv (OSv master), accelerator tcg; {standin}"
    assert both.functional
    for offloads in ("guest_csum=off,guest_tso4=off", "ipv6 checksums by host"):
        told = words.guests_of(replace(both, offloads=offloads))
        assert told.endswith(f"tcg, {offloads.partition(',')[0]}; {standin}")
    assert words.guests_of(replace(CAMPAIGN, cells=(native,))) == "no guests"


def test_numbers_are_exported_for_dashboards(
    little: store.Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["table", "--bencher", str(little.path)]) == 0
    exported = json.loads(capsys.readouterr().out)
    rows = {(row.cell.id, row.quantity): row for row in Results(little).summaries}
    cell = "capture/native-guest/ipv4/tcp/latency/64x1"
    assert exported[cell]["p50_us"]["value"] == rows[cell, "p50_us"].estimate.mean
    assert {frozenset(measure) for of in exported.values() for measure in of.values()} <= {
        frozenset({"value"}),
        frozenset({"value", "lower_value", "upper_value"}),
    }
