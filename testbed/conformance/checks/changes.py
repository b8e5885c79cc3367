"""Checks of what happens when workloads, links and pods come and go."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Self

from testbed.conformance.bed import Bed
from testbed.conformance.check import Unsupported, check, expect
from testbed.conformance.checks.volume import amount
from testbed.conformance.sockets import Peer
from testbed.conformance.steps import exchange
from testbed.model.cells import Pair
from testbed.model.errors import Error
from testbed.model.terms import Transport

END_S = 2.0
"""Limit for a program to learn that its peer is gone."""
AGAIN_S = 3.0
"""Time after which a guest sends a lost SYN again (RFC 2988; 1 s since RFC 6298)."""
BACK_S = 40.0
"""Limit for a workload to be back; an emulated machine has to boot."""

RESTARTS = 100
EACH = 5
"""Number of connections that every client must make between two restarts."""

BETWEEN = frozenset({Pair.NATIVE_GUEST, Pair.GUEST_NATIVE})
ANOTHER = BETWEEN | {Pair.NATIVE_NATIVE, Pair.GUEST_GUEST}


def works_again(bed: Bed) -> None:
    """Check that new connections work, as soon as the workloads answer again."""
    deadline = time.monotonic() + BACK_S
    while True:
        try:
            fresh = Bed(bed.stage, bed.case)
        except (OSError, Error):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
            continue
        try:
            for _ in range(5):
                exchange(*fresh.connected())
            return
        except (OSError, Error):
            if time.monotonic() > deadline:
                raise
        finally:
            fresh.close()


@check("no FIN comes from who was killed: the pod has to say it", pairs=ANOTHER, disruptive=True)
def server_killed(bed: Bed) -> None:
    """The other end of a killed server learns of it, and the next server on the port works."""
    pod = bed.own_pod.pod
    works_again(bed)
    near, _ = bed.connected()
    exchange_began = time.monotonic()
    near.ask_receive(1, timeout_s=BACK_S)
    server = pod.processes[bed.server_name]
    if bed.server_name.startswith("container"):
        server.terminate()  # runc passes SIGTERM on; if killed, it would leave its container
    else:
        server.kill()
    server.wait()
    if bed.client.is_guest and bed.server.is_guest:  # only the next server answers its segments
        pod.revive()
        answer = near.answer() if bed.stage.guest == "standin" else None
    else:
        answer = near.answer()
        took_s = time.monotonic() - exchange_began
        expect(took_s < END_S, f"it hung for {took_s:.1f} s")
        pod.revive()
    if answer:
        expect(
            bool(answer["errno"]) or bool(answer["ended"]), f"it received {answer['bytes']} bytes"
        )
    works_again(bed)


@check("a link that vanishes is made again", pairs=BETWEEN, disruptive=True)
def link_replaced_under_load(bed: Bed) -> None:
    """After a guest's link was deleted in mid-transfer, connections are made again."""
    pod = bed.own_pod.pod
    port = next(p for p in pod.wiring().ports if p.n == 1)
    if port.socket:
        raise Unsupported("the guest has a socket for its link, which is nothing to delete")
    works_again(bed)  # after the case before: a guest's IPv6 comes a second later than its IPv4
    near, far = bed.connected()
    native, guest = (far, near) if bed.client.is_guest else (near, far)
    native.ask_send(1 << 30, timeout_s=0.5)
    guest.poll("read")
    pod.links.link_ip.link("del", index=port.ifindex)
    native.answer()
    _until(lambda: not pod.missing_links(), "the link was not made again")
    works_again(bed)


@check("a namespace, its name used again", pairs=BETWEEN, disruptive=True)
def pod_rebuilt(bed: Bed) -> None:
    """A pod that is taken down and built under the same name works."""
    stage = bed.own_pod
    exchange(*bed.connected())
    stage.close()
    stage.build()
    works_again(bed)


class Client:
    """A client that makes one short connection after the other, in a thread of its own.

    `made` counts connections that succeeded. `refused` counts failures while the server was down or
    was being restarted. `wrong` lists other faults: a failure while the server was up, or a
    connection that hung.
    """

    def __init__(self, bed: Bed, peer: Peer, epoch: list[int]) -> None:
        """`epoch` holds a counter that is even while the server is up."""
        self.made = self.refused = 0
        self.wrong: list[str] = []
        self.bed, self._peer, self._epoch = bed, peer, epoch
        self._target = str(peer.localhost(bed.family))
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"restarts {peer.name}")

    def _work(self) -> None:
        while not self._ending.is_set() and not self.wrong:
            epoch, began, failure = self._epoch[0], time.monotonic(), ""
            try:
                result = self._peer.agent.run(
                    Transport.TCP,
                    self.bed.family,
                    self._target,
                    self.bed.port,
                    "crr",
                    64,
                    bytes=64,
                )
            except (Error, OSError) as e:
                failure = str(e)
            took_s = time.monotonic() - began
            slow = self._peer.is_guest or self.bed.stage.emulated
            if took_s > END_S + (AGAIN_S if slow else 0):
                self.wrong.append(f"{self._peer.name} hung for {took_s:.1f} s ({failure})")
            elif not failure:
                expect(result.transactions == 1, "no transaction, no failure")
                self.made += 1
            elif epoch % 2 or epoch != self._epoch[0]:
                self.refused += 1
            else:
                self.wrong.append(f"{self._peer.name}: {failure}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()


@check(
    "a server that restarts costs its clients nothing else",
    disruptive=True,
    pairs=frozenset({Pair.NATIVE_GUEST}),
)
def restarts_under_load(bed: Bed) -> None:
    """Of 100 restarts of a guest clients see refusals while it is down; none fails else, or hangs.

    The clients are a native and the other guest. A connection that begins and ends while the server
    is up must succeed. A connection that overlaps a restart may fail, but must fail soon.
    """
    pod = bed.own_pod.pod
    works_again(bed)
    epoch = [1]
    clients = [Client(bed, peer, epoch) for peer in (bed.client, bed.peer("guest2"))]
    with clients[0], clients[1]:
        for _ in range(amount(bed, RESTARTS)):
            bed.serve_by_agent(bed.peer(bed.server_name))
            epoch[0] += 1
            all_go_on(clients, "made", EACH)
            epoch[0] += 1
            pod.processes[bed.server_name].kill()
            pod.processes[bed.server_name].wait()
            all_go_on(clients, "refused", 1)
            pod.revive()


def all_go_on(clients: list[Client], what: str, by: int) -> None:
    """Wait until the counter `what` of each client has grown by `by`. Raises `Failure`."""
    goals = [getattr(client, what) + by for client in clients]

    def reached() -> bool:
        for client in clients:
            expect(not client.wrong, "; ".join(client.wrong))
        return all(getattr(c, what) >= goal for c, goal in zip(clients, goals, strict=True))

    _until(reached, f"no more connections are {what}")


def _until(holds: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + BACK_S
    while not holds():
        expect(time.monotonic() < deadline, otherwise)
        time.sleep(0.02)
