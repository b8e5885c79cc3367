"""Unmodified programs in OSv, with the shim: literal 127.0.0.1 and ::1 are the pod's localhost.

In guests of both kernels, where they are in the cache: an agent composed with the shim makes single
socket calls, and real programs serve and dial as Debian ships them. The hosts file is the stock
one, so that nothing here is the hosts patch's doing.
"""

from __future__ import annotations

import http.server
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from testbed import datapaths, paths, runtimes
from testbed.agent import Agent
from testbed.host import namespaces, netlink, process
from testbed.host.ledger import Owner
from testbed.images import kernels
from testbed.model import addresses
from testbed.model.manifest import Manifest, Program, Workload
from testbed.model.terms import Family, Runtime, Transport
from testbed.pods.pod import Pod
from testbed.runtimes.interface import Options

from .sockets import PATIENCE_S, wait_until

pytestmark = pytest.mark.root

NATIVE_PORT = 6000
GUEST_PORTS = range(5001, 5060)
_ports = iter(GUEST_PORTS)
HTTP_PORT, IPERF_PORT = 8000, 5202
MESSAGES_PORT = 5100
SERVERS = {"redis": 6379, "nginx": 8080}
"""Guests whose port may be tried (for iperf3, a connection that closes at once is an error)."""

FAMILIES = pytest.mark.parametrize("family", Family, ids=str)
TRANSPORTS = pytest.mark.parametrize("transport", Transport, ids=str)


MESSAGES = r"""
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#define CHECK(what) if (!(what)) return perror(#what), printf("failed: %s\n", #what), 1

union name { struct sockaddr any; struct sockaddr_in v4; struct sockaddr_in6 v6; };

int main(int argc, char **argv)
{
    int family = atoi(argv[1]) == 4 ? AF_INET : AF_INET6, port = htons(atoi(argv[2]));
    union name self = { .any.sa_family = family }, from[2];
    struct mmsghdr out[2] = {}, in[2] = {};
    char text[2][8] = { "one", "two" }, got[2][8] = {};
    struct iovec out_iov[2], in_iov[2];
    socklen_t size = family == AF_INET ? sizeof(self.v4) : sizeof(self.v6), length = sizeof(*from);
    int fd = socket(family, SOCK_DGRAM, 0);

    self.v4.sin_port = port;
    inet_pton(family, argv[3], family == AF_INET ? (void *)&self.v4.sin_addr : &self.v6.sin6_addr);
    CHECK(!bind(fd, &self.any, size));
    for (int i = 0; i < 2; i++) {
        out_iov[i] = (struct iovec){ text[i], 4 };
        in_iov[i] = (struct iovec){ got[i], 8 };
        out[i].msg_hdr = (struct msghdr){ &self, size, &out_iov[i], 1 };
        in[i].msg_hdr = (struct msghdr){ &from[i], sizeof(*from), &in_iov[i], 1 };
    }
    /* Alone: until the kernel knows its neighbor it keeps one packet, and drops those before. */
    CHECK(sendto(fd, "six", 4, 0, &self.any, size) == 4);
    CHECK(recvfrom(fd, got[0], atoi(argv[4]), 0, &from[1].any, &length) == 4 && length == size);
    CHECK(!strcmp(got[0], "six") && from[1].v4.sin_port == port);
    CHECK(family == AF_INET6 || ((char *)&from[1].v4.sin_addr)[0] == 127);

    CHECK(sendmmsg(fd, out, 2, 0) == 2 && out[1].msg_len == 4);
    for (int n = 0; n < 2; n++)
        CHECK(recvmmsg(fd, in + n, 1, MSG_WAITFORONE, NULL) == 1);
    CHECK(!memcmp(text, got, sizeof(got)) && in[1].msg_len == 4);
    CHECK(in[0].msg_hdr.msg_namelen == size && !memcmp(&from[0], &from[1], size));

    /* To whom it was shown to be from: an answer, so it comes from localhost itself. */
    out->msg_hdr.msg_name = &from[0];
    CHECK(sendmsg(fd, &out->msg_hdr, 0) == 4);
    CHECK(recvmsg(fd, &in->msg_hdr, 0) == 4 && in->msg_hdr.msg_namelen == size);
    CHECK(!memcmp(&from[0], &self, size));
    puts("all messages arrived");
    return 0;
}
"""
"""A guest's datagrams to itself by every call that has an address; recvfrom is fortified."""


def manifest(folder: Path) -> Manifest:
    """One guest for each program."""
    agent = folder / "agent.toml"
    agent.write_text('program = "agent"\n')
    command = ["cc", "-xc", "-", "-O2", "-D_FORTIFY_SOURCE=2", "-D_GNU_SOURCE", "-pie", "-fPIE"]
    subprocess.run([*command, "-o", folder / "messages"], input=MESSAGES, text=True, check=True)
    shutil.copy(paths.OSV / "nginx.toml", folder)
    conf = (paths.OSV / "nginx.conf").read_text()
    (folder / "nginx.conf").write_text(conf.replace("listen 8080", "listen 127.0.0.1:8080"))
    messages = folder / "messages.toml"
    messages.write_text('program = "messages"\n')

    def guest(name: str, definition: Path, *ports: int, args: Sequence[str] = ()) -> Workload:
        return Workload(
            name,
            Runtime.OSV,
            tuple((t, p) for p in ports for t in Transport),
            program=Program(str(definition), args=tuple(args)),
        )

    guests = [
        guest("agent", agent, *GUEST_PORTS),
        guest("redis", paths.OSV / "redis.toml", SERVERS["redis"]),
        guest("nginx", folder / "nginx.toml", SERVERS["nginx"]),
        guest("iperf3", paths.OSV / "iperf3.toml", 5201),
        guest("curl", paths.OSV / "curl.toml"),
        guest(
            "curl-ipv6",
            paths.OSV / "curl.toml",
            args=["--silent", "--show-error", f"http://[::1]:{HTTP_PORT}/"],
        ),
        guest(
            "messages4", messages, MESSAGES_PORT, args=["4", str(MESSAGES_PORT), "127.0.0.1", "8"]
        ),
        guest(
            "messages6", messages, MESSAGES_PORT + 1, args=["6", str(MESSAGES_PORT + 1), "::1", "8"]
        ),
        guest(
            "iperf3-client",
            paths.OSV / "iperf3.toml",
            args=["--client", "127.0.0.1", "--port", str(IPERF_PORT), "--time", "1"],
        ),
    ]
    return Manifest(tuple(guests))


@pytest.fixture(
    scope="module",
    params=[("ipv6", "capture"), ("ipv6", "steer"), ("master", "capture")],
    ids="-".join,
)
def pod(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    """Built, with the agent started; programs are started by their tests."""
    flavor, name = request.param
    kernel = kernels.find_osv(flavor=flavor, download=False)
    if kernel is None or kernel.path.parent.name != f"osv-{flavor}":
        pytest.skip(f"no OSv kernel of flavor {flavor} in the cache")
    datapath = datapaths.get(name)
    folder = tmp_path_factory.mktemp("shim")
    osv = runtimes.prepare(Runtime.OSV, Options(osv_kernel=kernel.path, hosts_patch=False))
    with Owner() as owner:
        with Pod(owner, "shim", manifest(folder), datapath, {Runtime.OSV: osv}, folder) as pod:
            for_outsiders(pod)
            pod.start_workload("agent")
            pod.wait_ready("agent")
            yield pod


OUTSIDER = {Family.IPV4: ip_address("169.254.64.9"), Family.IPV6: ip_address("fd77::64:9")}
"""On the guests' link, and nobody of the pod."""


def for_outsiders(pod: Pod) -> None:
    """Let the pod's end of the first guest's link have the outsider's addresses, too."""
    wiring = pod.wiring()
    for address in OUTSIDER.values():
        link = wiring.uplink_ifindex or wiring.ports[0].ifindex
        netlink.add_address(pod.links.ip, link, address, address.max_prefixlen)


class Guest:
    """The agent's sockets, by number. Calls raise `OSError` as the guest's kernel says it."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def call(self, op: str, **keys: Any) -> dict[str, Any]:
        self._agent.ask(op=op, **keys)
        answer = self._agent.answer()
        if answer["errno"]:
            raise OSError(answer["errno"], op)
        return answer

    def socket(self, family: Family, transport: Transport) -> int:
        return int(self.call("socket", family=family, transport=transport)["socket"])

    def names(self, fd: int) -> tuple[str, str]:
        """Own and peer's address."""
        names = self.call("names", socket=fd)
        return names["own_address"], names["peer_address"]

    def exchange(self, fd: int, text: str) -> str:
        """Send, and what comes back."""
        self.call("send", socket=fd, text=text)
        return self.receive(fd)[0]

    def receive(self, fd: int) -> tuple[str, str, int]:
        """Text, and where a datagram came from."""
        got = self.call("receive", socket=fd, size=100, some=1, timeout_s=PATIENCE_S)
        return bytes.fromhex(got["hex"]).decode(), got["address"], got["port"]


@pytest.fixture
def guest(pod: Pod) -> Iterator[Guest]:
    with pod.agent("agent") as agent:
        yield Guest(agent)


@pytest.fixture
def port() -> int:
    """One that no test had: the agent closes its sockets a little after its orders end."""
    return next(_ports)


@pytest.fixture(autouse=True)
def family_is_spoken(request: pytest.FixtureRequest, pod: Pod) -> None:
    family = request.node.callspec.params.get("family")
    kernel_speaks = pod._runtimes[Runtime.OSV].families
    if family and family not in kernel_speaks:
        pytest.skip(f"this kernel has no {family}")


def native(pod: Pod, family: Family, transport: Transport) -> socket.socket:
    kind = socket.SOCK_STREAM if transport is Transport.TCP else socket.SOCK_DGRAM
    opened = namespaces.inside(pod.netns, lambda: socket.socket(family.domain, kind))
    opened.settimeout(PATIENCE_S)
    return opened


@contextmanager
def echo(pod: Pod, family: Family, transport: Transport) -> Iterator[None]:
    """A native that is bound to loopback and sends one message back."""
    with native(pod, family, transport) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((str(addresses.loopback(family)), NATIVE_PORT))

        def serve() -> None:
            if transport is Transport.UDP:
                server.sendto(*server.recvfrom(100))
                return
            accepted, _ = server.accept()
            with accepted:
                accepted.sendall(accepted.recv(100))

        if transport is Transport.TCP:
            server.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


# --- calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dialed"),
    [
        (Family.IPV4, "127.0.0.1"),
        (Family.IPV4, "127.0.0.9"),
        (Family.IPV4, "0.0.0.0"),
        (Family.IPV6, "::1"),
        (Family.IPV6, "::"),
    ],
)
@TRANSPORTS
def test_loopback_that_is_dialed_is_the_pods(
    pod: Pod, guest: Guest, family: Family, dialed: str, transport: Transport
) -> None:
    fd = guest.socket(family, transport)
    with echo(pod, family, transport):
        guest.call("connect", socket=fd, address=dialed, port=NATIVE_PORT, timeout_s=PATIENCE_S)
        assert guest.names(fd) == (str(addresses.loopback(family)),) * 2
        assert guest.exchange(fd, "hello") == "hello"


@FAMILIES
def test_datagram_to_loopback_is_answered_from_loopback(
    pod: Pod, guest: Guest, family: Family
) -> None:
    to = str(addresses.loopback(family))
    fd = guest.socket(family, Transport.UDP)
    with echo(pod, family, Transport.UDP):
        guest.call("send", socket=fd, text="hello", address=to, port=NATIVE_PORT)
        assert guest.receive(fd) == ("hello", to, NATIVE_PORT)


def test_ipv4_over_an_ipv6_socket(pod: Pod, guest: Guest) -> None:
    if Family.IPV6 not in pod._runtimes[Runtime.OSV].families:
        pytest.skip("this kernel has no IPv6")
    fd = guest.socket(Family.IPV6, Transport.TCP)
    guest.call("set", socket=fd, option="IPV6_V6ONLY", value=0)
    with echo(pod, Family.IPV4, Transport.TCP):
        to = "::ffff:127.0.0.1"
        guest.call("connect", socket=fd, address=to, port=NATIVE_PORT, timeout_s=PATIENCE_S)
        assert [ip_address(a) for a in guest.names(fd)] == [ip_address(to)] * 2
        assert guest.exchange(fd, "hello") == "hello"


def listening(guest: Guest, family: Family, address: str, port: int) -> int:
    fd = guest.socket(family, Transport.TCP)
    guest.call("bind", socket=fd, address=address, port=port)
    guest.call("listen", socket=fd, backlog=5)
    return fd


@FAMILIES
def test_server_at_loopback_serves_natives(
    pod: Pod, guest: Guest, family: Family, port: int
) -> None:
    loopback = str(addresses.loopback(family))
    fd = listening(guest, family, loopback, port)
    assert guest.names(fd)[0] == loopback
    with native(pod, family, Transport.TCP) as client:
        client.connect((loopback, port))
        accepted = guest.call("accept", socket=fd, timeout_s=PATIENCE_S)
        assert (accepted["address"], accepted["port"]) == client.getsockname()[:2]
        assert guest.names(accepted["socket"]) == (loopback, loopback)
        client.sendall(b"hello")
        assert guest.receive(accepted["socket"])[0] == "hello"


@FAMILIES
def test_server_at_the_address_of_localhost_is_at_loopback(
    pod: Pod, guest: Guest, family: Family, port: int
) -> None:
    """As gethostbyname gives it, with the hosts patch.

    (Accepted here as everywhere: OSv hangs when a socket is closed with a connection in its queue.)
    """
    fd = listening(guest, family, str(addresses.alias(family)), port)
    assert guest.names(fd)[0] == str(addresses.loopback(family))
    with native(pod, family, Transport.TCP) as client:
        client.connect((str(addresses.loopback(family)), port))
        guest.call("accept", socket=fd, timeout_s=PATIENCE_S)


@FAMILIES
def test_server_at_loopback_is_not_for_outsiders(
    pod: Pod, guest: Guest, family: Family, port: int
) -> None:
    """From outside the pod they are reset; who came to localhost meanwhile is served."""
    fd = listening(guest, family, str(addresses.loopback(family)), port)
    with (
        native(pod, family, Transport.TCP) as outsider,
        native(pod, family, Transport.TCP) as client,
    ):
        outsider.bind((str(OUTSIDER[family]), 0))
        outsider.connect((str(pod.address("agent", family)), port))
        client.connect((str(addresses.loopback(family)), port))
        accepted = guest.call("accept", socket=fd, timeout_s=PATIENCE_S)
        assert accepted["port"] == client.getsockname()[1]
        with pytest.raises(ConnectionResetError):
            outsider.recv(1)


@FAMILIES
def test_server_at_the_wildcard_is_for_everybody_and_tells_them_apart(
    pod: Pod, guest: Guest, family: Family, port: int
) -> None:
    loopback, link = addresses.loopback(family), pod.address("agent", family)
    fd = listening(guest, family, family.wildcard, port)
    for dialed, peer in ((loopback, loopback), (link, OUTSIDER[family])):
        with native(pod, family, Transport.TCP) as client:
            client.bind((str(peer), 0))
            client.connect((str(dialed), port))
            accepted = guest.call("accept", socket=fd, timeout_s=PATIENCE_S)
            assert accepted["address"] == str(peer)
            assert guest.names(accepted["socket"]) == (str(dialed), str(peer))


@FAMILIES
def test_datagram_is_answered_to_the_address_that_it_was_shown_from(
    pod: Pod, guest: Guest, family: Family, port: int
) -> None:
    loopback = str(addresses.loopback(family))
    fd = guest.socket(family, Transport.UDP)
    guest.call("bind", socket=fd, address=loopback, port=port)
    assert guest.names(fd)[0] == loopback
    with native(pod, family, Transport.UDP) as client:
        client.connect((loopback, port))
        client.send(b"hello")
        text, address, source_port = guest.receive(fd)
        assert (text, source_port) == ("hello", client.getsockname()[1])
        assert family is Family.IPV6 or ip_address(address).is_loopback
        guest.call("send", socket=fd, text=text, address=address, port=source_port)
        assert client.recv(100) == b"hello"


@FAMILIES
def test_guest_reaches_itself(guest: Guest, family: Family, port: int) -> None:
    loopback = str(addresses.loopback(family))
    server = listening(guest, family, loopback, port)
    client = guest.socket(family, Transport.TCP)
    guest.call("bind", socket=client, address=loopback, port=0)
    assert guest.names(client)[0] == loopback
    guest.call("connect", socket=client, address=loopback, port=port, timeout_s=PATIENCE_S)
    accepted = guest.call("accept", socket=server, timeout_s=PATIENCE_S)
    assert accepted["address"] == loopback
    assert guest.names(client) == guest.names(accepted["socket"]) == (loopback, loopback)
    guest.call("send", socket=client, text="hello")
    assert guest.receive(accepted["socket"])[0] == "hello"


def test_localhost_has_an_address_in_every_family_that_the_kernel_speaks(
    pod: Pod, guest: Guest
) -> None:
    spoken = [
        str(addresses.loopback(f)) for f in Family if f in pod._runtimes[Runtime.OSV].families
    ]

    def resolved(family: str) -> list[str]:
        found: str = guest.call("resolve", name="LocalHost", family=family)["addresses"]
        return found.split()

    assert resolved("any") == spoken[::-1]  # ::1 first
    assert resolved("ipv4") == spoken[:1]
    if len(spoken) > 1:
        assert resolved("ipv6") == spoken[1:]


@FAMILIES
def test_every_call_that_has_an_address_knows_loopback(pod: Pod, family: Family) -> None:
    name = "messages4" if family is Family.IPV4 else "messages6"
    with started(pod, name):
        printed(pod, name, "all messages arrived")


# --- programs -------------------------------------------------------------------------------


@contextmanager
def started(pod: Pod, name: str) -> Iterator[None]:
    """A guest with one of Debian's programs; skipped visibly if it is not installed."""
    program = {"redis": "redis-server"}.get(name, name.partition("-")[0])
    if not name.startswith("messages") and shutil.which(program) is None:
        pytest.skip(f"no {program}")
    pod.start_workload(name)
    try:
        if name in SERVERS:
            wait_until(
                lambda: accepts(pod, SERVERS[name]) or bool(failure(pod, name)),
                f"{name} serves",
                40,
            )
            if said := failure(pod, name):
                pytest.skip(f"OSv itself fails: {said}")
        yield
    finally:
        pod.stop_workload(name)


def failure(pod: Pod, name: str) -> str:
    """What a guest's kernel says of a failure of its own, at times while it loads a program."""
    console = pod.console(name).read_text(errors="replace")
    said = re.search("^Assertion failed: .*", console, re.MULTILINE)
    return said[0] if said else ""


def accepts(pod: Pod, port: int) -> bool:
    with native(pod, Family.IPV4, Transport.TCP) as client:
        client.settimeout(0.3)
        return client.connect_ex((str(addresses.loopback(Family.IPV4)), port)) == 0


def run(pod: Pod, *command: str) -> str:
    """What a native of the pod prints. It has to end well."""
    output = pod.console(f"native-{command[0]}")
    output.unlink(missing_ok=True)
    running = process.spawn(command, cgroup=pod.cgroup, netns=pod.netns, output=output)
    try:
        assert running.wait(30) == 0, output.read_text()
    finally:
        process.end(running)
    return output.read_text()


def printed(pod: Pod, name: str, text: str) -> None:
    """Wait until a guest has printed something. It may end then, not before."""
    ended = False
    deadline = time.monotonic() + 30
    while text not in (console := pod.console(name).read_text(errors="replace")):
        assert not ended, console
        assert time.monotonic() < deadline, console
        ended = pod.processes[name].poll() is not None
        time.sleep(0.005)


def test_redis_bound_to_loopback_with_protected_mode_on(pod: Pod) -> None:
    if shutil.which("redis-cli") is None:
        pytest.skip("no redis-cli")
    with started(pod, "redis"):
        for family in pod._runtimes[Runtime.OSV].families:
            cli = ("redis-cli", "-h", str(addresses.loopback(family)))
            assert run(pod, *cli, "CONFIG", "GET", "protected-mode").split()[-1] == "yes"
            assert run(pod, *cli, "SET", "key", str(family)).strip() == "OK"
            assert run(pod, *cli, "GET", "key").strip() == family
            assert f"addr={bracketed(family)}:" in run(pod, *cli, "CLIENT", "LIST")


def bracketed(family: Family) -> str:
    return (
        f"[{addresses.loopback(family)}]"
        if family is Family.IPV6
        else str(addresses.loopback(family))
    )


def test_nginx_at_loopback_sees_clients_at_loopback(pod: Pod) -> None:
    with started(pod, "nginx"):
        answer = run(pod, "curl", "--silent", "--show-error", "http://localhost:8080/")
        assert answer.strip() == "127.0.0.1"


class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello from the pod\n")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@FAMILIES
def test_curl_in_a_guest_finds_a_native_server(pod: Pod, family: Family) -> None:
    """By ::1 too, though it dials before the guest's IPv6 address is ready."""

    class Server(http.server.HTTPServer):
        address_family = family.domain

    at = (str(addresses.loopback(family)), HTTP_PORT)
    name = "curl" if family is Family.IPV4 else "curl-ipv6"
    with namespaces.inside(pod.netns, lambda: Server(at, Hello)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with started(pod, name):
                printed(pod, name, "hello from the pod")
        finally:
            server.shutdown()
            thread.join()


def test_iperf3_in_a_guest_serves_natives(pod: Pod) -> None:
    with started(pod, "iperf3"):
        for i, way in enumerate(((), ("--reverse",), ("--udp",)), start=1):
            printed(pod, "iperf3", f"Server listening on 5201 (test #{i})")
            assert "receiver" in run(pod, "iperf3", "--client", "127.0.0.1", "--time", "1", *way)


def test_iperf3_in_a_guest_dials_a_native(pod: Pod) -> None:
    if shutil.which("iperf3") is None:
        pytest.skip("no iperf3")
    server = process.spawn(
        [
            "iperf3",
            "--server",
            "--one-off",
            "--forceflush",
            "--bind",
            "127.0.0.1",
            "--port",
            str(IPERF_PORT),
        ],
        cgroup=pod.cgroup,
        netns=pod.netns,
        output=pod.console("native-iperf3-server"),
    )
    try:
        wait_until(lambda: "listening" in pod.console("native-iperf3-server").read_text(), "server")
        with started(pod, "iperf3-client"):
            printed(pod, "iperf3-client", "iperf Done.")
    finally:
        process.end(server)
