"""A link of one guest is lost and mended again and again, and nobody else notices."""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack

import pytest

from testbed.datapaths.interface import Attachment
from testbed.model.terms import Family, Transport
from testbed.pods.reconciler import Reconciler

from .conftest import Build
from .sockets import Bench, Pair, wait_until

pytestmark = pytest.mark.root

MENDINGS = 100
PATIENCE_S = 0.9
"""Less than TCP takes to send anew what was lost first (1 s, or 0.2 s once it knows the way)."""


class Flow(threading.Thread):
    """Goes to and fro between two sockets until it is stopped; `rounds`, and what went wrong."""

    def __init__(self, pair: Pair, near: socket.socket, far: socket.socket) -> None:
        super().__init__(name=f"{pair} {near.type.name}")
        self.ends, self.rounds, self.fault = (near, far), 0, ""
        self.stopping = threading.Event()
        for end in self.ends:
            end.settimeout(PATIENCE_S)

    def run(self) -> None:
        try:
            while not self.stopping.wait(0.0005):
                for sender, receiver in (self.ends, self.ends[::-1]):
                    sender.send(b"round %8d" % self.rounds)
                    assert receiver.recv(100) == b"round %8d" % self.rounds
                self.rounds += 1
        except Exception as e:
            self.fault = f"{self.name} after {self.rounds} rounds: {e!r}"


@pytest.mark.parametrize("datapath", ["steer", "capture", "broadcast"])
def test_other_pairs_lose_nothing_while_one_link_is_mended(build: Build, datapath: str) -> None:
    bench = Bench(build(f"mend-{datapath}", datapath=datapath))
    pod = bench.pod
    pod.attach_deferred()
    with ExitStack() as stack:
        flows = [
            Flow(pair, *stack.enter_context(bench.connected(pair, family, transport)))
            for pair in (Pair(0, 1), Pair(1, 0))
            for family in Family
            for transport in Transport
        ]
        for flow in flows:
            flow.start()
        try:
            for _ in range(MENDINGS):
                pod.links.link_ip.link("del", ifname="g2")
                pod.mend()
        finally:
            for flow in flows:
                flow.stopping.set()
                flow.join()
    assert [flow.fault for flow in flows if flow.fault] == []
    assert all(flow.rounds > MENDINGS for flow in flows)
    for pair in (Pair(0, 2), Pair(2, 0), Pair(1, 2)):
        with bench.connected(pair, Family.IPV4) as (near, far):
            near.send(b"mended")
            assert far.recv(100) == b"mended"


def test_what_a_mending_left_undone_the_next_one_does(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = build("halfway", datapath="steer")

    def fail(attachment: Attachment, wiring: object) -> None:
        raise PermissionError

    pod.links.link_ip.link("del", ifname="g1")
    with monkeypatch.context() as patch:
        patch.setattr(type(pod.attachment), "rewire", fail)
        with pytest.raises(PermissionError):
            pod.mend()
    assert pod.mend() == {"g1"}


def test_a_link_is_made_again_in_a_pod_that_lost_its_cgroup(build: Build) -> None:
    pod = build("uprooted", datapath="steer")
    pod.cgroup.rmdir()
    pod.links.link_ip.link("del", ifname="g1")
    with Reconciler(pod) as reconciler:
        wait_until(lambda: "g1" in reconciler.mended, "g1 is back")
