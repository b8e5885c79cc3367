"""Guests that somebody else boots, on taps with the filters of others: attached to a pod as any.

    outside ── eth0 ─┊─ theirs, which tie the two together ─┊─ tap0 ── a machine of somebody else's

A namespace is in the place of the machine. It has the pod's addresses, or others, and no part in
the address plan but `localhost` in its hosts file.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from ipaddress import ip_address, ip_interface
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from testbed import agent, bpf
from testbed.conformance.stage import PORTS
from testbed.host import cgroups, namespaces, netlink
from testbed.host.ledger import Owner
from testbed.host.process import run as execute
from testbed.host.process import spawn
from testbed.images import compose, kernels, rootfs
from testbed.images.rootfs import Process
from testbed.model.addresses import (
    CONTROL_PORT,
    alias,
    guest_link,
    guest_view,
    loopback,
    native_source,
    native_view,
    pod_link,
)
from testbed.model.terms import Family, Transport
from testbed.pods import control
from testbed.runtimes import linux
from testbed.runtimes.vm.qemu import Vm
from tests.children import ending

from .commands import run, there
from .sockets import opened, send_frames, served, wait_until

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not bpf.has_tcx(), reason="Linux 6.6"),
]

FAMILIES = pytest.mark.parametrize("family", Family, ids=str)
TRANSPORTS = pytest.mark.parametrize("transport", Transport, ids=str)

PORT, NATIVE_PORT, OTHER_PORT = 9000, 9001, 9002
POD = {Family.IPV4: "10.3.0.9", Family.IPV6: "fd03::9"}
OUTSIDE = {Family.IPV4: "10.3.0.1", Family.IPV6: "fd03::1"}
OTHER = {Family.IPV4: "10.0.2.2", Family.IPV6: "fd99::2"}
LENGTH = {Family.IPV4: 24, Family.IPV6: 64}
GUEST = f"""
- name: guest
  image: "host:busybox"
  ports:
  - {{containerPort: {PORT}}}
  - {{containerPort: {PORT}, protocol: UDP}}
  - {{containerPort: {OTHER_PORT}}}
  readinessProbe: {{tcpSocket: {{port: {OTHER_PORT}}}}}
"""
"""The probe keeps others than the tests from dialing its port."""


@dataclass
class Theirs:
    """A pod of somebody else's with a machine on a tap, and the network outside."""

    owner: Owner
    pod: str
    pattern: str
    """How tap and uplink are tied: `mirred` (urunc, Kata's tcfilter) or `bridge` (KubeVirt)."""
    machines: int = 0
    netns: dict[int, str] = field(default_factory=dict)
    """Namespaces of machines."""

    @property
    def path(self) -> Path:
        return namespaces.NETNS / self.pod

    @property
    def outside(self) -> str:
        return f"{self.pod}-outside"

    def ip(self, netns: str, *words: str) -> str:
        return execute(["ip", "-n", netns, *words], "ip")

    def tc(self, *words: str) -> str:
        return execute(["tc", "-n", self.pod, *words], "tc")

    def boot(self, addresses: dict[Family, str] = POD, tap: str = "tap0") -> str:
        """Boot a machine with these addresses, on a new tap; returns its namespace."""
        self.machines += 1
        netns = f"{self.pod}-vm{self.machines}"
        namespaces.create(self.owner, netns).close()
        self.ip(self.pod, *f"link add {tap} up type veth peer name eth0 netns {netns}".split())
        if self.pattern == "mirred":
            self.ip(netns, "link", "set", "eth0", "address", self.mac(self.pod))
        self.ip(netns, "link", "set", "eth0", "up")
        for family, address in addresses.items():
            _add(self, netns, address, family)
            gateway = OUTSIDE[family]
            self.ip(netns, f"-{family[3]}", *f"route add {gateway} dev eth0".split())
            self.ip(netns, f"-{family[3]}", *f"route add default via {gateway}".split())
        self.tie(tap)
        return netns

    def tie(self, tap: str = "tap0") -> None:
        """Tie tap and uplink together."""
        if self.pattern == "bridge":
            self.ip(self.pod, "link", "set", tap, "master", "k6t-eth0")
        else:
            for one, other in (("eth0", tap), (tap, "eth0")):
                self.tc(*f"qdisc replace dev {one} ingress".split())
                match = (
                    f"filter replace dev {one} parent ffff: prio 10 handle 800::800 protocol all"
                )
                self.tc(
                    *match.split(),
                    *f"u32 match u32 0 0 action mirred egress redirect dev {other}".split(),
                )

    def mac(self, netns: str, link: str = "eth0") -> str:
        with namespaces.open_socket(netns) as ip:
            return str(ip.get_links(ifname=link)[0].get("address"))

    def programs(self, link: str) -> list[str]:
        with namespaces.open_socket(self.pod) as ip:
            return bpf.running_tc(self.pod, ip, netlink.links(self.pod)[link])


def _add(theirs: Theirs, netns: str, address: str, family: Family) -> None:
    option = ["nodad"] if family is Family.IPV6 else []
    words = f"addr add {address}/{LENGTH[family]} dev eth0".split()
    theirs.ip(netns, *words, *option)


@pytest.fixture(params=["mirred", "bridge"])
def theirs(request: pytest.FixtureRequest) -> Iterator[Theirs]:
    with Owner() as owner:
        made = Theirs(owner, f"tb-{owner.id}-theirs", request.param)
        for netns in (made.pod, made.outside):
            namespaces.create(owner, netns).close()
        peer = f"type veth peer name eth0 netns {made.outside}"
        made.ip(made.pod, *f"link add eth0 up {peer}".split())
        made.ip(made.outside, "link", "set", "eth0", "up")
        for family in Family:
            _add(made, made.outside, OUTSIDE[family], family)
            if made.pattern == "mirred":
                _add(made, made.pod, POD[family], family)
        if made.pattern == "bridge":
            made.ip(made.pod, *["link", "add", "k6t-eth0", "up", "type", "bridge"])
            made.ip(made.pod, *["addr", "add", "169.254.75.10/32", "dev", "k6t-eth0"])
            made.ip(made.pod, *["link", "set", "eth0", "master", "k6t-eth0"])
        yield made


def talk(
    client: tuple[str, str], server: tuple[str, int], family: Family, transport: Transport
) -> str:
    """A question of 3000 bytes and its answer; returns whom the server sees.

    `client`: namespace, address to dial. `server`: namespace, port.
    """
    question = b"?" * 3000
    with (
        served(server[0], family, transport, server[1]) as serving,
        opened(client[0], family, transport) as near,
    ):
        near.connect((client[1], server[1]))
        near.send(question)
        if transport is Transport.UDP:
            asked, seen = serving.recvfrom(5000)
            serving.sendto(asked, seen)
            assert near.recv(5000) == question
        else:
            far, seen = serving.accept()
            with far:
                near.shutdown(socket.SHUT_WR)
                with far.makefile("rb") as file:
                    far.sendall(file.read())
            with near.makefile("rb") as file:
                assert file.read() == question
    return str(seen[0])


def attach(manifest: Callable[..., Path], theirs: Theirs, *options: str, tap: str = "tap0") -> None:
    file = manifest(GUEST, runtime="standin")
    run("attach", "--netns", theirs.path, "--tap", tap, "--wait", "0", *options, file, status=1)


@pytest.mark.parametrize("datapath", ["steer", "capture"])
def test_it_shares_localhost_and_keeps_its_own_network(
    manifest: Callable[..., Path], name: str, theirs: Theirs, datapath: str
) -> None:
    guest = theirs.boot()
    before = theirs.programs("tap0")
    attach(manifest, theirs, "--datapath", datapath)
    assert len(theirs.programs("tap0")) == len(before) + 2
    for family in Family:
        for transport in Transport:
            to_alias = guest, str(alias(family))
            seen = talk(to_alias, (theirs.pod, NATIVE_PORT), family, transport)
            assert seen == str(native_view(family, 1)) or transport is Transport.TCP
            talk((theirs.pod, str(loopback(family))), (guest, PORT), family, transport)
            talk(to_alias, (guest, PORT), family, transport)  # itself
            seen = talk((guest, OUTSIDE[family]), (theirs.outside, NATIVE_PORT), family, transport)
            assert seen == POD[family]
            seen = talk((theirs.outside, POD[family]), (guest, PORT), family, transport)
            assert seen == OUTSIDE[family]
    run("detach", name)
    assert theirs.programs("tap0") == before
    assert {"g1", "t1"}.isdisjoint(netlink.links(theirs.pod))
    assert not there(name)
    talk((guest, OUTSIDE[Family.IPV4]), (theirs.outside, PORT), Family.IPV4, Transport.TCP)


def test_a_tap_may_come_late_and_a_machine_be_another(
    manifest: Callable[..., Path], name: str, theirs: Theirs
) -> None:
    attach(manifest, theirs)
    for addresses in (POD, OTHER):
        guest = theirs.boot(addresses)
        wait_until(lambda: "ingress:tap_ingress" in theirs.programs("tap0"), "it is connected")
        for family in Family:
            talk((guest, str(alias(family))), (theirs.pod, NATIVE_PORT), family, Transport.TCP)
            with (
                served(guest, family, Transport.TCP, PORT) as server,
                opened(theirs.pod, family, Transport.TCP) as client,
            ):
                client.connect((str(loopback(family)), PORT))
                server.accept()[0].close()
        with (
            served(guest, Family.IPV4, Transport.TCP, PORT) as server,
            opened(theirs.pod, Family.IPV4, Transport.TCP) as client,
        ):
            client.connect((str(loopback(Family.IPV4)), PORT))
            with server.accept()[0]:
                theirs.ip(theirs.pod, "link", "del", "tap0")
                with pytest.raises(ConnectionError):
                    client.recv(1)
        with opened(theirs.pod, Family.IPV4, Transport.TCP) as client:
            with pytest.raises(ConnectionRefusedError):
                client.connect((str(loopback(Family.IPV4)), PORT))


def test_a_machine_that_says_nothing_is_reached_at_what_is_told_or_what_the_pod_has(
    manifest: Callable[..., Path], name: str, theirs: Theirs
) -> None:
    """Behind a bridge, the pod's own stack has no addresses."""
    guest = theirs.boot()
    theirs.ip(guest, *["link", "set", "eth0", "arp", "off"])
    told = [theirs.mac(guest), *POD.values()] if theirs.pattern == "bridge" else []
    attach(manifest, theirs, tap=",".join(("tap0", *told)))
    for family in Family:
        talk((theirs.pod, str(loopback(family))), (guest, PORT), family, Transport.TCP)


@FAMILIES
@TRANSPORTS
def test_it_is_heard_from_its_own_address_alone(
    manifest: Callable[..., Path],
    name: str,
    theirs: Theirs,
    family: Family,
    transport: Transport,
) -> None:
    guest = theirs.boot()
    attach(manifest, theirs)
    to = str(alias(family))
    talk((guest, to), (theirs.pod, NATIVE_PORT), family, transport)
    _add(theirs, guest, OTHER[family], family)
    with (
        served(theirs.pod, family, transport, NATIVE_PORT) as server,
        opened(guest, family, transport) as client,
    ):
        client.bind((OTHER[family], 0))
        client.settimeout(0.3)
        try:
            client.connect((to, NATIVE_PORT))
            client.send(b"?")
        except TimeoutError:
            pass
        server.settimeout(0.3)
        with pytest.raises(TimeoutError):
            server.accept() if transport is Transport.TCP else server.recv(1)
    [tap] = control.describe(name)["taps"]
    assert tap["refused"]["packets"] > 0
    assert POD[family] in tap["addresses"]
    assert OTHER[family] not in tap["addresses"]


@FAMILIES
def test_nobody_outside_passes_for_one_inside(
    manifest: Callable[..., Path], name: str, theirs: Theirs, family: Family
) -> None:
    """Frames reach the machine past the pod's own stack."""
    guest = theirs.boot()
    attach(manifest, theirs)
    talk((guest, str(alias(family))), (theirs.pod, NATIVE_PORT), family, Transport.UDP)
    layer = IP if family is Family.IPV4 else IPv6
    inside = (alias, native_source, pod_link, partial(guest_view, n=1), partial(guest_link, n=2))
    frames = [
        bytes(
            Ether(dst=theirs.mac(guest), src=theirs.mac(theirs.outside))
            / layer(src=source, dst=POD[family])
            / UDP(dport=PORT)
            / text
        )
        for source, text in (
            *((str(address(family)), b"bad") for address in inside),
            (OUTSIDE[family], b"good"),
        )
    ]
    twice = bytes.fromhex("8100 0000 8100 0000")  # tags that mean no VLAN
    frames[:0] = [frame[:12] + twice + frame[12:] for frame in frames[: len(inside)]]
    with served(guest, family, Transport.UDP, PORT) as server:
        send_frames(theirs.outside, "eth0", *frames)
        assert server.recv(100) == b"good"
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.recv(100)


def unreachable(family: Family, to: str, source_port: int, port: int) -> list[Packet]:
    """Packets that say that this port of another is unreachable: plain, in fragments, and, for
    IPv6, behind an extension header.
    """
    ends: dict[str, Any] = {"src": OUTSIDE[family], "dst": POD[family]}
    if family is Family.IPV4:
        error = IP(**ends) / ICMP(type=3, code=3) / IP(src=POD[family], dst=to)
        whole = bytes(error / UDP(sport=source_port, dport=port))
        message = whole[20:]
        first = IP(**ends, proto=1, id=7, flags="MF") / message[:8]
        return [IP(whole), first, IP(**ends, proto=1, id=7, frag=1) / message[8:]]
    error6 = IPv6(**ends) / ICMPv6DestUnreach(code=4) / IPv6(src=POD[family], dst=to)
    whole = bytes(error6 / UDP(sport=source_port, dport=port))
    message = whole[40:]
    return [
        IPv6(whole),
        IPv6(**ends) / IPv6ExtHdrFragment(nh=58, id=7, m=1) / message[:8],
        IPv6(**ends) / IPv6ExtHdrFragment(nh=58, id=7, offset=1) / message[8:],
        IPv6(**ends) / IPv6ExtHdrDestOpt(nh=58) / message,
        IPv6(**ends) / IPv6ExtHdrHopByHop(nh=58) / message,
    ]


@FAMILIES
def test_nobody_outside_tells_errors_about_flows_inside(
    manifest: Callable[..., Path], name: str, theirs: Theirs, family: Family
) -> None:
    """Their quotations are all by which a guest knows the socket."""
    guest, inside, port = theirs.boot(), str(alias(family)), NATIVE_PORT
    attach(manifest, theirs)
    talk((guest, inside), (theirs.pod, port), family, Transport.UDP)
    with ExitStack() as stack:
        about = {}
        for to in (inside, OUTSIDE[family]):
            about[to] = stack.enter_context(opened(guest, family, Transport.UDP))
            about[to].connect((to, port))
        head = Ether(dst=theirs.mac(guest), src=theirs.mac(theirs.outside))
        for to, client in about.items():
            errors = unreachable(family, to, client.getsockname()[1], port)
            shown = errors if to == inside else errors[:1]
            send_frames(theirs.outside, "eth0", *(bytes(head / error) for error in shown))
        with pytest.raises(ConnectionRefusedError):
            about[OUTSIDE[family]].recv(1)
        assert about[inside].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


def test_a_process_of_the_namespace_sends_nothing_for_the_guest(
    manifest: Callable[..., Path], name: str, theirs: Theirs
) -> None:
    """Nor by the other end of its link, so it makes no guest that is down pass for up."""
    theirs.boot()
    attach(manifest, theirs)
    theirs.ip(theirs.pod, *["link", "del", "tap0"])
    wait_until(lambda: not control.describe(name)["taps"][0]["connected"], "it is gone")
    with opened(theirs.pod, Family.IPV4, Transport.UDP) as process:
        process.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"t1\0")
        process.sendto(b"?", (str(alias(Family.IPV4)), NATIVE_PORT))
    with opened(theirs.pod, Family.IPV4, Transport.TCP) as client:
        with pytest.raises(ConnectionRefusedError):
            client.connect((str(loopback(Family.IPV4)), PORT))


def test_a_tap_that_was_renamed_is_no_longer_the_guests(
    manifest: Callable[..., Path], name: str, theirs: Theirs
) -> None:
    old = theirs.boot()
    attach(manifest, theirs)
    to = str(alias(Family.IPV4))
    talk((old, to), (theirs.pod, NATIVE_PORT), Family.IPV4, Transport.UDP)
    theirs.ip(theirs.pod, *["link", "set", "tap0", "down", "name", "old0"])
    theirs.ip(theirs.pod, *["link", "set", "old0", "up"])
    new = theirs.boot()
    wait_until(lambda: "ingress:tap_ingress" in theirs.programs("tap0"), "it is connected")
    wait_until(lambda: "ingress:tap_ingress" not in theirs.programs("old0"), "the other is not")
    talk((new, to), (theirs.pod, NATIVE_PORT), Family.IPV4, Transport.UDP)
    with (
        served(theirs.pod, Family.IPV4, Transport.UDP, NATIVE_PORT) as server,
        opened(old, Family.IPV4, Transport.UDP) as client,
    ):
        client.sendto(b"?", (to, NATIVE_PORT))
        server.settimeout(0.3)
        with pytest.raises(TimeoutError):
            server.recv(1)


def test_programs_that_somebody_removes_are_attached_again(
    manifest: Callable[..., Path], name: str, theirs: Theirs
) -> None:
    guest = theirs.boot()
    attach(manifest, theirs)
    talk((guest, str(alias(Family.IPV4))), (theirs.pod, NATIVE_PORT), Family.IPV4, Transport.TCP)
    index = netlink.links(theirs.pod)["tap0"]
    bpf.detach_tcx(theirs.pod, index, bpf.INGRESS, "tap_ingress")
    theirs.tc(*["qdisc", "del", "dev", "t1", "clsact"])
    wait_until(lambda: "ingress:tap_ingress" in theirs.programs("tap0"), "the tap's", 10)
    wait_until(lambda: "ingress:inner_ingress" in theirs.programs("t1"), "the link's", 10)
    talk((theirs.pod, str(loopback(Family.IPV4))), (guest, PORT), Family.IPV4, Transport.TCP)


@pytest.mark.parametrize("taps", [["lo"], ["g1"], ["eth0"], ["tap0", "tap0"]])
@pytest.mark.parametrize("theirs", ["mirred"], indirect=True)
def test_what_is_no_tap_is_refused(
    manifest: Callable[..., Path], name: str, theirs: Theirs, taps: list[str]
) -> None:
    guests = "".join(GUEST.replace("name: guest", f"name: guest{n}") for n in range(len(taps)))
    if len(taps) > 1:
        guests = re.sub("ports:.*?readiness", "readiness", guests, flags=re.DOTALL)
    options = [word for tap in taps for word in ("--tap", tap)]
    run("attach", "--netns", theirs.path, *options, manifest(guests, runtime="standin"), status=3)
    assert not there(name)


def test_a_guest_that_a_killed_supervisor_left_is_taken_over(
    manifest: Callable[..., Path], name: str, theirs: Theirs
) -> None:
    guest = theirs.boot()
    attach(manifest, theirs)
    talk((guest, str(alias(Family.IPV4))), (theirs.pod, NATIVE_PORT), Family.IPV4, Transport.TCP)
    os.kill(control.status(name)["supervisor"], signal.SIGKILL)
    wait_until(lambda: control.status(name)["supervisor"] is None, "it is dead")
    run("adopt", name, "--wait", "0", status=1)
    talk((theirs.pod, str(loopback(Family.IPV4))), (guest, PORT), Family.IPV4, Transport.TCP)
    run("detach", name)
    assert "ingress:tap_ingress" not in theirs.programs("tap0")


@pytest.mark.parametrize("theirs", ["mirred"], indirect=True)
def test_the_conformance_suite_runs_against_it(name: str, theirs: Theirs, tmp_path: Path) -> None:
    """The natives are in the pod's cgroup, so they take the fast path."""
    guest, ports = theirs.boot(), PORTS["guest1"]
    listed = [
        {"containerPort": port, "protocol": str(transport).upper()}
        for port in ports
        for transport in Transport
    ]
    container = {
        "name": "guest",
        "image": "somebody-elses",
        "ports": listed,
        "readinessProbe": {"tcpSocket": {"port": CONTROL_PORT}},
    }
    metadata = {"name": name, "annotations": {"testbed/tap.guest": "tap0"}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}
    file = tmp_path / "pod.yaml"
    file.write_text(json.dumps({**pod, "spec": {"containers": [container]}}))
    cgroup = cgroups.create(theirs.owner, f"tb-{theirs.owner.id}")
    hosts = {compose.hosts_file(patched=True): "/etc/hosts"}
    own = cgroups.create(theirs.owner, f"tb-{theirs.owner.id}-vm")
    with ending(spawn([agent.build()], cgroup=own, netns=guest, binds=hosts)):
        run("attach", "--netns", theirs.path, "--cgroup", cgroup, file)
        checks = (
            w
            for check in ("connect", "refused", "datagram", "half-close", "port-forward")
            for w in ("--check", check)
        )
        where = (
            "--netns",
            theirs.path,
            "--cgroup",
            cgroup,
            "--control",
            str(guest_link(Family.IPV4, 1)),
        )
        found = json.loads(run("conformance", "--json", *where, *checks).stdout)
    assert {result["status"] for result in found} == {"pass"}
    assert {result["pair"] for result in found} >= {"native-guest", "guest-native", "guest-self"}
    assert control.describe(name)["counters"]["steered"]["packets"] > 0


@pytest.mark.parametrize("theirs", ["mirred"], indirect=True)
def test_a_virtual_machine_of_somebody_elses(
    manifest: Callable[..., Path], name: str, theirs: Theirs, tmp_path: Path
) -> None:
    """As urunc runs one: QEMU in the pod, with the pod's addresses."""
    theirs.boot()  # for the filters
    theirs.ip(theirs.pod, *["link", "del", "tap0"])
    attach(manifest, theirs)
    theirs.ip(theirs.pod, *["tuntap", "add", "tap0", "mode", "tap"])
    theirs.ip(theirs.pod, *["link", "set", "tap0", "up"])
    theirs.tie()
    dials = f"busybox nc localhost {NATIVE_PORT}"
    script = f"busybox nc -ll -p {PORT} -e cat & exec busybox nc -ll -p {OTHER_PORT} -e {dials}"
    kernel, root = kernels.linux_kernel(), rootfs.unpack("host:")
    process = Process(("/bin/sh",), ("-c", script), (f"PATH={rootfs.PATH}",))
    image = compose.compose_linux(replace(root, process=process), kernel)
    machine = Vm(
        "tcg",
        "tap0",
        theirs.mac(theirs.pod),
        tuple(ip_interface(f"{POD[f]}/{LENGTH[f]}") for f in Family),
        tmp_path / "console",
        gateways=tuple(ip_address(OUTSIDE[f]) for f in Family),
    )
    cgroup = cgroups.create(theirs.owner, f"tb-{theirs.owner.id}")
    command = linux.command(machine, kernel, image)
    with ending(spawn(command, cgroup=cgroup, netns=theirs.pod)):

        def answers(netns: str, to: str) -> bool:
            with (
                suppress(OSError),
                opened(netns, Family(f"ipv{ip_address(to).version}"), Transport.TCP) as near,
            ):
                near.connect((to, PORT))
                near.sendall(b"hello")
                return near.recv(5) == b"hello"
            return False

        for family in Family:
            at = ((theirs.outside, POD[family]), (theirs.pod, str(loopback(family))))
            wait_until(partial(answers, *at[0]), "it serves outside", 60)
            wait_until(partial(answers, *at[1]), "it serves at localhost")
        with served(theirs.pod, Family.IPV4, Transport.TCP, NATIVE_PORT) as native:
            with opened(theirs.pod, Family.IPV4, Transport.TCP) as asking:
                asking.connect(
                    (str(loopback(Family.IPV4)), OTHER_PORT)
                )  # it dials `localhost` for who dials it there
                dialed, _ = native.accept()
                with dialed:
                    asking.sendall(b"hello")
                    assert dialed.recv(5) == b"hello"
