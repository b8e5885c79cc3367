"""Cells and trials survive being written down; the address plan does not collide."""

from __future__ import annotations

import json
from ipaddress import ip_interface

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.model import addresses
from testbed.model.cells import Cell, Pair
from testbed.model.errors import Error
from testbed.model.metrics import Metric
from testbed.model.terms import Family, Transport
from testbed.model.trials import Status, Trial

cells = st.builds(
    Cell,
    datapath=st.from_regex(r"[a-z]{1,12}", fullmatch=True),
    pair=st.sampled_from(Pair),
    family=st.sampled_from(Family),
    transport=st.sampled_from(Transport),
    metric=st.sampled_from(Metric),
    size_bytes=st.integers(1, 1 << 20),
    streams=st.integers(1, 64),
)
finite = st.floats(allow_nan=False, allow_infinity=False)
trials = st.builds(
    Trial,
    cell=cells.map(lambda c: c.id),
    block=st.integers(0, 99),
    order=st.integers(0, 99),
    status=st.sampled_from(Status),
    reason=st.none() | st.text(),
    value=st.none() | finite,
    duration_s=st.none() | finite,
    payload_bytes=st.integers(0, 1 << 60),
    histogram_us=st.lists(st.tuples(finite, st.integers(1, 1 << 40))).map(tuple),
    dialed=st.none() | st.text(),
    carried=st.dictionaries(st.text(), st.integers()),
    machine=st.dictionaries(st.text(), finite),
)


@given(cells)
def test_a_cell_is_the_cell_of_its_id(cell: Cell) -> None:
    assert Cell.parse(cell.id) == cell


@pytest.mark.parametrize(
    "id", ["", "capture", "a/b/ipv4/tcp/latency/64x1", "a/native-guest/ipv4/tcp/latency/64"]
)
def test_what_is_no_cell_is_refused(id: str) -> None:
    with pytest.raises(Error, match="not a cell"):
        Cell.parse(id)


@given(trials)
def test_a_trial_survives_a_line_of_json(trial: Trial) -> None:
    line = json.dumps(trial.as_json())
    assert "\n" not in line
    assert Trial.from_json(json.loads(line)) == trial


@pytest.mark.parametrize("family", list(Family))
def test_no_two_roles_share_an_address_and_all_but_loopback_views_are_on_the_link(
    family: Family,
) -> None:
    numbers = range(1, addresses.MAX_GUESTS + 1)
    single = [addresses.alias(family), addresses.native_source(family), addresses.pod_link(family)]
    views = [
        view(family, n) for view in (addresses.guest_link, addresses.guest_view) for n in numbers
    ]
    natives = [addresses.native_view(family, n) for n in numbers]
    everything = [addresses.loopback(family), *single, *views, *natives]
    assert len(set(everything)) == len(everything)
    link = ip_interface(f"{addresses.alias(family)}/{addresses.LINK_PREFIX[family]}").network
    assert all(a in link for a in single + views)
    assert not any(a in link for a in natives)


def test_a_label_names_the_runtimes_of_a_pair() -> None:
    assert [pair.label("osv") for pair in Pair] == [
        "process→process",
        "process→osv",
        "osv→process",
        "osv→osv",
        "osv→itself",
        "wasm→osv",
        "osv→wasm",
        "wasm→container",
        "container→osv",
        "osv→container",
    ]
    assert [pair.guests for pair in Pair] == [0, 1, 1, 2, 1, 1, 1, 0, 1, 1]
    assert Pair.GUEST_WASM.shape is Pair.GUEST_NATIVE
