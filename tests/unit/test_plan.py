"""A plan multiplies out the same way every time, and bad input is refused by file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed import plan
from testbed.campaigns import schedule
from testbed.campaigns.provisioning import Deployment
from testbed.model.cells import Cell
from testbed.model.errors import Error

GOOD = """
name = "tiny"
blocks = 2
warmup_s = 0
duration_s = 0.5
[[cells]]
datapath = ["bridge", "capture"]
pair = "native-guest"
family = ["ipv4", "ipv6"]
transport = "tcp"
metric = "latency"
size_bytes = 64
"""


def test_lists_are_multiplied_in_a_fixed_order() -> None:
    assert [cell.id for cell in plan.parse(GOOD, "tiny.toml").cells] == [
        "bridge/native-guest/ipv4/tcp/latency/64x1",
        "bridge/native-guest/ipv6/tcp/latency/64x1",
        "capture/native-guest/ipv4/tcp/latency/64x1",
        "capture/native-guest/ipv6/tcp/latency/64x1",
    ]


def test_rates_and_variants_are_in_the_names_of_cells() -> None:
    text = GOOD.replace('"capture"', '"capture~again", "capture~slow"').replace(
        "size_bytes = 64", "size_bytes = 64\nrate_per_s = [0, 500]"
    )
    cells = plan.parse(
        text.replace("blocks = 2", "blocks = 2\ntarget_width = 0.1\nlimit_s = 9"), ""
    )
    assert (cells.target_width, cells.limit_s) == (0.1, 9)
    assert [c.id for c in cells.cells if c.family == "ipv4"] == [
        f"{datapath}/native-guest/ipv4/tcp/latency/64x1{rate}"
        for datapath in ("bridge", "capture~again", "capture~slow")
        for rate in ("", "@500")
    ]
    assert all(Cell.parse(c.id) == c for c in cells.cells)


def test_globs_select_cells_and_one_that_matches_nothing_is_refused() -> None:
    tiny = plan.parse(GOOD, "tiny.toml")
    chosen = tiny.select(["capture/*", "*/ipv4/*"])
    assert [c.id for c in chosen.cells] == [
        c.id for c in tiny.cells if "bridge" not in c.id or "ipv4" in c.id
    ]
    with pytest.raises(Error, match=r"no cell of plan tiny matches 'steer/\*'"):
        tiny.select(["capture/*", "steer/*"])


@pytest.mark.parametrize(
    ("old", "new", "key", "expected"),
    [
        ("blocks = 2", "blocks = 0", "blocks", "an integer of at least 1, found 0"),
        ("blocks = 2", "blocks = true", "blocks", "an integer of at least 1, found True"),
        ("blocks = 2", "", "blocks", "an integer of at least 1, found nothing"),
        ("blocks = 2", "block = 2", "block", "no such key"),
        ("duration_s = 0.5", "duration_s = -1", "duration_s", "seconds from 0.1 to 3600"),
        ("duration_s = 0.5", "duration_s = nan", "duration_s", "seconds from 0.1 to 3600"),
        ('"tiny"', '"../tiny"', "name", "a word of"),
        ('"native-guest"', '"native-gast"', "pair", "one of native-native, native-guest"),
        ('["ipv4", "ipv6"]', "[]", "family", "at least one value"),
        ('["ipv4", "ipv6"]', '["ipv4", "ipv4"]', "family", "each value once"),
        ('["ipv4", "ipv6"]', "[4]", "family", "one of ipv4, ipv6, found 4"),
        ("64", '"64"', "size_bytes", "an integer of at least 1"),
        ("64", "64\nstreams = 0", "streams", "an integer of at least 1"),
        ("64", "64\nsise = 0", "sise", "no such key"),
        ("64", "64\nrate_per_s = -1", "rate_per_s", "an integer of at least 0"),
        (
            '"latency"',
            '"throughput"\nrate_per_s = 9',
            "metric",
            "latency or requests with a rate_per_s",
        ),
        (
            '"capture"',
            '"capture~twin"',
            "datapath",
            "capture~slow, capture~slow-2us",
        ),
        (
            "64",
            '64\nguest = "process"',
            "guest",
            "one of standin, gvisor, linux, osv, found 'process'",
        ),
        ("64", "64\nguests = 251", "guests", "an integer of at least 1 and at most 250"),
        ("64", "64\npods = 0", "pods", "at least 1 and at most 200"),
        ('"native-guest"', '"guest-self"\nguests = 2', "pair", "guest-native with guests"),
        ("blocks = 2", "blocks = 2\nlimit_s = 60", "target_width and limit_s", "one without"),
        ("blocks = 2", "blocks = 2\nlimit_s = 60\ntarget_width = 5", "target_width", "a share"),
        ('"tcp"', '"udp"\n', "size_bytes", "at most 65507 with udp"),
    ],
)
def test_bad_input_is_refused_with_file_and_key(
    old: str, new: str, key: str, expected: str
) -> None:
    text = GOOD.replace(old, new)
    if "udp" in new:
        text = text.replace("64", "65536")
    with pytest.raises(Error) as caught:
        plan.parse(text, "tiny.toml")
    message = str(caught.value)
    assert message.startswith("plan tiny.toml: ")
    assert f"{key}: " in message
    assert expected in message
    assert "\n" not in message


def test_what_is_no_plan_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"plans here: .*quick.*standard") as refused:
        plan.load("nonsuch")
    assert "hosts.example" not in str(refused.value)  # an inventory is no plan
    with pytest.raises(Error, match="not TOML"):
        plan.parse("name = ", "bad.toml")
    with pytest.raises(Error, match="or more"):
        plan.parse('name = "x"\ncells = 3', "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Error, match="not text"):
        plan.load(str(tmp_path / "binary.toml"))
    with pytest.raises(Error, match="stands there twice"):
        plan.parse(GOOD + GOOD[GOOD.index("[[cells]]") :], "twice.toml")


@pytest.mark.parametrize("name", ["quick", "standard", "paper"])
def test_shipped_plans_are_sound(name: str) -> None:
    shipped = plan.load(name)
    assert shipped.name == name
    assert {str(c.family) for c in shipped.cells} == {"ipv4", "ipv6"}
    assert {str(c.metric) for c in shipped.cells} >= {"throughput", "latency", "connections"}
    assert all(Cell.parse(c.id) == c for c in shipped.cells)


@pytest.mark.parametrize(
    ("name", "minutes"),
    [("quick", 3), ("standard", 15), ("paper", 40), ("proof", 50), ("costs", 20)],
)
def test_shipped_plans_fit_their_time(name: str, minutes: float) -> None:
    """0.7 s around a trial, 2.5 s per guest; 0.2 s and 0.1 s with stand-ins; 30 s besides."""
    shipped = plan.load(name)
    ((_, ids),) = schedule.order_blocks(shipped, 1, range(1), set())
    cells = [Cell.parse(id) for id in ids]
    guests_s = 0.0
    for together in schedule.rounds(cells, lambda c: c.pair.guests > 0 and c.guest != "standin"):
        for deployment in {Deployment.of(c) for c in together}:
            guests = sum(name.startswith("guest") for name in deployment.heavy)
            each_s = 0.1 if deployment.guest == "standin" else 2.5
            guests_s += deployment.pods * deployment.guests * guests * each_s
    measured = [c.guest for c in shipped.cells if not c.metric.of_building]
    around_s = sum(0.2 if guest == "standin" else 0.7 for guest in measured)
    trials_s = len(measured) * (shipped.warmup_s + shipped.duration_s)
    block_s = around_s + trials_s + guests_s
    assert shipped.blocks * block_s + 30 < minutes * 60
