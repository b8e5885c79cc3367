"""A guest that sends whatever it likes at its own port; and whether these tests would find a hole.

The adversary is guest 3. BPF_PROG_TEST_RUN runs programs as at the port of guest 0, which no pod
has: for 0, `parse` (bpf/packet.h) does not ask whose a fragment is. So a program of ours runs
first, which sets the class of guest 3's port and calls the one that is tested.

A test that passes does not say whether it would find a hole. So each check is taken out of a copy
of `steer`, one at a time, and the tests have to fail. (`capture` has the same checks.) Compiling
takes seconds, so the copy has a switch for each check, and is compiled once.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    ICMPv6ND_RS,
    ICMPv6TimeExceeded,
    ICMPv6Unknown,
    IPv6,
    IPv6ExtHdrFragment,
)
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

from testbed import bpf
from testbed.bpf import ProgramSet, bytecode, syscall
from testbed.bpf.programs import PROG_ARRAY
from testbed.datapaths import capture, steer
from testbed.datapaths.ebpf import state
from testbed.host import namespaces
from testbed.host.facts import slowness
from testbed.model.addresses import (
    ALIAS_MAC,
    POD_MAC,
    Address,
    alias,
    guest_link,
    guest_mac,
    loopback,
    pod_link,
)
from testbed.model.terms import Family, Transport
from tests.bpf import test_capture, test_headers, test_neighbors
from tests.bpf.frames import (
    EPHEMERAL,
    NOBODY,
    Plan,
    echo,
    fragments,
    frame,
    ip,
    link_local,
    tcp,
    too_big,
    udp,
)
from tests.bpf.test_anything import bodies, headers, tails
from tests.bpf.variants import variant
from tests.bpf.verdicts import (
    ANOTHER,
    ANOTHERS_PORT,
    DROPPED,
    OWN_PORT,
    PASSED,
    REDIRECTED,
    US,
    Programs,
    in_slot_0,
)
from tests.integration.conftest import Build
from tests.integration.sockets import PORTS, Bench

pytestmark = pytest.mark.root

ME, VICTIM = ANOTHER, US
OWNERS = {ANOTHERS_PORT: ME, OWN_PORT: VICTIM}
REASONS = {"capture": capture.REASONS, "steer": steer.REASONS}
DATAPATHS = pytest.mark.parametrize("datapath", REASONS)
FAMILIES = pytest.mark.parametrize("family", Family, ids=str)
MINE = guest_mac(ME)
LINK_LOCAL = {n: link_local(n) for n in (ME, VICTIM)}


class Guest(Programs):
    """The programs of a datapath in slot 0, and the port of guest 3 there."""

    def __init__(self, loaded: ProgramSet, datapath: str, entry: int) -> None:
        super().__init__(loaded, REASONS[datapath])
        self.datapath, self._entry = datapath, entry
        self._state = state.mapped(loaded)

    def send(self, sent: bytes) -> tuple[int, bytes]:
        """Verdict on a frame of guest 3, and the frame when it has got to where it is led.

        In `capture` what is for natives is translated by a second program.
        """
        verdict, after, _ = bpf.run(self._entry, sent)
        if self.datapath == "capture" and (verdict, after) == (REDIRECTED, sent):
            return self.run("uplink_ingress", sent)
        return verdict, after

    def remembered(self) -> tuple[bytes, ...]:
        """What is in the tables of the pod's state."""
        return tuple(bytes(getattr(self._state, table)) for table in state.TABLES)

    @contextmanager
    def without(self, check: int) -> Iterator[None]:
        """Without one of the checks of `with_switches`."""
        off = self._loaded.map("switched_off", "=I", "=I")
        off[0,] = (check,)
        try:
            yield
        finally:
            off[0,] = (0,)


@contextmanager
def at_port(datapath: str) -> Iterator[Guest]:
    with in_slot_0(datapath, REASONS[datapath]) as loaded:
        if datapath == "capture":
            loaded.map("pods", "=I", "=II")[0,] = (1, 1)
        calls = syscall.create_map("calls", (PROG_ARRAY, 4, 4, 1, 0))
        syscall.Map(calls, struct.Struct("=I"), struct.Struct("=I"))[0,] = (
            loaded.program("port_ingress"),
        )
        entry = bytecode.load_entry("as_guest_3", ME, calls, 0)
        try:
            yield Guest(loaded, datapath, entry)
        finally:
            os.close(entry)
            os.close(calls)


# --- whatever a guest sends -----------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """A frame, and what is known of it without asking the programs."""

    frame: bytes
    what: str
    own: bool
    """Whether all that it claims is the guest's own."""
    destination: Address | None = None
    sport: int | None = None
    """Ports of the flow; None if the packet does not tell them."""
    dport: int | None = None
    may_enter: bool = True
    """False: must not get to where only the programs lead, whatever its addresses are."""
    hides: bool = False
    """It is the guest's own, but must be dropped, as it hides what it is."""


def senders(a: Plan) -> st.SearchStrategy[tuple[Address, str]]:
    """Source address and MAC, of which one may be another's."""
    others = [a.others_link, a.alias, a.loopback, a.view, a.pod_link, a.native_source, a.unknown]
    forged = [*((a.link, mac) for mac in OTHERS_MACS * 2), *((other, MINE) for other in others)]
    return st.sampled_from([(a.link, MINE)] * 10 + forged)


def destinations(a: Plan) -> st.SearchStrategy[Address]:
    led = [a.alias, a.view, a.others_view, a.native_source]
    others = [a.native_source_odd, a.others_link, a.loopback, a.native_view, a.unknown]
    return st.sampled_from(led * 2 + [a.pod_link] * 3 + others)


OTHERS_MACS = [guest_mac(VICTIM), ALIAS_MAC, POD_MAC]
MACS = st.sampled_from([MINE] * 10 + OTHERS_MACS)


def framed(packet: Packet, mac: str) -> bytes:
    return frame(packet, src=mac, dst=ALIAS_MAC)


def packets(data: st.DataObject, a: Plan) -> list[Sent]:
    """Segments, datagrams and errors of all kinds of ports and fields, maybe cut off or tagged."""
    (src, mac), dst = data.draw(senders(a)), data.draw(destinations(a))
    sport, dport, body = bodies(data, a)
    packet = ip(src, dst, **data.draw(headers(a.family))) / body(src, dst)
    whole = framed(packet, mac) + data.draw(tails)
    if data.draw(st.integers(0, 9)) == 0:
        whole = whole[: data.draw(st.integers(14 + (20 if src.version == 4 else 40), len(whole)))]
    own = mac == MINE and src == a.link
    if data.draw(st.integers(0, 19)) == 0:
        tagged = bytes(Ether(src=mac, dst=ALIAS_MAC) / Dot1Q(vlan=5)) + whole[12:]
        return [Sent(tagged, "tagged", False)]
    return [Sent(whole, "packet", own, dst, sport, dport)]


def pings(data: st.DataObject, a: Plan) -> list[Sent]:
    (src, mac), dst = data.draw(senders(a)), data.draw(destinations(a))
    packet = ip(src, dst) / echo(a.family, data.draw(st.booleans()))
    return [Sent(framed(packet, mac), "echo", mac == MINE and src == a.link, dst)]


def errors(data: st.DataObject, a: Plan) -> list[Sent]:
    """ICMP errors of all kinds, about packets of all kinds."""
    dst, mac = data.draw(destinations(a)), data.draw(MACS)
    sport, dport = data.draw(st.sampled_from([OWN_PORT, ANOTHERS_PORT, EPHEMERAL])), EPHEMERAL
    number = data.draw(st.sampled_from([17, 6, 132]))
    later = a.family is Family.IPV4 and data.draw(st.booleans())
    about = bytes(udp(dport, sport) if number == 17 else tcp(dport, sport))
    fields = {"proto": number, "frag": 10 * later} if a.family is Family.IPV4 else {"nh": number}
    quoted = Raw(bytes(ip(dst, a.link, **fields) / Raw(about)))
    kinds: Sequence[Packet] = (
        (ICMP(type=3, code=3), ICMP(type=11), too_big(a.family))
        if a.family is Family.IPV4
        else (ICMPv6DestUnreach(code=4), ICMPv6TimeExceeded(), too_big(a.family))
    )
    kind = data.draw(st.integers(0, 2))
    packet = ip(a.link, dst) / kinds[kind].copy() / quoted
    may_enter = kind != 2 and not later and number != 132
    return [Sent(framed(packet, mac), "error", mac == MINE, dst, sport, dport, may_enter)]


def in_fragments(data: st.DataObject, a: Plan) -> list[Sent]:
    """A datagram in two fragments, of which the first may be missing, too short, or an error."""
    (src, mac), dst = data.draw(senders(a)), data.draw(destinations(a))
    ports = st.sampled_from([OWN_PORT, ANOTHERS_PORT, EPHEMERAL])
    sport, dport = data.draw(ports), data.draw(ports)
    body = data.draw(st.sampled_from([udp, tcp]))(sport, dport)
    parts = fragments(ip(src, dst) / body, data.draw(st.sampled_from([8, 16, 24])))
    own = mac == MINE and src == a.link
    first, later = (framed(part, mac) for part in parts)
    if data.draw(st.integers(0, 3)) == 0:
        return [Sent(later, "orphan", own, dst, may_enter=False)]
    return [
        Sent(first, "first", own, dst, sport, dport),
        Sent(later, "later", own, dst, sport, dport),
    ]


def arp(data: st.DataObject, a: Plan) -> list[Sent]:
    p4 = Plan(Family.IPV4, ME, VICTIM)
    claimed = data.draw(st.sampled_from([p4.link] * 2 + [p4.others_link, p4.alias, p4.pod_link]))
    asked = data.draw(st.sampled_from([p4.alias, p4.view, p4.others_link, p4.pod_link]))
    mac, says = data.draw(MACS), data.draw(MACS)
    op = data.draw(st.sampled_from([1, 2]))
    message = ARP(op=op, hwsrc=says, psrc=str(claimed), pdst=str(asked))
    made = bytes(Ether(src=mac, dst="ff:ff:ff:ff:ff:ff") / message)
    return [Sent(made, "arp", mac == says == MINE and claimed == p4.link)]


def discovery(data: st.DataObject, a: Plan) -> list[Sent]:
    """Neighbor discovery, maybe behind what hides it."""
    p6 = Plan(Family.IPV6, ME, VICTIM)
    own = [str(p6.link), LINK_LOCAL[ME]]
    others = [str(p6.others_link), str(p6.alias), str(p6.pod_link), LINK_LOCAL[VICTIM], "fe80::1"]
    addresses = st.sampled_from(own * 3 + others)
    src, target, mac = data.draw(addresses), data.draw(addresses), data.draw(MACS)
    kind = data.draw(st.sampled_from(["solicit", "probe", "advertise", "ask", "pose", "redirect"]))
    src = "::" if kind == "probe" else src
    claimed = {src, target} if kind in ("probe", "advertise") else {src}
    message = {
        "solicit": ICMPv6ND_NS(tgt=target),
        "probe": ICMPv6ND_NS(tgt=target),
        "advertise": ICMPv6ND_NA(tgt=target),
        "ask": ICMPv6ND_RS(),
        "pose": ICMPv6ND_RA(),
        "redirect": ICMPv6ND_Redirect(),
    }[kind]
    # An atomic fragment is a whole packet, and seen through.
    hiding = data.draw(st.sampled_from([None] * 8 + [*test_neighbors.HIDING.values()]))
    hides = hiding is not None and bytes(hiding) != bytes(IPv6ExtHdrFragment())
    inner = message if hiding is None else hiding.copy() / message
    made = Ether(src=mac, dst="33:33:00:00:00:01") / IPv6(src=src, dst="ff02::1", hlim=255) / inner
    ours = mac == MINE and claimed <= {*own, "::"} and kind not in ("pose", "redirect")
    return [
        Sent(
            bytes(made),
            f"nd {kind}",
            ours or (hides and mac == MINE and src == own[0]),
            hides=hides,
        )
    ]


Ends = tuple[str, str, Address, Address]
"""Where a frame is led: destination and source MAC, source and destination address."""


def permitted(a: Plan, sent: Sent) -> Ends | None:
    """The one place to where the packet may be led."""
    n = OWNERS.get(sent.dport or 0)
    if not sent.own or not sent.may_enter:
        return None
    if sent.destination == a.alias:
        if n is None or sent.what == "echo":
            return NOBODY, NOBODY, a.native_view, a.loopback
        return guest_mac(n), ALIAS_MAC, a.view, a.link if n == ME else a.others_link
    if OWNERS.get(sent.sport or 0) != ME:
        return None
    answers: dict[Address | None, Ends] = {
        a.view: (MINE, ALIAS_MAC, a.alias, a.link),
        a.others_view: (guest_mac(VICTIM), ALIAS_MAC, a.alias, a.others_link),
        a.native_source: (NOBODY, NOBODY, a.loopback, a.loopback),
    }
    return answers.get(sent.destination)


def ends(made: bytes) -> Ends:
    macs = made[:6].hex(":"), made[6:12].hex(":")
    at, size = (26, 4) if made[12:14] == b"\x08\x00" else (22, 16)
    source, destination = (ip_address(made[i : i + size]) for i in (at, at + size))
    return *macs, source, destination


def holds(guest: Guest, a: Plan, sent: Sent) -> None:
    """What is not the guest's own is dropped without a trace; the rest goes where it may."""
    before = guest.remembered()
    verdict, after = guest.send(sent.frame)
    assert verdict in (PASSED, DROPPED, REDIRECTED)
    if not sent.own or sent.hides:
        assert verdict == DROPPED, sent
        assert sent.own or guest.remembered() == before, sent
    elif verdict == REDIRECTED and sent.destination:
        assert ends(after) == permitted(a, sent), sent
    elif verdict == REDIRECTED:  # an answer to ARP or neighbor discovery
        assert after.startswith(bytes.fromhex((MINE + ALIAS_MAC).replace(":", ""))), sent
    elif verdict == PASSED:
        assert after == sent.frame, sent
        as_it_is = [a.pod_link, a.others_link, None]
        if sent.what == "echo" and guest.datapath == "steer":
            as_it_is.append(a.alias)
        assert sent.destination in as_it_is, sent


KINDS = (packets, packets, errors, errors, pings, in_fragments, in_fragments, arp, discovery)


def whatever_it_sends(guest: Guest, family: Family, searches: bool = False) -> None:
    """With `searches`, always the same frames, many, and any that shows a hole will do."""
    a = Plan(family, ME, VICTIM)
    kinds = tuple(k for k in KINDS if k is not (arp if family is Family.IPV6 else discovery))

    @given(data=st.data())
    def tried(data: st.DataObject) -> None:
        guest.forget()
        for sent in data.draw(st.sampled_from(kinds))(data, a):
            holds(guest, a, sent)

    few = settings(max_examples=round(300 / min(slowness(), 10)), deadline=None)
    many = settings(
        max_examples=2000,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        print_blob=False,
    )
    (many if searches else few)(tried)()


@DATAPATHS
@FAMILIES
def test_whatever_a_guest_sends_goes_where_it_may_or_nowhere(datapath: str, family: Family) -> None:
    with at_port(datapath) as guest:
        whatever_it_sends(guest, family)
        guest.forget()


# --- what its errors do to natives ----------------------------------------------------------


@pytest.fixture(scope="module", params=REASONS)
def bench(build: Build, request: pytest.FixtureRequest) -> Bench:
    return Bench(build(f"guest-{request.param}", datapath=request.param))


def mac_of_pod(bench: Bench) -> str:
    """That guest 1 finds at the pod's own address."""
    with namespaces.open_socket(bench.netns(0)) as ip:
        links = {link.get("ifname"): link.get("address") for link in ip.get_links()}
    return str(links.get("g1", POD_MAC))


def sends_error(bench: Bench, destination: Address, error: Packet, quoted: Packet) -> None:
    """Guest 1, to an address of the pod, about a packet among natives."""
    family = Family(f"ipv{destination.version}")
    lo = loopback(family)
    mac = mac_of_pod(bench) if destination == pod_link(family) else ALIAS_MAC
    packet = ip(guest_link(family, 1), destination) / error / ip(lo, lo) / quoted
    bench.raw(1, frame(packet, src=guest_mac(1), dst=mac))


@contextmanager
def undisturbed(bench: Bench, family: Family) -> Iterator[tuple[socket.socket, int]]:
    """A native's flow with another native goes on. Gives the client and its port."""
    lo = str(loopback(family))
    with (
        bench.serve(0, family, Transport.UDP) as server,
        bench.open(0, family, Transport.UDP) as client,
    ):
        client.connect((lo, PORTS[0]))
        yield client, client.getsockname()[1]
        time.sleep(0.1)
        client.send(b"!")
        assert server.recv(100) == b"!"


def mtu_of_loopback(bench: Bench, family: Family) -> int:
    """What the pod's kernel takes for it, without asking a route that has its own."""
    with bench.open(0, family, Transport.UDP) as asks:
        asks.connect((str(loopback(family)), PORTS[0]))
        level, option = (0, 14) if family is Family.IPV4 else (socket.IPPROTO_IPV6, 24)
        return asks.getsockopt(level, option)  # IP_MTU, IPV6_MTU


ENDS = pytest.mark.parametrize("at", ["pod", "alias"])


@ENDS
@FAMILIES
def test_a_guest_refuses_no_flow_among_natives(bench: Bench, family: Family, at: str) -> None:
    """It would have to know the ports, of which a flow of UDP has one of 28 thousand."""
    destination = alias(family) if at == "alias" else pod_link(family)
    refused = ICMP(type=3, code=3) if family is Family.IPV4 else ICMPv6DestUnreach(code=4)
    with undisturbed(bench, family) as (_, port):
        sends_error(bench, destination, refused, udp(port, PORTS[0]))


def test_a_guest_disturbs_no_flow_among_natives_by_unknown_errors(bench: Bench) -> None:
    """RFC 4443, section 2.4: errors are all types below 128. Only who asks for errors hears."""
    with undisturbed(bench, Family.IPV6) as (client, port):
        client.setsockopt(socket.IPPROTO_IPV6, 25, 1)  # IPV6_RECVERR
        error = ICMPv6Unknown(type=100) / Raw(bytes(4))
        sends_error(bench, alias(Family.IPV6), error, udp(port, PORTS[0]))


@ENDS
@FAMILIES
def test_a_guest_tells_natives_no_path_mtu_of_loopback(
    bench: Bench, family: Family, at: str
) -> None:
    destination = alias(family) if at == "alias" else pod_link(family)
    before = mtu_of_loopback(bench, family)
    with bench.serve(0, family, Transport.UDP):  # somebody's socket, of a port that is known
        sends_error(bench, destination, too_big(family), udp(PORTS[0], 9))
        time.sleep(0.1)
    try:
        assert mtu_of_loopback(bench, family) == before
    finally:
        namespaces.inside(bench.netns(0), partial(forget_path_mtus, family))


def forget_path_mtus(family: Family) -> None:
    flush = ["ip", f"-{4 if family is Family.IPV4 else 6}", "route", "flush", "cache"]
    subprocess.run(flush, check=True, capture_output=True)


# --- checks that are taken out --------------------------------------------------------------

Check = Callable[[Guest], object]


def anything(*families: Family) -> Check:
    """The property above, in some families."""

    def check(guest: Guest) -> None:
        for family in families:
            whatever_it_sends(guest, family, searches=True)

    return check


V4, V6 = anything(Family.IPV4), anything(Family.IPV6)


def hidden(name: str) -> Check:
    test = test_neighbors.test_no_header_hides_neighbor_discovery
    return partial(test, hiding=test_neighbors.HIDING[name])


def in_plan(test: Callable[[Programs, Plan], object]) -> Check:
    return lambda guest: test(guest, Plan(Family.IPV4))


@dataclass(frozen=True)
class Mutation:
    """One check that can be switched off: OFF() in the new text is then true."""

    name: str
    file: str
    original: str
    mutated: str
    missed_by: tuple[Check, ...]
    """Each of them must fail."""

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


def without(name: str, file: str, condition: str, *missed_by: Check) -> Mutation:
    """A condition that refuses packets, and then does not hold."""
    return Mutation(name, file, condition, f"(!OFF() && ({condition}))", missed_by)


SPOOFING = test_capture.TestSpoofing()
FRAGMENTS = test_capture.TestFragments()

MUTATIONS = [
    Mutation(
        "any MAC",
        "pod.h",
        "if (!has_source_mac(skb, port.n))",
        "if (!OFF() && !has_source_mac(skb, port.n))",
        (V4, V6, in_plan(SPOOFING.test_guest_sends_only_from_its_own_mac)),
    ),
    without("another guest's source", "pod.h", "p->source.n != port.n", V4, V6),
    without(
        "a source that is no guest's",
        "pod.h",
        "p->source.kind != LINK",
        V4,
        V6,
        in_plan(SPOOFING.test_guest_sends_only_from_its_own_address),
    ),
    without(
        "extension headers",
        "pod.h",
        "p->v6 && is_extension(p->l4_protocol)",
        V6,
        hidden("hop-by-hop"),
        hidden("fragment-of-options"),
    ),
    Mutation(
        "fragments of neighbor discovery",
        "pod.h",
        "return p->is_fragment ? drop(",
        "return OFF() && p->is_fragment ? TC_ACT_OK : p->is_fragment ? drop(",
        (V6, hidden("first-fragment")),
    ),
    without(
        "first fragments too short to tell",
        "pod.h",
        "p->v6 && p->is_fragment && p->fault == FAULT_TRUNCATED",
        test_neighbors.test_a_first_fragment_too_short_to_tell_is_dropped,
    ),
    without(
        "router advertisements",
        "pod.h",
        "p->icmp_type == ND_ROUTER_ADVERTISEMENT",
        V6,
        test_neighbors.test_guest_may_not_pose_as_a_router,
    ),
    without(
        "redirects",
        "pod.h",
        "p->icmp_type == ND_REDIRECT",
        V6,
        test_neighbors.test_guest_may_not_pose_as_a_router,
    ),
    Mutation(
        "discovery that claims any address",
        "pod.h",
        "port.n) || !may_claim(says.claimed, port.n)",
        "port.n) || (!OFF() && !may_claim(says.claimed, port.n))",
        (
            V6,
            test_neighbors.test_neighbor_discovery_claims_only_the_guests_own_addresses,
            partial(
                test_neighbors.test_nobody_claims_the_link_local_address_of_another,
                op="advertises",
            ),
        ),
    ),
    without("discovery from any source", "pod.h", "!may_claim(p->source, port.n)", V6),
    Mutation(
        "ARP that claims any address",
        "pod.h",
        "own_mac || !may_claim(says.claimed, port.n)",
        "own_mac || (!OFF() && !may_claim(says.claimed, port.n))",
        (V4, partial(test_neighbors.test_arp_claims_only_the_guests_own_address, op=1)),
    ),
    without(
        "ARP that claims another MAC",
        "pod.h",
        "!says.own_mac",
        V4,
        partial(test_neighbors.test_arp_claims_only_the_guests_own_address, op=2),
    ),
    Mutation(
        "addresses of any guest claimed",
        "pod.h",
        "&& claimed.n == n)",
        "&& (OFF() || claimed.n == n))",
        (V4, V6),
    ),
    Mutation(
        "advertisements claim nothing",
        "neighbor.h",
        "p->icmp_type == ND_ADVERTISEMENT ||",
        "(!OFF() && p->icmp_type == ND_ADVERTISEMENT) ||",
        (V6,),
    ),
    without(
        "path MTU",
        "pod.h",
        "tells_path_mtu(p)",
        V4,
        V6,
        *(partial(test_headers.test_a_guest_tells_loopback_no_path_mtu, family=f) for f in Family),
    ),
    Mutation(
        "answers to natives from any port",
        "pod.h",
        "case NATIVE_SOURCE_ODD:\n\t\tif (owner_of(",
        "case NATIVE_SOURCE_ODD:\n\t\tif (!OFF() && owner_of(",
        (V4, V6, in_plan(SPOOFING.test_guest_answers_only_from_ports_that_it_owns)),
    ),
    Mutation(
        "answers to guests from any port",
        "pod.h",
        "n = p->destination.n;\n\t\tif (owner_of(",
        "n = p->destination.n;\n\t\tif (!OFF() && owner_of(",
        (V4, V6, in_plan(SPOOFING.test_guest_answers_only_from_ports_that_it_owns)),
    ),
    Mutation(
        "answers to flows that nobody began",
        "maps.h",
        "return !number || entry->number != number;",
        "return !OFF() && (!number || entry->number != number);",
        (V4, V6),
    ),
    without(
        "a guest's own address on lo",
        "pod.h",
        "is_guests_own(p.source)",
        in_plan(SPOOFING.test_natives_send_in_no_guests_name_by_lo),
    ),
    without(
        "a guest's port on lo",
        "pod.h",
        "owner_of(port.slot, p->protocol, p->source_port) >= 0",
        in_plan(SPOOFING.test_natives_answer_from_no_guests_port),
    ),
    without(
        "the native view of a guest on lo",
        "pod.h",
        "p.source.kind == NATIVE_VIEW && !p.rst && !p.is_icmp_error",
        in_plan(SPOOFING.test_natives_send_in_no_guests_name_by_lo),
    ),
    Mutation(
        "addresses that exist on lo only",
        "addresses.h",
        "\tcase NATIVE_VIEW:\n\t\treturn true;",
        "\t\treturn true;\n\tcase NATIVE_VIEW:\n\t\treturn !OFF();",
        (V4, V6, in_plan(SPOOFING.test_guest_reaches_no_loopback_address)),
    ),
    Mutation(
        "packets with a fault",
        "pod.h",
        "return p->fault == FAULT_NONE ? ADMITTED",
        "return p->fault == FAULT_NONE || OFF() ? ADMITTED",
        (V4, V6),
    ),
    Mutation(
        "traces of forged fragments",
        "packet.h",
        "p->source.kind == LINK && p->source.n == guest",
        "OFF() || (p->source.kind == LINK && p->source.n == guest)",
        (V4, V6),
    ),
    Mutation(
        "fragments without their first",
        "packet.h",
        "p->is_later_fragment ? FAULT_ORPHAN",
        "p->is_later_fragment && !OFF() ? FAULT_ORPHAN",
        (V4, V6),
    ),
    without(
        "IPv4 errors about the flows of others",
        "packet.h",
        "!quotes_its_receiver(p, &ip.saddr)",
        partial(
            test_headers.test_an_error_is_about_what_its_receiver_sent_to_its_sender,
            family=Family.IPV4,
        ),
    ),
    without(
        "IPv6 errors about the flows of others",
        "packet.h",
        "!quotes_its_receiver(p, (void *)&ip.saddr)",
        partial(
            test_headers.test_an_error_is_about_what_its_receiver_sent_to_its_sender,
            family=Family.IPV6,
        ),
    ),
    Mutation(
        "errors about later fragments",
        "packet.h",
        "if (ip.frag_off & bpf_htons(IP_FRAGMENT_OFFSET))",
        "if (!OFF() && ip.frag_off & bpf_htons(IP_FRAGMENT_OFFSET))",
        (V4, test_headers.test_an_error_about_a_later_fragment_has_no_ports),
    ),
    without(
        "errors about protocols without ports",
        "packet.h",
        "p->protocol != IPPROTO_TCP && p->protocol != IPPROTO_UDP",
        V4,
        V6,
    ),
    Mutation(
        "fast path from any MAC",
        "pod.h",
        "skb->vlan_present || !has_source_mac(skb, port.n)",
        "skb->vlan_present || (!OFF() && !has_source_mac(skb, port.n))",
        (V4, V6),
    ),
    without("fast path from any address", "pod.h", "!has_source(p, port.n)", V4, V6),
    Mutation(
        "fast answers to natives from any port",
        "pod.h",
        "return n == port.n ? TO_NATIVE",
        "return n == port.n || OFF() ? TO_NATIVE",
        (in_plan(SPOOFING.test_guest_answers_only_from_ports_that_it_owns),),
    ),
    Mutation(
        "fast answers to guests from any port",
        "pod.h",
        "case GUEST_VIEW:\n\t\tif (owner_of(",
        "case GUEST_VIEW:\n\t\tif (!OFF() && owner_of(",
        (in_plan(SPOOFING.test_guest_answers_only_from_ports_that_it_owns),),
    ),
    Mutation(
        "fast fragments",
        "packet.h",
        "ip->frag_off & bpf_htons(",
        "!OFF() && ip->frag_off & bpf_htons(",
        (in_plan(FRAGMENTS.test_later_ones_follow_the_first_between_guests),),
    ),
    without(
        "fast from any address on lo",
        "pod.h",
        "source_of(&p).kind != LOOPBACK",
        in_plan(SPOOFING.test_natives_send_in_no_guests_name_by_lo),
    ),
]

SWITCH = """\
BPF_ARRAY(switched_off, u32, 1);

static __always_inline bool is_off(u32 number)
{
	u32 zero = 0, *off = switched_off.lookup(&zero);

	return off && *off == number;
}

"""


def with_switches(folder: Path) -> None:
    """Change the programs so that each check can be switched off by its number.

    Each must be there once. Programs that no test here runs are left out.
    """
    pristine = {mutation.file: (folder / mutation.file).read_text() for mutation in MUTATIONS}
    texts = dict(pristine)
    for number, mutation in enumerate(MUTATIONS, 1):
        changed = f"{mutation}: bpf/{mutation.file} is not as this test knows it"
        assert pristine[mutation.file].count(mutation.original) == 1, changed
        assert texts[mutation.file].count(mutation.original) == 1, changed
        mutated = mutation.mutated.replace("OFF()", f"is_off({number})")
        texts[mutation.file] = texts[mutation.file].replace(mutation.original, mutated)
    for file, text in texts.items():
        (folder / file).write_text(text)
    entries = re.compile(r"^\w+_PROGRAM\((?!port_ingress|lo_egress)\w+\)\n", re.MULTILINE)
    main = folder / "steer.c"
    main.write_text(SWITCH + entries.sub("", main.read_text()))


@pytest.fixture(scope="module")
def mutants() -> Iterator[Guest]:
    """The programs, changed so, and loaded."""
    with ExitStack() as stack:
        with variant("steer", with_switches):
            guest = stack.enter_context(at_port("steer"))
        yield guest


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_no_check_can_be_taken_out_unnoticed(mutants: Guest, mutation: Mutation) -> None:
    with mutants.without(MUTATIONS.index(mutation) + 1):
        for check in mutation.missed_by:
            mutants.forget()
            with pytest.raises(AssertionError):
                check(mutants)


def test_nothing_is_missed_where_all_checks_are_in(mutants: Guest) -> None:
    """The control: else it could be the switches that those tests find."""
    for check in dict.fromkeys(check for mutation in MUTATIONS for check in mutation.missed_by):
        mutants.forget()
        check(mutants)
