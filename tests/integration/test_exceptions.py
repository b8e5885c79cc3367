"""What goes wrong in a pod at work, and is mended: links that vanish, guests that die."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from pyroute2.netlink.exceptions import NetlinkError

from testbed.host import namespaces
from testbed.model.addresses import guest_mac
from testbed.model.terms import Family, Transport
from testbed.pods.pod import Pod
from testbed.pods.reconciler import Reconciler

from .conftest import Build
from .sockets import PAIRS, PORTS, Bench, Pair, localhost, wait_until

pytestmark = pytest.mark.root

FAMILIES = pytest.mark.parametrize("family", Family, ids=str)


@pytest.fixture(scope="module")
def supervisor(pod: Pod) -> Iterator[Reconciler]:
    pod.start()
    with Reconciler(pod) as supervisor:
        yield supervisor


def links(pod: Pod) -> dict[str, str]:
    """What can vanish, by name."""
    return {**{f"port of guest {n}": f"g{n}" for n in (1, 2)}, "uplink": "pod", "bridge": "bridge"}


def remove(pod: Pod, ifname: str) -> None:
    with namespaces.open_socket(pod.links.link_netns) as ip:  # the supervisor has the pod's own
        ip.link("del", ifname=ifname)


def vanish(pod: Pod, supervisor: Reconciler, ifname: str) -> None:
    """Remove a link and wait until it is mended."""
    before = len(supervisor.mended)
    remove(pod, ifname)
    wait_until(lambda: ifname in supervisor.mended[before:], f"{ifname} is back")


def works(bench: Bench, pair: Pair, family: Family, transport: Transport) -> bool:
    try:
        with bench.connected(pair, family, transport) as (near, far):
            near.send(b"question")
            far.send(far.recv(100))
            return near.recv(100) == b"question"
    except OSError:
        return False


def everything_works(bench: Bench) -> bool:
    return all(works(bench, p, f, t) for p in PAIRS for f in Family for t in Transport)


# --- links ----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["port of guest 1", "port of guest 2", "uplink", "bridge"])
def test_a_link_that_vanishes_is_made_again(
    bench: Bench, supervisor: Reconciler, what: str
) -> None:
    """Without a word to the supervisor; what was counted before stays counted."""
    before = bench.pod.attachment.carried(None, 1)
    assert everything_works(bench)
    vanish(bench.pod, supervisor, links(bench.pod)[what])
    assert everything_works(bench)
    assert bench.pod.attachment.carried(None, 1).packets > before.packets


def test_a_connection_survives_the_loss_of_its_link(bench: Bench, supervisor: Reconciler) -> None:
    for what in ("port of guest 1", "uplink"):
        with bench.connected(Pair(0, 1), Family.IPV4) as (near, far):
            remove(bench.pod, links(bench.pod)[what])
            near.send(b"question")
            assert far.recv(100) == b"question"


def test_links_may_vanish_over_and_over_all_at_once(bench: Bench, supervisor: Reconciler) -> None:
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        for ifname in links(bench.pod).values():
            with suppress(NetlinkError):  # not made again yet
                remove(bench.pod, ifname)
    wait_until(lambda: not bench.pod.missing_links(), "all links are there")
    vanish(bench.pod, supervisor, links(bench.pod)["bridge"])
    assert everything_works(bench)


def test_agents_are_reached_again_too(bench: Bench, supervisor: Reconciler) -> None:
    for ifname in links(bench.pod).values():
        vanish(bench.pod, supervisor, ifname)
    for name in ("native1", "guest1", "guest2"):
        with bench.pod.agent(name) as agent:
            assert agent.hello().families == set(Family)


# --- guests ---------------------------------------------------------------------------------


def kill(pod: Pod, workload: str) -> None:
    os.kill(pod.processes[workload].pid, signal.SIGKILL)


@pytest.fixture
def silenced(bench: Bench) -> Iterator[None]:
    """Guest 1 is cut off before it dies: its kernel's FIN, which a real guest has none of, is lost.

    With another MAC than its own it is dropped as a forger.
    """
    with namespaces.open_socket(bench.netns(1)) as ip:
        eth0 = ip.link_lookup(ifname="eth0")[0]
        ip.link("set", index=eth0, address="02:00:00:00:00:01")
        yield
        ip.link("set", index=eth0, address=guest_mac(1))


@FAMILIES
def test_natives_blocked_on_a_guest_that_dies_get_an_error_within_a_second(
    bench: Bench, supervisor: Reconciler, family: Family, request: pytest.FixtureRequest
) -> None:
    """Of either direction: who connected does not matter."""
    bench.pod.revive()
    died = len(supervisor.deaths)
    with (
        bench.connected(Pair(0, 1), family) as (client, _),
        bench.connected(Pair(1, 0), family) as (_, server),
    ):
        request.getfixturevalue("silenced")
        kill(bench.pod, "guest1")
        began = time.monotonic()
        for native in (client, server):
            with pytest.raises(ConnectionAbortedError):
                native.recv(100)
        assert time.monotonic() - began < 1
    assert supervisor.deaths[died:] == ["guest1"]


@FAMILIES
def test_connections_with_others_survive_a_guests_death(
    bench: Bench, supervisor: Reconciler, family: Family
) -> None:
    bench.pod.revive()
    with (
        bench.connected(Pair(0, 2), family) as of_guest2,
        bench.connected(Pair(2, 0), family) as by_guest2,
    ):
        died = len(supervisor.deaths)
        kill(bench.pod, "guest1")
        wait_until(lambda: len(supervisor.deaths) > died, "the death was noticed")
        for near, far in (of_guest2, by_guest2):
            near.send(b"still there?")
            assert far.recv(100) == b"still there?"


@pytest.fixture(scope="module")
def unattended(build: Build) -> Bench:
    """Nobody mends it."""
    return Bench(build("unattended"))


@FAMILIES
@pytest.mark.parametrize("dead", [1, 2])
def test_a_guest_hears_of_anothers_death(unattended: Bench, dead: int, family: Family) -> None:
    unattended.a_guest_hears_of_anothers_death(Pair(1, 2), dead, family)


@FAMILIES
@pytest.mark.parametrize("dead", [1, 2])
def test_a_guest_hears_of_anothers_death_after_a_half_close(
    unattended: Bench, dead: int, family: Family
) -> None:
    """By the other end than the one that dies: it sends no more, but waits for what comes."""

    def half_close(client: socket.socket, server: socket.socket) -> None:
        near, far = (server, client) if dead == 1 else (client, server)
        near.shutdown(socket.SHUT_WR)
        assert far.recv(1) == b""

    unattended.a_guest_hears_of_anothers_death(Pair(1, 2), dead, family, half_close)


@FAMILIES
@pytest.mark.parametrize("transport", Transport, ids=str)
def test_a_guest_that_ended_is_refused_until_it_sends(
    bench: Bench, supervisor: Reconciler, family: Family, transport: Transport
) -> None:
    bench.refuses_until_it_sends(family, transport)


@FAMILIES
def test_the_next_guest_on_the_port_works(
    bench: Bench, supervisor: Reconciler, family: Family
) -> None:
    bench.pod.revive()
    kill(bench.pod, "guest1")
    bench.pod.processes["guest1"].wait()
    bench.pod.revive()
    with bench.pod.agent("guest1") as agent, bench.open(0, family, Transport.TCP) as client:
        agent.serve(Transport.TCP, family, PORTS[1])
        client.connect((localhost(0, family), PORTS[1]))


def test_a_death_is_noticed_once(bench: Bench, supervisor: Reconciler) -> None:
    bench.pod.revive()
    died = len(supervisor.deaths)
    kill(bench.pod, "guest2")
    wait_until(lambda: len(supervisor.deaths) > died, "the death was noticed")
    vanish(bench.pod, supervisor, links(bench.pod)["bridge"])  # something else to do, and done
    assert supervisor.deaths[died:] == ["guest2"]
