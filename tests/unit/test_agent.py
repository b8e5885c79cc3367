"""The traffic agent by itself: orders to refuse, payload checks, the error of its histogram."""

from __future__ import annotations

import ctypes
import json
import random
import shutil
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic

import pytest

from testbed import paths
from testbed.agent import CFLAGS, Agent, build
from testbed.model.errors import Error
from testbed.model.terms import Family, Transport
from testbed.paths import AGENT
from tests.children import ending


@pytest.fixture(scope="module")
def program() -> Path:
    return build()


@pytest.fixture(scope="module")
def control_port(program: Path) -> Iterator[int]:
    started = subprocess.Popen([program, "--control-port", "0"], stdout=subprocess.PIPE)
    with ending(started) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline().split()[-1])
        process.terminate()
        assert process.wait(5) == 0


@pytest.fixture
def agent(control_port: int) -> Iterator[Agent]:
    with Agent.connect("127.0.0.1", control_port) as agent:
        yield agent


def ask(control_port: int, *lines: bytes) -> list[dict[str, object]]:
    """Raw lines to the agent, one answer each."""
    with socket.create_connection(("127.0.0.1", control_port), 5) as s, s.makefile("rb") as f:
        s.sendall(b"".join(line + b"\n" for line in lines))
        return [json.loads(f.readline()) for _ in lines]


RUN = {
    "op": "run",
    "transport": "tcp",
    "family": "ipv4",
    "host": "127.0.0.1",
    "port": 1,
    "mode": "rr",
    "size_bytes": 64,
    "duration_s": 0.1,
}


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (b"", "not a flat JSON object"),
        (b"hello", "not a flat JSON object"),
        (b'{"op":"hello"', "not a flat JSON object"),
        (b'{"op":"hello",}', "not a flat JSON object"),
        (b'{"op":"hello" "x":1}', "not a flat JSON object"),
        (b'{"op":"hello"}}', "not a flat JSON object"),
        (b'{"op":["hello"]}', "not a flat JSON object"),
        (b'{"op":"hel\\', "not a flat JSON object"),
        (b'{"op":0x10}', "not a flat JSON object"),
        (b'{"op":nan}', "not a flat JSON object"),
        (b'{"op":"hello","op":"hello"}', "a key stands twice"),
        (b"{" + b",".join(b'"%d":1' % i for i in range(30)) + b"}", "too many keys"),
        (b"{}", "op: no such order"),
        (b'{"op":"reboot"}', "op: no such order"),
        (b'{"op":1}', "op: no such order"),
        (b'{"op":"hello","extra":1}', "extra: unknown key"),
        (b'{"op":"stop"}', "server must be 0 to 63"),
        (b'{"op":"stop","server":7}', "no such server"),
        (b'{"op":"serve","transport":"sctp","family":"ipv4"}', "transport must be tcp or udp"),
        (b'{"op":"serve","transport":"tcp","family":"ipv5"}', "family must be ipv4 or ipv6"),
        (b'{"op":"http","path":"/"}', "host: must be a name or an address"),
        (b'{"op":"http","host":"a","path":"x"}', "path: must begin with /"),
        (b'{"op":"http","host":"a","path":"/","transport":"x"}', "transport must be tcp or udp"),
        (
            b'{"op":"http","transport":"udp","family":"ipv4","host":"a","path":"/","port":1}',
            "duration_s must be 0.001 to 3600",
        ),
        (
            b'{"op":"serve","transport":"tcp","family":"ipv4","port":65536}',
            "port must be 0 to 65535",
        ),
        (b'{"op":"serve","transport":"tcp","family":"ipv4","bind":"::1"}', "bind: must be any"),
        (
            b'{"op":"serve","transport":"tcp","family":"ipv4","bind":"192.0.2.1"}',
            "bind 192.0.2.1:0: Cannot assign requested address",
        ),
    ],
)
def test_a_bad_order_is_refused_and_the_next_one_is_obeyed(
    control_port: int, order: bytes, message: str
) -> None:
    refused, obeyed = ask(control_port, order, b'{"op":"hello"}')
    assert refused["ok"] is False
    assert message in str(refused["error"])
    assert obeyed["ok"] is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"host": ""}, "host: must be"),
        ({"port": 0}, "port must be 1 to 65535"),
        ({"port": "80"}, "port must be 1 to 65535"),
        ({"mode": "flood"}, "mode must be stream or rr or crr"),
        ({"mode": "stream"}, "direction must be up or down"),
        ({"direction": "up"}, "direction: unknown key"),
        ({"size_bytes": 0}, "size_bytes must be 1 to 1048576"),
        ({"transport": "udp", "size_bytes": 15}, "size_bytes must be 16 to 65507"),
        ({"streams": 65}, "streams must be 1 to 64"),
        ({"duration_s": -1}, "duration_s must be 0 to 3600"),
        ({"duration_s": 0}, "needs either duration_s or bytes"),
        ({"bytes": 1}, "needs either duration_s or bytes"),
        ({"duration_s": 0, "bytes": 1, "warmup_s": 1}, "not with bytes"),
        ({"port": 1}, "connect 127.0.0.1:1: Connection refused"),
        ({"host": "no-such-name.invalid"}, "resolve no-such-name.invalid:1: "),
        ({"family": "ipv6"}, "resolve 127.0.0.1:1: "),
    ],
)
def test_a_bad_run_says_what_is_wrong(
    control_port: int, change: dict[str, object], message: str
) -> None:
    (answer,) = ask(control_port, json.dumps(RUN | change).encode())
    assert answer["ok"] is False
    assert message in str(answer["error"])


def test_an_endless_line_ends_the_connection_and_not_the_agent(control_port: int) -> None:
    with socket.create_connection(("127.0.0.1", control_port), 5) as s:
        s.sendall(b"x" * 4096)
        assert s.recv(1) == b""
    assert ask(control_port, b'{"op":"hello"}')[0]["ok"] is True


def test_an_order_may_come_in_pieces_and_controllers_at_once(control_port: int) -> None:
    with socket.create_connection(("127.0.0.1", control_port), 5) as s, s.makefile("rb") as f:
        s.sendall(b'{"op":"he')
        assert ask(control_port, b'{"op":"hello"}')[0]["ok"] is True
        s.sendall(b'llo"}\n')
        assert json.loads(f.readline())["version"] == "1"


def test_servers_end_with_their_controller(control_port: int) -> None:
    with Agent.connect("127.0.0.1", control_port) as agent:
        port = agent.serve(Transport.TCP, Family.IPV4).port
        with pytest.raises(Error, match=f"bind any:{port}: Address already in use"):
            agent.serve(Transport.TCP, Family.IPV4, port)
    with Agent.connect("127.0.0.1", control_port) as agent:
        # The agent sees the end of the first connection at some time after close() returned.
        for _ in range(200):
            try:
                agent.stop(agent.serve(Transport.TCP, Family.IPV4, port))
                return
            except Error:
                agent.hello()
    pytest.fail("the port is still taken")


def test_a_server_stops_at_once_also_while_clients_are_silent(agent: Agent) -> None:
    served = agent.serve(Transport.TCP, Family.IPV4, bind="localhost")
    order = struct.pack(">4I3Q", 0x74626137, 3, 64, 0, 0, 0, 0)  # agent.h: requests of 64 bytes
    with (
        socket.create_connection(("127.0.0.1", served.port), 5) as asked,
        socket.create_connection(("127.0.0.1", served.port), 5) as silent,
    ):
        asked.sendall(order + bytes(64))
        assert len(asked.recv(64, socket.MSG_WAITALL)) == 64
        began = monotonic()
        agent.stop(served)
        assert monotonic() - began < 2
        for connection in (asked, silent):
            with pytest.raises(ConnectionResetError):
                connection.recv(1)


def test_garbage_on_the_data_ports_does_no_harm(agent: Agent) -> None:
    rng = random.Random(1)
    tcp = agent.serve(Transport.TCP, Family.IPV4, bind="localhost")
    udp = agent.serve(Transport.UDP, Family.IPV4, bind="localhost")
    for n in (0, 1, 15, 16, 47, 48, 64, 1400):
        with socket.create_connection(("127.0.0.1", tcp.port), 5) as s:
            s.sendall(rng.randbytes(n))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.sendto(rng.randbytes(n), ("127.0.0.1", udp.port))
            # The head of each type of datagram, without what should follow.
            for type in range(10):
                head = (0x74626137 ^ type).to_bytes(4, "big") + rng.randbytes(12)
                s.sendto(head + rng.randbytes(n), ("127.0.0.1", udp.port))
    for server, transport in ((tcp, Transport.TCP), (udp, Transport.UDP)):
        result = agent.run(
            transport, Family.IPV4, "127.0.0.1", server.port, "rr", 64, bytes=64 * 100
        )
        assert (result.transactions, result.lost, result.corrupt) == (100, 0, 0)


def tcp_relay(port: int, change: Callable[[bytes], bytes], response: bool) -> int:
    """Passes connections on to a port and changes one direction, while tests run. Its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, to: socket.socket, change: Callable[[bytes], bytes]) -> None:
        try:
            while data := source.recv(65536):
                to.sendall(change(data))
            to.shutdown(socket.SHUT_WR)
        except OSError:
            to.close()

    def accept() -> None:
        while True:
            client, _ = listener.accept()
            server = socket.create_connection(("127.0.0.1", port))
            head = b""
            while len(head) < 40:
                head += client.recv(40 - len(head))
            server.sendall(head)
            same = bytes
            for source, to, how in (
                (client, server, same if response else change),
                (server, client, change if response else same),
            ):
                threading.Thread(target=pump, args=(source, to, how), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return int(listener.getsockname()[1])


def flip_last_bit(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("response", [False, True])
@pytest.mark.parametrize("mode", ["rr", "crr"])
def test_a_flipped_bit_in_a_transaction_is_found(agent: Agent, mode: str, response: bool) -> None:
    server = agent.serve(Transport.TCP, Family.IPV4)
    port = tcp_relay(server.port, flip_last_bit, response)
    result = agent.run(Transport.TCP, Family.IPV4, "127.0.0.1", port, mode, 64, bytes=64 * 50)  # type: ignore[arg-type]
    assert result.transactions == 50
    assert result.corrupt == 50


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_flipped_bit_in_a_warm_up_is_found(agent: Agent, direction: str) -> None:
    server = agent.serve(Transport.TCP, Family.IPV4)
    port = tcp_relay(server.port, flip_last_bit, direction == "down")
    result = agent.run(
        Transport.TCP,
        Family.IPV4,
        "127.0.0.1",
        port,
        "stream",
        65536,
        direction=direction,  # type: ignore[arg-type]
        duration_s=0.05,
        warmup_s=0.1,
    )
    assert result.corrupt > 0


def test_bytes_out_of_place_are_found(agent: Agent) -> None:
    swap = lambda data: data[len(data) // 2 :] + data[: len(data) // 2]  # noqa: E731
    server = agent.serve(Transport.TCP, Family.IPV4)
    port = tcp_relay(server.port, swap, True)
    result = agent.run(
        Transport.TCP,
        Family.IPV4,
        "127.0.0.1",
        port,
        "stream",
        1448,
        direction="down",
        bytes=1_000_000,
    )
    assert result.bytes == 1_000_000
    assert result.corrupt > 0


def test_an_unspoiled_relay_finds_no_corruption(agent: Agent) -> None:
    server = agent.serve(Transport.TCP, Family.IPV4)
    port = tcp_relay(server.port, bytes, True)
    result = agent.run(
        Transport.TCP, Family.IPV4, "127.0.0.1", port, "stream", 1448, bytes=10_000_000
    )
    assert (result.bytes, result.corrupt) == (10_000_000, 0)


def test_the_histogram_is_at_most_one_percent_off(tmp_path: Path) -> None:
    library = tmp_path / "histogram.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, AGENT / "histogram.c"], check=True)
    c = ctypes.CDLL(str(library))
    c.histogram_add.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    c.histogram_upper_ns.restype = ctypes.c_uint64
    buckets = (29 << 7) + 128
    rng = random.Random(2)
    values = [10 ** rng.uniform(2, 10.778) for _ in range(5000)]  # 0.1 µs to 60 s
    edges = [2**k + d for k in range(7, 36) for d in (-1, 0, 1)]
    for value in [round(v) for v in values] + edges:
        counts = (ctypes.c_uint64 * buckets)()
        c.histogram_add(counts, value)
        (bucket,) = [i for i, count in enumerate(counts) if count]
        upper = c.histogram_upper_ns(bucket)
        assert value <= upper <= value * 1.01
    counts = (ctypes.c_uint64 * buckets)()
    c.histogram_add(counts, 2**63)
    assert counts[buckets - 1] == 1


def test_the_agent_compiles_without_a_warning_and_needs_only_libc(tmp_path: Path) -> None:
    output = tmp_path / "agent"
    strict = ("-Wall", "-Wextra", "-Werror")
    subprocess.run(["cc", *CFLAGS, *strict, "-o", output, *AGENT.glob("*.c")], check=True)
    if objdump := shutil.which("objdump"):
        headers = subprocess.run(
            [objdump, "-p", output], check=True, capture_output=True, text=True
        ).stdout
        assert {x.split()[1] for x in headers.splitlines() if "NEEDED" in x} == {"libc.so.6"}


def test_the_build_is_kept_by_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: Path
) -> None:
    assert build() == program
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Error, match="no C compiler.*apt install"):
        build()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = build()
    assert built.is_relative_to(tmp_path)
    assert [p.name for p in built.parent.iterdir()] == ["agent"]


@pytest.mark.parametrize(
    "arguments", [["--control-port", "70000"], ["--speed"], ["--control-port"]]
)
def test_a_wrong_command_line_is_refused(program: Path, arguments: list[str]) -> None:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: agent")


def test_a_taken_control_port_is_said(program: Path, control_port: int) -> None:
    done = subprocess.run(
        [program, "--control-port", str(control_port)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == f"agent: control port {control_port}: Address already in use\n"


def test_version_and_help(program: Path) -> None:
    for option, start in (("--version", "agent 1\n"), ("--help", "usage: agent")):
        done = subprocess.run([program, option], capture_output=True, text=True, check=True)
        assert done.stdout.startswith(start)


def test_sigterm_ends_it_at_once_also_while_it_serves(program: Path) -> None:
    started = subprocess.Popen([program, "--control-port", "0"], stdout=subprocess.PIPE)
    with ending(started) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().split()[-1])
        with Agent.connect("127.0.0.1", port) as agent:
            agent.serve(Transport.TCP, Family.IPV4)
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 0
            with pytest.raises(Error, match="traffic agent: the agent has ended"):
                agent.hello()


def test_a_compiled_agent_that_lies_in_a_clone_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "static"
    left.write_text("of an older source")
    monkeypatch.setattr(paths, "BUNDLED_AGENT", left)
    assert build(static=True) != left
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    assert build() == left, "in a bundle, which is no clone"
