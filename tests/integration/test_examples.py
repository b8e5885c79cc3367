"""The pods of examples/ run with any guest, and everybody in them reaches all at localhost."""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from testbed.agent import Agent
from testbed.host import cache, facts, namespaces
from testbed.images import kernels
from testbed.model import addresses
from testbed.model.terms import Family, Runtime, Transport
from testbed.pods import control

from .sockets import wait_until

pytestmark = pytest.mark.root

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT_S = 180
"""For the first `up` of a component, which is compiled once, on a machine that is busy."""
COUNT = r"(?m)^(\(integer\) )?[1-9]\d*\r?$"
"""What redis-cli prints of a counter, on a terminal (the console of a virtual machine) or not."""
NOBODY = "http://127.0.0.1:9"
"""The discard port, for a proxy: nothing is downloaded."""

Up = Callable[[str], str]


@pytest.fixture(scope="module", params=[Runtime.STANDIN, Runtime.LINUX, Runtime.OSV])
def best(request: pytest.FixtureRequest) -> Runtime:
    """A runtime, to be the best guest that is there."""
    return Runtime(request.param)


@pytest.fixture(scope="module")
def environment(best: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """A machine that has no kernel for a better guest, and gets none."""
    if best is Runtime.OSV:
        if kernels.find_osv(download=False) is None:
            pytest.skip("no OSv kernel here")
        return os.environ
    folder = tmp_path_factory.mktemp(f"cache-{best}") / "testbed"
    (folder / "kernels").mkdir(parents=True)
    (cache.cache_folder() / "wasm").mkdir(exist_ok=True)  # a component takes 20 s to compile
    for there in cache.cache_folder().iterdir():
        if there.name != "kernels":
            (folder / there.name).symlink_to(there)
    environment = {n: value for n, value in os.environ.items() if n != "TESTBED_OSV_KERNEL"}
    environment |= {"XDG_CACHE_HOME": str(folder.parent), "https_proxy": NOBODY}
    if best is Runtime.LINUX:
        linux = kernels.linux_kernel().path.parents[2]
        (folder / "kernels" / linux.name).symlink_to(linux)
        return environment
    apt = folder.parent / "apt.conf"
    apt.write_text('Dir::State::lists "/nonexistent"; Dir::Cache "/nonexistent";\n')
    return environment | {"APT_CONFIG": str(apt)}


@pytest.fixture
def up(best: Runtime, environment: Mapping[str, str], tmp_path: Path) -> Iterator[Up]:
    """Puts an example up under a name of its own, which it returns; taken down afterwards."""
    names = []

    def up(example: str) -> str:
        name = f"{example}-{secrets.token_hex(3)}"
        text = (EXAMPLES / f"{example}.yaml").read_text()
        text = text.replace(f"name: {example}\n", f"name: {name}\n", 1)
        text = re.sub(rf"image: {example}/", f"image: {EXAMPLES}/{example}/", text)
        file = tmp_path / f"{example}.yaml"
        file.write_text(text)
        names.append(name)
        wait = f"--wait={LIMIT_S * facts.slowness():g}"
        command = [sys.executable, "-m", "testbed.cli", "up", str(file), wait]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert re.findall("(?m)^testbed: the best guest here: ([a-z]+)", done.stderr) == [best]
        return name

    yield up
    for name in set(names) & set(control.names()):
        control.down(name)


def log(pod: str, workload: str) -> str:
    [found] = control.workloads(pod, workload)
    return Path(found["log"]).read_text(errors="replace")


def says(pod: str, workload: str, pattern: str) -> None:
    """Wait until a workload has printed what matches."""
    wait_until(lambda: bool(re.search(pattern, log(pod, workload))), f"{workload}: {pattern}", 60)


def test_redis_counts_for_a_component_and_a_guest(up: Up) -> None:
    pod = up("redis")
    says(pod, "component", r":\d{1,9}")
    says(pod, "guest", COUNT)


def test_a_container_reads_what_a_guest_serves(up: Up, best: Runtime) -> None:
    """And the guest sees it at loopback if there is a shim in it, else at its link's other end."""
    seen = (addresses.loopback if best is Runtime.OSV else addresses.pod_link)(Family.IPV4)
    says(up("web"), "client", f"(?m)^{re.escape(str(seen))}$")


def test_guests_talk_to_each_other(up: Up) -> None:
    says(up("guests"), "counter", COUNT)


def test_a_gateway_switches_its_fan(up: Up) -> None:
    pod = up("gateway")
    says(pod, "rules", "fan on")
    says(pod, "rules", "fan off")


@pytest.mark.parametrize(
    "best", [Runtime.OSV, Runtime.LINUX], indirect=True
)  # it has a Linux guest
def test_everyone_reaches_everyone(up: Up, capsys: pytest.CaptureFixture[str]) -> None:
    """Every agent gets answers from every other's port, in both families where both ends speak
    them; the component, which is no agent, connects to all.
    """
    pod = control.status(up("everyone"))
    with ExitStack() as stack:
        agents = {
            w["name"]: stack.enter_context(connected(pod, w))
            for w in pod["workloads"]
            if w["runtime"] != "wasm"
        }
        ports = {
            w["name"]: int(w["ports"][0].split("/")[0]) for w in pod["workloads"] if w["ports"]
        }
        families = {name: agent.hello().families for name, agent in agents.items()}
        reached = {}
        for family in Family:
            for transport in Transport:
                for server, serving in agents.items():
                    if family not in families[server]:
                        continue
                    listening = serving.serve(transport, family, ports[server])
                    for client, dialing in agents.items():
                        if family in families[client]:
                            name = "localhost" if family is Family.IPV4 else "ip6-localhost"
                            result = dialing.run(
                                transport, family, name, ports[server], "rr", 64, duration_s=0.05
                            )
                            ok = result.transactions > 0 and not result.errors
                            reached[client, server, family, transport] = ok
                    if transport is Transport.TCP:
                        address = "127.0.0.1" if family is Family.IPV4 else "::1"
                        dialed = rf"(?m)^{address} {ports[server]} connected"
                        says(pod["name"], "component", dialed)
                    serving.stop(listening)
    with capsys.disabled():
        print_matrix(list(agents), reached)
    assert all(reached.values())
    assert len(reached) >= 2 * 25  # IPv4 at least


def connected(pod: dict[str, Any], workload: dict[str, Any]) -> Agent:
    """A control connection to the agent of a workload."""
    port = {"container": 4701, "process": 4702}.get(workload["name"], 4700)
    to = (workload["addresses"][0], port)
    return Agent(namespaces.inside(pod["netns"], lambda: socket.create_connection(to, 5)))


def print_matrix(names: list[str], reached: dict[tuple[str, str, Family, Transport], bool]) -> None:
    """Clients downwards, servers across: T for TCP, U for UDP, small over IPv6, - for not."""
    letters = [
        (f, t, t[0].upper() if f is Family.IPV4 else t[0]) for f in Family for t in Transport
    ]
    print(f"\n{'':10}" + "".join(f"{name:>11}" for name in names))
    for client in names:
        cells = (
            "".join(x if reached.get((client, server, f, t)) else "-" for f, t, x in letters)
            for server in names
        )
        print(f"{client:10}" + "".join(f"{cell:>11}" for cell in cells))
