"""One cell measured in standing pods, and the proof that its packets took the datapath.

Of several guests or pods all are at work at once, each dialled by a client of its own: rates are
summed up, and times are of all of them together. The throughput of UDP is searched for by short
attempts (`testbed.campaigns.rate_search`), and measured at the rate that was found.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from testbed.agent import Agent, Result, Server
from testbed.campaigns import rate_search
from testbed.campaigns.roles import ends, port
from testbed.datapaths.interface import Count
from testbed.host import facts
from testbed.model.addresses import guest_link, pod_link
from testbed.model.cells import SLOW, SLOW_US, UDP_LOSS, Cell
from testbed.model.errors import Error
from testbed.model.metrics import Metric
from testbed.model.terms import Transport
from testbed.model.trials import Status, Trial
from testbed.pods.pod import Pod
from testbed.runtimes.interface import Prepared

FEW = 16
"""So many flows get their share of the CPUs often enough; with more, trials are longer."""
STOLEN_SHARE = 0.02
"""A trial is disturbed if a hypervisor below took more of the CPUs' time."""
CLOCK_SLACK_S = 1.0
"""How much later than by the receiver's clock a trial may end by the host's: set-up, score, end."""
SHORT = 0.25
"""What an attempt in a search for a rate lasts, by what a trial does."""
LONG_ATTEMPTS = 6
"""So often the rate that was found may fail to hold for a whole trial, and is lowered, by more each
time."""


@dataclass(frozen=True)
class Flow:
    """A client of a pod that is to dial a server."""

    pod: Pod
    client: str
    server: str
    agent: Agent
    """The client's."""
    dialed: str

    def run(self, cell: Cell, **options: Any) -> Result:
        """Traffic as the cell says, or one request where it is about building."""
        mode = cell.metric.measure.mode
        return self.agent.run(
            cell.transport,
            cell.family,
            self.dialed,
            port(self.server),
            mode,
            cell.size_bytes,
            **options,
        )

    def carried(self) -> Count:
        """By the datapath between the two, so far."""
        client, server = (self.pod.number_of(name) for name in (self.client, self.server))
        return self.pod.attachment.carried(client, server)


@contextmanager
def flows(cell: Cell, pods: Sequence[Pod], guest: Prepared) -> Iterator[list[Flow]]:
    """All flows of a cell, their servers serving."""
    with ExitStack() as stack:
        found = []
        for pod in pods:
            for server in dict.fromkeys(server for _, server in ends(cell.pair, cell.guests)):
                serving = stack.enter_context(pod.agent(server))
                served = serving.serve(
                    cell.transport,
                    cell.family,
                    port(server),
                    _bind(pod, server),
                    delay_us=SLOW_US if cell.variant == SLOW else 0,
                )
                stack.callback(_stop, serving, served)
            for client, server in ends(cell.pair, cell.guests):
                dialing = stack.enter_context(pod.agent(client))
                dialed = _dialed(cell, pod, client, server, guest)
                found.append(Flow(pod, client, server, dialing, dialed))
        yield found


def _stop(serving: Agent, served: Server) -> None:
    with suppress(Error):  # the agent has ended
        serving.stop(served)  # now: without, soon


def at_once(flows: Sequence[Flow], cell: Cell, **options: Any) -> list[Result]:
    """Run all flows of a cell together. Raises the `Error` of the first that has one."""
    with ThreadPoolExecutor(len(flows)) as threads:
        return list(threads.map(lambda flow: flow.run(cell, **options), flows))


def run(
    cell: Cell, pods: Sequence[Pod], guest: Prepared, warmup_s: float, duration_s: float
) -> Trial:
    """Measure a cell. A fault of any kind is the trial's result, not an exception."""
    started = datetime.now(UTC).isoformat(timespec="milliseconds")
    trial = Trial(cell.id, 0, 0, Status.FAILED, started=started)
    try:
        for pod in pods:
            pod.revive()
        with flows(cell, pods, guest) as found:
            trial = replace(trial, dialed=found[0].dialed)
            machines = [pod.guest_cgroup for pod in pods if guest.description.accelerator]
            if cell.metric is Metric.THROUGHPUT and cell.transport is Transport.UDP:
                return _search(trial, cell, found, warmup_s, duration_s, machines)
            return _measure(trial, cell, found, warmup_s, duration_s, machines)
    except (Error, OSError) as e:
        return replace(trial, reason=str(e))


def _search(
    trial: Trial,
    cell: Cell,
    flows: Sequence[Flow],
    warmup_s: float,
    duration_s: float,
    machines: Sequence[Path],
) -> Trial:
    """The trial at the highest rate that stays within the bound on loss for all of its duration."""
    searched: list[rate_search.Attempt] = []

    def keep(payload_bytes: int, lost: int, took_s: float, least_s: float) -> rate_search.Attempt:
        # A receiver that was held up empties its buffer faster than that was filled.
        took_s = max(took_s, least_s)
        sent_bytes = payload_bytes + lost * cell.size_bytes
        sent_bps, arrived_bps = sent_bytes * 8 / took_s, payload_bytes * 8 / took_s
        searched.append(rate_search.Attempt(sent_bps, arrived_bps, 1 - payload_bytes / sent_bytes))
        return searched[-1]

    def attempt(rate_bps: float) -> rate_search.Attempt:
        short_s = duration_s * SHORT
        results = at_once(
            flows,
            cell,
            streams=cell.streams,
            duration_s=short_s,
            warmup_s=warmup_s * SHORT,
            rate_bps=rate_bps / len(flows),
        )
        whole = _together(results)
        return keep(whole.bytes, whole.lost, whole.duration_s, short_s)

    rate_bps = rate_search.highest_rate(attempt)
    for n in range(1, LONG_ATTEMPTS + 1):
        measured = _measure(trial, cell, flows, warmup_s, duration_s, machines, rate_bps)
        if measured.status is not Status.OK or not measured.duration_s:
            return replace(measured, searched=tuple(searched))
        last = keep(measured.payload_bytes, measured.errors, measured.duration_s, duration_s)
        if last.passed:
            return replace(measured, value=last.arrived_bps, searched=tuple(searched))
        rate_bps = (rate_bps or last.offered_bps) / (1 + rate_search.RESOLUTION) ** n
    return replace(
        measured,
        status=Status.FAILED,
        value=None,
        searched=tuple(searched),
        reason=f"more than {UDP_LOSS:.1%} of datagrams are lost at what short attempts bore",
    )


def _measure(
    trial: Trial,
    cell: Cell,
    flows: Sequence[Flow],
    warmup_s: float,
    duration_s: float,
    machines: Sequence[Path],
    rate_bps: float = 0.0,
) -> Trial:
    pods = {flow.pod.name: flow.pod for flow in flows}.values()
    longer = max(1.0, len(flows) / FEW)
    warmup_s, duration_s = warmup_s * longer, duration_s * longer
    carried, counters = [flow.carried() for flow in flows], _counters(pods)
    busy, began = facts.busy(machines), time.monotonic()
    results = at_once(
        flows,
        cell,
        streams=cell.streams,
        duration_s=duration_s,
        warmup_s=warmup_s,
        rate_per_s=cell.rate_per_s / len(flows),
        rate_bps=rate_bps / len(flows),
    )
    elapsed_s = time.monotonic() - began
    spent = {key: value - busy[key] for key, value in facts.busy(machines).items()}
    carried = [flow.carried() - before for flow, before in zip(flows, carried, strict=True)]
    moved = _counters(pods) - counters
    ways = 1 if cell.metric is Metric.THROUGHPUT else 2
    faults = (
        _fault(result, count, result.bytes * ways)
        for result, count in zip(results, carried, strict=True)
    )
    fault = next(filter(None, faults), None)
    whole = _together(results)
    if whole.transactions < 0.95 * cell.rate_per_s * duration_s:
        fault = fault or (
            f"{whole.transactions} requests in {duration_s:g} s: {cell.rate_per_s} per second are "
            "too many"
        )
    spent |= {
        "load1": facts.load1(),
        "elapsed_s": elapsed_s,
        "active_s": warmup_s + whole.duration_s,
    }
    if frequency := facts.frequency_mhz():
        spent["frequency_mhz"] = frequency
    clock = None if fault else _clock(whole, elapsed_s - warmup_s - whole.duration_s)
    fault = fault or clock
    total = sum(carried, Count())
    return replace(
        trial,
        status=Status.FAILED if fault else Status.OK,
        reason=fault,
        value=None if fault else cell.metric.measure.value(whole),
        duration_s=whole.duration_s,
        payload_bytes=whole.bytes,
        transactions=whole.transactions,
        errors=whole.errors + whole.lost,
        histogram_us=whole.histogram_us,
        carried={"packets": total.packets, "bytes": total.bytes},
        counters=dict(moved),
        machine=spent,
        disturbed=clock or _stolen(spent),
    )


def _counters(pods: Iterable[Pod]) -> Counter[str]:
    """Packets per reason of all pods."""
    total = Counter[str]()
    for pod in pods:
        total.update({why: count.packets for why, count in pod.attachment.counters().items()})
    return total


def _together(results: Sequence[Result]) -> Result:
    """Several runs at once as one: everything summed up, and the longest duration."""
    if len(results) == 1:
        return results[0]
    histogram = Counter[float]()
    for result in results:
        histogram.update(dict(result.histogram_us))
    sums = ("bytes", "transactions", "datagrams", "errors", "lost", "reordered", "corrupt")
    return replace(
        results[0],
        duration_s=max(result.duration_s for result in results),
        histogram_us=tuple(sorted(histogram.items())),
        **{name: sum(getattr(result, name) for result in results) for name in sums},
    )


def _clock(result: Result, late_s: float) -> str | None:
    """How far the receiver's clock is from the host's, if that is too far."""
    slack_s = CLOCK_SLACK_S * facts.slowness()
    if -0.05 * result.duration_s < late_s < slack_s + 0.05 * result.duration_s:
        return None
    return f"the receiver's {result.duration_s:.2f} s were {late_s:.2f} s more by the host's clock"


def _stolen(spent: Mapping[str, float]) -> str | None:
    """How much of the CPUs' time a hypervisor below gave to others, if that is too much."""
    share = spent["steal_s"] / (spent["elapsed_s"] * len(facts.cpus()))
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


def _dialed(cell: Cell, pod: Pod, client: str, server: str, guest: Prepared) -> str:
    if pod.datapath.localhost:
        return guest.dialed(cell.family) if pod.number_of(client) else "localhost"
    if server in pod.elsewhere:
        return str(pod.elsewhere[server][cell.family])
    n = pod.number_of(server)
    return str(guest_link(cell.family, n) if n else pod_link(cell.family))


def _bind(pod: Pod, server: str) -> str:
    """Natives serve at loopback, as programs that mean `localhost` do, where that is under test."""
    return "localhost" if pod.datapath.localhost and not pod.number_of(server) else "any"
