"""A supervisor that is killed takes nothing along, and another one goes on in its place."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from testbed.host import namespaces, netlink
from testbed.model.addresses import alias, loopback
from testbed.model.terms import Family
from testbed.pods import control
from tests.children import ending

from .commands import run, there, workload
from .sockets import dial, wait_until

pytestmark = pytest.mark.root

GUEST, NATIVE = 9000, 9001
ECHO = f"""
- name: guest
  image: "host:busybox"
  args: [nc, -ll, -p, "{GUEST}", -e, cat]
  ports: [{{containerPort: {GUEST}}}]
- name: native
  image: "host:busybox"
  args: [nc, -ll, -p, "{NATIVE}", -e, cat]
  ports: [{{containerPort: {NATIVE}}}]
"""
CLIENT = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 5) as connection:
    for line in sys.stdin:
        connection.sendall(line.encode())
        print(connection.makefile().readline(), end="", flush=True)
"""


class Client:
    """A program in a workload's place, with a connection to a server that echoes."""

    def __init__(self, pod: str, place: str, address: object, port: int) -> None:
        command = [*workload(pod, place)["enter"], sys.executable, "-c", CLIENT]
        self.process = subprocess.Popen(
            [*command, str(address), str(port)],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def works(self) -> bool:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("hello\n")
        self.process.stdin.flush()
        return self.process.stdout.readline() == "hello\n"


@contextmanager
def connected(pod: str) -> Iterator[list[Client]]:
    """Clients past `lo` in both directions and families, that have been answered."""
    with ExitStack() as stack:
        clients = []
        for family in Family:
            for place, dialed, port in (
                ("native", loopback(family), GUEST),
                ("guest", alias(family), NATIVE),
            ):
                clients.append(Client(pod, place, dialed, port))
                stack.enter_context(ending(clients[-1].process))
        assert all(client.works() for client in clients)
        yield clients


def by_lo(pod: str, family: Family) -> socket.socket:
    """A connection to the guest from a process of the namespace that is not of the pod's cgroup."""
    return dial(control.status(pod)["netns"], str(loopback(family)), GUEST)


def echoes(connection: socket.socket) -> bool:
    connection.sendall(b"hello")
    return connection.recv(5) == b"hello"


def kill_supervisor(pod: str, by: signal.Signals = signal.SIGKILL) -> None:
    os.kill(control.status(pod)["supervisor"], by)
    wait_until(lambda: control.status(pod)["supervisor"] is None, "it is dead")


@pytest.mark.parametrize("datapath", ["steer", "capture"])
def test_connections_and_workloads_live_through_their_supervisors(
    manifest: Callable[..., Path], name: str, datapath: str
) -> None:
    up = ("up", manifest(ECHO, guests=["guest"]), "--datapath", datapath)
    run(*up)
    pids = {w["name"]: w["pid"] for w in control.status(name)["workloads"]}
    with connected(name) as clients, by_lo(name, Family.IPV4) as v4, by_lo(name, Family.IPV6) as v6:

        def all_work() -> bool:
            return all([*(client.works() for client in clients), echoes(v4), echoes(v6)])

        for _ in range(2):
            kill_supervisor(name)
            assert all_work()
            run(*up)
            assert all_work()
        assert control.status(name)["supervisor"]
        with by_lo(name, Family.IPV6) as new:
            assert echoes(new)
    assert {w["name"]: w["pid"] for w in control.status(name)["workloads"]} == pids
    assert [w["restarts"] for w in control.status(name)["workloads"]] == [0, 0]
    assert "taken over" in run("describe", name).stdout
    with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
        namespaces.inside(control.status(name)["netns"], lambda: socket.create_server(("", GUEST)))
    run("down", name)
    assert not there(name)


def test_a_new_supervisor_starts_what_ended_meanwhile_and_sees_what_ends_later(
    manifest: Callable[..., Path], name: str
) -> None:
    run("up", manifest(ECHO, guests=["guest"]))
    guest, native = (workload(name, w)["pid"] for w in ("guest", "native"))
    kill_supervisor(name)
    os.kill(guest, signal.SIGKILL)
    assert f"supervisor of pod {name} was killed" in run("ps").stderr
    run("adopt", name)
    assert (workload(name, "guest")["restarts"], workload(name, "native")["restarts"]) == (1, 0)
    assert any("guest: ended while nobody" in event for event in control.describe(name)["events"])
    os.kill(native, signal.SIGKILL)
    wait_until(lambda: workload(name, "native")["restarts"] == 1, "a restart")
    wait_until(lambda: workload(name, "native")["ready"], "it is ready again")
    assert "is alive" in run("adopt", name, status=3).stderr


def test_neither_a_hangup_nor_the_end_of_adopt_takes_a_pod_down(
    manifest: Callable[..., Path], name: str
) -> None:
    """A guest that never gets ready keeps `adopt` waiting."""
    never = ECHO + '  readinessProbe: {exec: {command: ["false"]}}\n'
    run("up", manifest(never, guests=["guest"]), "--wait=1", status=1)
    native = workload(name, "native")["pid"]
    kill_supervisor(name, signal.SIGHUP)
    command = [sys.executable, "-m", "testbed.cli", "adopt", name, "--wait=60"]
    with ending(subprocess.Popen(command)) as adopting:
        wait_until(lambda: control.status(name)["supervisor"] is not None, "it is adopted")
        adopting.send_signal(signal.SIGTERM)
        assert adopting.wait(30) == 130
    assert workload(name, "native")["pid"] == native
    assert control.status(name)["supervisor"] is not None


def test_a_link_that_was_lost_meanwhile_is_made_again(
    manifest: Callable[..., Path], name: str
) -> None:
    run("up", manifest(ECHO, guests=["guest"]))
    kill_supervisor(name)
    netlink.remove_link(control.status(name)["netns"], "g1")
    run("adopt", name)
    with by_lo(name, Family.IPV4) as connection:
        assert echoes(connection)


def test_an_orphan_is_only_taken_over_as_it_is(manifest: Callable[..., Path], name: str) -> None:
    run("up", manifest(ECHO, guests=["guest"]))
    kill_supervisor(name)
    other = manifest(ECHO.replace(str(NATIVE), "9002"), guests=["guest"])
    refused = run("up", other, status=3)
    assert f"testbed adopt {name}, or testbed down {name}" in refused.stderr
    taken = namespaces.inside(
        control.status(name)["netns"], lambda: socket.create_server(("", GUEST))
    )
    with taken:
        assert "a native process has it" in run("adopt", name, status=3).stderr
    assert workload(name, "guest")["state"] == "running"
    run("adopt", name)


def test_an_orphan_is_taken_down_as_any_pod(manifest: Callable[..., Path], name: str) -> None:
    run("up", manifest(ECHO, guests=["guest"]))
    kill_supervisor(name)
    run("down", name)
    assert not there(name)
    assert f"no pod '{name}'" in run("adopt", name, status=3).stderr


def test_containers_go_on_too(manifest: Callable[..., Path], name: str) -> None:
    run(
        "up",
        manifest('- {name: box, image: "host:", command: [sleep, "1000"]}', runtime="container"),
    )
    pid = workload(name, "box")["pid"]
    kill_supervisor(name)
    run("adopt", name)
    assert (workload(name, "box")["pid"], workload(name, "box")["restarts"]) == (pid, 0)
    run("exec", name, "--", "true")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: workload(name, "box")["restarts"] == 1, "a restart")
    wait_until(lambda: workload(name, "box")["ready"], "it is ready again")
    run("down", name)
    assert not there(name)
