"""How long a container runtime waits for ADD, against Debian's `bridge` with `host-local`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from testbed.host import namespaces
from testbed.host.ledger import Owner
from tests.integration import chain

from .gate import Ratio

pytestmark = [pytest.mark.root, pytest.mark.bench]

BARE_GOAL_S, GUEST_GOAL_S, MANY_GOAL_S = 0.02, 0.1, 2.0
ROUNDS, MANY = 9, 20
GUEST = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "guests"},
    "spec": {
        "runtimeClassName": "standin",
        "containers": [
            {
                "name": "guest",
                "image": "host:busybox",
                "ports": [{"containerPort": 9000}],
                "args": ["nc", "-ll", "-p", "9000", "-e", "cat"],
            }
        ],
    },
}


@dataclass(frozen=True)
class Node:
    """A host with a daemon, and namespaces of pods."""

    netns: str
    pods: list[str]
    folder: Path

    def call(self, command: str, plugin: dict[str, Any], pod: int = 0) -> None:
        """Call a plugin for a pod."""
        folders = [str(chain.own().parent), *chain.FOLDERS]
        program = shutil.which(plugin["type"], path=":".join(folders))
        given = {"cniVersion": "1.0.0", "name": "net", "prevResult": {"interfaces": []}, **plugin}
        variables = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": self.pods[pod],
            "CNI_NETNS": str(namespaces.NETNS / self.pods[pod]),
            "CNI_IFNAME": "eth0",
            "CNI_PATH": ":".join(folders),
            "PATH": os.environ["PATH"],
        }
        subprocess.run(
            ["nsenter", f"--net={namespaces.NETNS / self.netns}", str(program)],
            input=json.dumps(given),
            env=variables,
            check=True,
            text=True,
            capture_output=True,
        )

    def adds(self, plugin: dict[str, Any], count: int = 1) -> float:
        """Time of so many ADDs at once, in seconds. They are deleted afterwards."""
        pods = range(count)
        with ThreadPoolExecutor(count) as pool:
            began = perf_counter()
            list(pool.map(lambda pod: self.call("ADD", plugin, pod), pods))
            took_s = perf_counter() - began
            list(pool.map(lambda pod: self.call("DEL", plugin, pod), pods))
        return took_s


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    chain.programs()
    with Owner() as owner:
        host, *pods = (f"tb-{owner.id}-{n}" for n in range(MANY + 1))
        for netns in (host, *pods):
            with namespaces.create(owner, netns) as ip:
                ip.link("set", index=1, state="up")
        with chain.daemon(["nsenter", f"--net={namespaces.NETNS / host}"]):
            yield Node(host, pods, tmp_path_factory.mktemp("ipam"))


@pytest.mark.parametrize(
    ("what", "guests", "count", "rounds", "goal_s"),
    [
        ("a pod without guests", None, 1, ROUNDS, BARE_GOAL_S),
        ("a pod with a stand-in", GUEST, 1, ROUNDS, GUEST_GOAL_S),
        (f"{MANY} pods with stand-ins at once", GUEST, MANY, 3, MANY_GOAL_S),
    ],
)
def test_adding(
    ratio: Ratio,
    node: Node,
    tmp_path: Path,
    what: str,
    guests: dict[str, Any] | None,
    count: int,
    rounds: int,
    goal_s: float,
) -> None:
    own = {"type": "testbed-cni", "guests": guests or str(tmp_path)}
    ratio(
        f"ADD: {what}",
        lambda: node.adds(own, count),
        lambda: node.adds(chain.bridge(node.folder), count),
        rounds=rounds,
        goal_s=goal_s,
    )
