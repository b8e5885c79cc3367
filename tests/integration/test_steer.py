"""`steer` with real sockets: natives of the pod's cgroup go past `lo`, all others by it.

A socket belongs to the cgroup that its process was in when it was opened: the tests join the pod's
for that moment, or stay out of it to be a process from elsewhere.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from testbed import bpf, datapaths
from testbed.host import cgroups, namespaces
from testbed.host.ledger import Owner
from testbed.model import addresses
from testbed.model.errors import Error
from testbed.model.manifest import Manifest
from testbed.model.terms import Family, Runtime, Transport
from testbed.pods.pod import Pod
from testbed.runtimes.interface import Prepared

from .conftest import Build
from .sockets import (
    MANIFEST,
    NOBODYS_PORT,
    PAIRS,
    PORTS,
    Bench,
    Pair,
    localhost,
    transfer,
    wait_until,
)

pytestmark = pytest.mark.root

FAMILIES = pytest.mark.parametrize("family", Family, ids=str)
IP_PKTINFO = 8
TRANSPORTS = pytest.mark.parametrize("transport", Transport, ids=str)


@contextmanager
def member(cgroup: Path) -> Iterator[None]:
    """Be in a cgroup for a moment."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next(line.removeprefix("0::/") for line in lines if line.startswith("0::"))
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        (cgroups.mount_point() / own / "cgroup.procs").write_text(str(os.getpid()))


class Members(Bench):
    """Natives' sockets are of the pod's cgroup."""

    def open(self, n: int, family: Family, transport: Transport) -> socket.socket:
        if n:
            return super().open(n, family, transport)
        with member(self.pod.cgroup):
            return super().open(n, family, transport)


@pytest.fixture(scope="module")
def pod(build: Build) -> Pod:
    return build("steer", datapath="steer")


@pytest.fixture(scope="module")
def members(pod: Pod) -> Members:
    return Members(pod)


@pytest.fixture(scope="module", params=[Members, Bench], ids=["members", "foreigners"])
def natives(pod: Pod, request: pytest.FixtureRequest) -> Bench:
    bench: Bench = request.param(pod)
    return bench


def loopback(family: Family) -> str:
    return str(addresses.loopback(family))


# --- every pair -----------------------------------------------------------------------------


@FAMILIES
@TRANSPORTS
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_clients_reach_servers_at_localhost(
    natives: Bench, pair: Pair, family: Family, transport: Transport
) -> None:
    ends = pair.client or None, pair.server or None
    before = natives.pod.attachment.carried(*ends)
    with natives.connected(pair, family, transport) as (client, server):
        for size in (1, 1400):
            client.send(b"?" * size)
            assert server.recv(2000) == b"?" * size
            server.send(b"!" * size)
            assert client.recv(2000) == b"!" * size
    assert (natives.pod.attachment.carried(*ends) - before).bytes > 2 * 1401


@FAMILIES
@TRANSPORTS
def test_only_sockets_of_the_cgroup_are_steered(
    pod: Pod, family: Family, transport: Transport
) -> None:
    for bench, steered in ((Members(pod), 1), (Bench(pod), 0)):
        before = {reason: bench.counted(reason) for reason in ("steered", "assigned")}
        with bench.connected(Pair(0, 1), family, transport):
            assert bench.counted("steered") == before["steered"] + steered
        with bench.connected(Pair(1, 0), family, transport):
            assert bench.counted("assigned") == before["assigned"] + steered


@FAMILIES
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_transfers_arrive_whole(natives: Bench, pair: Pair, family: Family) -> None:
    data = os.urandom(1 << 20) * 8
    before = natives.checksum_errors()
    with natives.connected(pair, family) as (client, server):
        assert transfer(client, server, data) == data
        assert transfer(server, client, data) == data
    assert natives.checksum_errors() == before


@FAMILIES
@pytest.mark.parametrize("pair", [Pair(0, 1), Pair(1, 0), Pair(1, 2), Pair(1, 1)], ids=str)
def test_nobody_listens_is_refused_at_once(natives: Bench, pair: Pair, family: Family) -> None:
    port = PORTS[pair.server] if pair.server else NOBODYS_PORT
    began = time.monotonic()
    with natives.open(pair.client, family, Transport.TCP) as client:
        with pytest.raises(ConnectionRefusedError):
            client.connect((localhost(pair.client, family), port))
    with natives.open(pair.client, family, Transport.UDP) as client:
        client.connect((localhost(pair.client, family), port))
        client.send(b"?")
        with pytest.raises(ConnectionRefusedError):
            client.recv(1)
    assert time.monotonic() - began < 0.5


@FAMILIES
@pytest.mark.parametrize("size", [1473, 3000, 8000])
@pytest.mark.parametrize("pair", [Pair(0, 1), Pair(1, 0)], ids=str)
def test_datagrams_in_fragments_arrive_both_ways(
    members: Members, pair: Pair, family: Family, size: int
) -> None:
    data = os.urandom(size)
    client, server = pair
    with (
        members.serve(server, family, Transport.UDP, "") as serving,
        members.open(client, family, Transport.UDP) as asking,
    ):
        asking.sendto(data, (localhost(client, family), PORTS[server]))
        received, sender = serving.recvfrom(9000)
        assert received == data
        serving.sendto(data, sender)
        assert asking.recv(9000) == data


# --- listeners ------------------------------------------------------------------------------

LISTENERS = [
    (socket.AF_INET, "127.0.0.1", False, {Family.IPV4}),
    (socket.AF_INET, "0.0.0.0", False, {Family.IPV4}),
    (socket.AF_INET, "127.0.0.9", False, set()),
    (socket.AF_INET6, "::1", False, {Family.IPV6}),
    (socket.AF_INET6, "::", True, {Family.IPV6}),
    (socket.AF_INET6, "::", False, {Family.IPV4, Family.IPV6}),
    (socket.AF_INET6, "::ffff:127.0.0.1", False, {Family.IPV4}),
]


@FAMILIES
@pytest.mark.parametrize(
    ("domain", "host", "v6only", "served"), LISTENERS, ids=[f"{x[1]}-{x[2]}" for x in LISTENERS]
)
def test_a_guest_reaches_what_a_native_would_reach(
    natives: Bench,
    domain: socket.AddressFamily,
    host: str,
    v6only: bool,
    served: set[Family],
    family: Family,
) -> None:
    of = Family.IPV4 if domain is socket.AF_INET else Family.IPV6
    with natives.open(0, of, Transport.TCP) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if domain is socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(v6only))
        listening.bind((host, PORTS[0]))
        listening.listen()
        with natives.open(1, family, Transport.TCP) as client:
            if family not in served:
                with pytest.raises(ConnectionRefusedError):
                    client.connect((localhost(1, family), PORTS[0]))
                return
            client.connect((localhost(1, family), PORTS[0]))
            accepted, _ = listening.accept()
            with accepted:
                client.send(b"?")
                assert accepted.recv(1) == b"?"


@TRANSPORTS
def test_a_group_of_listeners_shares_what_comes_from_a_guest(
    members: Members, transport: Transport
) -> None:
    with ExitStack() as stack:
        group = []
        for _ in range(2):
            server = stack.enter_context(members.open(0, Family.IPV4, transport))
            for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
                server.setsockopt(socket.SOL_SOCKET, option, 1)
            server.bind(("127.0.0.1", PORTS[0]))
            if transport is Transport.TCP:
                server.listen(64)
            server.setblocking(False)
            group.append(server)
        for _ in range(32):
            client = stack.enter_context(members.open(1, Family.IPV4, transport))
            client.connect((localhost(1, Family.IPV4), PORTS[0]))
            client.send(b"?")
        got = [0, 0]

        def all_arrived() -> bool:
            for i, server in enumerate(group):
                try:
                    if transport is Transport.TCP:
                        server.accept()[0].close()
                    else:
                        server.recv(1)
                    got[i] += 1
                except BlockingIOError:
                    pass
            return sum(got) == 32

        wait_until(all_arrived, f"32 clients served, {got} so far")
        assert min(got) > 4


def test_a_listener_bound_to_lo_is_reached_by_lo(members: Members) -> None:
    with members.open(0, Family.IPV4, Transport.TCP) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        listening.bind(("", PORTS[0]))
        listening.listen()
        with members.open(1, Family.IPV4, Transport.TCP) as client:
            client.connect((localhost(1, Family.IPV4), PORTS[0]))
            listening.accept()[0].close()


# --- TCP's corners --------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("pair", [Pair(0, 1), Pair(1, 0)], ids=str)
def test_a_clients_port_is_used_again_past_time_wait(
    natives: Bench, pair: Pair, family: Family
) -> None:
    client, server = pair
    with natives.serve(server, family, Transport.TCP, "") as listening:
        port = 0
        began = time.monotonic()
        for _ in range(3):
            with natives.open(client, family, Transport.TCP) as near:
                near.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                near.bind(("", port))
                near.connect((localhost(client, family), PORTS[server]))
                port = near.getsockname()[1]
                far, _ = listening.accept()
                far.close()  # first: TIME_WAIT is the server's
                assert near.recv(1) == b""
        assert time.monotonic() - began < 1


def talk(near: socket.socket, far: socket.socket) -> None:
    """To and fro, so that programs remember the connection."""
    for _ in range(3):
        near.send(b"?")
        assert far.recv(1) == b"?"
        far.send(b"!")
        assert near.recv(1) == b"!"


@FAMILIES
def test_a_connection_by_lo_follows_one_that_was_handed_over(pod: Pod, family: Family) -> None:
    """On the same ports; of the one before, programs remember that its packets need no look-up."""
    port, natives = 0, [Members(pod), Bench(pod), Members(pod)]
    for bench in natives:
        with bench.serve(0, family, Transport.TCP, "") as listening:
            with bench.open(1, family, Transport.TCP) as near:
                near.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                near.bind(("", port))
                near.connect((localhost(1, family), PORTS[0]))
                port = near.getsockname()[1]
                far, _ = listening.accept()
                with far:
                    talk(near, far)
                    near.close()
                    with pytest.raises(ConnectionResetError):
                        far.recv(1)


@FAMILIES
def test_a_connection_of_the_pod_that_had_the_slot_before_is_forgotten(
    owner: Owner,
    prepared: dict[Runtime, Prepared],
    pod: Pod,  # keeps the programs
    family: Family,
    tmp_path: Path,
) -> None:
    """There the port was a native's, here it is a guest's; the client's port is the same."""
    steer, (native, one, _) = datapaths.get("steer"), MANIFEST.workloads
    without_two = Manifest((native, one))
    with Pod(owner, "before", without_two, steer, prepared, tmp_path) as before:
        bench = Members(before)
        with (
            bench.open(0, family, Transport.TCP) as listening,
            bench.open(1, family, Transport.TCP) as near,
        ):
            listening.bind(("", PORTS[2]))
            listening.listen()
            near.connect((localhost(1, family), PORTS[2]))
            port = near.getsockname()[1]
            far, _ = listening.accept()
            with far:
                talk(near, far)
    with Pod(owner, "after", MANIFEST, steer, prepared, tmp_path) as after:
        bench = Members(after)
        with (
            bench.serve(2, family, Transport.TCP) as listening,
            bench.open(1, family, Transport.TCP) as near,
        ):
            near.bind(("", port))
            near.connect((localhost(1, family), PORTS[2]))
            far, _ = listening.accept()
            with far:
                talk(near, far)


@FAMILIES
@pytest.mark.parametrize("host", ["", "localhost"])
def test_syn_cookies_are_honored(natives: Bench, family: Family, host: str) -> None:
    namespaces.set_sysctls(natives.pod.netns, {"net/ipv4/tcp_syncookies": 2})
    try:
        with natives.serve(0, family, Transport.TCP, host and loopback(family)) as listening:
            with natives.open(1, family, Transport.TCP) as client:
                client.connect((localhost(1, family), PORTS[0]))
                client.send(b"?")
                accepted, _ = listening.accept()
                with accepted:
                    assert accepted.recv(1) == b"?"
    finally:
        namespaces.set_sysctls(natives.pod.netns, {"net/ipv4/tcp_syncookies": 1})


@TRANSPORTS
@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.5", "::1"])
def test_clients_bound_to_a_loopback_address_go_by_lo(
    members: Members, transport: Transport, source: str
) -> None:
    family = Family.IPV6 if ":" in source else Family.IPV4
    before = members.counted("fallback")
    with (
        members.serve(1, family, transport) as serving,
        members.open(0, family, transport) as client,
    ):
        client.bind((source, 0))
        client.connect((loopback(family), PORTS[1]))
        client.send(b"?")
        if transport is Transport.TCP:
            far, _ = serving.accept()
            with far:
                far.send(far.recv(1))
        else:
            serving.sendto(*serving.recvfrom(1))
        assert client.recv(1) == b"?"
        assert client.getsockname()[0] == source
    assert members.counted("fallback") > before


@pytest.mark.parametrize("dialed", ["127.0.0.2", "0.0.0.0"])
def test_any_loopback_address_means_localhost(members: Members, dialed: str) -> None:
    with members.serve(1, Family.IPV4, Transport.TCP) as listening:
        with members.open(0, Family.IPV4, Transport.TCP) as client:
            client.connect((dialed, PORTS[1]))
            listening.accept()[0].close()
            assert client.getpeername()[0] == ("127.0.0.1" if dialed == "0.0.0.0" else dialed)


# --- names ----------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("host", ["any", "loopback"])
def test_natives_see_loopback_addresses_of_connections(
    members: Members, family: Family, host: str
) -> None:
    one = loopback(family)
    with members.connected(Pair(0, 1), family) as (client, _):
        assert client.getpeername()[:2] == (one, PORTS[1])
        assert client.getsockname()[0] == one
    bound = one if host == "loopback" else ""
    with (
        members.serve(0, family, Transport.TCP, bound) as listening,
        members.open(1, family, Transport.TCP) as client,
    ):
        client.connect((localhost(1, family), PORTS[0]))
        accepted, peer = listening.accept()
        with accepted:
            assert peer[:2] == (one, client.getsockname()[1])
            assert accepted.getpeername()[0] == one
            assert accepted.getsockname()[:2] == (one, PORTS[0])


def test_a_dual_stack_listener_sees_mapped_loopback_addresses(members: Members) -> None:
    with members.open(0, Family.IPV6, Transport.TCP) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("::", PORTS[0]))
        listening.listen()
        with members.open(1, Family.IPV4, Transport.TCP) as client:
            client.connect((localhost(1, Family.IPV4), PORTS[0]))
            accepted, peer = listening.accept()
            with accepted:
                assert peer[0] == "::ffff:127.0.0.1"
                assert accepted.getsockname()[0] == "::ffff:127.0.0.1"


def test_an_ipv6_socket_dials_a_mapped_address(members: Members) -> None:
    with members.serve(1, Family.IPV4, Transport.TCP) as listening:
        with members.open(0, Family.IPV6, Transport.TCP) as client:
            client.connect(("::ffff:127.0.0.1", PORTS[1]))
            listening.accept()[0].close()
            assert client.getpeername()[0] == "::ffff:127.0.0.1"
            assert client.getsockname()[0] == "::ffff:127.0.0.1"


@FAMILIES
def test_a_guest_that_is_dialed_by_its_own_address_is_shown_as_it_is(
    members: Members, family: Family
) -> None:
    link = str(addresses.guest_link(family, 1))
    with members.serve(1, family, Transport.TCP) as listening:
        with members.open(0, family, Transport.TCP) as client:
            client.connect((link, PORTS[1]))
            listening.accept()[0].close()
            assert client.getpeername()[0] == link
            assert client.getsockname()[0] == str(addresses.pod_link(family))
    with (
        members.serve(1, family, Transport.UDP) as serving,
        members.open(0, family, Transport.UDP) as client,
    ):
        client.sendto(b"?", (link, PORTS[1]))
        serving.sendto(*serving.recvfrom(1))
        assert client.recvfrom(1)[1][0] == link


# --- a guest without IPv6 -------------------------------------------------------------------


@pytest.fixture(scope="module")
def lacking(build: Build, owner: Owner) -> Iterator[Members]:
    """A pod whose guest 1 is said to know no IPv6 (its kernel would know)."""
    pod = build("steer4", datapath="direct")
    wiring = pod.wiring()
    ports = tuple(replace(port, families=frozenset({Family.IPV4})) for port in wiring.ports)
    whole, attachment = (
        pod.attachment,
        datapaths.get("steer").attach(replace(wiring, ports=ports), owner.part()),
    )
    pod.attachment = attachment
    yield Members(pod)
    attachment.detach()
    pod.attachment = whole


def test_it_is_reached_from_the_ipv6_loopback_address(lacking: Members) -> None:
    with (
        lacking.serve(1, Family.IPV4, Transport.TCP) as listening,
        lacking.open(0, Family.IPV6, Transport.TCP) as client,
    ):
        client.connect(("::1", PORTS[1]))
        listening.accept()[0].close()
        assert client.getpeername()[:2] == ("::1", PORTS[1])
        assert client.getsockname()[0] == "::1"
    with (
        lacking.serve(1, Family.IPV4, Transport.UDP) as serving,
        lacking.open(0, Family.IPV6, Transport.UDP) as client,
    ):
        client.connect(("::1", PORTS[1]))
        client.send(b"?")
        serving.sendto(*serving.recvfrom(1))
        assert client.recvfrom(1)[1][:2] == ("::1", PORTS[1])


def test_who_cannot_be_mapped_is_refused_at_once(lacking: Members) -> None:
    for bench in (lacking, Bench(lacking.pod)):
        with bench.open(0, Family.IPV6, Transport.TCP) as client:
            client.bind(("::1", 0))
            with pytest.raises(ConnectionRefusedError):
                client.connect(("::1", PORTS[1]))
    before = lacking.counted("no_guest")
    with lacking.open(0, Family.IPV6, Transport.UDP) as client:
        client.sendto(b"?", ("::1", PORTS[1]))
        assert lacking.counted("no_guest") == before + 1


# --- datagrams without a connection ---------------------------------------------------------


@FAMILIES
def test_one_server_answers_two_guests_that_use_the_same_port(
    natives: Bench, family: Family
) -> None:
    with natives.serve(0, family, Transport.UDP, loopback(family)) as serving, ExitStack() as stack:
        clients = []
        for n in (1, 2):
            client = stack.enter_context(natives.open(n, family, Transport.UDP))
            client.bind(("", 40404))
            client.connect((localhost(n, family), PORTS[0]))
            client.send(b"%d" % n)
            clients.append(client)
        heard = [serving.recvfrom(10) for _ in clients]
        assert {sender[0] for _, sender in heard} == {
            str(addresses.native_view(family, n)) for n in (1, 2)
        }
        for data, sender in heard:
            serving.sendto(data, sender)
        assert [client.recv(10) for client in clients] == [b"1", b"2"]


@FAMILIES
def test_an_answer_comes_from_the_address_that_was_asked(natives: Bench, family: Family) -> None:
    with (
        natives.serve(1, family, Transport.UDP) as serving,
        natives.open(0, family, Transport.UDP) as client,
    ):
        client.sendto(b"?", (loopback(family), PORTS[1]))
        serving.sendto(*serving.recvfrom(1))
        assert client.recvfrom(1)[1][:2] == (loopback(family), PORTS[1])


@FAMILIES
def test_a_socket_may_ask_guests_and_natives_at_once(members: Members, family: Family) -> None:
    with (
        members.serve(1, family, Transport.UDP) as guests,
        members.serve(0, family, Transport.UDP) as natives,
        members.open(0, family, Transport.UDP) as client,
    ):
        for port in (PORTS[1], PORTS[0]):
            client.sendto(b"?", (loopback(family), port))
        for serving, port in ((guests, PORTS[1]), (natives, PORTS[0])):
            serving.sendto(*serving.recvfrom(1))
            assert client.recvfrom(1)[1][:2] == (loopback(family), port)


def test_an_ipv6_socket_asks_and_serves_by_mapped_addresses(members: Members) -> None:
    with (
        members.serve(1, Family.IPV4, Transport.UDP) as serving,
        members.open(0, Family.IPV6, Transport.UDP) as client,
    ):
        client.sendto(b"?", ("::ffff:127.0.0.1", PORTS[1]))
        serving.sendto(*serving.recvfrom(1))
        assert client.recvfrom(1)[1][0] == "::ffff:127.0.0.1"
    with (
        members.open(0, Family.IPV6, Transport.UDP) as serving,
        members.open(1, Family.IPV4, Transport.UDP) as client,
    ):
        serving.bind(("::", PORTS[0]))
        client.connect((localhost(1, Family.IPV4), PORTS[0]))
        client.send(b"?")
        serving.sendto(*serving.recvfrom(1))
        assert client.recv(1) == b"?"


@FAMILIES
def test_who_asks_where_a_datagram_came_sees_lo(members: Members, family: Family) -> None:
    level, option, request = {
        Family.IPV4: (socket.IPPROTO_IP, IP_PKTINFO, IP_PKTINFO),
        Family.IPV6: (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, socket.IPV6_RECVPKTINFO),
    }[family]
    with (
        members.serve(0, family, Transport.UDP) as serving,
        members.open(1, family, Transport.UDP) as client,
    ):
        serving.setsockopt(level, request, 1)
        client.connect((localhost(1, family), PORTS[0]))
        client.send(b"?")
        data, [(_, kind, info)], _, sender = serving.recvmsg(1, 100)
        assert kind == option
        if family is Family.IPV4:
            index, destination = int.from_bytes(info[:4], sys.byteorder), info[8:]
        else:
            index, destination = int.from_bytes(info[16:], sys.byteorder), info[:16]
        assert (index, destination) == (1, addresses.loopback(family).packed)
        serving.sendmsg([data], [(level, option, info)], 0, sender)
        assert client.recv(1) == b"?"


@FAMILIES
def test_natives_among_themselves_are_left_alone(members: Members, family: Family) -> None:
    """Guests' kernels may send something of their own meanwhile, which is counted."""

    def is_left_alone() -> bool:
        before = members.pod.attachment.counters()
        for transport in Transport:
            with members.connected(Pair(0, 0), family, transport) as (client, server):
                client.send(b"?")
                assert server.recv(1) == b"?"
                assert client.getpeername()[:2] == (loopback(family), PORTS[0])
        return members.pod.attachment.counters() == before

    assert any(is_left_alone() for _ in range(5))


# --- whose port, whose packet ---------------------------------------------------------------


@TRANSPORTS
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_a_native_cannot_bind_a_guests_port(
    natives: Bench, transport: Transport, host: str
) -> None:
    family = Family.IPV6 if ":" in host else Family.IPV4
    with natives.open(0, family, transport) as native:
        with pytest.raises(OSError, match="Address already in use"):
            native.bind((host, PORTS[1]))


def test_another_namespace_in_the_same_cgroup_keeps_its_own_loopback(members: Members) -> None:
    with member(members.pod.cgroup):
        stranger = namespaces.inside(members.netns(2), socket.socket)
    with stranger, members.serve(1, Family.IPV4, Transport.TCP):
        with pytest.raises(ConnectionRefusedError):
            stranger.connect(("127.0.0.1", PORTS[1]))


def ip(src: str, dst: str) -> IP | IPv6:
    return IPv6(src=src, dst=dst) if ":" in src else IP(src=src, dst=dst)


@FAMILIES
@pytest.mark.parametrize("kind", ["link of another", "native source", "alias", "pod", "loopback"])
def test_a_guest_sends_only_from_its_own_address(
    members: Members, family: Family, kind: str
) -> None:
    claimed = {
        "link of another": addresses.guest_link(family, 2),
        "native source": addresses.native_source(family),
        "alias": addresses.alias(family),
        "pod": addresses.pod_link(family),
        "loopback": addresses.loopback(family),
    }[kind]
    before = members.counted("spoofed")
    with members.serve(0, family, Transport.UDP, "") as serving:
        packet = ip(str(claimed), localhost(1, family)) / UDP(sport=9, dport=PORTS[0]) / Raw(b"!")
        members.raw(1, bytes(Ether(src=addresses.guest_mac(1), dst=addresses.ALIAS_MAC) / packet))
        wait_until(lambda: members.counted("spoofed") == before + 1, "counted as spoofed")
        serving.settimeout(0)
        with pytest.raises(BlockingIOError):
            serving.recv(1)


@FAMILIES
@pytest.mark.parametrize("port", ["owned by the guest", "a native's"])
def test_a_guest_cannot_aim_at_loopback_addresses(
    members: Members, family: Family, port: str
) -> None:
    number = PORTS[1] if port == "owned by the guest" else PORTS[0]
    link = str(addresses.guest_link(family, 1))
    aims = [loopback(family), str(addresses.native_view(family, 1))]
    before = members.counted("spoofed")
    for aim in aims:
        packet = ip(link, aim) / TCP(sport=9, dport=number, flags="S")
        members.raw(1, bytes(Ether(src=addresses.guest_mac(1), dst=addresses.ALIAS_MAC) / packet))
    wait_until(lambda: members.counted("spoofed") == before + len(aims), "counted as spoofed")


def test_a_guest_cannot_take_anothers_address_by_arp(members: Members) -> None:
    before = members.counted("spoofed")
    claims = ARP(op=2, hwsrc=addresses.guest_mac(1), psrc=str(addresses.guest_link(Family.IPV4, 2)))
    members.raw(1, bytes(Ether(src=addresses.guest_mac(1), dst="ff:ff:ff:ff:ff:ff") / claims))
    wait_until(lambda: members.counted("spoofed") == before + 1, "counted as spoofed")


def test_a_guest_pings_localhost(members: Members) -> None:
    before = members.pod.attachment.carried(1, None)
    packet = ip(str(addresses.guest_link(Family.IPV4, 1)), localhost(1, Family.IPV4)) / ICMP(id=7)
    with namespaces.inside(
        members.netns(1), lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)
    ) as raw:
        raw.settimeout(5)
        members.raw(1, bytes(Ether(src=addresses.guest_mac(1), dst=addresses.ALIAS_MAC) / packet))
        assert raw.recv(100)[20] == 0  # echo reply
    assert (members.pod.attachment.carried(1, None) - before).packets == 2


# --- links and pods -------------------------------------------------------------------------


@FAMILIES
def test_a_port_that_vanished_is_made_again(natives: Bench, family: Family) -> None:
    pod = natives.pod
    before = pod.attachment.carried(None, 1)
    pod.links.link_ip.link("del", ifname="g1")
    pod.mend()
    for pair in (Pair(0, 1), Pair(1, 0), Pair(1, 2), Pair(2, 1)):
        with natives.connected(pair, family) as (client, server):
            client.send(b"?")
            assert server.recv(1) == b"?"
    assert (pod.attachment.carried(None, 1) - before).packets > 0


@FAMILIES
@pytest.mark.parametrize("pair", [Pair(0, 1), Pair(1, 0)], ids=str)
def test_natives_hear_of_a_guests_death(natives: Bench, pair: Pair, family: Family) -> None:
    """Its kernel is gone, and says nothing: here, its link is down."""
    pod = natives.pod
    with natives.connected(pair, family) as ends:
        native = ends[pair.index(0)]
        pod.links.link_ip.link("del", ifname="g1")
        pod.end_peers("guest1")
        with pytest.raises(ConnectionAbortedError):
            native.recv(1)
    pod.mend()
    with natives.connected(pair, family) as (client, server):
        client.send(b"?")
        assert server.recv(1) == b"?"


@FAMILIES
@pytest.mark.parametrize("dead", [1, 2])
def test_a_guest_hears_of_anothers_death(members: Members, dead: int, family: Family) -> None:
    members.a_guest_hears_of_anothers_death(Pair(1, 2), dead, family)


@FAMILIES
@TRANSPORTS
def test_a_guest_that_ended_is_refused_until_it_sends(
    natives: Bench, family: Family, transport: Transport
) -> None:
    natives.refuses_until_it_sends(family, transport)


@FAMILIES
def test_when_it_has_settled_each_packet_meets_a_program_once(build: Build, family: Family) -> None:
    if not bpf.has_tcx():
        pytest.skip("links run programs by themselves: Linux 6.6")
    settled = Members(build(f"settled-{family}", datapath="steer"))
    pod = settled.pod
    pod.attach_deferred()
    for _ in range(2):
        port = pod.wiring().ports[0]
        at_port = bpf.running_tc(pod.netns, pod.links.link_ip, port.ifindex)
        assert at_port == ["ingress:port_ingress", "egress:port_egress"]
        for client, server in ((None, 1), (1, None), (1, 2)):
            before = pod.attachment.carried(client, server)
            pair = Pair(client or 0, server or 0)
            with settled.connected(pair, family, Transport.UDP) as (near, far):
                for _ in range(10):
                    far.send(b"!")
                    near.recv(100)
            carried = pod.attachment.carried(client, server) - before
            assert 11 <= carried.packets <= 13  # with what the kernels say of who is neighbor
        pod.links.link_ip.link("del", ifname="g1")
        pod.mend()


@FAMILIES
def test_where_linux_tells_no_cookie_natives_still_see_loopback_addresses(
    build: Build, monkeypatch: pytest.MonkeyPatch, family: Family
) -> None:
    """As Linux 5.10 to 5.13 do not."""

    def no_cookie() -> int:
        raise OSError(errno.ENOPROTOOPT, "no such option")

    monkeypatch.setattr("testbed.datapaths.steer._cookie", no_cookie)
    natives = Members(build(f"steer-{family}-old", datapath="steer"))
    with natives.connected(Pair(0, 1), family) as (client, _):
        assert client.getpeername()[:2] == (loopback(family), PORTS[1])
    with natives.connected(Pair(1, 0), family) as (_, server):
        assert server.getpeername()[0] == loopback(family)


def test_two_pods_are_separate(build: Build, members: Members) -> None:
    other = Members(build("steer2", datapath="steer"))
    with members.serve(1, Family.IPV4, Transport.TCP):
        with other.open(0, Family.IPV4, Transport.TCP) as client:
            with pytest.raises(ConnectionRefusedError):
                client.connect(("127.0.0.1", PORTS[1]))
    other.pod.attachment.detach()
    with members.connected(Pair(0, 1), Family.IPV4):
        pass


def test_a_native_that_has_a_guests_port_already_is_named(build: Build, owner: Owner) -> None:
    pod = build("steer3", datapath="direct")
    with namespaces.inside(pod.netns, socket.socket) as native:
        native.bind(("127.0.0.1", PORTS[1]))
        with pytest.raises(Error, match=f"tcp port {PORTS[1]} is guest 1's"):
            datapaths.get("steer").attach(pod.wiring(), owner.part())
