"""What people would use instead of `capture` and `steer`, in a pod of one native and two guests.

That each carries what it claims to, that nothing is left of it afterwards, and what is particular
to each. Which promises of `localhost` they break is what the conformance suite shows.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from testbed import datapaths, runtimes
from testbed.campaigns import roles, trial
from testbed.datapaths.interface import Layout
from testbed.host import cgroups, namespaces
from testbed.host.ledger import Owner
from testbed.model import addresses
from testbed.model.addresses import guest_link, guest_mac
from testbed.model.cells import Cell
from testbed.model.cells import Pair as Roles
from testbed.model.errors import Error
from testbed.model.manifest import Manifest
from testbed.model.metrics import Metric
from testbed.model.terms import Family, Runtime, Transport
from testbed.runtimes.interface import Options

from .conftest import Build
from .sockets import (
    MANIFEST,
    PAIRS,
    PORTS,
    Bench,
    Pair,
    localhost,
    transfer,
    workload,
)

pytestmark = pytest.mark.root

FAMILIES = pytest.mark.parametrize("family", Family, ids=str)
TRANSPORTS = pytest.mark.parametrize("transport", Transport, ids=str)
EVERY_PAIR = pytest.mark.parametrize("pair", PAIRS, ids=str)
DATA = os.urandom(2_000_000)
DATAPATHS = ("dnat", "proxy", "broadcast", "tun")
WITH_ALIAS = [name for name in DATAPATHS if datapaths.get(name).layout is not Layout.NO_LOOPBACK]
"""In the others guests reach loopback itself."""


def need(name: str, *transports: Transport) -> None:
    """Skip if the datapath's programs are missing, that some or all transports need."""
    for transport in transports or Transport:
        cell = Cell(name, Roles.NATIVE_GUEST, Family.IPV4, transport, Metric.LATENCY, 64)
        if reason := datapaths.get(name).unsupported(cell):
            pytest.skip(reason)


@pytest.fixture(scope="module", params=DATAPATHS)
def bench(build: Build, request: pytest.FixtureRequest) -> Bench:
    need(request.param)
    return Bench(build(request.param, datapath=request.param))


def dialed(bench: Bench, client: int, family: Family) -> str:
    """What `localhost` is to a workload. Skips families that the datapath does not carry."""
    datapath = bench.pod.datapath
    cell = Cell(datapath.name, Roles.NATIVE_GUEST, family, Transport.TCP, Metric.LATENCY, 64)
    if reason := datapath.unsupported(cell):
        pytest.skip(reason)
    return localhost(0 if datapath.layout is Layout.NO_LOOPBACK else client, family)


@contextmanager
def connected(
    bench: Bench, pair: Pair, family: Family, transport: Transport
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """As `Bench.connected`, with natives that serve at loopback alone."""
    host = "" if pair.server else str(addresses.loopback(family))
    with (
        bench.serve(pair.server, family, transport, host) as listening,
        bench.open(pair.client, family, transport) as near,
    ):
        near.connect((dialed(bench, pair.client, family), PORTS[pair.server]))
        if transport is Transport.UDP:
            near.send(b"hello")
            listening.connect(listening.recvfrom(100)[1])
            yield near, listening
            return
        far, _ = listening.accept()
        with far:
            far.settimeout(near.gettimeout())
            yield near, far


# --- all of them ----------------------------------------------------------------------------


@EVERY_PAIR
@FAMILIES
@TRANSPORTS
def test_both_ends_hear_each_other_by_the_datapath(
    bench: Bench, pair: Pair, family: Family, transport: Transport
) -> None:
    ends = [n or None for n in pair]
    before = bench.pod.attachment.carried(*ends)
    with connected(bench, pair, family, transport) as (near, far):
        near.sendall(b"question")
        assert far.recv(100) == b"question"
        far.sendall(b"answer")
        assert near.recv(100) == b"answer"
    carried = bench.pod.attachment.carried(*ends) - before
    assert carried.packets >= 2
    assert carried.bytes >= len(b"questionanswer")


@EVERY_PAIR
@FAMILIES
def test_a_stream_arrives_whole(bench: Bench, pair: Pair, family: Family) -> None:
    with connected(bench, pair, family, Transport.TCP) as (near, far):
        assert transfer(near, far, DATA) == DATA
        assert transfer(far, near, DATA) == DATA


@FAMILIES
def test_a_link_that_was_lost_is_made_again(bench: Bench, family: Family) -> None:
    pod = bench.pod
    pod.links.link_ip.link("del", ifname="g1")
    assert pod.missing_links() == {"g1"}
    pod.mend()
    for pair in (Pair(0, 1), Pair(1, 0), Pair(2, 1)):
        with connected(bench, pair, family, Transport.TCP) as (near, far):
            near.sendall(b"question")
            assert far.recv(100) == b"question"


@pytest.mark.parametrize("bench", WITH_ALIAS, indirect=True)
def test_no_guest_reaches_loopback_but_by_the_alias(bench: Bench) -> None:
    server = bench.serve(0, Family.IPV4, Transport.UDP, "127.0.0.1")
    server6 = bench.serve(0, Family.IPV6, Transport.UDP, "::1")
    link, link6 = (str(guest_link(family, 1)) for family in Family)
    forged = [
        IP(src=link, dst="127.0.0.1"),
        IP(src="127.0.0.1", dst=localhost(1, Family.IPV4)),
        IPv6(src=link6, dst="::1"),
        IPv6(src="::1", dst=localhost(1, Family.IPV6)),
    ]
    port_mac = bench.pod.links.link_ip.get_links(ifname="g1")[0].get("address")
    frames = [
        bytes(Ether(src=guest_mac(1), dst=mac) / p / UDP(sport=40000, dport=PORTS[0]) / b"forged")
        for p in forged
        for mac in (port_mac, addresses.ALIAS_MAC)
    ]
    with server, server6:
        bench.raw(1, *frames)
        for family, listening in ((Family.IPV4, server), (Family.IPV6, server6)):
            with bench.open(1, family, Transport.UDP) as honest:
                honest.sendto(b"honest", (localhost(1, family), PORTS[0]))
                assert listening.recv(100) == b"honest"


# --- each -----------------------------------------------------------------------------------


def in_pod(netns: str, *command: str) -> str:
    """What a command in the namespace prints."""
    entered = ["nsenter", f"--net={namespaces.NETNS / netns}", *command]
    return subprocess.run(entered, check=True, capture_output=True, text=True).stdout


def test_dnat_leaves_no_rules(build: Build, owner: Owner) -> None:
    need("dnat")
    pod = build("rules", datapath="dnat")
    assert in_pod(pod.netns, "nft", "list", "tables") == f"table inet {pod.netns}\n"
    pod.attachment.detach()
    assert in_pod(pod.netns, "nft", "list", "tables") == ""
    pod.attachment = datapaths.get("dnat").attach(pod.wiring(), owner)


def test_proxies_end_with_their_pod(build: Build) -> None:
    need("proxy")
    pod = build("proxies", datapath="proxy")
    cgroup = cgroups.mount_point() / pod.netns / "proxy"
    pids = (cgroup / "cgroup.procs").read_text().split()
    names = {Path("/proc", pid, "comm").read_text().strip() for pid in pids}
    assert names == {"haproxy", "nginx"}
    pod.attachment.detach()
    assert not cgroup.exists()


@FAMILIES
def test_broadcast_to_three_guests_resets_nobody(build: Build, family: Family) -> None:
    manifest = replace(
        MANIFEST, workloads=(*MANIFEST.workloads, workload("guest3", Runtime.STANDIN, 5003))
    )
    bench = Bench(build(f"three{family}", manifest, "broadcast"))
    before = bench.counted("copied"), bench.counted("unwanted")
    for pair in PAIRS:
        with connected(bench, pair, family, Transport.TCP) as (near, far):
            assert transfer(near, far, DATA) == DATA
    copied, unwanted = bench.counted("copied") - before[0], bench.counted("unwanted") - before[1]
    assert copied / 3 < unwanted < copied * 3

    def resets() -> int:
        lines = [x.split() for x in Path("/proc/thread-self/net/snmp").read_text().splitlines()]
        names, values = (x for x in lines if x[0] == "Tcp:")
        return int(values[names.index("OutRsts")])

    assert [namespaces.inside(bench.netns(n), resets) for n in range(4)] == [0, 0, 0, 0]


# --- tcredirect -----------------------------------------------------------------------------

ONE_GUEST = Manifest(MANIFEST.workloads[:2])


@pytest.fixture(scope="module")
def tied(build: Build) -> Bench:
    return Bench(build("tied", ONE_GUEST, "tcredirect"))


def exchange(bench: Bench, pair: Pair, family: Family) -> None:
    """At the server's own address: there is no `localhost`."""
    to = guest_link(family, pair.server) if pair.server else addresses.pod_link(family)
    with (
        bench.serve(pair.server, family, Transport.TCP) as listening,
        bench.open(pair.client, family, Transport.TCP) as near,
    ):
        near.connect((str(to), PORTS[pair.server]))
        far, _ = listening.accept()
        with far:
            assert transfer(near, far, DATA) == DATA


@FAMILIES
@pytest.mark.parametrize("pair", [Pair(0, 1), Pair(1, 0)], ids=str)
def test_tied_links_carry_all_there_is(tied: Bench, pair: Pair, family: Family) -> None:
    ends = [n or None for n in pair]
    before = tied.pod.attachment.carried(*ends)
    exchange(tied, pair, family)
    assert (tied.pod.attachment.carried(*ends) - before).bytes > len(DATA)
    assert "g1" not in in_pod(tied.pod.links.link_netns, "bridge", "link")


@pytest.mark.parametrize("lost", ["g1", "pod"])
def test_links_that_were_lost_are_tied_again(tied: Bench, lost: str) -> None:
    pod = tied.pod
    pod.links.link_ip.link("del", ifname=lost)
    pod.mend()
    exchange(tied, Pair(0, 1), Family.IPV4)


def test_two_guests_cannot_be_tied_to_one_veth(build: Build) -> None:
    with pytest.raises(Error, match="has 2 guests, and one veth"):
        build("two", MANIFEST, "tcredirect")


# --- passt ----------------------------------------------------------------------------------


def test_stand_ins_have_no_frames_for_passt(build: Build) -> None:
    with pytest.raises(Error, match="virtual machines only"):
        build("standins", datapath="passt")


def test_passt_carries_a_virtual_machine_both_ways_also_the_next_one(build: Build) -> None:
    need("passt", Transport.TCP)
    prepared = {r: runtimes.prepare(r, Options()) for r in (Runtime.PROCESS, Runtime.LINUX)}
    pairs = (Roles.NATIVE_GUEST, Roles.GUEST_NATIVE)
    pod = build("passt", roles.manifest(pairs, Runtime.LINUX), "passt", prepared)
    pod.start()

    def fault(cell: Cell) -> str | None:
        """In a short trial a busy machine may get nothing done: then a longer one."""
        for duration_s in (0.2, 2.0):
            reason = trial.run(cell, [pod], prepared[Runtime.LINUX], 0.05, duration_s).reason
            if reason is None:
                break
        return reason

    cells = [
        Cell("passt", pair, family, transport, Metric.LATENCY, 64)
        for pair in pairs
        for family in Family
        for transport in Transport
    ]
    supported = [cell for cell in cells if not pod.datapath.unsupported(cell)]
    assert len(supported) == 6
    assert [fault(cell) for cell in supported] == [None] * 6
    pod.stop_workload("guest1")
    pod.start_workload("guest1")
    pod.wait_ready("guest1")
    assert fault(supported[0]) is None


# --- tun ------------------------------------------------------------------------------------


def test_a_guest_without_loopback_lacks_what_needs_it(build: Build) -> None:
    need("tun", Transport.TCP)
    bench = Bench(build("lacking", datapath="tun"))
    with bench.open(1, Family.IPV6, Transport.TCP) as own:
        with pytest.raises(OSError, match="Cannot assign requested address"):
            own.bind(("::1", 0))
    with bench.open(1, Family.IPV4, Transport.TCP) as own:
        with pytest.raises(OSError, match="Cannot assign requested address"):
            own.bind(("127.0.0.1", 0))
