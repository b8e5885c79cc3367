"""Another pod: it finds nothing of the pod that had its slot before."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import Ether

from testbed import datapaths
from testbed.datapaths.ebpf.attachment import EbpfAttachment
from testbed.host.ledger import Owner
from testbed.model import addresses
from testbed.model.addresses import guest_link, guest_mac
from testbed.model.terms import Family, Runtime, Transport
from testbed.pods.pod import Pod
from testbed.runtimes.interface import Prepared
from tests.integration.conftest import Build
from tests.integration.sockets import MANIFEST, PORTS, Bench, Pair

pytestmark = pytest.mark.root

BY_SLOT = {
    "fragments": ("=8IIBBBB", "=HH", 9),
    "nonstandard_flows": ("=BBBBHH", "=8I", 0),
    "guest_connections": ("=BBBBHH", "=B", 0),
    "flow_counts": ("=BBBx", "=QQ", 0),
}
"""Map → layout of its key and value, and where in the key the slot is."""


def rows(attachment: EbpfAttachment, slot: int) -> dict[str, list[tuple[int, ...]]]:
    """What there is of a slot, in maps that have rows of all pods."""
    found = {}
    for name, (key, value, at) in BY_SLOT.items():
        with suppress(FileNotFoundError):  # this datapath has none
            keys = attachment._programs.map(name, key, value)
            found[name] = [row for row in keys if row[at] == slot]
    return found


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
            traces = rows(standing, slot)
            assert traces["fragments"]
            assert traces["nonstandard_flows"]
            assert not counted(pod.attachment) <= counted(standing)
        left = rows(standing, slot)
        with Pod(owner, f"second-{datapath}", MANIFEST, found, prepared, tmp_path) as pod:
            assert isinstance(pod.attachment, EbpfAttachment)
            if pod.attachment._programs.slot == slot:  # else another process took it
                assert not any(left.values())
                assert counted(pod.attachment) <= counted(standing)
                return
    pytest.fail("no pod got the slot of the one before")
