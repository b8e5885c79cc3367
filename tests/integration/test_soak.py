"""Random operations over many pods: guests die, links vanish, supervisors are killed, guests flood.

At the end every pod passes conformance checks, and once they are taken down nothing is left, of
memory neither. `--soak` says for how many seconds, `--soak-seed` has the same operations again.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from testbed import agent
from testbed.conformance.stage import PORTS
from testbed.host import facts, netlink
from testbed.model.addresses import CONTROL_PORT, guest_link
from testbed.model.terms import Family
from testbed.pods import control
from tests.conftest import snapshot

from .commands import run, there, workload
from .sockets import floods, send_frames, wait_until
from .test_killed import left_behind

pytestmark = [pytest.mark.root, pytest.mark.timeout(3600)]  # half an hour at night

AT_ONCE = 4
DATAPATHS = ("steer", "capture", "steer", "capture", "broadcast")
CHECKS = (
    "connect",
    "refused",
    "half-close",
    "reset",
    "listen-loopback",
    "accept-names",
    "datagram",
    "datagram-refused",
    "datagram-names",
    "datagram-3000",
)
SPARE_BYTES = 48 << 20
"""By which the kernel's memory may differ, as other programs run, too."""


def pod(name: str, program: Path) -> str:
    """A native and two guests; the agent of the first guest is asked by the checks."""
    ports = "".join(
        f"{{containerPort: {port}, protocol: {protocol}}}, "
        for port in PORTS["guest1"]
        for protocol in ("TCP", "UDP")
    )
    return f"""
apiVersion: v1
kind: Pod
metadata:
  name: {name}
  annotations: {{testbed/runtime.guest1: standin, testbed/runtime.guest2: standin}}
spec:
  runtimeClassName: process
  containers:
  - {{name: native, image: "host:sleep", args: ["100000"]}}
  - name: guest1
    image: "host:{program}"
    ports: [{ports}]
    readinessProbe: {{tcpSocket: {{port: {CONTROL_PORT}}}}}
  - {{name: guest2, image: "host:sleep", args: ["100000"]}}
"""


class Soak:
    """Pods, and what may happen to them."""

    def __init__(self, names: list[str], folder: Path) -> None:
        self.names = names
        self.manifests = {name: folder / f"{name}.yaml" for name in names}
        self.done: Counter[str] = Counter()
        for name, file in self.manifests.items():
            file.write_text(pod(name, agent.build()))

    def up(self, name: str) -> None:
        datapath = DATAPATHS[self.names.index(name) % len(DATAPATHS)]
        run("up", self.manifests[name], "--datapath", datapath, "--wait", "30")

    def ways(self) -> dict[str, Callable[[str, random.Random], None]]:
        return {
            "a guest dies": self.kill_guest,
            "a link vanishes": self.remove_link,
            "a supervisor is killed": self.kill_supervisor,
            "a guest floods": self.flood,
            "a pod goes and comes": self.go_and_come,
        }

    def kill_guest(self, name: str, rng: random.Random) -> None:
        """Unless it is being started."""
        pid = workload(name, rng.choice(("guest1", "guest2")))["pid"]
        with suppress(ProcessLookupError):
            if pid:
                os.kill(pid, signal.SIGKILL)

    def remove_link(self, name: str, rng: random.Random) -> None:
        """Of a guest, unless it is missing still."""
        lost = rng.choice(("g1", "g2"))
        for link in control.describe(name)["links"]:
            if link["name"] == lost:
                netlink.remove_link(link["netns"], lost)

    def kill_supervisor(self, name: str, rng: random.Random) -> None:
        os.kill(control.status(name)["supervisor"], signal.SIGKILL)
        wait_until(lambda: control.status(name)["supervisor"] is None, "it is dead")
        if rng.random() < 0.5:
            run("adopt", name)
        else:
            run("down", name)
            self.up(name)

    def flood(self, name: str, rng: random.Random) -> None:
        to = PORTS["guest1"][0]
        frames = floods(2, to, to, rng.randrange(5000))
        send_frames(f"{control.status(name)['netns']}-g2", "eth0", *frames)

    def go_and_come(self, name: str, rng: random.Random) -> None:
        run("down", name)
        self.up(name)

    def check(self, name: str) -> None:
        """Each check passes in the pod, once its guests are ready again."""
        wait_until(lambda: all(w["ready"] for w in control.status(name)["workloads"]), name, 60)
        where = f"/run/netns/{control.status(name)['netns']}", str(guest_link(Family.IPV4, 1))
        chosen = (word for check in CHECKS for word in ("--check", check))
        said = run("conformance", "--netns", where[0], "--control", where[1], *chosen, "--json")
        passed = {row["check"] for row in json.loads(said.stdout) if row["status"] == "pass"}
        assert passed == set(CHECKS)


@pytest.fixture
def names(pytestconfig: pytest.Config) -> Iterator[list[str]]:
    """Of pods, which are taken down if they stand: 20, or 5 for a short time."""
    mark = secrets.token_hex(2)
    pods = 20 if pytestconfig.getoption("soak") >= 600 else 5
    names = [f"soak-{mark}-{number}" for number in range(pods)]
    yield names
    for name in {*names} & {*control.names()}:
        control.down(name)


@pytest.mark.alone
def test_pods_stand_whatever_happens_and_leave_nothing(
    names: list[str], tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    seed = pytestconfig.getoption("soak_seed") or secrets.randbelow(10**6)
    print(f"--soak-seed {seed}")
    soak = Soak(names, tmp_path)
    before, memory = snapshot(), facts.kernel_bytes()

    def happens(name: str) -> None:
        rng = random.Random(f"{seed}/{name}")
        ways = soak.ways()
        while time.monotonic() < end:
            what = rng.choice(list(ways))
            ways[what](name, rng)
            soak.done[what] += 1
            time.sleep(rng.random())

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(soak.up, names))
    end = time.monotonic() + pytestconfig.getoption("soak")
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(happens, names))
    print(dict(soak.done))
    assert set(soak.done) == set(soak.ways())
    for name in names:
        soak.check(name)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda name: run("down", name), names))
    assert not [left for name in names for left in there(name)]

    wait_until(lambda: not left_behind(before, len(names)), "nothing is left", 30)
    wait_until(lambda: facts.kernel_bytes() < memory + SPARE_BYTES, "memory is back", 30)
