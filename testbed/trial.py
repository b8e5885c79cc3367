"""One cell measured in a standing pod, and the proof that its packets took the datapath."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from testbed import machine
from testbed.agent import Agent, Mode, Result
from testbed.datapaths import Count
from testbed.manifest import Manifest, Workload
from testbed.model import (
    CONTROL_PORT,
    SLOW,
    SLOW_US,
    Cell,
    Error,
    Metric,
    Pair,
    Runtime,
    Status,
    Transport,
    Trial,
    guest_link,
    percentile,
    pod_link,
)
from testbed.pod import Pod
from testbed.runtimes import Prepared

ROLES = {
    Pair.NATIVE_NATIVE: ("native1", "native2"),
    Pair.NATIVE_GUEST: ("native1", "guest1"),
    Pair.GUEST_NATIVE: ("guest1", "native1"),
    Pair.GUEST_GUEST: ("guest1", "guest2"),
    Pair.GUEST_SELF: ("guest1", "guest1"),
}
"""Client and server of each pair, by name."""

PORTS = {"native1": 8001, "native2": 8002, "guest1": 8011, "guest2": 8012}
MODES: dict[Metric, Mode] = {
    Metric.THROUGHPUT: "stream",
    Metric.LATENCY: "rr",
    Metric.CONNECTIONS: "crr",
}
STOLEN_SHARE = 0.02
"""A trial is disturbed if a hypervisor below took more of the CPUs' time."""
CLOCK_SLACK_S = 1.0
"""How much later than by the receiver's clock a trial may end by the host's: set-up, score, end."""


def manifest(pairs: Iterable[Pair], guest: Runtime) -> Manifest:
    """A pod with what the pairs need: the ends of each on different CPUs, where there are two."""
    first, last = machine.cpus()[0], machine.cpus()[-1]
    names = {name for pair in pairs for name in ROLES[pair]}
    cpus = {"native1": first, "native2": last, "guest1": last, "guest2": first}
    return Manifest(
        tuple(
            Workload(
                name,
                guest if name.startswith("guest") else Runtime.PROCESS,
                tuple((transport, PORTS[name]) for transport in Transport),
                cpus=(cpus[name],),
                control_port=CONTROL_PORT + i,
            )
            for i, name in enumerate(sorted(names))
        )
    )


def run(cell: Cell, pod: Pod, guest: Prepared, warmup_s: float, duration_s: float) -> Trial:
    """Measure a cell. A fault of any kind is the trial's result, not an exception."""
    started = datetime.now(UTC).isoformat(timespec="milliseconds")
    client, server = ROLES[cell.pair]
    dialed = _dialed(cell, pod, guest)
    try:
        pod.revive()
        with pod.agent(server) as serving, pod.agent(client) as dialing:
            served = serving.serve(cell.transport, cell.family, PORTS[server], _bind(pod, server),
                                   delay_us=SLOW_US if cell.variant == SLOW else 0)  # fmt: skip
            machines = pod.guest_cgroup if guest.description.accelerator else None
            try:
                return _measure(cell, pod, dialing, dialed, warmup_s, duration_s, started, machines)
            finally:
                with suppress(Error):  # the agent has ended
                    serving.stop(served)  # now: without, soon
    except (Error, OSError) as e:
        return Trial(cell.id, 0, 0, Status.FAILED, str(e), dialed=dialed, started=started)


def _measure(
    cell: Cell,
    pod: Pod,
    dialing: Agent,
    dialed: str,
    warmup_s: float,
    duration_s: float,
    started: str,
    machines: Path | None,
) -> Trial:
    client, server = (pod.number_of(name) for name in ROLES[cell.pair])
    carried, counters = pod.attachment.carried(client, server), pod.attachment.counters()
    busy, began = machine.busy(machines), time.monotonic()
    result = dialing.run(
        cell.transport, cell.family, dialed, PORTS[ROLES[cell.pair][1]], MODES[cell.metric],
        cell.size_bytes, streams=cell.streams, duration_s=duration_s, warmup_s=warmup_s,
        rate_per_s=cell.rate_per_s,
    )  # fmt: skip
    elapsed_s = time.monotonic() - began
    carried = pod.attachment.carried(client, server) - carried
    moved = {
        reason: (count - counters.get(reason, Count())).packets
        for reason, count in pod.attachment.counters().items()
    }
    payload_bytes = result.bytes * (1 if cell.metric is Metric.THROUGHPUT else 2)
    fault = _fault(result, carried, payload_bytes)
    if result.transactions < 0.95 * cell.rate_per_s * duration_s:
        fault = fault or (
            f"{result.transactions} requests in {duration_s:g} s: {cell.rate_per_s} per second are "
            "too many"
        )
    spent = {key: value - busy[key] for key, value in machine.busy(machines).items()}
    spent |= {"load1": machine.load1(), "elapsed_s": elapsed_s,
              "active_s": warmup_s + result.duration_s}  # fmt: skip
    if frequency := machine.frequency_mhz():
        spent["frequency_mhz"] = frequency
    clock = None if fault else _clock(result, elapsed_s - warmup_s - result.duration_s)
    fault = fault or clock
    return Trial(
        cell=cell.id,
        block=0,
        order=0,
        status=Status.FAILED if fault else Status.OK,
        reason=fault,
        value=None if fault else _value(cell.metric, result),
        duration_s=result.duration_s,
        payload_bytes=result.bytes,
        transactions=result.transactions,
        errors=result.errors + result.lost,
        histogram_us=result.histogram_us,
        dialed=dialed,
        carried={"packets": carried.packets, "bytes": carried.bytes},
        counters={reason: packets for reason, packets in moved.items() if packets},
        machine=spent,
        disturbed=clock or _stolen(spent),
        started=started,
    )


def _clock(result: Result, late_s: float) -> str | None:
    """How far the receiver's clock is from the host's, if that is too far."""
    if -0.05 * result.duration_s < late_s < CLOCK_SLACK_S + 0.05 * result.duration_s:
        return None
    return f"the receiver's {result.duration_s:.2f} s were {late_s:.2f} s more by the host's clock"


def _stolen(spent: Mapping[str, float]) -> str | None:
    """How much of the CPUs' time a hypervisor below gave to others, if that is too much."""
    share = spent["steal_s"] / (spent["elapsed_s"] * len(machine.cpus()))
    return f"{share:.1%} of the CPUs' time was stolen" if share > STOLEN_SHARE else None


def _fault(result: Result, carried: Count, payload_bytes: int) -> str | None:
    """What makes a result not worth keeping, or None."""
    if not result.bytes or not result.duration_s:
        return "nothing arrived"
    if result.corrupt:
        return f"{result.corrupt} corrupt messages"
    if result.errors:
        return f"{result.errors} of {result.transactions + result.errors} transactions failed"
    if carried.bytes < payload_bytes:
        return (
            f"the datapath carried {carried.bytes} bytes of {payload_bytes}: traffic went elsewhere"
        )
    return None


def _value(metric: Metric, result: Result) -> float:
    if metric is Metric.THROUGHPUT:
        return result.bytes * 8 / result.duration_s
    if metric is Metric.CONNECTIONS:
        return result.transactions / result.duration_s
    return percentile(result.histogram_us, 50)


def _dialed(cell: Cell, pod: Pod, guest: Prepared) -> str:
    client, server = ROLES[cell.pair]
    if pod.datapath.localhost:
        return guest.dialed(cell.family) if pod.number_of(client) else "localhost"
    n = pod.number_of(server)
    return str(guest_link(cell.family, n) if n else pod_link(cell.family))


def _bind(pod: Pod, server: str) -> str:
    """Natives serve at loopback, as programs that mean `localhost` do, where that is under test."""
    return "localhost" if pod.datapath.localhost and not pod.number_of(server) else "any"
