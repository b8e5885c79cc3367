"""The traffic agent must not be the bottleneck: beside iperf3 and sockperf, pinned, on loopback.

On one CPU a round trip is mostly system calls; across CPUs it is mostly the waking of the other,
which varies by more than the programs differ. On stand-ins both programs must find the same.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import pytest

from testbed import datapaths, runtimes
from testbed.agent import Agent, Direction, build
from testbed.campaigns import roles
from testbed.host import process
from testbed.host.ledger import Owner
from testbed.model.addresses import guest_link, loopback
from testbed.model.cells import Pair
from testbed.model.manifest import Manifest
from testbed.model.terms import Family, Runtime, Transport
from testbed.pods.pod import Pod
from testbed.runtimes import interface

from .gate import Ratio

pytestmark = [
    pytest.mark.bench,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs"),
]

ROUNDS, SECONDS = 15, 0.15
IPERF3_BYTES = 250_000_000


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


def megabyte_s(said: bytes) -> float:
    """Seconds that a megabyte took, of iperf3's JSON."""
    received = json.loads(said)["end"]["sum_received"]
    return 1e6 * float(received["seconds"]) / float(received["bytes"])


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_tcp_stream_is_as_fast_as_iperf3s(ratio: Ratio, direction: Direction) -> None:
    port = free_port()

    def agent_s() -> float:
        result = client.run(
            Transport.TCP,
            Family.IPV4,
            "127.0.0.1",
            served.port,
            "stream",
            128 << 10,
            direction=direction,
            duration_s=SECONDS,
            warmup_s=0.05,
        )
        assert result.corrupt == 0
        return 1e6 * result.duration_s / result.bytes

    def iperf3_s() -> float:
        reverse = ["-R"] if direction == "down" else []
        command = ["iperf3", "-c", "127.0.0.1", "-p", str(port), "-J", "-n", f"{IPERF3_BYTES}"]
        done = subprocess.run(pinned(0, *command, *reverse), check=True, capture_output=True)
        return megabyte_s(done.stdout)

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
            transport,
            Family.IPV4,
            "127.0.0.1",
            served.port,
            "rr",
            size,
            duration_s=SECONDS,
            warmup_s=0.05,
        )
        assert result.corrupt == 0
        return result.duration_s / result.transactions

    def sockperf_s() -> float:
        command = ["sockperf", "ping-pong", *where, "-m", str(size), "-t", "1"]
        done = subprocess.run(pinned(0, *command), check=True, capture_output=True, text=True)
        found = re.search(
            r"\[Valid Duration\] RunTime=([\d.]+) sec;.*ReceivedMessages=(\d+)", done.stdout
        )
        if not found or not int(found[2]):
            pytest.skip("sockperf was held up for all its time: the machine is too busy")
        return float(found[1]) / int(found[2])

    with two_agents(0, server_cpu) as (client, server):
        served = server.serve(transport, Family.IPV4)
        with started(pinned(server_cpu, "sockperf", "server", *where)):
            await_port(transport, port)
            what = f"agent: {transport} transaction, CPU 0 to {server_cpu}, by sockperf's"
            ratio(what, agent_s, sockperf_s, rounds=ROUNDS)


@pytest.mark.root
@pytest.mark.parametrize("family", Family, ids=str)
@pytest.mark.parametrize("datapath", ["direct", "steer"])
def test_iperf3_finds_the_same_of_a_stand_in(
    ratio: Ratio, tmp_path: Path, datapath: str, family: Family
) -> None:
    """From the pod to the stand-in, both programs where workloads are, on the CPUs of these."""
    port = 5201
    agents = roles.manifest([Pair.NATIVE_GUEST], Runtime.STANDIN)
    workloads = {w.name: w for w in agents.workloads}
    guest = workloads["guest1"]
    workloads["guest1"] = replace(guest, ports=(*guest.ports, (Transport.TCP, port)))
    way = datapaths.get(datapath)
    kinds = {
        r: runtimes.prepare(r, interface.Options()) for r in (Runtime.PROCESS, Runtime.STANDIN)
    }
    dialed = str(loopback(family) if way.localhost else guest_link(family, 1))
    said, log = tmp_path / "client.json", tmp_path / "server.txt"

    def start_iperf3(name: str, output: Path, *options: str) -> subprocess.Popen[bytes]:
        place = pod.place(workloads[name])
        command = ["iperf3", *options, "-p", str(port), "--forceflush"]
        return process.spawn(
            command, cgroup=place.cgroup, netns=place.netns, cpus=place.workload.cpus, output=output
        )

    def agent_s() -> float:
        result = client.run(
            Transport.TCP,
            family,
            dialed,
            roles.port("guest1"),
            "stream",
            128 << 10,
            duration_s=SECONDS,
            warmup_s=0.05,
        )
        return 1e6 * result.duration_s / result.bytes

    def iperf3_s() -> float:
        said.unlink(missing_ok=True)
        options = ("-c", dialed, "-J", "-n", f"{IPERF3_BYTES}")
        assert start_iperf3("native1", said, *options).wait() == 0
        return megabyte_s(said.read_bytes())

    with (
        Owner() as owner,
        ExitStack() as stack,
        Pod(owner, "beside", Manifest(tuple(workloads.values())), way, kinds, tmp_path) as pod,
    ):
        pod.start()
        iperf3 = start_iperf3("guest1", log, "-s")
        stack.callback(process.end, iperf3)
        with pod.agent("native1") as client, pod.agent("guest1") as server:
            server.serve(Transport.TCP, family, roles.port("guest1"))
            while not (log.exists() and "listening" in log.read_text()):
                assert iperf3.poll() is None
                sleep(0.01)
            what = f"agent: a megabyte to a stand-in, {datapath}, {family}, by iperf3's"
            ratio(what, agent_s, iperf3_s, rounds=ROUNDS)
