"""The traffic agent end to end over loopback: modes, families, transports, dead peers.

Client and server are two processes, as they are two workloads of a pod.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path
from time import monotonic
from typing import Any, Self

import pytest

from testbed.agent import Agent, Result, build
from testbed.host import namespaces, netlink
from testbed.host.ledger import Owner
from testbed.model.addresses import loopback
from testbed.model.errors import Error
from testbed.model.terms import Family, Transport
from testbed.model.trials import percentile
from tests.children import ending

from .sockets import wait_until


@dataclass
class Running:
    """An agent's process and a control connection to it."""

    process: subprocess.Popen[bytes]
    port: int
    agent: Agent


@contextmanager
def running(program: Path, netns: str = "") -> Iterator[Running]:
    enter = ["ip", "netns", "exec", netns] if netns else []
    started = subprocess.Popen([*enter, program, "--control-port", "0"], stdout=subprocess.PIPE)
    with ending(started) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().split()[-1])

        def connect() -> Agent:
            return Agent.connect("127.0.0.1", port)

        with namespaces.inside(netns, connect) if netns else connect() as agent:
            yield Running(process, port, agent)


@pytest.fixture(scope="module")
def client_port() -> Iterator[int]:
    with running(build()) as r:
        yield r.port


@pytest.fixture(scope="module")
def server_port() -> Iterator[int]:
    with running(build()) as r:
        yield r.port


@pytest.fixture
def client(client_port: int) -> Iterator[Agent]:
    with Agent.connect("127.0.0.1", client_port) as agent:
        yield agent


@pytest.fixture
def server(server_port: int) -> Iterator[Agent]:
    with Agent.connect("127.0.0.1", server_port) as agent:
        yield agent


@pytest.fixture(params=list(Family), ids=str)
def family(request: pytest.FixtureRequest, client: Agent) -> Family:
    family: Family = request.param
    if family not in client.hello().families:
        pytest.skip(f"this machine's loopback has no {family}")
    return family


@pytest.fixture(params=list(Transport), ids=str)
def transport(request: pytest.FixtureRequest) -> Transport:
    transport: Transport = request.param
    return transport


def size_of(transport: Transport) -> int:
    return 65536 if transport is Transport.TCP else 1400


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("streams", [1, 4])
def test_a_stream_runs_as_long_as_it_should(
    client: Agent, server: Agent, family: Family, transport: Transport, direction: str, streams: int
) -> None:
    port = server.serve(transport, family).port
    result = client.run(
        transport,
        family,
        str(loopback(family)),
        port,
        "stream",
        size_of(transport),
        direction=direction,  # type: ignore[arg-type]
        streams=streams,
        duration_s=0.3,
        warmup_s=0.1,
    )
    assert result.address == loopback(family)
    assert result.bytes > 1_000_000
    # The receiver's buffer is emptied after the sender's end: little more, hardly less.
    assert 0.2 < result.duration_s < 1
    assert (result.errors, result.corrupt, result.reordered) == (0, 0, 0)
    assert (result.datagrams > 0) == (transport is Transport.UDP)


@pytest.mark.parametrize("streams", [1, 4])
def test_requests_keep_to_their_rate(
    client: Agent, server: Agent, family: Family, transport: Transport, streams: int
) -> None:
    port = server.serve(transport, family).port
    result = client.run(
        transport,
        family,
        str(loopback(family)),
        port,
        "rr",
        64,
        streams=streams,
        duration_s=0.5,
        warmup_s=0.1,
        rate_per_s=800,
    )
    assert result.transactions == pytest.approx(400, rel=0.1)
    assert sum(count for _, count in result.histogram_us) == result.transactions


def test_a_slow_server_is_found_and_by_how_much(
    client: Agent, server: Agent, family: Family, transport: Transport
) -> None:
    port = server.serve(transport, family, delay_us=3000).port
    result = client.run(transport, family, str(loopback(family)), port, "rr", 64, duration_s=0.3)
    assert 3000 <= min(result.histogram_us)[0] < 4000


def test_requests_beyond_what_the_server_can_do_queue_and_are_timed_from_when_they_were_due(
    client: Agent, server: Agent, family: Family, transport: Transport
) -> None:
    """A request every 5 ms, of 10 ms each: half are answered, and the last after half the run."""
    port = server.serve(transport, family, delay_us=10_000).port
    result = client.run(
        transport, family, str(loopback(family)), port, "rr", 64, duration_s=1, rate_per_s=200
    )
    assert result.transactions + result.unanswered == pytest.approx(200, abs=1)
    assert result.unanswered > 60  # responses are awaited for a quarter of a second
    assert result.unsent == 0
    assert max(result.histogram_us)[0] > 400_000
    assert percentile(result.histogram_us, 50) > 200_000


class Silent:
    """A server of requests that answers nothing for a while, then everything."""

    def __init__(self, transport: Transport, silent_s: float) -> None:
        kind = socket.SOCK_STREAM if transport is Transport.TCP else socket.SOCK_DGRAM
        self.waiting_bytes = 0
        """What had come when the silence ended."""
        self._socket, self._silent_s = socket.socket(socket.AF_INET, kind), silent_s
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self._socket.settimeout(1)
        self._socket.bind(("127.0.0.1", 0))
        if transport is Transport.TCP:
            self._socket.listen()
        self.port = int(self._socket.getsockname()[1])
        serve = self._serve_tcp if transport is Transport.TCP else self._serve_udp
        self._thread = threading.Thread(target=serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._socket.close()

    def _serve_tcp(self) -> None:
        connection, _ = self._socket.accept()
        end, data = monotonic() + self._silent_s, b""
        with connection, suppress(TimeoutError, ConnectionError):
            connection.settimeout(self._silent_s)
            with suppress(TimeoutError):
                while (left := end - monotonic()) > 0:
                    connection.settimeout(left)
                    data += connection.recv(1 << 20)
            connection.settimeout(5)
            data = data[ORDER_BYTES:]
            self.waiting_bytes = len(data)
            while data:
                connection.sendall(data)
                data = connection.recv(1 << 20)

    def _serve_udp(self) -> None:
        end, waiting = monotonic() + self._silent_s, []
        with suppress(TimeoutError):
            while True:
                waiting.append(self._socket.recvfrom(1 << 16))
                if monotonic() < end:
                    continue
                self.waiting_bytes = self.waiting_bytes or sum(len(data) for data, _ in waiting)
                for data, peer in waiting:
                    type = int.from_bytes(data[:4], "big") ^ REQUEST ^ RESPONSE
                    self._socket.sendto(type.to_bytes(4, "big") + data[4:], peer)
                waiting = []


def test_responses_to_what_was_not_asked_are_an_error(client: Agent) -> None:
    """Else they would count as answers before their requests left."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def flood() -> None:
            connection, _ = listener.accept()
            with connection, suppress(ConnectionError):
                while connection.recv(1 << 16):
                    connection.sendall(bytes(1 << 16))

        thread = threading.Thread(target=flood)
        thread.start()
        port = listener.getsockname()[1]
        where = (Transport.TCP, Family.IPV4, "127.0.0.1", port)
        with pytest.raises(Error, match="Protocol error"):
            client.run(*where, "rr", 64, duration_s=0.5, rate_per_s=1000)
        thread.join()


ORDER_BYTES, REQUEST, RESPONSE = 40, 8, 9
"""Of agent.h: what a TCP connection begins with, types of datagrams."""


def test_requests_leave_when_they_are_due_while_none_is_answered(
    client: Agent, transport: Transport
) -> None:
    with Silent(transport, silent_s=0.3) as silent:
        result = client.run(
            transport,
            Family.IPV4,
            "127.0.0.1",
            silent.port,
            "rr",
            64,
            duration_s=0.5,
            rate_per_s=1000,
        )
    assert 200 * 64 < silent.waiting_bytes < 320 * 64
    assert result.transactions + result.unanswered == pytest.approx(500, abs=1)
    assert result.unanswered < 10
    assert (result.unsent, result.corrupt) == (0, 0)
    # The first waited for all the silence, those in its middle half as long.
    assert 250_000 < max(result.histogram_us)[0] < 400_000
    assert 30_000 < percentile(result.histogram_us, 50) < 250_000


def test_requests_that_the_table_has_no_place_for_are_counted(client: Agent) -> None:
    with Silent(Transport.TCP, silent_s=0.2) as silent:
        result = client.run(
            Transport.TCP,
            Family.IPV4,
            "127.0.0.1",
            silent.port,
            "rr",
            64,
            duration_s=0.3,
            rate_per_s=200_000,
        )
    assert silent.waiting_bytes <= 16384 * 64
    assert result.unsent > 10_000
    assert result.transactions + result.unanswered + result.unsent == pytest.approx(60_000, abs=2)
    assert result.transactions == sum(count for _, count in result.histogram_us)


def test_responses_that_are_lost_are_counted_and_hold_nothing_up(client: Agent) -> None:
    """Every third datagram gets no response."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as lossy:
        lossy.bind(("127.0.0.1", 0))
        lossy.settimeout(1)

        def serve() -> None:
            with suppress(TimeoutError):
                while True:
                    data, peer = lossy.recvfrom(1 << 16)
                    type = int.from_bytes(data[:4], "big") ^ REQUEST ^ RESPONSE
                    if data[15] % 3:
                        lossy.sendto(type.to_bytes(4, "big") + data[4:], peer)

        serving = threading.Thread(target=serve)
        serving.start()
        result = client.run(
            Transport.UDP,
            Family.IPV4,
            "127.0.0.1",
            lossy.getsockname()[1],
            "rr",
            64,
            duration_s=0.5,
            rate_per_s=510,
        )
        serving.join()
    assert result.unanswered == pytest.approx(85, abs=5)
    assert result.transactions == pytest.approx(170, abs=5)
    assert percentile(result.histogram_us, 50) < 50_000


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("size", [1, 1448, 1 << 20])
def test_a_tcp_stream_moves_exactly_its_bytes(
    client: Agent, server: Agent, family: Family, direction: str, size: int
) -> None:
    port = server.serve(Transport.TCP, family).port
    count = 54_321 if size == 1 else 7_654_321
    result = client.run(
        Transport.TCP,
        family,
        str(loopback(family)),
        port,
        "stream",
        size,
        direction=direction,  # type: ignore[arg-type]
        streams=3,
        bytes=count,
    )
    assert (result.bytes, result.corrupt) == (3 * count, 0)


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("size", [16, 1472, 65507])
def test_a_paced_udp_stream_arrives_whole(
    client: Agent, server: Agent, family: Family, direction: str, size: int
) -> None:
    port = server.serve(Transport.UDP, family).port
    result = client.run(
        Transport.UDP,
        family,
        str(loopback(family)),
        port,
        "stream",
        size,
        direction=direction,  # type: ignore[arg-type]
        bytes=30 * size,
        rate_bps=30 * size * 8 / 0.2,
    )
    assert (result.datagrams, result.bytes) == (30, 30 * size)
    assert (result.lost, result.reordered, result.corrupt) == (0, 0, 0)
    assert 0.15 < result.duration_s < 1


def test_udp_keeps_to_its_rate(client: Agent, server: Agent, family: Family) -> None:
    port = server.serve(Transport.UDP, family).port
    result = client.run(
        Transport.UDP,
        family,
        str(loopback(family)),
        port,
        "stream",
        1400,
        streams=2,
        duration_s=0.5,
        warmup_s=0.1,
        rate_bps=20e6,
    )
    sent_bps = (result.bytes + result.lost * 1400) * 8 / result.duration_s
    assert 14e6 < sent_bps < 21e6  # what a busy machine holds up is not made up for


@pytest.mark.parametrize("mode", ["rr", "crr"])
@pytest.mark.parametrize("size", [16, 1400, 60_000])
def test_transactions_are_timed_one_by_one(
    client: Agent, server: Agent, family: Family, transport: Transport, mode: str, size: int
) -> None:
    port = server.serve(transport, family).port
    result = client.run(
        transport,
        family,
        str(loopback(family)),
        port,
        mode,  # type: ignore[arg-type]
        size,
        streams=2,
        duration_s=0.2,
        warmup_s=0.05,
    )
    assert result.transactions > 50
    assert result.transactions == sum(count for _, count in result.histogram_us)
    assert result.bytes == result.transactions * size
    assert result.duration_s == pytest.approx(0.2, rel=0.3)
    assert (result.errors, result.lost, result.corrupt) == (0, 0, 0)
    # Two at a time, back to back: their times add up to twice the duration.
    spent_us = sum(upper * count for upper, count in result.histogram_us)
    assert spent_us == pytest.approx(2 * result.duration_s * 1e6, rel=0.1)
    assert 1 < percentile(result.histogram_us, 50) <= percentile(result.histogram_us, 99)


def test_a_million_byte_request_is_answered(client: Agent, server: Agent, family: Family) -> None:
    port = server.serve(Transport.TCP, family).port
    result = client.run(
        Transport.TCP, family, str(loopback(family)), port, "rr", 1 << 20, bytes=20 << 20
    )
    assert (result.transactions, result.corrupt) == (20, 0)


def test_one_server_serves_all_modes_at_once(client_port: int, server: Agent) -> None:
    port = {t: server.serve(t, Family.IPV4).port for t in Transport}
    results: list[Result] = []

    def go(transport: Transport, mode: str) -> None:
        with Agent.connect("127.0.0.1", client_port) as own:
            results.append(
                own.run(
                    transport,
                    Family.IPV4,
                    "127.0.0.1",
                    port[transport],
                    mode,  # type: ignore[arg-type]
                    1000,
                    direction="down",
                    duration_s=0.3,
                )
            )

    threads = [
        threading.Thread(target=go, args=(t, m)) for t in Transport for m in ("stream", "rr", "crr")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert all(r.bytes > 0 and r.corrupt == 0 for r in results)


def test_the_dialed_name_is_looked_up(client: Agent, server: Agent) -> None:
    port = server.serve(Transport.TCP, Family.IPV4, bind="localhost").port
    result = client.run(Transport.TCP, Family.IPV4, "localhost", port, "rr", 64, bytes=64)
    assert result.address == loopback(Family.IPV4)
    assert result.transactions == 1


def test_a_server_on_one_family_is_not_on_the_other(client: Agent, server: Agent) -> None:
    if Family.IPV6 not in client.hello().families:
        pytest.skip("this machine's loopback has no ipv6")
    port = server.serve(Transport.TCP, Family.IPV6).port
    with pytest.raises(Error, match="Connection refused"):
        client.run(Transport.TCP, Family.IPV4, "127.0.0.1", port, "rr", 64, bytes=64)


@pytest.mark.parametrize("mode", ["stream", "rr", "crr"])
def test_a_port_that_nobody_serves_is_refused_at_once(
    client: Agent, server: Agent, family: Family, transport: Transport, mode: str
) -> None:
    stopped = server.serve(transport, family)
    server.stop(stopped)
    began = monotonic()
    with pytest.raises(Error, match=rf":{stopped.port}: Connection refused"):
        client.run(
            transport,
            family,
            str(loopback(family)),
            stopped.port,
            mode,  # type: ignore[arg-type]
            64,
            duration_s=1,
        )
    assert monotonic() - began < 1


@pytest.mark.parametrize("how", ["stop", "kill"])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_server_that_ends_in_mid_stream_ends_the_run(
    client: Agent, transport: Transport, direction: str, how: str
) -> None:
    with running(build()) as other:
        server = other.agent.serve(transport, Family.IPV4)
        end = other.process.kill if how == "kill" else lambda: other.agent.stop(server)
        timer = threading.Timer(0.2, end)
        timer.start()
        began = monotonic()
        with pytest.raises(Error, match=f"127.0.0.1:{server.port}: "):
            client.run(
                transport,
                Family.IPV4,
                "127.0.0.1",
                server.port,
                "stream",
                size_of(transport),
                direction=direction,  # type: ignore[arg-type]
                duration_s=30,
                rate_bps=1e8,
            )
        assert monotonic() - began < 8
        timer.join()


def test_a_peer_that_vanishes_without_a_word_ends_every_kind_of_run(client_port: int) -> None:
    """A stopped process answers nothing, though its kernel still does: no end, no reset."""
    faults: list[str] = []
    with running(build()) as other:
        port = {t: other.agent.serve(t, Family.IPV4).port for t in Transport}

        def go(transport: Transport, mode: str, direction: str) -> None:
            with Agent.connect("127.0.0.1", client_port) as own:
                try:
                    own.run(
                        transport,
                        Family.IPV4,
                        "127.0.0.1",
                        port[transport],
                        mode,  # type: ignore[arg-type]
                        1000,
                        direction=direction,  # type: ignore[arg-type]
                        duration_s=30,
                        rate_bps=1e7,
                    )
                except Error as e:
                    faults.append(f"{transport} {mode} {direction}: {e}")

        kinds = [("stream", "up"), ("stream", "down"), ("rr", "up"), ("crr", "up")]
        threads = [threading.Thread(target=go, args=(t, *k)) for t in Transport for k in kinds]
        for thread in threads:
            thread.start()
        threading.Timer(0.3, other.process.send_signal, (signal.SIGSTOP,)).start()
        began = monotonic()
        for thread in threads:
            thread.join()
        assert 5 <= monotonic() - began < 12
        other.process.kill()  # stopped, it would not hear that it is to end
    assert len(faults) == len(threads)
    assert all(f.endswith("no progress for 5 s") for f in faults), faults


def test_a_client_that_vanishes_leaves_no_sender_behind(server: Agent) -> None:
    """After a killed client, stopping the server is quick: nothing of it is stuck in a send."""
    for transport in Transport:
        served = server.serve(transport, Family.IPV4)
        with running(build()) as other:
            timer = threading.Timer(0.2, other.process.kill)
            timer.start()
            with pytest.raises(Error, match="traffic agent: (run|the agent has ended)"):
                other.agent.run(
                    transport,
                    Family.IPV4,
                    "127.0.0.1",
                    served.port,
                    "stream",
                    1000,
                    direction="down",
                    duration_s=30,
                )
            timer.join()
        began = monotonic()
        server.stop(served)
        assert monotonic() - began < 2


@pytest.mark.root
def test_a_client_whose_machine_vanishes_is_forgotten(owner: Owner) -> None:
    """Its link is down, so that nothing tells the server that there will be no more requests."""
    near, far = (f"tb-{owner.id}-{end}" for end in ("serves", "dials"))
    with namespaces.create(owner, near) as ip, namespaces.create(owner, far) as far_ip:
        peer = {"ifname": "eth0", "net_ns_fd": far}
        link = netlink.create_link(ip, "eth0", kind="veth", state="up", peer=peer)
        netlink.add_address(ip, link, IPv4Address("198.51.100.1"), 24)
        far_link = netlink.links(far)["eth0"]
        far_ip.link("set", index=far_link, state="up")
        netlink.add_address(far_ip, far_link, IPv4Address("198.51.100.2"), 24)

        with running(build(), near) as server, running(build(), far) as client:
            port = server.agent.serve(Transport.TCP, Family.IPV4).port
            down = {"index": far_link, "state": "down"}
            timer = threading.Timer(0.5, far_ip.link, ("set",), down)
            timer.start()
            with pytest.raises(Error, match=r"no progress for 5 s|unreachable"):
                client.agent.run(
                    Transport.TCP, Family.IPV4, "198.51.100.1", port, "rr", 100, duration_s=30
                )
            timer.join()

            def is_forgotten() -> bool:
                rows = Path(f"/proc/{server.process.pid}/net/tcp").read_text().splitlines()
                return not any(f":{port:04X} " in row and " 01 " in row for row in rows)

            assert not is_forgotten()
            wait_until(is_forgotten, "the server closes the connection", limit_s=15)


# --- HTTP -----------------------------------------------------------------------------------


class Web(BaseHTTPRequestHandler):
    """Answers every path with its own text; the server's `hold` is waited for before."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # a response is sent in one piece

    def do_GET(self) -> None:
        hold: threading.Event = self.server.hold  # type: ignore[attr-defined]
        hold.wait()
        body = self.path.encode()
        self.send_response(404 if "missing" in self.path else 200)
        if "endless" not in self.path:
            self.send_header("content-length", str(len(body)))
        if "close" in self.path:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        with suppress(BrokenPipeError):
            self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.hold = threading.Event()  # type: ignore[attr-defined]
    server.hold.set()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def get(server: ThreadingHTTPServer, path: str, **order: object) -> dict[str, Any]:
    """The result of the agent's order `http`, from its command line."""
    web = {"op": "http", "transport": "tcp", "family": "ipv4", "host": "127.0.0.1", "path": path}
    order = {**web, "port": server.server_address[1], "duration_s": 0.5, **order}
    done = subprocess.run(
        [build(), "--order", json.dumps(order)], capture_output=True, check=True, timeout=20
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("path", ["/", "/close", "/" + 400 * "x"])
def test_a_web_server_is_asked_over_several_connections(
    web: ThreadingHTTPServer, path: str
) -> None:
    found = get(web, path, connections=3)
    assert found["ok"], found
    assert found["requests"] > 10
    assert found["errors"] == 0
    assert sum(count for _, count in found["histogram_us"]) == found["requests"]
    assert found["per_s"] == pytest.approx(found["requests"] / found["duration_s"], rel=0.01)


def test_a_response_that_says_no_is_an_error(web: ThreadingHTTPServer) -> None:
    found = get(web, "/missing")
    assert found["errors"] == found["requests"] > 0


def test_a_response_without_an_end_is_refused(web: ThreadingHTTPServer) -> None:
    assert "no Content-Length" in get(web, "/endless")["error"]


def test_requests_at_a_rate_are_timed_from_when_they_are_due(web: ThreadingHTTPServer) -> None:
    """The server stands still for 0.3 s of 1 s: a third of the requests wait, not one each."""
    hold: threading.Event = web.hold  # type: ignore[attr-defined]
    pause = threading.Timer(0.3, hold.clear)
    resume = threading.Timer(0.6, hold.set)
    pause.start()
    resume.start()
    found = get(web, "/", connections=2, rate_per_s=200, duration_s=1)
    assert found["requests"] == 200
    late = sum(count for upper, count in found["histogram_us"] if upper > 50_000)
    assert 30 < late < 120
    assert found["histogram_us"][-1][0] > 200_000


def test_a_web_server_that_is_silent_ends_the_run(web: ThreadingHTTPServer) -> None:
    web.hold.clear()  # type: ignore[attr-defined]
    try:
        assert "no progress for 5 s" in get(web, "/")["error"]
    finally:
        web.hold.set()  # type: ignore[attr-defined]
