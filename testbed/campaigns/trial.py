"""Measures one cell in standing pods, and proves by counters that its packets took the datapath.

With several guests or pods, all run at the same time, each with a client of its own: rates are
summed, and round-trip times are pooled. The throughput of UDP is found by short attempts at
different rates (`testbed.campaigns.rate_search`), and then measured at the rate that was found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from testbed.agent import Agent, Result, Server
from testbed.campaigns import rate_search
from testbed.campaigns.isolation import disturbance
from testbed.campaigns.observation import Observation, observing
from testbed.campaigns.roles import ends, port
from testbed.datapaths.interface import Count
from testbed.host import facts
from testbed.model.addresses import guest_link, pod_link
from testbed.model.cells import SLOW_US, UDP_LOSS, Cell
from testbed.model.errors import Error
from testbed.model.metrics import Metric
from testbed.model.terms import Transport
from testbed.model.trials import Limit, Status, Trial
from testbed.pods.pod import Pod
from testbed.runtimes.interface import Prepared

FEW = 16
"""Number of flows up to which a trial has its usual length. With more flows each gets the CPU less
often, so trials last longer."""
CLOCK_SLACK_S = 1.0
"""Extra time that a trial may take by the host's clock, over the receiver's: set-up and end."""
SHORT = 0.25
"""Duration of an attempt in a rate search, as a share of a trial's duration."""
LONG_ATTEMPTS = 6
"""Number of whole trials after a rate search. After each one that loses too much, the rate
is lowered, by more each time."""
ANSWERED = 0.95
"""Share of a cell's rate at which requests have to be answered, or the trial is saturated."""
MISSING = 0.01
"""Share of requests above which those without a response make a trial saturated: the 99th
percentile of times is among them."""


@dataclass(frozen=True)
class Flow:
    """Traffic between one client and one server of a pod."""

    pod: Pod
    client: str
    server: str
    agent: Agent
    """The client's traffic agent."""
    dialed: str
    """Name or address that the client dials."""

    def run(self, cell: Cell, **options: Any) -> Result:
        """Send the cell's traffic; `options` are those of `Agent.run`."""
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
        """Packets and bytes that the datapath has carried between the two so far."""
        return self.pod.carried(self.client, self.server)


@contextmanager
def flows(cell: Cell, pods: Sequence[Pod], guest: Prepared) -> Iterator[list[Flow]]:
    """Start the servers of a cell; yields its flows. The servers stop at the end."""
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
                    delay_us=SLOW_US.get(cell.variant, 0.0),
                )
                stack.callback(_stop, serving, served)
            for client, server in ends(cell.pair, cell.guests):
                dialing = stack.enter_context(pod.agent(client))
                dialed = _dialed(cell, pod, client, server, guest)
                found.append(Flow(pod, client, server, dialing, dialed))
        yield found


def _stop(serving: Agent, served: Server) -> None:
    with suppress(Error):  # the agent has ended, and its server with it
        serving.stop(served)


def at_once(flows: Sequence[Flow], cell: Cell, **options: Any) -> list[Result]:
    """Run all flows of a cell at the same time. Raises the `Error` of the first that fails."""
    with ThreadPoolExecutor(len(flows)) as threads:
        return list(threads.map(lambda flow: flow.run(cell, **options), flows))


def run(
    cell: Cell, pods: Sequence[Pod], guest: Prepared, warmup_s: float, duration_s: float
) -> Trial:
    """Measure a cell. Errors are stored in the trial and not raised."""
    started = datetime.now(UTC).isoformat(timespec="milliseconds")
    trial = Trial(cell.id, 0, 0, Status.FAILED, started=started)
    try:
        for pod in pods:
            pod.revive()
        with flows(cell, pods, guest) as found:
            trial = replace(trial, dialed=found[0].dialed)
            cgroups = [pod.guest_cgroup for pod in pods if guest.description.accelerator]
            measurement = _Measurement(trial, cell, found, warmup_s, duration_s, cgroups)
            if cell.metric is Metric.THROUGHPUT and cell.transport is Transport.UDP:
                return measurement.search()
            return measurement.measure()
    except (Error, OSError) as e:
        return replace(trial, reason=str(e))


@dataclass(frozen=True)
class _Measurement:
    """A cell whose servers are running, and how it is to be measured."""

    trial: Trial
    """The trial so far."""
    cell: Cell
    flows: Sequence[Flow]
    warmup_s: float
    duration_s: float
    cgroups: Sequence[Path]
    """Cgroups of virtual machines, whose CPU time is that of guests."""

    def search(self) -> Trial:
        """The trial at the highest UDP rate whose loss stays within the bound for a whole trial."""
        searched: list[rate_search.Attempt] = []

        def keep(
            payload_bytes: int, lost: int, took_s: float, least_s: float
        ) -> rate_search.Attempt:
            # A receiver that was held up empties its buffer faster than the buffer was filled.
            took_s = max(took_s, least_s)
            sent_bytes = payload_bytes + lost * self.cell.size_bytes
            sent_bps, arrived_bps = sent_bytes * 8 / took_s, payload_bytes * 8 / took_s
            loss = 1 - payload_bytes / sent_bytes
            searched.append(rate_search.Attempt(sent_bps, arrived_bps, loss))
            return searched[-1]

        def attempt(rate_bps: float) -> rate_search.Attempt:
            short_s = self.duration_s * SHORT
            whole = _together(self._send(self.warmup_s * SHORT, short_s, rate_bps))
            return keep(whole.bytes, whole.lost, whole.duration_s, short_s)

        rate_bps = rate_search.highest_rate(attempt)
        for n in range(1, LONG_ATTEMPTS + 1):
            trial = self.measure(rate_bps)
            if trial.status is not Status.OK or not trial.duration_s:
                return replace(trial, searched=tuple(searched))
            last = keep(trial.payload_bytes, trial.errors, trial.duration_s, self.duration_s)
            if last.passed:
                slow = not rate_bps or last.offered_bps < rate_bps / (1 + rate_search.RESOLUTION)
                return replace(
                    trial,
                    value=last.arrived_bps,
                    searched=tuple(searched),
                    limited=Limit.SENDER if slow else None,
                )
            rate_bps = (rate_bps or last.offered_bps) / (1 + rate_search.RESOLUTION) ** n
        return replace(
            trial,
            status=Status.FAILED,
            value=None,
            searched=tuple(searched),
            reason=f"more than {UDP_LOSS:.1%} of datagrams are lost at the rate of short attempts",
        )

    def measure(self, rate_bps: float = 0.0) -> Trial:
        """The trial, at a payload rate of all UDP flows together (0: full speed)."""
        cell, flows = self.cell, self.flows
        pods = {flow.pod.name: flow.pod for flow in flows}.values()
        longer = max(1.0, len(flows) / FEW)
        warmup_s, duration_s = self.warmup_s * longer, self.duration_s * longer
        with observing([flow.carried for flow in flows], pods, self.cgroups) as seen:
            results = self._send(warmup_s, duration_s, rate_bps)
        whole = _together(results)
        active_s = warmup_s + whole.duration_s
        fault = _first_fault(cell, results, seen.carried)
        return finished(
            self.trial,
            seen,
            fault=fault,
            value=None if fault else cell.metric.measure.value(whole),
            duration_s=whole.duration_s,
            active_s=active_s,
            late_s=seen.machine["elapsed_s"] - active_s,
            payload_bytes=whole.bytes,
            transactions=whole.transactions,
            errors=whole.errors + whole.lost,
            unanswered=whole.unanswered,
            unsent=whole.unsent,
            limited=None if fault else _saturation(cell, whole),
            histogram_us=whole.histogram_us,
        )

    def _send(self, warmup_s: float, duration_s: float, rate_bps: float) -> list[Result]:
        """Send the cell's traffic on all flows. Rates are divided equally among them."""
        return at_once(
            self.flows,
            self.cell,
            streams=self.cell.streams,
            duration_s=duration_s,
            warmup_s=warmup_s,
            rate_per_s=self.cell.rate_per_s / len(self.flows),
            rate_bps=rate_bps / len(self.flows),
        )


def _together(results: Sequence[Result]) -> Result:
    """Combine simultaneous results: sums of all counts, and the longest duration."""
    if len(results) == 1:
        return results[0]
    histogram = Counter[float]()
    for result in results:
        histogram.update(dict(result.histogram_us))
    sums = (
        *("bytes", "transactions", "datagrams", "errors", "lost", "reordered", "corrupt"),
        *("unanswered", "unsent"),
    )
    return replace(
        results[0],
        duration_s=max(result.duration_s for result in results),
        histogram_us=tuple(sorted(histogram.items())),
        **{name: sum(getattr(result, name) for result in results) for name in sums},
    )


def finished(
    trial: Trial,
    seen: Observation,
    *,
    fault: str | None,
    value: float | None,
    duration_s: float,
    active_s: float,
    late_s: float,
    limited: Limit | None,
    **measured: Any,
) -> Trial:
    """The trial with what was measured, and what the host saw meanwhile.

    It failed if there is a `fault`, or if the receiver's clock, by which it took `duration_s`,
    differs from the host's: `late_s` is by how much its end was late. `active_s` is the time with
    traffic.
    """
    clock = None if fault else clock_fault(duration_s, late_s)
    fault = fault or clock
    carried, spent = sum(seen.carried, Count()), seen.machine | {"active_s": active_s}
    return replace(
        trial,
        status=Status.FAILED if fault else Status.OK,
        reason=fault,
        value=None if fault else value,
        duration_s=duration_s,
        limited=None if fault else limited,
        carried={"packets": carried.packets, "bytes": carried.bytes},
        counters=dict(seen.counters),
        machine=spent,
        disturbed=clock or disturbance(spent),
        **measured,
    )


def clock_fault(duration_s: float, late_s: float) -> str | None:
    """A fault if the receiver's clock differs too much from the host's, else None."""
    slack_s = CLOCK_SLACK_S * facts.slowness()
    if -0.05 * duration_s < late_s < slack_s + 0.05 * duration_s:
        return None
    return f"the receiver's {duration_s:.2f} s were {late_s:.2f} s more by the host's clock"


def _first_fault(cell: Cell, results: Sequence[Result], carried: Sequence[Count]) -> str | None:
    """The first fault of the flows of a cell, or None."""
    ways = 1 if cell.metric is Metric.THROUGHPUT else 2
    faults = (
        _fault(result, count, result.bytes * ways)
        for result, count in zip(results, carried, strict=True)
    )
    return next(filter(None, faults), None)


def _saturation(cell: Cell, result: Result) -> Limit | None:
    """Whether clearly fewer requests were answered than the cell's rate asks for."""
    missing = result.unanswered + result.unsent
    slow = result.transactions / result.duration_s < ANSWERED * cell.rate_per_s
    few = missing > MISSING * (missing + result.transactions)
    return Limit.SATURATED if slow or few else None


def _fault(result: Result, carried: Count, payload_bytes: int) -> str | None:
    """Why a result cannot be used, or None. `payload_bytes` must have gone through the datapath."""
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
    """Name or address that the client dials to reach the server."""
    if pod.datapath.localhost:
        return guest.dialed(cell.family) if pod.number_of(client) else "localhost"
    if server in pod.elsewhere:
        return str(pod.elsewhere[server][cell.family])
    n = pod.number_of(server)
    return str(guest_link(cell.family, n) if n else pod_link(cell.family))


def _bind(pod: Pod, server: str) -> str:
    """Address that a server binds: `localhost` for natives, if the datapath is for localhost."""
    return "localhost" if pod.datapath.localhost and not pod.number_of(server) else "any"
