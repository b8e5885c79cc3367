"""Checks of what happens when workloads, links and pods come and go."""

from __future__ import annotations

import time
from collections.abc import Callable

from testbed.conformance import check, expect
from testbed.conformance.bed import Bed
from testbed.conformance.connections import exchange
from testbed.model import Error, Pair

END_S = 2.0
"""How soon a program has to learn that its peer is gone."""
BACK_S = 40.0
"""How soon a workload is back; an emulated machine boots."""

BETWEEN = frozenset({Pair.NATIVE_GUEST, Pair.GUEST_NATIVE})
ANOTHER = BETWEEN | {Pair.NATIVE_NATIVE, Pair.GUEST_GUEST}


def works_again(bed: Bed) -> None:
    """A fresh view of the case, as soon as its workloads answer, makes connections."""
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
    pod.processes[bed.server_name].kill()
    pod.processes[bed.server_name].wait()
    if bed.client.is_guest and bed.server.is_guest:  # its next segment is answered by the next one
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
    works_again(bed)  # after the case before: a guest's IPv6 comes a second later than its IPv4
    near, far = bed.connected()
    native, guest = (far, near) if bed.client.is_guest else (near, far)
    native.ask_send(1 << 30, timeout_s=0.5)
    guest.poll("read")
    port = next(p for p in pod.wiring().ports if p.n == 1)
    pod.link_netns[1].link("del", index=port.ifindex)
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


def _until(holds: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + BACK_S
    while not holds():
        expect(time.monotonic() < deadline, otherwise)
        time.sleep(0.02)
