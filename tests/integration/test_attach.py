"""Guests that join a pod which somebody else made, and leave it as it was."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from scapy.layers.inet6 import ICMPv6ND_RA, ICMPv6NDOptPrefixInfo, IPv6
from scapy.layers.l2 import Ether

from testbed import bpf, datapaths
from testbed.datapaths.ebpf import loopback_side
from testbed.host import cgroups, namespaces, netlink
from testbed.host.ledger import Owner
from testbed.images import kernels
from testbed.model.addresses import alias, loopback
from testbed.model.errors import Error
from testbed.model.terms import Family, Runtime
from testbed.pods import control, kubernetes
from testbed.pods.sandbox import Sandbox
from tests.children import ending

from .commands import run, there, workload
from .sockets import dial, echoes, send_frames, wait_until

pytestmark = pytest.mark.root

PORT, NATIVE_PORT = 9000, 9001
GUEST = f"""
- name: guest
  image: "host:busybox"
  args: [nc, -ll, -p, "{PORT}", -e, cat]
  ports: [{{containerPort: {PORT}}}]
"""
REDIS = f"""
- name: guest
  image: redis
  args: [--save, "", --dir, /tmp, --port, "{PORT}"]
  ports: [{{containerPort: {PORT}}}]
"""
SETTINGS: dict[str, int | str] = {
    "net/ipv4/ip_local_reserved_ports": "4000-4001",
    "net/ipv4/conf/all/rp_filter": 1,
    "net/ipv6/conf/default/disable_ipv6": 1,
}
"""What pods of others may have."""


@dataclass
class Theirs:
    """A pod of somebody else's: a namespace with a link, and a cgroup."""

    owner: Owner
    name: str
    cgroup: Path

    @property
    def netns(self) -> Path:
        return namespaces.NETNS / self.name

    def run(self, *words: str) -> str:
        command = ["nsenter", f"--net={self.netns}", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def state(self) -> list[str]:
        """All that attaching could change."""
        routes = (("ip", family, "route", "show", "table", "all") for family in ("-4", "-6"))
        asked = (
            ("ip", "addr"),
            *routes,
            ("tc", "qdisc"),
            ("ss", "-lntuH"),
            ("nft", "list", "ruleset"),
        )
        return [*(self.run(*words) for words in asked), *namespaces.inside(self.name, _settings)]

    def connect(self, family: Family) -> socket.socket:
        """To the guest, at `localhost`."""
        return dial(self.name, str(loopback(family)), PORT)

    def serve(self, family: Family, host: str, port: int) -> socket.socket:
        af = family.domain
        return namespaces.inside(self.name, lambda: socket.create_server((host, port), family=af))


def _settings() -> list[str]:
    """All sysctls of the network stack that can be read."""
    files = (p for f in ("ipv4", "ipv6") for p in sorted(Path("/proc/sys/net", f).rglob("*")))
    readable = (p for p in files if p.is_file() and p.stat().st_mode & 0o400)
    return [f"{p} {p.read_text()}" for p in readable if p.name != "stable_secret"]


@pytest.fixture
def theirs(tmp_path: Path) -> Iterator[Theirs]:
    with Owner() as owner:
        theirs = Theirs(owner, f"tb-{owner.id}-theirs", cgroups.create(owner, f"tb-{owner.id}"))
        with namespaces.create(owner, theirs.name) as ip:
            netlink.create_link(
                ip, "eth0", kind="veth", state="up", peer={"ifname": "peer", "state": "up"}
            )
        namespaces.set_sysctls(theirs.name, SETTINGS)
        theirs.run("ip", "addr", "add", "10.1.2.3/24", "dev", "eth0")
        yield theirs


def dials(netns: str, family: Family, native: socket.socket) -> bool:
    """Whether a guest reaches a native server at what `localhost` is to it."""
    with dial(netns, str(alias(family)), NATIVE_PORT) as guest:
        accepted, _ = native.accept()
        with accepted:
            guest.sendall(b"hello")
            return accepted.recv(5) == b"hello"


@pytest.mark.parametrize("datapath", ["steer", "capture"])
def test_guests_join_and_leave_all_as_it_was(
    manifest: Callable[..., Path], name: str, theirs: Theirs, datapath: str
) -> None:
    before = theirs.state()
    run(
        "attach",
        "--netns",
        theirs.netns,
        "--datapath",
        datapath,
        manifest(GUEST, runtime="standin"),
    )
    guest_netns = f"{control.status(name)['netns']}-g1"
    for family in Family:
        assert echoes(theirs.connect(family))
        with theirs.serve(family, str(loopback(family)), NATIVE_PORT) as native:
            assert dials(guest_netns, family, native)
    assert name in run("ps").stdout
    assert str(theirs.netns) in run("describe", name).stdout
    assert theirs.state() != before
    run("detach", name)
    assert theirs.state() == before
    assert not there(name)


@pytest.mark.parametrize("datapath", ["steer", "capture"])
def test_an_osv_guest_joins_and_leaves_all_as_it_was(
    manifest: Callable[..., Path], name: str, theirs: Theirs, datapath: str
) -> None:
    """With links beside its tap, by which IPv6 reaches it."""
    if kernels.find_osv(flavor="ipv6", download=False) is None:
        pytest.skip("no OSv kernel of flavor ipv6 in the cache")
    before = theirs.state()
    file = manifest(REDIS, runtime="osv")
    run("attach", "--netns", theirs.netns, "--datapath", datapath, file)

    def answers(family: Family) -> bool:
        with suppress(OSError), theirs.connect(family) as client:
            client.sendall(b"ECHO " + bytes(60000).replace(b"\0", b"x") + b"\r\n")
            with client.makefile("rb") as answer:
                return answer.readline() == b"$60000\r\n" and len(answer.read(60000)) == 60000
        return False

    for family in Family:  # its IPv6 address is usable a second later than that of IPv4
        wait_until(partial(answers, family), f"it answers in {family}")
    run("detach", name)
    assert theirs.state() == before


@dataclass
class Outside:
    """A network of the pod's: the namespace at its other end, and the addresses at both ends."""

    netns: str
    pod: dict[Family, str]
    here: dict[Family, str]

    def serve(self, family: Family) -> socket.socket:
        at = ("", NATIVE_PORT)
        return namespaces.inside(self.netns, lambda: socket.create_server(at, family=family.domain))


def outside(theirs: Theirs, n: int) -> Outside:
    """Connect the pod to a network by a link eth1n; it is the default route of the others."""
    made = Outside(
        f"{theirs.name}-outside{n}",
        {Family.IPV4: f"10.{n}.9.3", Family.IPV6: f"fd{n:02}::3"},
        {Family.IPV4: f"10.{n}.9.1", Family.IPV6: f"fd{n:02}::1"},
    )
    namespaces.create(theirs.owner, made.netns).close()
    theirs.run(*f"ip link add eth1{n} up type veth peer name eth0 netns {made.netns}".split())
    theirs.run(*f"ip -n {made.netns} link set eth0 up".split())
    namespaces.set_sysctls(theirs.name, {f"net/ipv6/conf/eth1{n}/disable_ipv6": 0})
    for family, length in ((Family.IPV4, 24), (Family.IPV6, 64)):
        option = "nodad" if family is Family.IPV6 else "brd +"
        for enter, link, address in (
            ((), f"eth1{n}", made.pod[family]),
            (("-n", made.netns), "eth0", made.here[family]),
        ):
            theirs.run("ip", *enter, *f"addr add {address}/{length} dev {link} {option}".split())
        theirs.run(
            *f"ip -n {made.netns} -{family[3]} route add default via {made.pod[family]}".split()
        )
    return made


@pytest.mark.parametrize("datapath", ["steer", "capture"])
@pytest.mark.parametrize("forwards", [False, True])
def test_guests_are_whole_members_of_the_pod(
    manifest: Callable[..., Path], name: str, theirs: Theirs, datapath: str, forwards: bool
) -> None:
    """They have its addresses outside, both ways, and it becomes no router that it was not."""
    near, far = outside(theirs, 1), outside(theirs, 2)
    theirs.run(*f"sysctl -qw net.ipv4.ip_forward={int(forwards)}".split())
    theirs.run(*f"sysctl -qw net.ipv6.conf.all.forwarding={int(forwards)}".split())
    before = theirs.state()
    attach = ("attach", "--netns", theirs.netns, "--datapath", datapath)
    run(*attach, manifest(GUEST, runtime="standin"))
    guest = f"{control.status(name)['netns']}-g1"
    for n in range(2):
        for family in Family:
            for network in (near, far):
                pod, loop = network.pod[family], str(loopback(family))
                for netns in (network.netns, theirs.name, guest):
                    assert echoes(dial(netns, pod, PORT))
                assert echoes(dial(theirs.name, pod, PORT, source=loop))
                with theirs.serve(family, "", NATIVE_PORT):
                    dial(guest, pod, NATIVE_PORT).close()
                with network.serve(family) as server:
                    with dial(guest, network.here[family], NATIVE_PORT):
                        asking, seen = server.accept()
                        asking.close()
                assert seen[0] == pod
            passed = False
            with far.serve(family), suppress(TimeoutError):
                dial(near.netns, far.here[family], NATIVE_PORT, 1).close()
                passed = True
            assert passed == forwards
        if not n:  # again, with a supervisor that took over
            os.kill(control.status(name)["supervisor"], signal.SIGKILL)
            wait_until(lambda: control.status(name)["supervisor"] is None, "it is dead")
            run("adopt", name)
    run("detach", name)
    assert theirs.state() == before


def advertisement(prefix: str) -> bytes:
    """A router's, as a frame."""
    information = ICMPv6NDOptPrefixInfo(prefix=prefix, prefixlen=64)
    packet = IPv6(src="fe80::77", dst="ff02::1", hlim=255) / ICMPv6ND_RA() / information
    return bytes(Ether(src="02:00:00:00:00:77", dst="33:33:00:00:00:01") / packet)


def test_what_a_router_advertised_is_kept_and_taken_further(
    manifest: Callable[..., Path], name: str, theirs: Theirs
) -> None:
    near = outside(theirs, 1)
    namespaces.set_sysctls(theirs.name, {"net/ipv6/conf/eth11/accept_ra": 1})

    def advertise(prefix: str) -> None:
        send_frames(near.netns, "eth0", advertisement(prefix))

    def routes() -> str:
        return theirs.run("ip", "-6", "route")

    advertise("fd05::")
    wait_until(lambda: "default via fe80::77" in routes(), "the first is taken")
    run("attach", "--netns", theirs.netns, manifest(GUEST, runtime="standin"))
    assert "default via fe80::77" in routes()
    advertise("fd06::")
    wait_until(lambda: "fd06::/64" in routes(), "the second is taken")
    run("detach", name)
    assert "default via fe80::77" in routes()


def test_a_link_that_takes_no_advertisements_takes_none_while_guests_join(
    manifest: Callable[..., Path], name: str, theirs: Theirs
) -> None:
    near = outside(theirs, 1)
    namespaces.set_sysctls(theirs.name, {"net/ipv6/conf/eth11/accept_ra": 0})
    joined = threading.Event()

    def flood() -> None:
        while not joined.is_set():
            send_frames(near.netns, "eth0", *[advertisement("fd05::")] * 100)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        run("attach", "--netns", theirs.netns, manifest(GUEST, runtime="standin"))
    finally:
        joined.set()
        thread.join()
    assert "proto ra" not in theirs.run("ip", "-6", "route")


def test_a_link_that_loses_its_ipv6_keeps_nothing_from_being_undone(
    manifest: Callable[..., Path], name: str, theirs: Theirs
) -> None:
    forwarding = "net/ipv4/conf/all/forwarding"
    namespaces.set_sysctls(theirs.name, {forwarding: 0})
    run("attach", "--netns", theirs.netns, manifest(GUEST, runtime="standin"))
    theirs.run(*["ip", "link", "set", "eth0", "mtu", "1000"])
    run("detach", name)
    assert namespaces.sysctls(theirs.name, forwarding) == {forwarding: "0"}
    assert theirs.run("nft", "list", "ruleset") == ""


def test_processes_of_a_cgroup_that_is_named_go_past_lo(
    manifest: Callable[..., Path], name: str, theirs: Theirs
) -> None:
    run(
        "attach",
        "--netns",
        theirs.netns,
        "--cgroup",
        theirs.cgroup,
        manifest(GUEST, runtime="standin"),
    )
    script = 'echo $$ > "$0/cgroup.procs" && echo hello | exec nc -w 1 127.0.0.1 9000'
    assert theirs.run("busybox", "sh", "-c", script, str(theirs.cgroup)) == "hello\n"
    assert echoes(theirs.connect(Family.IPV4))
    assert control.describe(name)["counters"]["steered"]["packets"] == 1
    namespaces.create(theirs.owner, f"{theirs.name}-2").close()
    file = manifest(GUEST, runtime="standin")
    file.write_text(file.read_text().replace(name, f"{name}-2"))
    refused = run(
        "attach", "--netns", f"{theirs.netns}-2", "--cgroup", theirs.cgroup, file, status=3
    )
    assert "is the cgroup of another pod" in refused.stderr
    assert control.describe(name)["counters"]["steered"]["packets"] == 1
    run("down", name)
    assert theirs.cgroup.is_dir()


def test_a_pod_known_by_a_process_of_it_is_kept_after_the_supervisor_s_death(
    manifest: Callable[..., Path], name: str
) -> None:
    script = "ip link set lo up && echo ready && exec sleep 1000"
    command = ["unshare", "--net", "sh", "-c", script]
    with ending(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) as one:
        assert one.stdout
        assert one.stdout.readline() == "ready\n"
        attach = (
            "attach",
            "--netns",
            f"/proc/{one.pid}/ns/net",
            manifest(GUEST, runtime="standin"),
        )
        run(*attach)
        os.kill(control.status(name)["supervisor"], signal.SIGKILL)
        wait_until(lambda: control.status(name)["supervisor"] is None, "it is dead")
        run(*attach)
        assert workload(name, "guest")["restarts"] == 0
    run("detach", name)
    assert not there(name)


def test_what_can_never_be_joined_is_refused(
    manifest: Callable[..., Path], theirs: Theirs, tmp_path: Path
) -> None:
    [guests] = kubernetes.read([manifest(GUEST, runtime="standin")], lambda: Runtime.STANDIN)
    [natives] = kubernetes.read([manifest(GUEST)], lambda: Runtime.STANDIN)
    joined = Sandbox(theirs.netns)
    for sandbox, spec, datapath, problem in (
        (Sandbox(Path("/etc/passwd")), guests, "steer", "/etc/passwd is no network namespace"),
        (Sandbox(Path("/proc/self/ns/net")), guests, "steer", "own network namespace"),
        (Sandbox(theirs.netns, tmp_path), guests, "steer", f"{tmp_path} is no cgroup"),
        (joined, guests, "dnat", "dnat needs a pod that it has for itself"),
        (joined, natives, "steer", "guest would be native to"),
    ):
        with pytest.raises(Error, match=problem):
            sandbox.check(spec, datapaths.get(datapath))
    joined.check(guests, datapaths.get("steer"))


def test_what_cannot_be_joined_is_left_alone(
    manifest: Callable[..., Path], name: str, theirs: Theirs
) -> None:
    before = theirs.state()
    attach = ("attach", "--netns", theirs.netns, manifest(GUEST, runtime="standin"))
    with theirs.serve(Family.IPV4, "0.0.0.0", PORT):
        refused = run(*attach, status=3).stderr
    assert f"port {PORT} is guest 1's, but a native process has it" in refused
    assert name not in control.names()
    assert theirs.state() == before


def test_a_pod_without_ipv6_at_lo_has_it_while_guests_are_there(
    manifest: Callable[..., Path], name: str, theirs: Theirs
) -> None:
    namespaces.set_sysctls(theirs.name, {"net/ipv6/conf/lo/disable_ipv6": 1})
    before = theirs.state()
    run("attach", "--netns", theirs.netns, manifest(GUEST, runtime="standin"))
    for family in Family:
        with theirs.connect(family) as client:
            assert echoes(client)
    run("detach", name)
    assert theirs.state() == before


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("ip addr add 169.254.79.9/32 dev eth0", "an address 169.254.79.9/32"),
        ("ip route add fd77::78:0/112 dev lo", "a route to fd77::78:0/112"),
        ("ip link add g1 type bridge", "a link g1"),
        ("tc qdisc add dev lo clsact", "programs on lo"),
        ("ip link set lo down", "lo is down"),
    ],
)
def test_what_is_in_the_way_is_named(theirs: Theirs, command: str, problem: str) -> None:
    theirs.run(*command.split())
    before = theirs.state()
    with pytest.raises(Error, match=problem), theirs.owner.part() as part:
        Sandbox(theirs.netns).join(part, f"{theirs.name}-joined", {"g1"})
    assert theirs.state() == before


def test_programs_that_lo_runs_by_itself_are_in_the_way(theirs: Theirs) -> None:
    if not bpf.has_tcx():
        pytest.skip("Linux 6.6")
    programs, name = bpf.load("probe", theirs.owner), f"{theirs.name}-joined"
    programs.make_calls(theirs.owner, 1)
    with theirs.owner.part() as part, namespaces.hold(part, name, theirs.netns):
        with programs.entry("redirect_peer", 1, 0) as entry:
            bpf.attach_tcx(name, loopback_side.LO_IFINDEX, bpf.INGRESS, entry)
    programs.close()
    with pytest.raises(Error, match="programs on lo"), theirs.owner.part() as joining:
        Sandbox(theirs.netns).join(joining, f"{theirs.name}-again", {"g1"})
