"""`testbed trace`: every hop of a packet is told with its verdict, and written for Wireshark."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import TCP
from scapy.layers.l2 import Ether
from scapy.utils import rdpcap

from testbed import bpf
from testbed.bpf import bytecode
from testbed.host import namespaces
from testbed.model.addresses import alias, loopback
from testbed.model.terms import Family
from testbed.pods import control
from tests.children import ending

pytestmark = pytest.mark.root

TESTBED = (sys.executable, "-m", "testbed.cli")
PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
PORT = 8081
HOPS = {
    "capture": [
        *("lo_egress", "uplink_egress", "router", "bridge_egress"),
        *("port_ingress", "uplink_ingress"),
    ],
    "steer": ["lo_egress", "port_egress", "port_ingress"],
}
"""Of a native's SYN to a guest and the answer, for a process that is not of the pod's cgroup."""


@pytest.fixture(scope="module", params=list(HOPS))
def pod(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A guest that serves, and the datapath in its name."""
    name = f"{request.param}-{secrets.token_hex(3)}"
    file = tmp_path_factory.mktemp("trace") / "pod.yaml"
    file.write_text(f"""
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  runtimeClassName: standin
  containers:
  - name: guest
    image: host:busybox
    args: [httpd, -f, -p, "{PORT}"]
    ports: [{{containerPort: {PORT}}}]
""")
    subprocess.run([*TESTBED, "up", "--datapath", request.param, file], check=True)
    yield name
    control.down(name)


def trace(pod: str, family: Family, *options: str | Path) -> list[dict[str, Any]]:
    """Events of a native that connects to the guest's port, until its own FIN."""
    command = [*TESTBED, "trace", pod, "--json", f"--port={PORT}", *options]
    with ending(subprocess.Popen(command, **PIPES)) as run:
        assert run.stderr
        assert run.stdout
        assert run.stderr.readline().startswith(f"tracing {pod}")
        netns = control.status(pod)["netns"]
        dial = f"import socket; socket.create_connection(('{loopback(family)}', {PORT})).close()"
        namespaces.inside(netns, lambda: subprocess.run([sys.executable, "-c", dial], check=True))
        events = [json.loads(line) for line in run.stdout]
        assert run.wait() == 0
    return events


@pytest.mark.parametrize("family", Family, ids=str)
def test_each_hop_of_a_connection_is_told_and_can_be_read_by_others(
    pod: str, family: Family, tmp_path: Path
) -> None:
    hops = HOPS[pod.partition("-")[0]]
    events = trace(pod, family, f"--count={len(hops)}", f"--pcap={tmp_path / 'x.pcapng'}")
    assert [e["program"] for e in events] == hops
    first, last = events[0], events[-1]
    assert str(loopback(family)) in first["came"]
    assert str(loopback(family)) not in first["went"]
    assert first["verdict"] == "redirected"
    assert last["went"].endswith("tcp SA")
    packets = rdpcap(str(tmp_path / "x.pcapng"))
    assert [p.sniffed_on for p in packets][:2] == ["lo_egress", "lo_egress, rewritten"]
    assert all(isinstance(p, Ether) and PORT in (p[TCP].sport, p[TCP].dport) for p in packets)
    assert packets[0].comment in ("redirected", b"redirected")


def test_what_is_dropped_is_told_with_its_reason(pod: str) -> None:
    command = [*TESTBED, "trace", pod, "--json", "--port=5555", "--count=1"]
    with ending(subprocess.Popen(command, **PIPES)) as run:
        assert run.stderr
        assert run.stdout
        run.stderr.readline()
        guest = f"{control.status(pod)['netns']}-g1"
        send = (
            "from scapy.all import Ether, IP, UDP, sendp\n"
            f"sendp(Ether(src='02:77:00:00:01:01') / IP(src='10.9.9.9', dst='{alias(Family.IPV4)}')"
            " / UDP(sport=5555, dport=5555), iface='eth0', verbose=False)"
        )
        namespaces.inside(guest, lambda: subprocess.run([sys.executable, "-c", send], check=True))
        event = json.loads(run.stdout.readline())
        run.wait()
    assert (event["verdict"], event["reason"]) == ("dropped", "spoofed")


def test_ordinary_programs_have_nothing_of_it_and_are_back_afterwards(pod: str) -> None:
    datapath = pod.partition("-")[0]
    assert not {"events", "last_reason"} & {m.name for m in bytecode.get(datapath).maps}
    assert not list(bpf.PINS.glob(f"{datapath}-*/traced-*"))
    command = [*TESTBED, "trace", pod, "--count=1"]
    with ending(subprocess.Popen(command, stderr=subprocess.PIPE, text=True)) as run:
        assert run.stderr
        run.stderr.readline()
        again = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "is being traced already" in again.stderr
