"""Who owns a port of a pod: the manifest says, and nobody gets around it."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from testbed import bpf, datapaths
from testbed.host import namespaces
from testbed.host.ledger import ROOT, Owner
from testbed.model.addresses import guest_link, native_source
from testbed.model.errors import Error
from testbed.model.manifest import Manifest, Workload
from testbed.model.terms import Family, Runtime, Transport
from testbed.pods.pod import Pod

from .conftest import Build
from .sockets import PORTS, Bench, workload

pytestmark = pytest.mark.root

TRANSPORTS = pytest.mark.parametrize("transport", Transport, ids=str)


@TRANSPORTS
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "127.7.7.7", "::1", "::"])
@pytest.mark.parametrize("option", [None, socket.SO_REUSEADDR, socket.SO_REUSEPORT])
def test_native_cannot_bind_a_port_that_a_guest_owns(
    bench: Bench, transport: Transport, address: str, option: int | None
) -> None:
    family = Family.IPV6 if ":" in address else Family.IPV4
    for guest in (1, 2):
        with bench.open(0, family, transport) as native:
            if option is not None:
                native.setsockopt(socket.SOL_SOCKET, option, 1)
            with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
                native.bind((address, PORTS[guest]))


@TRANSPORTS
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_native_cannot_bind_a_guests_port_at_the_device_lo(
    bench: Bench, transport: Transport, address: str
) -> None:
    family = Family.IPV6 if ":" in address else Family.IPV4
    with bench.open(0, family, transport) as native:
        native.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
            native.bind((address, PORTS[1]))


@pytest.mark.parametrize("family", Family, ids=str)
def test_what_a_guest_sends_to_its_own_port_at_lo_is_refused(bench: Bench, family: Family) -> None:
    """Our sockets that hold the port there do not take it."""
    with bench.open(1, family, Transport.UDP) as guest:
        guest.bind((str(guest_link(family, 1)), PORTS[1]))
        guest.connect((str(native_source(family)), PORTS[1]))
        guest.send(b"!")
        with pytest.raises(ConnectionRefusedError):
            guest.recv(1)


@TRANSPORTS
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_native_can_bind_its_own_port(bench: Bench, transport: Transport, address: str) -> None:
    family = Family.IPV6 if ":" in address else Family.IPV4
    with bench.open(0, family, transport) as native:
        native.bind((address, PORTS[0]))


def test_no_native_gets_a_guests_port_as_an_ephemeral_one(bench: Bench) -> None:
    """With a range that holds little else, still."""
    span = Path("/proc/sys/net/ipv4/ip_local_port_range")
    before = namespaces.inside(bench.pod.netns, span.read_text)
    namespaces.set_sysctls(bench.pod.netns, {"net/ipv4/ip_local_port_range": "5000 5003"})
    try:
        taken = [bench.open(0, Family.IPV4, Transport.UDP) for _ in range(2)]
        for client in taken:
            client.bind(("127.0.0.1", 0))
        with bench.open(0, Family.IPV4, Transport.UDP) as one_more:
            with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
                one_more.bind(("127.0.0.1", 0))
        assert {client.getsockname()[1] for client in taken} == {5000, 5003}
    finally:
        for client in taken:
            client.close()
        namespaces.set_sysctls(bench.pod.netns, {"net/ipv4/ip_local_port_range": before})


@pytest.mark.parametrize("other", [Runtime.PROCESS, Runtime.STANDIN], ids=str)
def test_two_workloads_that_claim_one_port_are_refused_before_anything_is_built(
    other: Runtime,
) -> None:
    ledgers = set(ROOT.glob("*.ledger"))
    with pytest.raises(Error, match=r"'one' and 'two' both claim tcp port 5001"):
        Manifest((workload("one", Runtime.STANDIN, 5001), workload("two", other, 5001)))
    assert set(ROOT.glob("*.ledger")) == ledgers


def test_tcp_and_udp_of_one_port_may_have_different_owners() -> None:
    manifest = Manifest(tuple(Workload(t, Runtime.STANDIN, ((t, 5001),)) for t in Transport))
    assert manifest.owners == {(Transport.TCP, 5001): 1, (Transport.UDP, 5001): 2}


@TRANSPORTS
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_a_port_that_a_native_has_already_is_named_and_nothing_is_left(
    plain: Pod, owner: Owner, transport: Transport, address: str
) -> None:
    pins = set(bpf.PINS.rglob("*"))
    with Bench(plain).open(0, Family.IPV6 if ":" in address else Family.IPV4, transport) as native:
        native.bind((address, PORTS[1]))
        with pytest.raises(Error, match=f"{plain.name}: {transport} port {PORTS[1]} is guest 1's"):
            datapaths.get("capture").attach(plain.wiring(), owner.part())
    assert set(bpf.PINS.rglob("*")) == pins
    datapaths.get("capture").attach(plain.wiring(), owner.part()).detach()


def test_many_sockets_hide_no_port_that_a_native_has(plain: Pod, owner: Owner) -> None:
    """Of more than ten, older kernels look at the unspecified addresses only."""
    with ExitStack() as opened:
        for last in range(1, 13):
            native = opened.enter_context(Bench(plain).open(0, Family.IPV4, Transport.UDP))
            native.bind((f"127.0.0.{last}", PORTS[1]))
        with pytest.raises(Error, match=f"udp port {PORTS[1]} is guest 1's"):
            datapaths.get("capture").attach(plain.wiring(), owner.part())


@pytest.fixture(scope="module")
def plain(build: Build) -> Pod:
    """A pod with the links of `capture`, that has no datapath yet which would hold ports."""
    return build("plain", datapath="bridge")
