"""What natives in a pod with `capture` see of who they talk to: `localhost`, as of any loopback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from testbed.host import process
from testbed.model import addresses
from testbed.model.terms import Family, Transport

from .sockets import PORTS, Bench, Pair, localhost, wait_until

pytestmark = pytest.mark.root

FAMILIES = pytest.mark.parametrize("family", Family, ids=str)

NATIVE = """
import socket, sys
host, port, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
domain = socket.AF_INET6 if ":" in host else socket.AF_INET
udp = kind == "udp"
with socket.socket(domain, socket.SOCK_DGRAM if udp else socket.SOCK_STREAM) as s:
    if domain == socket.AF_INET6:
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind((host, port))
    if udp:
        print("ready", flush=True)
        data, peer = s.recvfrom(100)
        s.sendto(data, peer)
        print(peer[0])
    else:
        s.listen()
        print("ready", flush=True)
        c, peer = s.accept()
        with c:
            c.sendall(c.recv(100))
            print(peer[0], c.getpeername()[0], c.getsockname()[0], *map(str, (
                peer[1] == c.getpeername()[1], c.getsockname()[1] == port)))
"""


def start(bench: Bench, output: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A server among the pod's natives; their sockets know their cgroup from the start."""
    server = process.spawn(
        [sys.executable, "-c", NATIVE, *arguments],
        cgroup=bench.pod.cgroup,
        netns=bench.pod.netns,
        output=output,
    )
    wait_until(lambda: output.read_text() == "ready\n" or server.poll() is not None, "it listens")
    return server


def exchange(bench: Bench, guest: int, family: Family, transport: Transport) -> None:
    with bench.open(guest, family, transport) as client:
        client.connect((localhost(guest, family), PORTS[0]))
        client.send(b"hello")
        assert client.recv(100) == b"hello"


@pytest.mark.parametrize("guest", [1, 2])
@pytest.mark.parametrize(
    ("listens", "family", "shown"),
    [
        ("127.0.0.1", Family.IPV4, "127.0.0.1"),
        ("0.0.0.0", Family.IPV4, "127.0.0.1"),
        ("::1", Family.IPV6, "::1"),
        ("::", Family.IPV4, "::ffff:127.0.0.1"),
        ("::", Family.IPV6, "::1"),
    ],
)
def test_natives_see_guests_tcp_as_localhost(
    bench: Bench, tmp_path: Path, guest: int, listens: str, family: Family, shown: str
) -> None:
    """accept, getpeername and getsockname; the ports are the real ones."""
    server = start(bench, tmp_path / "out", listens, str(PORTS[0]), "tcp")
    exchange(bench, guest, family, Transport.TCP)
    assert server.wait(5) == 0
    assert (tmp_path / "out").read_text().split()[1:] == [shown] * 3 + ["True"] * 2


@pytest.mark.parametrize("guest", [1, 2])
@FAMILIES
def test_natives_answer_udp_to_the_guest_that_asked(
    bench: Bench, tmp_path: Path, guest: int, family: Family
) -> None:
    server = start(bench, tmp_path / "out", str(addresses.loopback(family)), str(PORTS[0]), "udp")
    exchange(bench, guest, family, Transport.UDP)
    assert server.wait(5) == 0
    assert (tmp_path / "out").read_text().split()[1:] == [str(addresses.native_view(family, guest))]


@FAMILIES
def test_native_clients_are_at_loopback_on_both_ends(bench: Bench, family: Family) -> None:
    loopback = str(addresses.loopback(family))
    with bench.connected(Pair(0, 1), family) as (near, far):
        assert (near.getsockname()[0], near.getpeername()[:2]) == (loopback, (loopback, PORTS[1]))
        assert far.getpeername()[0] == str(addresses.native_source(family))
        assert far.getpeername()[1] == near.getsockname()[1]


@FAMILIES
def test_two_guests_with_the_same_source_port_are_two_clients(bench: Bench, family: Family) -> None:
    """And a native server answers each, over UDP unconnected."""
    with bench.serve(0, family, Transport.UDP, str(addresses.loopback(family))) as server:
        clients = {n: bench.open(n, family, Transport.UDP) for n in (1, 2)}
        for n, client in clients.items():
            client.bind((str(addresses.guest_link(family, n)), 7000))
            client.connect((localhost(n, family), PORTS[0]))
            client.send(f"of guest {n}".encode())
        for _ in clients:
            data, peer = server.recvfrom(100)
            server.sendto(data, peer)
        for n, client in clients.items():
            with client:
                assert client.recv(100) == f"of guest {n}".encode()
