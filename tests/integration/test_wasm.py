"""WASI components: made of Python programs, with the pod's network and localhost."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testbed import runtimes
from testbed.campaigns import roles, trial
from testbed.campaigns.roles import unsupported
from testbed.datapaths import get
from testbed.host import ledger, namespaces
from testbed.host.ledger import Owner
from testbed.model.cells import Cell, Pair
from testbed.model.errors import Error
from testbed.model.manifest import Manifest, Program, Workload
from testbed.model.metrics import Metric
from testbed.model.terms import Family, Runtime, Transport
from testbed.model.trials import Status
from testbed.pods.pod import Pod
from testbed.runtimes.interface import Options, Prepared
from tests.children import ending

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]  # components are compiled once

SOURCE = """\
import os
import socket
import sys

if len(sys.argv) == 1:
    print("hello", os.environ["WHO"])
    raise SystemExit(3)
host, port = sys.argv[1:]
family = socket.AF_INET6 if ":" in host else socket.AF_INET
with socket.socket(family) as client:
    if host == "localhost":
        client = socket.create_connection((host, int(port)))
    else:
        client.connect((host, int(port)))
    client.sendall(b"ping")
    print(client.recv(100).decode())
"""


@pytest.fixture(scope="module")
def runtime() -> Prepared:
    return runtimes.prepare(Runtime.WASM, Options())


@pytest.fixture(scope="module")
def pod(owner: Owner, runtime: Prepared) -> Iterator[Pod]:
    scratch = ledger.create_folder(owner, f"{owner.id}-wasm")
    (scratch / "native").mkdir()
    (scratch / "native/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    (scratch / "native/resolv.conf").write_text("")
    kinds = {Runtime.WASM: runtime}
    with Pod(owner, "wasm", Manifest(()), get("loopback"), kinds, scratch, scratch) as pod:
        yield pod


Run = Callable[..., str]


@pytest.fixture(scope="module")
def run(pod: Pod, runtime: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What the component of `SOURCE` prints."""
    source = tmp_path_factory.mktemp("wasm") / "client.py"
    source.write_text(SOURCE)

    def run(*args: str, status: int = 0) -> str:
        program = Program(str(source), args=args, env=(("WHO", "Ada"),))
        place = pod.place(Workload("component", Runtime.WASM, program=program))
        place.console.unlink(missing_ok=True)
        with ending(runtime.start(place)) as running:
            running.wait(10)
        text = place.console.read_text()
        assert running.returncode == status, text
        return text

    return run


def test_environment_and_status_are_the_programs(run: Run) -> None:
    assert run(status=1) == "hello Ada\n"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_it_dials_in_the_pod(run: Run, pod: Pod, host: str) -> None:
    family = Family.IPV6 if ":" in host else Family.IPV4
    address = "127.0.0.1" if host == "localhost" else host

    def serve() -> socket.socket:
        return socket.create_server((address, 0), family=family.domain)

    with namespaces.inside(pod.netns, serve) as server:
        server.settimeout(10)

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"pong " + connection.recv(100))

        answering = threading.Thread(target=answer)
        answering.start()
        assert run(host, str(server.getsockname()[1])) == "pong ping\n"
        answering.join()


# --- the traffic agent ----------------------------------------------------------------------

PAIRS = [pair for pair in Pair if pair is not pair.shape]
METRICS = [(Metric.THROUGHPUT, Transport.TCP, 65536), (Metric.LATENCY, Transport.UDP, 64)]


@pytest.fixture(scope="module", params=["steer", "capture"])
def bench(
    request: pytest.FixtureRequest, owner: Owner, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Pod, Prepared]]:
    """A pod of what the pairs need, and its guest."""
    kinds = {
        kind: runtimes.prepare(kind, Options()) for kind in (*roles.natives(PAIRS), Runtime.STANDIN)
    }
    manifest = roles.manifest(PAIRS, Runtime.STANDIN)
    name, consoles = f"agents-{request.param}", tmp_path_factory.mktemp("consoles")
    with Pod(owner, name, manifest, get(request.param), kinds, consoles) as pod:
        pod.start()
        yield pod, kinds[Runtime.STANDIN]


@pytest.mark.parametrize(("metric", "transport", "size"), METRICS)
@pytest.mark.parametrize("family", Family, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_pairs_with_components_are_measured_in_both_families(
    bench: tuple[Pod, Prepared],
    pair: Pair,
    family: Family,
    metric: Metric,
    transport: Transport,
    size: int,
) -> None:
    pod, guest = bench
    cell = Cell(pod.datapath.name, pair, family, transport, metric, size)
    result = trial.run(cell, [pod], guest, 0.05, 0.2)
    if result.status is not Status.OK:  # on a busy machine
        result = trial.run(cell, [pod], guest, 0.1, 1.5)
    assert result.status is Status.OK, result.reason


def test_what_a_component_has_no_calls_for_is_told(bench: tuple[Pod, Prepared]) -> None:
    pod, guest = bench
    cell = Cell("steer", Pair.WASM_GUEST, Family.IPV4, Transport.TCP, Metric.CONNECTIONS, 64)
    assert "WASI has no close by reset" in (unsupported(get("steer"), cell, guest) or "")
    with pod.agent("wasm1") as agent:
        agent.ask(op="socket", transport="tcp", family="ipv4")
        made = agent.answer()["socket"]
        agent.ask(op="set", socket=made, option="SO_LINGER", value=0)
        assert agent.answer()["errno"] == errno.ENOPROTOOPT


def test_what_is_no_component_is_refused(runtime: Prepared, tmp_path: Path) -> None:
    (tmp_path / "bad.wasm").write_bytes(b"no component")
    for image, fault in (
        (tmp_path / "bad.wasm", "no component for WASI 0.2"),
        (tmp_path / "none.wasm", "no component"),
    ):
        with pytest.raises(Error, match=fault):
            runtime.compose(Workload("c", Runtime.WASM, program=Program(str(image))))
    told = Workload("c", Runtime.WASM, program=Program("x.wasm", command=("ls",)))
    with pytest.raises(Error, match="neither command nor workingDir"):
        runtime.compose(told)
