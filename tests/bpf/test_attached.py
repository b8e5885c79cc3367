"""`capture` at work between namespaces: a pod, two stand-ins for guests, the node's bridge.

    pod: 6000, 6001        guest 1: 5001        guest 200: 5002

The pod has no other workloads than these tests' own sockets, opened from inside the namespaces.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
from pyroute2 import IPRoute
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, Ether

from testbed import bpf
from testbed.datapaths import get
from testbed.datapaths.interface import Attachment
from testbed.host import namespaces
from testbed.host.ledger import Owner
from testbed.model import addresses
from testbed.model.addresses import guest_link, guest_mac
from testbed.model.errors import Error
from testbed.model.terms import Family, Transport
from tests.children import ending
from tests.integration.sockets import MTU_DISCOVER, PMTUDISC_PROBE

from .bed import OWNERS, Bed, Echo, ask, localhost, open_socket, seen

pytestmark = pytest.mark.root

FAMILIES = pytest.mark.parametrize("family", Family)
TRANSPORTS = pytest.mark.parametrize("transport", Transport)
LARGE = os.urandom(3_000_000)


class Pod(NamedTuple):
    bed: Bed
    attachment: Attachment


@pytest.fixture(scope="module")
def owner() -> Iterator[Owner]:
    with Owner() as owner:
        yield owner


@pytest.fixture(scope="module")
def pod(owner: Owner) -> Iterator[Pod]:
    with closing(Bed(owner, "a")) as bed:
        attachment = get("capture").attach(bed.wiring, owner)
        yield Pod(bed, attachment)
        attachment.detach()


PAIRS = [
    (None, 1, 5001),
    (None, 200, 5002),
    (1, None, 6000),
    (1, 200, 5002),
    (200, 1, 5001),
    (1, 1, 5001),
]


# --- what works -----------------------------------------------------------------------------


@FAMILIES
@TRANSPORTS
@pytest.mark.parametrize(("client", "server", "port"), PAIRS)
def test_every_pair_reaches_each_other_at_localhost_and_is_counted(
    pod: Pod,
    family: Family,
    transport: Transport,
    client: int | None,
    server: int | None,
    port: int,
) -> None:
    bed, attachment = pod
    before = attachment.carried(client, server)
    message = LARGE if transport is Transport.TCP else b"datagram"
    with closing(Echo(bed.netns(server), family, transport, port)):
        dialing = open_socket(bed.netns(client), family, transport)
        peer = ask(dialing, (localhost(client, family), port), message)
    assert peer == str(seen(family, client, server))
    carried = attachment.carried(client, server) - before
    assert carried.packets >= 2
    assert carried.bytes >= 2 * len(message)


@FAMILIES
@pytest.mark.parametrize(("client", "server", "port"), [p for p in PAIRS if p[0] is not None])
def test_datagrams_in_fragments_arrive(
    pod: Pod, family: Family, client: int, server: int | None, port: int
) -> None:
    with closing(Echo(pod.bed.netns(server), family, Transport.UDP, port)):
        dialing = open_socket(pod.bed.netns(client), family, Transport.UDP)
        ask(dialing, (localhost(client, family), port), bytes(9000))


@FAMILIES
def test_a_datagram_of_a_native_that_ignores_the_mtu_is_counted(pod: Pod, family: Family) -> None:
    bed, attachment = pod
    before = attachment.counters()["too_big"]
    with open_socket(bed.pod, family, Transport.UDP) as client:
        client.setsockopt(*MTU_DISCOVER[family], PMTUDISC_PROBE)
        client.sendto(bytes(9000), (localhost(None, family), 5001))
    assert (attachment.counters()["too_big"] - before).packets == 1


@FAMILIES
@TRANSPORTS
@pytest.mark.parametrize(("client", "port"), [(None, 5001), (1, 6000), (1, 5002), (1, 5001)])
def test_a_port_that_nobody_serves_refuses_at_once(
    pod: Pod, family: Family, transport: Transport, client: int | None, port: int
) -> None:
    client_socket = open_socket(pod.bed.netns(client), family, transport)
    with pytest.raises(ConnectionRefusedError):
        ask(client_socket, (localhost(client, family), port))


@FAMILIES
@TRANSPORTS
def test_natives_reach_guests_from_and_at_other_addresses_of_the_pod(
    pod: Pod, family: Family, transport: Transport
) -> None:
    another = "127.0.0.5" if family is Family.IPV4 else str(addresses.pod_link(family))
    usual = localhost(None, family)
    with closing(Echo(pod.bed.guests[1], family, transport, 5001)):
        for bound, dialed in ((another, usual), (usual, another)):
            client = open_socket(pod.bed.pod, family, transport)
            client.bind((bound, 0))
            assert ask(client, (dialed, 5001)) == str(addresses.native_source_odd(family))


@TRANSPORTS
def test_dual_stack_natives_meet_guests_by_mapped_addresses(pod: Pod, transport: Transport) -> None:
    with closing(Echo(pod.bed.guests[1], Family.IPV4, transport, 5001)):
        client = open_socket(pod.bed.pod, Family.IPV6, transport)
        peer = ask(client, ("::ffff:127.0.0.1", 5001))
    assert peer == str(addresses.native_source(Family.IPV4))


@TRANSPORTS
def test_native_to_native_is_the_kernels_own(pod: Pod, transport: Transport) -> None:
    before = pod.attachment.carried(1, None), pod.attachment.carried(None, 1)
    with closing(Echo(pod.bed.pod, Family.IPV4, transport, 6001)):
        client = open_socket(pod.bed.pod, Family.IPV4, transport)
        assert ask(client, ("127.0.0.1", 6001)) == "127.0.0.1"
    assert before == (pod.attachment.carried(1, None), pod.attachment.carried(None, 1))


def test_no_checksum_was_ever_wrong(pod: Pod) -> None:
    for netns in (pod.bed.pod, *pod.bed.guests.values()):

        def counted() -> str:
            return "".join(Path("/proc/thread-self/net", f).read_text() for f in ("snmp", "snmp6"))

        text = namespaces.inside(netns, counted)
        assert re.findall(r"^(\w+InCsumErrors)\s+([1-9]\d*)", text, re.MULTILINE) == []
        for header, values in re.findall(r"^(\w+: [A-Z].*)\n\w+: (\d.*)", text, re.MULTILINE):
            row = dict(zip(header.split()[1:], values.split(), strict=True))
            assert row.get("InCsumErrors", "0") == "0"


# --- names ----------------------------------------------------------------------------------

SHOW_PEER = """
import os, socket, sys
open(sys.argv[1], "w").write("0")
host = sys.argv[2]
family = socket.AF_INET6 if ":" in host else socket.AF_INET
server = socket.create_server((host, 6000), family=family, dualstack_ipv6=host == "::")
print("ready", flush=True)
client, peer = server.accept()
print(peer[0], client.getpeername()[0], client.getsockname()[0])
"""


@pytest.mark.parametrize(
    ("listens", "family", "shown"),
    [
        ("127.0.0.1", Family.IPV4, "127.0.0.1"),
        ("::1", Family.IPV6, "::1"),
        ("::", Family.IPV4, "::ffff:127.0.0.1"),
        ("::", Family.IPV6, "::1"),
    ],
)
def test_natives_see_tcp_clients_of_guests_as_localhost(
    pod: Pod, listens: str, family: Family, shown: str
) -> None:
    command = [
        "nsenter",
        f"--net={namespaces.NETNS / pod.bed.pod}",
        "python3",
        "-c",
        SHOW_PEER,
        str(pod.bed.cgroup / "cgroup.procs"),
        listens,
    ]
    with ending(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) as server:
        assert server.stdout
        assert server.stdout.readline() == "ready\n"
        with open_socket(pod.bed.guests[1], family, Transport.TCP) as client:
            client.connect((localhost(1, family), 6000))
            assert server.stdout.read().split() == [shown] * 3


# --- ownership ------------------------------------------------------------------------------


@TRANSPORTS
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "127.0.0.9", "::1", "::"])
def test_native_gets_no_port_that_a_guest_owns(
    pod: Pod, transport: Transport, address: str
) -> None:
    family = Family.IPV6 if ":" in address else Family.IPV4
    for port in (5001, 5002):
        for option in (None, socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            with open_socket(pod.bed.pod, family, transport) as native:
                if option is not None:
                    native.setsockopt(socket.SOL_SOCKET, option, 1)
                with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
                    native.bind((address, port))


def test_guests_ports_are_out_of_the_ephemeral_range(pod: Pod) -> None:
    path = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")
    assert namespaces.inside(pod.bed.pod, path.read_text) == "5001-5002\n"


def test_a_port_that_a_native_has_already_is_an_error_that_names_it(owner: Owner) -> None:
    with owner.part() as part, closing(Bed(part, "taken")) as bed:
        with (
            closing(Echo(bed.pod, Family.IPV4, Transport.TCP, 5001)),
            pytest.raises(Error, match="tcp port 5001 is guest 1's"),
        ):
            get("capture").attach(bed.wiring, part)
        get("capture").attach(bed.wiring, part).detach()


# --- safety ---------------------------------------------------------------------------------


def test_the_bridge_brings_nobody_to_loopback(pod: Pod) -> None:
    """Frames made by the host's end of the bridge, as anybody on it could."""
    bed, attachment = pod
    before = attachment.counters()["outside"].packets

    alias, native_source, pod_link = (
        str(f(Family.IPV4)) for f in (addresses.alias, addresses.native_source, addresses.pod_link)
    )
    native_view, link = str(addresses.native_view(Family.IPV4, 1)), str(guest_link(Family.IPV4, 1))
    frames = [
        bytes(Ether(src="02:00:00:00:00:99", dst=mac) / IP(src=src, dst=dst) / UDP(dport=6001))
        for src in (alias, native_source, native_view)
        for mac, dst in (
            (addresses.POD_MAC, alias),
            (addresses.POD_MAC, pod_link),
            (guest_mac(1), link),
        )
    ]

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind(("br", 0))
            for frame in frames:
                raw.send(frame)

    with open_socket(bed.pod, Family.IPV4, Transport.UDP) as server:
        server.bind(("", 6001))
        namespaces.inside(bed.links, send)
        assert attachment.counters()["outside"].packets >= before + len(frames)
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.recv(100)


def test_frames_of_any_length_from_a_guest_do_no_harm(pod: Pod) -> None:
    """Shorter ones than BPF_PROG_TEST_RUN takes: down to the bare Ethernet header."""
    bed, attachment = pod

    header = Ether(src=guest_mac(1), dst=addresses.ALIAS_MAC)
    wholes = [
        bytes(header / ip(src=str(guest_link(family, 1)), dst=str(addresses.alias(family))) / TCP())
        for ip, family in ((IP, Family.IPV4), (IPv6, Family.IPV6))
    ]
    wholes.append(bytes(header / ARP()))

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind(("eth0", 0))
            for whole in wholes:
                for length in range(14, len(whole)):
                    raw.send(whole[:length])

    before = attachment.counters()
    namespaces.inside(bed.guests[1], send)
    after = attachment.counters()
    dropped = sum((after[r] - before[r]).packets for r in ("truncated", "unhandled", "spoofed"))
    assert dropped == sum(len(whole) - 14 for whole in wholes)


def test_pods_do_not_meet(pod: Pod, owner: Owner) -> None:
    """Two pods with the same addresses and ports on one host."""
    with owner.part() as part, closing(Bed(part, "b")) as other:
        attachment = get("capture").attach(other.wiring, part)
        with closing(Echo(pod.bed.guests[1], Family.IPV4, Transport.TCP, 5001)):
            with pytest.raises(ConnectionRefusedError):
                ask(open_socket(other.pod, Family.IPV4, Transport.TCP), ("127.0.0.1", 5001))
            ask(open_socket(pod.bed.pod, Family.IPV4, Transport.TCP), ("127.0.0.1", 5001))
        attachment.detach()


# --- coming and going -----------------------------------------------------------------------


def test_a_guest_whose_link_was_replaced_is_reached_again(pod: Pod) -> None:
    bed, attachment = pod
    before = attachment.carried(None, 1)
    bed.unlink_guest(1)
    new = bed.link_guest(1)
    attachment.rewire(replace(bed.wiring, ports=(new, bed.wiring.ports[1])))
    with closing(Echo(bed.guests[1], Family.IPV4, Transport.TCP, 5001)):
        ask(open_socket(bed.pod, Family.IPV4, Transport.TCP), ("127.0.0.1", 5001))
    assert (attachment.carried(None, 1) - before).packets > 0


@FAMILIES
@pytest.mark.parametrize("link", ["up", "down"])
def test_a_guest_that_waits_for_one_that_ended_is_refused(
    pod: Pod, family: Family, link: Literal["up", "down"]
) -> None:
    """As if the machine had been killed: its link goes, and it says no word.

    If the link of the one that waits is down just then, the first word to it is lost.
    """
    bed, attachment = pod
    with (
        open_socket(bed.guests[1], family, Transport.TCP) as server,
        open_socket(bed.guests[200], family, Transport.TCP) as client,
    ):
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", 5001))
        server.listen()
        client.connect((localhost(200, family), 5001))
        with server.accept()[0] as accepted:
            client.sendall(b"request")
            assert accepted.recv(7) == b"request"
            bed.unlink_guest(1)
            index = bed.wiring.ports[1].ifindex
            with IPRoute(netns=bed.links) as ip:
                ip.link("set", index=index, state=link)
                attachment.guest_ended(1)
                time.sleep(0.1)
                ip.link("set", index=index, state="up")
            with pytest.raises(ConnectionResetError):
                client.recv(1)
    new = bed.link_guest(1)
    attachment.rewire(replace(bed.wiring, ports=(new, bed.wiring.ports[1])))
    with open_socket(bed.guests[1], family, Transport.UDP) as up_again:
        up_again.sendto(b"", (localhost(1, family), 6000))


def test_detaching_leaves_nothing(owner: Owner) -> None:
    def settings() -> list[str]:
        with IPRoute() as ip:
            routes = [str(r.get("attrs")) for r in ip.get_routes(table=255)]
            qdiscs = [q.get("TCA_KIND") for q in ip.get_qdiscs()]
        names = ("conf/lo/route_localnet", "conf/lo/accept_local", "ip_local_reserved_ports")
        sysctls = [Path("/proc/sys/net/ipv4", name).read_text() for name in names]
        return [*sysctls, *sorted(routes), *qdiscs]

    with owner.part() as part, closing(Bed(part, "c")) as bed:
        before = {ns: namespaces.inside(ns, settings) for ns in (bed.pod, bed.links)}
        pins = set(bpf.PINS.rglob("*"))
        attachment = get("capture").attach(bed.wiring, part)
        assert {ns: namespaces.inside(ns, settings) for ns in before} != before
        attachment.detach()
        assert {ns: namespaces.inside(ns, settings) for ns in before} == before
        assert set(bpf.PINS.rglob("*")) == pins
        with ExitStack() as stack:
            for _, port in OWNERS:
                native = open_socket(bed.pod, Family.IPV4, Transport.TCP)
                stack.enter_context(native).setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                native.bind(("127.0.0.1", port))
