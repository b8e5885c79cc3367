"""Whole cells with guests: stand-ins, the best guest that is here, gVisor, OSv's kernels by flavor.

The traffic agent dials the name `localhost` from within, so the hosts patch is in use: without it
the same cell fails.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from testbed import datapaths, runtimes
from testbed.campaigns import protocol, roles, trial, worker
from testbed.host.facts import slowness
from testbed.host.ledger import Owner
from testbed.images import kernels
from testbed.model import addresses
from testbed.model.cells import Cell, Pair
from testbed.model.errors import Error
from testbed.model.metrics import Metric
from testbed.model.terms import Family, Runtime, Transport
from testbed.model.trials import Status
from testbed.pods.pod import Pod
from testbed.pods.reconciler import Reconciler
from testbed.runtimes.interface import Options, Prepared
from testbed.runtimes.osv import Osv
from testbed.runtimes.osv import prepare as prepare_osv

from .sockets import Bench, localhost, wait_until

pytestmark = pytest.mark.root

FAMILIES = pytest.mark.parametrize("family", Family, ids=str)
GUESTS_PORT = roles.port("guest1")
PAIRS = [pair for pair in Pair if pair is pair.shape]
GUESTS_PAIRS = (Pair.NATIVE_GUEST, Pair.GUEST_NATIVE, Pair.GUEST_GUEST, Pair.GUEST_SELF)
WARMUP_S, DURATIONS_S = 0.05, (0.1, 1.0, 2.0)

Start = Callable[[str, Prepared, Collection[Pair]], Pod]


@pytest.fixture(scope="module")
def start(
    owner: Owner, prepared: dict[Runtime, Prepared], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Start]:
    """Builds pods as the worker does, with workloads that are ready."""
    consoles = tmp_path_factory.mktemp("consoles")
    with ExitStack() as stack:

        def start(name: str, guest: Prepared, pairs: Collection[Pair]) -> Pod:
            runtime = guest.description.runtime
            kinds = {**prepared, runtime: guest}
            pod = Pod(
                owner,
                name,
                roles.manifest(pairs, runtime),
                datapaths.get("capture"),
                kinds,
                consoles / name,
            )
            stack.enter_context(pod).start()
            stack.enter_context(Reconciler(pod))
            return pod

        yield start


def cell(pair: Pair, family: Family, transport: Transport, metric: Metric) -> Cell:
    size = 64 if metric is not Metric.THROUGHPUT else 1400
    return Cell("capture", pair, family, transport, metric, size)


def measured(cell: Cell, pod: Pod, guest: Prepared) -> str:
    """`ok`, or why it is not. In a short trial a busy machine may get nothing done: then longer."""
    for duration_s in DURATIONS_S:
        result = trial.run(cell, [pod], guest, WARMUP_S, duration_s)
        if result.status is Status.OK:
            return "ok"
    return str(result.reason)


# --- stand-ins ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def standins(start: Start, prepared: dict[Runtime, Prepared]) -> Pod:
    return start("standins", prepared[Runtime.STANDIN], PAIRS)


KINDS = [
    (transport, metric)
    for transport in Transport
    for metric in Metric
    if (transport, metric) != (Transport.UDP, Metric.CONNECTIONS)
]


@pytest.mark.parametrize(("transport", "metric"), KINDS)
@FAMILIES
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_cell_of_every_kind_is_measured(
    standins: Pod,
    prepared: dict[Runtime, Prepared],
    pair: Pair,
    family: Family,
    transport: Transport,
    metric: Metric,
) -> None:
    measure = cell(pair, family, transport, metric)
    assert measured(measure, standins, prepared[Runtime.STANDIN]) == "ok"


# --- guests with a stack of their own --------------------------------------------------


class Guests(NamedTuple):
    """Two guests of a kind that has a network stack of its own, and a native."""

    kind: Prepared
    pod: Pod


@pytest.fixture(scope="module")
def best() -> Prepared:
    guest, why = runtimes.choose("best", Options())
    assert guest.description.runtime is not Runtime.STANDIN, why
    return guest


@pytest.fixture(scope="module")
def gvisor() -> Prepared:
    return runtimes.prepare(Runtime.GVISOR, Options())


@pytest.fixture(scope="module", params=["best", "gvisor"])
def guests(start: Start, request: pytest.FixtureRequest) -> Guests:
    kind = request.getfixturevalue(request.param)
    return Guests(kind, start(request.param, kind, GUESTS_PAIRS))


def osv(flavor: str) -> Osv:
    """The guest of a cached kernel."""
    kernel = kernels.find_osv(flavor=flavor, download=False)
    if kernel is None:
        pytest.skip(f"no OSv kernel of flavor {flavor} in the cache")
    return prepare_osv(Options(osv_kernel=kernel.path))


@FAMILIES
@pytest.mark.parametrize("pair", GUESTS_PAIRS, ids=str)
def test_a_guest_runs_whole_cells(guests: Guests, pair: Pair, family: Family) -> None:
    if family not in guests.kind.families:
        pytest.skip(f"{guests.kind.description.kernel} has no {family}")
    for transport, metric in KINDS:
        assert measured(cell(pair, family, transport, metric), guests.pod, guests.kind) == "ok"


@pytest.mark.parametrize("flavor", kernels.FLAVORS)
def test_each_osv_kernel_runs_cells_of_the_families_it_has(start: Start, flavor: str) -> None:
    guest = osv(flavor)
    pod = start(f"osv-{flavor}", guest, {Pair.NATIVE_GUEST, Pair.GUEST_NATIVE})
    for pair in (Pair.NATIVE_GUEST, Pair.GUEST_NATIVE):
        for family in guest.families:
            measure = cell(pair, family, Transport.TCP, Metric.LATENCY)
            assert measured(measure, pod, guest) == "ok"


def test_cells_of_a_family_that_the_kernel_lacks_are_unsupported_with_the_reason(
    tmp_path: Path,
) -> None:
    guest = osv("master")
    lacking = cell(Pair.NATIVE_GUEST, Family.IPV6, Transport.TCP, Metric.LATENCY).id
    job = protocol.Job(
        ((0, (lacking,)),),
        0,
        DURATIONS_S[0],
        "osv",
        str(tmp_path),
        osv_kernel=str(guest.kernel.path),
    )
    (event,) = (e for e in worker.work(job) if e["event"] == "trial")
    assert event["trial"]["status"] == "unsupported"
    assert event["trial"]["reason"] == (
        f"the guest's kernel ({guest.description.kernel}) has no IPv6"
    )


# --- the hosts patch ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["standin", "best", "gvisor"])
def test_without_the_hosts_patch_the_same_cells_fail(
    start: Start, kind: str, request: pytest.FixtureRequest
) -> None:
    best = kind == "best"
    runtime = request.getfixturevalue("best").description.runtime if best else Runtime(kind)
    stock = runtimes.prepare(runtime, Options(hosts_patch=False))
    pod = start(f"stock-{kind}", stock, {Pair.NATIVE_GUEST, Pair.GUEST_NATIVE})
    for family in stock.families:
        dialing = cell(Pair.GUEST_NATIVE, family, Transport.TCP, Metric.LATENCY)
        refused = trial.run(dialing, [pod], stock, WARMUP_S, DURATIONS_S[0])
        assert refused.status is Status.FAILED
        assert "refused" in str(refused.reason)
        dialed = cell(Pair.NATIVE_GUEST, family, Transport.TCP, Metric.LATENCY)
        assert measured(dialed, pod, stock) == "ok"


# --- exceptions -----------------------------------------------------------------------------


def test_peers_of_a_guest_that_is_killed_get_an_error_and_the_next_one_works(
    guests: Guests,
) -> None:
    """It sends neither FIN nor RST."""
    pod = guests.pod
    connected = []
    with pod.agent("guest1") as agent:
        for family in guests.kind.families:
            agent.serve(Transport.TCP, family, GUESTS_PORT)
            client = Bench(pod).open(0, family, Transport.TCP)
            client.connect((localhost(0, family), GUESTS_PORT))
            connected.append(client)
        os.kill(pod.processes["guest1"].pid, signal.SIGKILL)
        began = time.monotonic()
        for client in connected:
            with client, pytest.raises(ConnectionAbortedError):
                client.recv(100)
        assert time.monotonic() - began < slowness()
    with pod.agent("guest2") as other:
        for family in guests.kind.families:
            to = str(addresses.alias(family))
            with pytest.raises(Error, match="Connection refused"):
                other.run(Transport.TCP, family, to, GUESTS_PORT, "rr", 1, bytes=1)
    works_both_ways(guests)


def test_a_guest_whose_link_vanishes_gets_another_one_and_works(guests: Guests) -> None:
    pod = guests.pod
    pod.revive()
    before = pod.processes["guest1"].pid
    pod.links.link_ip.link("del", ifname="g1")
    wait_until(
        lambda: "guest1" in pod.processes and pod.processes["guest1"].pid != before, "another guest"
    )
    pod.wait_ready("guest1")
    works_both_ways(guests)


def works_both_ways(guests: Guests) -> None:
    for pair in (Pair.NATIVE_GUEST, Pair.GUEST_NATIVE):
        for family in guests.kind.families:
            measure = cell(pair, family, Transport.TCP, Metric.LATENCY)
            assert measured(measure, guests.pod, guests.kind) == "ok"
