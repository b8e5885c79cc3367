"""How long a person waits for `testbed up` and `ps`: whole commands, all caches warm.

Against the start of a Python that does nothing.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.images import kernels
from testbed.pods import control

from .gate import Ratio
from .references import start_of_python

pytestmark = [pytest.mark.root, pytest.mark.bench]

NATIVES_GOAL_S, GUEST_GOAL_S, MANY_GOAL_S, PS_GOAL_S = 1.0, 2.0, 15.0, 0.4
ROUNDS, MANY = 5, 20
SERVER = """\
import socket

server = socket.create_server(("127.0.0.1", 8003))
while True:
    server.accept()[0].close()
"""
RUNTIMES = {"component": "wasm", "guest": "osv"}
HTTPD = """{{name: c{port}, image: "host:", command: [httpd, -f, -p, "{port}"],
    ports: [{{containerPort: {port}}}]}}"""


def command(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "testbed.cli", *words], check=True, capture_output=True)


@pytest.fixture
def names() -> Iterator[list[str]]:
    """Of pods that are taken down afterwards."""
    names: list[str] = []
    yield names
    take_down(names)


def take_down(names: list[str]) -> None:
    for name in set(names) & set(control.names()):
        control.down(name)
    names.clear()


def manifest(folder: Path, names: list[str], containers: list[str], count: int = 1) -> Path:
    """Of so many new pods, whose names are added."""
    (folder / "serve.py").write_text(SERVER)
    documents, lines = [], "".join(f"  - {container}\n" for container in containers)
    kinds = [f"testbed/runtime.{name}: {kind}" for name, kind in RUNTIMES.items() if name in lines]
    for _ in range(count):
        names.append(f"b{secrets.token_hex(3)}")
        documents.append(
            f"apiVersion: v1\nkind: Pod\nmetadata:\n  name: {names[-1]}\n"
            f"  annotations: {{{', '.join(kinds)}}}\n"
            f"spec:\n  containers:\n{lines}"
        )
    file = folder / "pods.yaml"
    file.write_text("---\n".join(documents))
    return file


def measure(
    ratio: Ratio,
    what: str,
    names: list[str],
    folder: Path,
    containers: list[str],
    goal_s: float,
    count: int = 1,
    rounds: int = ROUNDS,
) -> None:
    """An `up`."""
    file = folder / "pods.yaml"

    def setup() -> None:
        take_down(names)
        manifest(folder, names, containers, count)

    ratio(
        f"up: {what}",
        lambda: command("up", file),
        start_of_python,
        rounds=rounds,
        setup=setup,
        goal_s=goal_s,
    )


COMPONENT = "{name: component, image: serve.py, ports: [{containerPort: 8003}]}"
GUEST = (
    "{name: guest, image: agent, ports: [{containerPort: 8011}], "
    "readinessProbe: {tcpSocket: {port: 4700}}}"
)


def test_two_containers_and_a_component(ratio: Ratio, names: list[str], tmp_path: Path) -> None:
    containers = [HTTPD.format(port=8001), HTTPD.format(port=8002), COMPONENT]
    what = "two containers and a component"
    measure(ratio, what, names, tmp_path, containers, NATIVES_GOAL_S)


def test_the_same_with_a_unikernel_that_serves(
    ratio: Ratio, names: list[str], tmp_path: Path
) -> None:
    if kernels.find_osv(download=False) is None:
        pytest.skip("no OSv kernel here")
    containers = [HTTPD.format(port=8001), HTTPD.format(port=8002), COMPONENT, GUEST]
    what = "the same and a unikernel that serves"
    measure(ratio, what, names, tmp_path, containers, GUEST_GOAL_S)


def test_twenty_pods_of_four_containers_and_their_list(
    ratio: Ratio, names: list[str], tmp_path: Path
) -> None:
    containers = [HTTPD.format(port=8001 + n) for n in range(4)]
    what = f"{MANY} pods of four containers"
    measure(ratio, what, names, tmp_path, containers, MANY_GOAL_S, MANY, rounds=1)


def test_pods_are_listed(ratio: Ratio, names: list[str], tmp_path: Path) -> None:
    command("up", manifest(tmp_path, names, [HTTPD.format(port=8001)], MANY))
    ratio(f"ps: {MANY} pods", lambda: command("ps"), start_of_python, goal_s=PS_GOAL_S)
