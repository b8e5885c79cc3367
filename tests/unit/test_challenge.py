"""The segment that makes a peer tell how far it is; its checksums by scapy."""

from __future__ import annotations

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from testbed.datapaths.ebpf.challenge_ack import GuestConnection, segment
from testbed.model.addresses import ALIAS_MAC, alias, guest_link, guest_mac
from testbed.model.terms import Family


@pytest.mark.parametrize("family", Family)
def test_a_challenge_is_from_the_peer_and_right(family: Family) -> None:
    frame = segment(GuestConnection(2, 40000, alias(family), 5001))
    parsed = Ether(frame)
    ip, tcp = parsed[IP if family is Family.IPV4 else IPv6], parsed[TCP]
    assert (parsed.src, parsed.dst) == (ALIAS_MAC, guest_mac(2))
    assert (ip.src, ip.dst) == (str(alias(family)), str(guest_link(family, 2)))
    assert (tcp.sport, tcp.dport, tcp.flags, len(tcp.payload)) == (5001, 40000, "A", 1)
    for layer in (ip, tcp):
        if hasattr(layer, "chksum"):
            del layer.chksum
    assert bytes(parsed) == frame
