"""Another pod: nothing of the pod that had its slot is left, and its floods push nothing out."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from scapy.layers.inet import IP, UDP, fragment
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment, fragment6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from testbed import datapaths
from testbed.datapaths.ebpf import state
from testbed.datapaths.ebpf.attachment import EbpfAttachment
from testbed.host import namespaces
from testbed.host.ledger import Owner
from testbed.model import addresses
from testbed.model.addresses import guest_link, guest_mac
from testbed.model.terms import Family, Runtime, Transport
from testbed.pods.pod import Pod
from testbed.runtimes.interface import Prepared
from tests.integration.conftest import Build
from tests.integration.sockets import MANIFEST, PORTS, Bench, Pair, floods, localhost, wait_until

pytestmark = pytest.mark.root


def learned(attachment: EbpfAttachment) -> set[str]:
    """Tables of the pod's state that have rows."""
    found = state.mapped(attachment._programs)
    return {name for name in state.TABLES if any(getattr(found, name))}


def counted(attachment: EbpfAttachment) -> set[str]:
    """What was counted. The links of a pod without traffic say something of their own."""
    return {reason for reason, count in attachment.counters().items() if count.packets}


def leave_traces(bench: Bench, family: Family) -> None:
    """A fragment without the rest, a native that is not from 127.0.0.1, guests that talk."""
    native = bench.open(0, family, Transport.UDP)
    with bench.serve(1, family, Transport.UDP), native:
        native.bind(("127.0.0.2" if family is Family.IPV4 else "::1", 0))
        to = guest_link(family, 1) if family is Family.IPV6 else "127.0.0.3"
        with suppress(OSError):
            native.sendto(b"!", (str(to), PORTS[1]))
    link, alias = (str(a) for a in (guest_link(family, 1), addresses.alias(family)))
    head = UDP(sport=7777, dport=PORTS[0]) / bytes(16)
    first = (
        IP(src=link, dst=alias, flags="MF", id=7) / head
        if family is Family.IPV4
        else IPv6(src=link, dst=alias) / IPv6ExtHdrFragment(m=1, id=7) / head
    )
    bench.raw(1, bytes(Ether(src=guest_mac(1), dst=addresses.ALIAS_MAC) / first))
    with bench.connected(Pair(1, 2), family):
        pass


@pytest.mark.parametrize("datapath", ["steer", "capture"])
def test_a_slot_is_given_out_without_a_trace(
    owner: Owner,
    build: Build,
    prepared: dict[Runtime, Prepared],
    datapath: str,
    tmp_path: Path,
) -> None:
    standing = build(f"stands-{datapath}", datapath=datapath).attachment  # the programs stay
    assert isinstance(standing, EbpfAttachment)
    found = datapaths.get(datapath)
    for _ in range(10):
        with Pod(owner, f"first-{datapath}", MANIFEST, found, prepared, tmp_path) as pod:
            assert isinstance(pod.attachment, EbpfAttachment)
            slot = pod.attachment._programs.slot
            for family in Family:
                leave_traces(Bench(pod), family)
            assert learned(pod.attachment) >= {"fragments", "nonstandard_flows"}
            assert pod.attachment.carried(1, 2).packets
            assert not counted(pod.attachment) <= counted(standing)
        with Pod(owner, f"second-{datapath}", MANIFEST, found, prepared, tmp_path) as pod:
            assert isinstance(pod.attachment, EbpfAttachment)
            if pod.attachment._programs.slot == slot:  # else another process took it
                assert not learned(pod.attachment)
                assert not pod.attachment.carried(1, 2).packets
                assert counted(pod.attachment) <= counted(standing)
                return
    pytest.fail("no pod got the slot of the one before")


FLOOD = 20_000
"""More than there are rows for all pods together in maps that they would share."""


def flood(bench: Bench) -> None:
    """Returns when it has passed: queues of the CPU that it fills drop what others send."""
    bench.raw(1, *floods(1, PORTS[0], PORTS[2], FLOOD))

    def passed() -> bool:
        before = bench.pod.attachment.carried(1, 2)
        time.sleep(0.05)
        return bench.pod.attachment.carried(1, 2) == before

    wait_until(passed, "the flood has passed")


def dial_by_many_addresses() -> None:
    """As a native that is not from 127.0.0.1 to it, from each port and to each address once."""
    for port in range(20_000, 22_000):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender, suppress(OSError):
            sender.bind(("127.0.0.1", port))
            sender.sendto(b"!", (f"127.1.{port >> 8}.{port & 255}", PORTS[1]))


@pytest.fixture(scope="module", params=["steer", "capture"])
def neighbors(build: Build, request: pytest.FixtureRequest) -> tuple[Bench, Bench]:
    """Two pods with the same programs."""
    one, other = (build(f"{name}-{request.param}", datapath=request.param) for name in "ab")
    return Bench(one), Bench(other)


@pytest.mark.parametrize("family", Family, ids=str)
def test_a_flood_pushes_out_no_fragment_of_another_pod(
    neighbors: tuple[Bench, Bench], family: Family
) -> None:
    bench, hostile = neighbors
    link, alias = (str(a) for a in (guest_link(family, 1), addresses.alias(family)))
    ether = Ether(src=guest_mac(1), dst=addresses.ALIAS_MAC)
    payload = UDP(sport=7777, dport=PORTS[0]) / bytes(2000)
    whole = (
        IP(src=link, dst=alias, id=7) / payload
        if family is Family.IPV4
        else IPv6(src=link, dst=alias) / IPv6ExtHdrFragment(id=7) / payload
    )
    split: Callable[..., list[Packet]] = fragment if family is Family.IPV4 else fragment6
    first, *later = [bytes(ether / part) for part in split(whole, 1400)]
    with bench.serve(0, family, Transport.UDP) as server:
        bench.raw(1, first)
        flood(hostile)
        bench.raw(1, *later)
        assert len(server.recv(65536)) == 2000


@pytest.mark.parametrize("family", Family, ids=str)
def test_a_flood_makes_no_guest_of_another_pod_wait_for_a_dead_one(
    neighbors: tuple[Bench, Bench], family: Family
) -> None:
    bench, hostile = neighbors
    bench.a_guest_hears_of_anothers_death(
        Pair(1, 2), 2, family, before=lambda client, server: flood(hostile)
    )


@pytest.mark.parametrize("family", Family, ids=str)
def test_a_flood_cuts_off_no_answer_to_an_unusual_address_of_another_pod(
    neighbors: tuple[Bench, Bench], family: Family
) -> None:
    """A native that is not from 127.0.0.1 (::1) to it: the way back needs what was remembered."""
    bench, hostile = neighbors
    own = "127.0.0.2" if family is Family.IPV4 else str(addresses.pod_link(family))
    with bench.serve(1, family, Transport.TCP) as listening:
        client = bench.open(0, family, Transport.TCP)
        with client:
            client.bind((own, 0))
            client.connect((localhost(0, family), PORTS[1]))
            far, _ = listening.accept()
            namespaces.inside(hostile.netns(0), dial_by_many_addresses)
            with far:
                far.send(b"answer")
                assert client.recv(100) == b"answer"
