"""The traffic agent must not be the bottleneck: beside iperf3 and sockperf, pinned, on loopback.

Across CPUs a round trip is mostly the waking of the other CPU, which varies by more than the
programs differ: its band is wide. On one CPU it is mostly system calls, each of which costs a
program with several threads a little more: an idle thread added to sockperf makes it 3 to 4 %
slower there, and that much is granted to the agent.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic, sleep

import pytest

from testbed.agent import Agent, Direction, build
from testbed.model import Family, Transport

from .gate import Ratio

pytestmark = [
    pytest.mark.bench,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs"),
]

ROUNDS, SECONDS = 5, 0.4
IPERF3_BYTES = 800_000_000


def pinned(cpu: int, *command: str | Path) -> list[str]:
    return ["taskset", "-c", str(cpu), *map(str, command)]


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return int(s.getsockname()[1])


def await_port(transport: Transport, port: int) -> None:
    """Until something is bound to the port, which nothing is sent to."""
    deadline = monotonic() + 5
    tables = [Path(f"/proc/net/{transport}{x}") for x in ("", "6")]
    while not any(f":{port:04X} " in t.read_text() for t in tables if t.exists()):
        assert monotonic() < deadline, f"nothing is bound to {transport} port {port}"
        sleep(0.01)


@contextmanager
def two_agents(*cpus: int) -> Iterator[list[Agent]]:
    with ExitStack() as stack:
        agents = []
        for cpu in cpus:
            process = stack.enter_context(started(pinned(cpu, build(), "--control-port", "0")))
            assert process.stdout is not None
            port = int(process.stdout.readline().split()[-1])
            agents.append(stack.enter_context(Agent.connect("127.0.0.1", port)))
        yield agents


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_tcp_stream_is_as_fast_as_iperf3s(ratio: Ratio, direction: Direction) -> None:
    port = free_port()

    def agent_s() -> float:
        result = client.run(
            Transport.TCP, Family.IPV4, "127.0.0.1", served.port, "stream", 128 << 10,
            direction=direction, duration_s=SECONDS, warmup_s=0.1,
        )  # fmt: skip
        assert result.corrupt == 0
        return 1e6 * result.duration_s / result.bytes

    def iperf3_s() -> float:
        reverse = ["-R"] if direction == "down" else []
        command = ["iperf3", "-c", "127.0.0.1", "-p", str(port), "-J", "-n", f"{IPERF3_BYTES}"]
        done = subprocess.run(pinned(0, *command, *reverse), check=True, capture_output=True)
        received = json.loads(done.stdout)["end"]["sum_received"]
        return 1e6 * float(received["seconds"]) / float(received["bytes"])

    with two_agents(0, 1) as (client, server), started(pinned(1, "iperf3", "-s", "-p", str(port))):
        served = server.serve(Transport.TCP, Family.IPV4)
        await_port(Transport.TCP, port)
        what = f"agent: a megabyte of a TCP stream {direction}, by iperf3's"
        ratio(what, agent_s, iperf3_s, rounds=ROUNDS)


@pytest.mark.parametrize("transport", list(Transport), ids=str)
@pytest.mark.parametrize("server_cpu", [0, 1])
def test_transactions_are_as_fast_as_sockperfs(
    ratio: Ratio, transport: Transport, server_cpu: int
) -> None:
    size = 64
    port = free_port()
    where = ["-i", "127.0.0.1", "-p", str(port)] + ["--tcp"] * (transport is Transport.TCP)

    def agent_s() -> float:
        result = client.run(
            transport, Family.IPV4, "127.0.0.1", served.port, "rr", size,
            duration_s=SECONDS, warmup_s=0.1,
        )  # fmt: skip
        assert result.corrupt == 0
        return result.duration_s / result.transactions

    def sockperf_s() -> float:
        command = ["sockperf", "ping-pong", *where, "-m", str(size), "-t", "1"]
        done = subprocess.run(pinned(0, *command), check=True, capture_output=True, text=True)
        found = re.search(
            r"\[Valid Duration\] RunTime=([\d.]+) sec;.*ReceivedMessages=(\d+)", done.stdout
        )
        assert found, done.stdout
        return float(found[1]) / int(found[2])

    with two_agents(0, server_cpu) as (client, server):
        served = server.serve(transport, Family.IPV4)
        with started(pinned(server_cpu, "sockperf", "server", *where)):
            await_port(transport, port)
            what = f"agent: {transport} transaction, CPU 0 to {server_cpu}, by sockperf's"
            ratio(what, agent_s, sockperf_s, rounds=ROUNDS)
