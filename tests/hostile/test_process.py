"""An unprivileged process of the pod: another user's, without any capability.

It is in the pod's namespace and cgroup, as natives are, and tries to get what is a guest's.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from textwrap import dedent

import pytest

from testbed.datapaths.ebpf.attachment import EbpfAttachment
from testbed.host import architecture, namespaces
from testbed.host.facts import slowness
from testbed.model import addresses
from testbed.model.addresses import Address
from testbed.model.terms import Family, Transport
from tests.integration.conftest import Build
from tests.integration.sockets import PORTS, Bench, localhost

pytestmark = pytest.mark.root

FAMILIES = pytest.mark.parametrize("family", Family, ids=str)
TRANSPORTS = pytest.mark.parametrize("transport", Transport, ids=str)
NOBODY = 65534
"""User and group of a process that owns nothing."""
QUIET_S = 0.3
"""How long nothing may come."""

PRELUDE = """
import ctypes, errno, os, socket, sys

FREEBIND4, FREEBIND6 = 15, 78

def tried(call):
    "Name of the error that a call ends with."
    try:
        call()
    except OSError as e:
        return errno.errorcode[e.errno]
    return "done"

def opened(transport, host):
    return socket.socket(
        socket.AF_INET6 if ":" in host else socket.AF_INET,
        socket.SOCK_STREAM if transport == "tcp" else socket.SOCK_DGRAM,
    )
"""


@pytest.fixture(scope="module", params=["steer", "capture"])
def bench(build: Build, request: pytest.FixtureRequest) -> Bench:
    return Bench(build(f"process-{request.param}", datapath=request.param))


def command(bench: Bench, script: str, *arguments: object) -> list[str]:
    """Words of a command that runs a Python script as such a process of the pod."""
    # The file itself: nobody may not enter the folder of a virtual environment.
    python = str(Path(sys.executable).resolve())
    return [
        *("sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(bench.pod.cgroup)),
        *("nsenter", f"--net={namespaces.NETNS / bench.netns(0)}"),
        *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
        *("--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"),
        *(
            python,
            "-I",
            "-c",
            PRELUDE + dedent(script),
            *map(str, arguments),
        ),
    ]


def run(bench: Bench, script: str, *arguments: object) -> list[str]:
    """Lines that such a script prints."""
    words = command(bench, script, *arguments)
    done = subprocess.run(words, capture_output=True, text=True, cwd="/", timeout=60 * slowness())
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_it_has_no_privileges(bench: Bench) -> None:
    """The control: with privileges the kernel would let it."""
    lines = run(bench, "print(open('/proc/self/status').read(), os.readlink('/proc/self/ns/net'))")
    fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert fields["Uid"].split() == [str(NOBODY)] * 4
    assert {fields[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    of_pod = namespaces.inside(bench.netns(0), Path("/proc/thread-self/ns/net").readlink)
    assert lines[-1].strip() == str(of_pod)


# --- ports ----------------------------------------------------------------------------------

BIND = """
transport, host, device, *ports = sys.argv[1:]
for port in map(int, ports):
    for bits in range(8):
        with opened(transport, host) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, bits & 1)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, bits >> 1 & 1)
            if ":" in host and not host.startswith("::ffff:"):
                s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, bits >> 2)
            s.setsockopt(socket.SOL_SOCKET, 62, int(device))  # SO_BINDTOIFINDEX
            print(tried(lambda: s.bind((host, port))))
"""
"""With each combination of options."""
EVERYWHERE = ["0.0.0.0", "::"]
AT_LO = [*EVERYWHERE, "127.0.0.1", "127.7.7.7", "127.77.0.1", "::1", "::ffff:127.0.0.1"]


def binds_no_port_of_a_guest(bench: Bench, transport: Transport, host: str, device: int) -> None:
    assert set(run(bench, BIND, transport, host, device, PORTS[1], PORTS[2])) == {"EADDRINUSE"}
    assert set(run(bench, BIND, transport, host, device, PORTS[0])) == {"done"}  # the control


@TRANSPORTS
@pytest.mark.parametrize("host", AT_LO)
def test_it_binds_no_port_of_a_guest(bench: Bench, transport: Transport, host: str) -> None:
    binds_no_port_of_a_guest(bench, transport, host, device=0)


@TRANSPORTS
@pytest.mark.parametrize("host", AT_LO)
def test_it_binds_no_port_of_a_guest_at_the_device_lo(
    bench: Bench, transport: Transport, host: str
) -> None:
    """Which takes no privilege since Linux 5.7."""
    binds_no_port_of_a_guest(bench, transport, host, device=1)


@TRANSPORTS
@pytest.mark.parametrize("host", EVERYWHERE)
def test_it_binds_no_port_of_a_guest_at_another_device(
    bench: Bench, transport: Transport, host: str
) -> None:
    """By connect(AF_UNSPEC) it would then have the port without a device."""
    devices = [index for index, _ in namespaces.inside(bench.netns(0), socket.if_nameindex)]
    for device in devices:
        binds_no_port_of_a_guest(bench, transport, host, device)
    missing = max(devices) + 1000
    said = set(run(bench, BIND, transport, host, missing, PORTS[1]))
    assert said == {"EADDRINUSE"}, f"{said} at a device that does not exist"


# --- names ----------------------------------------------------------------------------------


def test_it_makes_no_packets_of_its_own(bench: Bench) -> None:
    """Neither IP packets nor frames; nor does it take addresses that are not the pod's, in IPv4."""
    script = """
    for family, kind, protocol in (
        (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW),
        (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
        (socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6),
        (socket.AF_PACKET, socket.SOCK_RAW, 0x0300),
        (socket.AF_PACKET, socket.SOCK_DGRAM, 0x0300),
    ):
        print(tried(lambda: socket.socket(family, kind, protocol)))
    for option, level in ((socket.IP_TRANSPARENT, 0), (75, socket.IPPROTO_IPV6)):
        with opened("udp", "::" if level else "") as s:
            print(tried(lambda: s.setsockopt(level, option, 1)))
    """
    assert set(run(bench, script)) == {"EPERM"}


SEND = """
transport, source, host, port = sys.argv[1:]
with opened(transport, host) as s:
    s.settimeout(0.3)
    level, option = (socket.IPPROTO_IPV6, FREEBIND6) if ":" in host else (0, FREEBIND4)
    s.setsockopt(level, option, 1)
    s.bind((source, 7777))
    try:
        s.connect((host, int(port)))
        s.send(b"as guest 2")
    except OSError as e:
        print(e)
"""


@contextmanager
def quiet(server: socket.socket, transport: Transport) -> Iterator[None]:
    """Nothing comes."""
    yield
    server.settimeout(QUIET_S)
    heard = None
    with suppress(TimeoutError):
        if transport is Transport.UDP:
            _, heard = server.recvfrom(100)
        else:
            client, heard = server.accept()
            client.close()
    assert heard is None


ADDRESSES_OF_GUESTS = (addresses.native_view, addresses.guest_view, addresses.guest_link)
"""By which a guest is known: to natives, to other guests, and on its link."""


@FAMILIES
@TRANSPORTS
@pytest.mark.parametrize("known_as", ADDRESSES_OF_GUESTS)
def test_it_sends_nothing_in_a_guests_name(
    bench: Bench, family: Family, transport: Transport, known_as: Callable[[Family, int], Address]
) -> None:
    """Guest 2's, towards a native and guest 1. Sockets may be bound to addresses nobody has."""
    native, guest = localhost(0, family), addresses.guest_link(family, 1)
    for n, host in ((0, native), (1, native), (1, guest)):
        with bench.serve(n, family, transport) as server, quiet(server, transport):
            run(bench, SEND, transport, known_as(family, 2), host, PORTS[n])


MULTICAST = """
for index, _ in socket.if_nameindex():
    for s, group, option in (
        (opened("udp", "0.0.0.0"), "224.0.0.1", (socket.IPPROTO_IP, socket.IP_MULTICAST_IF)),
        (opened("udp", "::"), "ff02::1", (socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF)),
    ):
        number = index.to_bytes(4, sys.byteorder)
        s.setsockopt(*option, bytes(8) + number if "." in group else number)  # struct ip_mreqn
        print(tried(lambda: s.sendto(b"?", (group, 9))))
"""


@FAMILIES
def test_it_makes_no_dead_guest_pass_for_up(bench: Bench, family: Family) -> None:
    """The kernel hands multicast back at the link that it leaves by, where guests' packets come."""

    def is_refused() -> bool:
        bench.pod.attachment.guest_ended(1)  # its kernel lives, and may send something meanwhile
        assert "done" in run(bench, MULTICAST)
        with bench.open(0, family, Transport.TCP) as client, suppress(ConnectionRefusedError):
            client.connect((localhost(0, family), PORTS[1]))
            return False
        return True

    with bench.serve(1, family, Transport.TCP):
        assert any(is_refused() for _ in range(5))


# --- programs and other pods ----------------------------------------------------------------


def test_it_reads_and_changes_nothing_of_the_programs(bench: Bench) -> None:
    """Neither by their pins nor by number, nor what the kernel is told for them."""
    assert isinstance(bench.pod.attachment, EbpfAttachment)
    pins = bench.pod.attachment._programs.pins
    script = """
    number, *paths = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)

    def bpf(command, *words):
        attributes = (ctypes.c_uint32 * 32)(*words)
        if libc.syscall(int(number), command, attributes, 128) < 0:
            raise OSError(ctypes.get_errno(), "bpf")

    for path in paths[:-1]:
        name = ctypes.create_string_buffer(path.encode())
        at = ctypes.addressof(name)
        print(tried(lambda: os.stat(path)), tried(lambda: bpf(7, at & 0xffffffff, at >> 32)))
    for next_id, by_id in ((11, 13), (12, 14)):
        print(tried(lambda: bpf(next_id, 0)), tried(lambda: bpf(by_id, 1)))
    print(*(tried(lambda: os.open(path, os.O_WRONLY)) for path in paths[-1:] * 2))
    """
    sysctl = "/proc/sys/net/ipv4/ip_local_reserved_ports"
    found = [pins, pins / "map_owners", pins / "program_port_ingress"]
    said = run(bench, script, architecture.native().sys_bpf, *found, sysctl)
    assert {word for line in said for word in line.split()} <= {"EACCES", "EPERM"}


@pytest.fixture(scope="module")
def other(build: Build, bench: Bench) -> Bench:
    """Another pod on the same node, with the same programs, addresses and ports."""
    return Bench(build(f"{bench.pod.name}-other", datapath=bench.pod.datapath.name))


@FAMILIES
@TRANSPORTS
def test_it_reaches_no_guest_of_another_pod(
    bench: Bench, other: Bench, family: Family, transport: Transport
) -> None:
    """Nor does it enter its namespace, which has a name that everybody may read."""
    script = """
    transport, port, netns, *hosts = sys.argv[1:]
    with open(netns) as file:
        if ctypes.CDLL(None).setns(file.fileno(), 0) == 0:
            sys.exit("it is in")
    for host in hosts:
        with opened(transport, host) as s:
            s.settimeout(0.2)
            try:
                s.connect((host, int(port)))
                s.send(b"!")
            except OSError:
                pass
    """
    hosts = [
        localhost(0, family),
        *(f(family, 1) for f in (addresses.guest_link, addresses.native_view)),
        addresses.alias(family),
    ]
    with ExitStack() as stack:
        for n in (0, 1, 2):
            server = stack.enter_context(other.serve(n, family, transport))
            stack.enter_context(quiet(server, transport))
        for port in PORTS.values():
            run(bench, script, transport, port, namespaces.NETNS / other.netns(1), *hosts)
