"""How long a container runtime waits for ADD, against Debian's `bridge` with `host-local`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from testbed.host import namespaces
from testbed.host.ledger import Owner
from tests.children import ending
from tests.integration import chain

from .gate import Ratio

pytestmark = [pytest.mark.root, pytest.mark.bench]

BARE_GOAL_S, GUEST_GOAL_S, MANY_GOAL_S = 0.02, 0.1, 2.0
ROUNDS, MANY = 9, 20


@dataclass(frozen=True)
class Node:
    """A host with a daemon, and namespaces of pods."""

    enter: list[str]
    """Prefix of a command line that runs a command there."""
    pods: list[str]
    folder: Path

    def call(self, command: str, plugin: dict[str, Any], pod: int = 0) -> None:
        """Call a plugin for a pod."""
        given = {"cniVersion": "1.0.0", "name": "net", "prevResult": {"interfaces": []}, **plugin}
        of_pod = {"container": self.pods[pod], "netns": str(namespaces.NETNS / self.pods[pod])}
        with ending(chain.begin(self.enter, command, given, **of_pod)) as called:
            printed, _ = called.communicate()
        assert called.returncode == 0, printed

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
        enter = ["nsenter", f"--net={namespaces.NETNS / host}"]
        with chain.daemon(enter):
            yield Node(enter, pods, tmp_path_factory.mktemp("ipam"))


@pytest.mark.parametrize(
    ("what", "guests", "count", "rounds", "goal_s"),
    [
        ("a pod without guests", None, 1, ROUNDS, BARE_GOAL_S),
        ("a pod with a stand-in", chain.guest(), 1, ROUNDS, GUEST_GOAL_S),
        (f"{MANY} pods with stand-ins at once", chain.guest(), MANY, 3, MANY_GOAL_S),
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
