"""Worker: runs blocks of trials on the host that it is started on, this one or a remote one.

    python -m testbed.campaigns.worker

It reads its job as one line of JSON from standard input, and writes events as lines of JSON to
standard output: `ready` (what the guests are), `step` (what it does now), `trial` (a result),
`note` (a line for the user), `kept` (pods that stay), `error`. The campaign writes a line to the
worker's standard input every `BEAT_S`. At the end of standard input, or after `SILENCE_S` without a
line (the link to this host may be dead), the worker takes everything down and ends.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

from testbed import datapaths, runtimes
from testbed.application import Application
from testbed.campaigns import applications, noise, roles, schedule, trial
from testbed.campaigns.protocol import Event, Job, end_when_nobody_listens
from testbed.campaigns.provisioning import Built, Deployment
from testbed.campaigns.roles import unsupported
from testbed.datapaths.interface import Datapath
from testbed.host import facts, interrupts
from testbed.host.ledger import Owner, Scope
from testbed.model.cells import Cell, Pair
from testbed.model.errors import Error
from testbed.model.manifest import Manifest
from testbed.model.terms import Runtime
from testbed.model.trials import Status, Trial
from testbed.pods.pod import Pod
from testbed.pods.reconciler import Reconciler
from testbed.runtimes import interface
from testbed.runtimes.vm.guest import queues


def work(job: Job) -> Iterator[Event]:
    """Run a job, and yield its events as they happen."""
    yield _step("preparing guests")
    kernel = Path(job.osv_kernel) if job.osv_kernel else None
    options = interface.Options(kernel, job.hosts_patch, say=lambda text: _say(_step(text)))
    guest, why = runtimes.choose(job.guest, options)
    named = {Cell.parse(id).guest for _, ids in job.blocks for id in ids} - {""}
    guests: Guests = {"": guest, **{name: _prepared(name, options) for name in sorted(named)}}
    standing = roles.manifest({Pair.NATIVE_GUEST}, guest.description.runtime)
    found = None
    if job.noise_s:
        yield _step("measuring how quiet this machine is")
        try:
            found = noise.measure(job.noise_s)
        except (Error, OSError) as e:
            yield {"event": "note", "text": f"how quiet this machine is, is unknown: {e}"}
    yield {
        "event": "ready",
        "guest": asdict(guest.description),
        "why": why,
        "guests": {
            name: asdict(of.description)
            for name, of in guests.items()
            if name and not isinstance(of, Error)
        },
        "queues": queues(guest, standing.guests[1]),
        "machine": facts.facts(),
        "versions": facts.versions(),
        "noise": asdict(found) if found else None,
    }
    with Owner() as owner:
        bench = _Bench(job, owner, guests, options)
        for number, ids in job.blocks:
            yield from bench.block(number, [Cell.parse(id) for id in ids])
            if bench.failed and job.keep:
                owner.leave_standing()
                yield {"event": "kept", "pods": [pod.netns for pod in bench.failed]}
                return


Guests = dict[str, interface.Prepared | Error]
"""Name of guests in cells → the prepared runtime, or why it cannot run. The campaign's own guests
have the empty name."""


def _prepared(name: str, options: interface.Options) -> interface.Prepared | Error:
    try:
        return runtimes.prepare(Runtime(name), options)
    except Error as e:
        return e


def _step(text: str) -> Event:
    return {"event": "step", "text": text}


def _result(trial: Trial) -> Event:
    return {"event": "trial", "trial": trial.as_json()}


def _pods(deployment: Deployment) -> str:
    many = f"{deployment.pods} pods" if deployment.pods > 1 else "the pod"
    return f"{many} of {deployment.datapath}"


def _say(event: Event) -> None:
    try:
        print(json.dumps(event), flush=True)
    except BrokenPipeError:
        interrupts.ignore()
        raise


class _Bench:
    """Runs the blocks of a job: builds their pods, runs their trials."""

    def __init__(self, job: Job, owner: Scope, guests: Guests, options: interface.Options) -> None:
        self.job, self.owner, self.guests, self.options = job, owner, guests, options
        self.applications = {
            name: Application.model_validate(data) for name, data in job.applications.items()
        }
        self.natives: dict[Runtime, interface.Prepared | Error] = {}
        self.failed: list[Pod] = []
        self.names = Counter[str]()
        """Name → number of deployments that had it."""

    def block(self, number: int, cells: Sequence[Cell]) -> Iterator[Event]:
        """Run one block with new pods, group by group (`schedule.rounds`)."""
        reasons = {cell: reason for cell in cells if (reason := self._unsupported(cell))}
        supported = [cell for cell in cells if cell not in reasons]
        rounds = schedule.rounds(supported, self._is_machine)
        order = {cell.id: at for at, cell in enumerate(chain(reasons, *rounds))}
        for cell, reason in reasons.items():
            yield _result(Trial(cell.id, number, order[cell.id], Status.UNSUPPORTED, reason))
        for together in rounds:
            for event in self._together(number, together):
                if isinstance(event, Trial):
                    event = _result(replace(event, block=number, order=order[event.cell]))
                yield event

    def _together(self, number: int, cells: Sequence[Cell]) -> Iterator[Event | Trial]:
        """Build the pods of some cells of a block, run the cells, and take the pods down."""
        shared: dict[Deployment, list[Cell]] = {}
        for cell in cells:
            shared.setdefault(Deployment.of(cell), []).append(cell)
        with ExitStack() as stack:
            built = {}
            for deployment, sharing in shared.items():
                yield _step(f"block {number}: building {_pods(deployment)}")
                name = self._name(number, deployment)
                built[deployment] = self._build(name, deployment, sharing, stack)
            for cell in cells:
                yield _step(f"block {number}: {cell.id}")
                yield from self._trials(cell, built[Deployment.of(cell)])

    def _name(self, number: int, deployment: Deployment) -> str:
        """Name of a deployment's pods, which no others of the job have."""
        name = f"block{number}-{deployment.name}"
        self.names[name] += 1
        return f"{name}-{self.names[name]}" if self.names[name] > 1 else name

    def _is_machine(self, cell: Cell) -> bool:
        """Whether the cell has guests, and they are virtual machines."""
        guest = self.guests[cell.guest]
        assert not isinstance(guest, Error)
        return cell.pair.guests > 0 and guest.description.runtime.is_machine

    def _unsupported(self, cell: Cell) -> str | None:
        guest = self.guests[cell.guest]
        missing = [e.message for e in self._natives([cell]).values() if isinstance(e, Error)]
        if isinstance(guest, Error) or missing:
            return guest.message if isinstance(guest, Error) else missing[0]
        datapath = self._datapath(cell.datapath)
        reason = unsupported(datapath, cell, guest)
        if cell.application and not reason:
            told = self.applications[cell.application]
            reason = applications.unsupported(cell, told, datapath, guest)
        return reason

    def _datapath(self, name: str) -> Datapath:
        """The datapath, set up for this side if it goes between hosts."""
        return datapaths.get(name).between(self.job.side)

    def _natives(self, cells: Sequence[Cell]) -> dict[Runtime, interface.Prepared | Error]:
        """Runtimes of the cells' native workloads, prepared when they are first needed."""
        kinds = roles.natives(cell.pair for cell in cells)
        kinds |= {Runtime.PROCESS} if any(cell.application for cell in cells) else set()
        for kind in kinds - self.natives.keys():
            self.natives[kind] = _prepared(kind, self.options)
        return {kind: self.natives[kind] for kind in kinds}

    def _build(
        self, name: str, deployment: Deployment, cells: Sequence[Cell], stack: ExitStack
    ) -> Built | Error:
        """Build the pods of a deployment, or return why that failed.

        An error fails the cells of the deployment, not the campaign.
        """
        guest, datapath = self.guests[deployment.guest], self._datapath(deployment.datapath)
        assert not isinstance(guest, Error)
        runtime, pairs = guest.description.runtime, {cell.pair for cell in cells}
        manifest = self._manifest(deployment, cells, datapath, runtime)
        kinds = {runtime: guest} | {
            kind: native
            for kind, native in self._natives(cells).items()
            if not isinstance(native, Error)
        }
        consoles = Path(self.job.directory, "consoles")
        built = Built()
        stack.callback(self._close, built)
        names = [f"{name}-{k}" for k in range(deployment.pods)] if deployment.pods > 1 else [name]
        addresses = datapath.server_addresses
        servers = {server for pair in pairs for _, server in roles.ends(pair) if addresses}
        elsewhere = dict.fromkeys(servers, addresses)
        pods = (
            Pod(self.owner, name, manifest, datapath, kinds, consoles, elsewhere=elsewhere)
            for name in names
        )
        try:
            built.build(
                cells, guest, lambda: [runtimes.prepare(kind, self.options) for kind in kinds], pods
            )
        except (Error, OSError) as e:
            self.failed += built.pods
            return e if isinstance(e, Error) else Error(str(e))
        for pod in built.pods:
            stack.enter_context(Reconciler(pod))
        return built

    def _manifest(
        self, deployment: Deployment, cells: Sequence[Cell], datapath: Datapath, guest: Runtime
    ) -> Manifest:
        """Manifest of a deployment's pods."""
        if not deployment.application:
            return roles.manifest({cell.pair for cell in cells}, guest, deployment.guests)
        cell = cells[0]
        found = self.applications[cell.application]
        return applications.manifest(found, cell.pair, cell.family, datapath, guest)

    def _trials(self, cell: Cell, built: Built | Error) -> Iterator[Trial]:
        """Run a cell's trial, and run it once more if it was disturbed."""
        if isinstance(built, Error):
            yield Trial(cell.id, 0, 0, Status.FAILED, str(built))
            return
        if cell.metric.of_building:
            yield built.measured(cell)
            return
        guest = self.guests[cell.guest]
        assert not isinstance(guest, Error)
        result = self._trial(cell, built.pods, guest)
        if result.disturbed:
            yield result
            _say(_step(f"{cell.id} again: {result.disturbed}"))
            result = self._trial(cell, built.pods, guest)
        if result.status is Status.FAILED:
            self.failed += built.pods
        yield result

    def _trial(self, cell: Cell, pods: Sequence[Pod], guest: interface.Prepared) -> Trial:
        times = self.job.warmup_s, self.job.duration_s
        if not cell.application:
            return trial.run(cell, pods, guest, *times)
        [pod] = pods
        return applications.run(cell, self.applications[cell.application], pod, guest, *times)

    def _close(self, built: Built) -> None:
        """Take pods down, except failed ones that are to be left standing."""
        for pod in built.pods:
            if not (self.job.keep and pod in self.failed):
                pod.close()


def main() -> None:
    """Entry of `python -m testbed.campaigns.worker`."""
    job = Job.from_json(json.loads(sys.stdin.readline()))
    end_when_nobody_listens()
    try:
        for event in work(job):
            _say(event)
    except Error as e:
        _say({"event": "error", "message": e.message, "hint": e.hint})
        sys.exit(1)
    except (KeyboardInterrupt, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(130)


if __name__ == "__main__":
    main()
