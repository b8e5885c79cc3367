"""Runs blocks of trials on the host it is started on; the same program here and on a remote host.

    python -m testbed.worker

The job comes as one line of JSON on standard input, events leave as lines of JSON on standard
output: `ready` (what the guests are), `step` (what is being done), `trial` (a result), `kept`,
`error`. Standard input stays open as long as somebody wants the results, and says so by a line
every `BEAT_S`: at its end, or after `SILENCE_S` without one (the link to another host may have
died unseen), the worker takes everything down and ends.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from testbed import datapaths, machine, runtimes, trial
from testbed.ledger import Owner
from testbed.model import Cell, Error, Pair, Runtime, Status, Trial
from testbed.pod import Node, Pod
from testbed.supervisor import Supervisor

BEAT_S = 5
SILENCE_S = 20


@dataclass(frozen=True)
class Job:
    """What a worker is asked to do."""

    blocks: tuple[tuple[int, tuple[str, ...]], ...]
    """(number of the block, ids of its cells in the order to run them)."""
    warmup_s: float
    duration_s: float
    guest: str
    """A runtime, or `best`."""
    directory: str
    """The campaign's, on this host: what workloads print goes to `consoles` in it."""
    osv_kernel: str | None = None
    hosts_patch: bool = True
    keep: bool = False
    """Leave a pod that failed standing."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        """The inverse of `dataclasses.asdict` after JSON."""
        blocks = tuple((number, tuple(cells)) for number, cells in data["blocks"])
        return cls(**{**data, "blocks": blocks})


Event = dict[str, Any]


def work(job: Job) -> Iterator[Event]:
    """The events of a job, as they happen."""
    yield _step("preparing guests")
    kernel = Path(job.osv_kernel) if job.osv_kernel else None
    options = runtimes.Options(kernel, job.hosts_patch, say=lambda text: _say(_step(text)))
    guest, why = runtimes.choose(job.guest, options)
    yield {"event": "ready", "guest": asdict(guest.description), "why": why,
           "machine": machine.facts(), "versions": machine.versions()}  # fmt: skip
    with Owner() as owner, closing(Node(owner)) as node:
        bench = _Bench(job, node, guest, runtimes.prepare(Runtime.PROCESS, options))
        for number, ids in job.blocks:
            yield from bench.block(number, [Cell.parse(id) for id in ids])
            if bench.failed and job.keep:
                owner.keep()
                yield {"event": "kept", "pods": [pod.netns for pod in bench.failed]}
                return


def _step(text: str) -> Event:
    return {"event": "step", "text": text}


def _say(event: Event) -> None:
    try:
        print(json.dumps(event), flush=True)
    except BrokenPipeError:
        _be_deaf()
        raise


def _be_deaf() -> None:
    """A second signal would interrupt the taking down that the first led to."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Bench:
    """Where blocks are run."""

    def __init__(
        self, job: Job, node: Node, guest: runtimes.Prepared, native: runtimes.Prepared
    ) -> None:
        self.job, self.node, self.guest = job, node, guest
        self.runtimes = {Runtime.PROCESS: native, guest.description.runtime: guest}
        self.failed: list[Pod] = []

    def block(self, number: int, cells: Sequence[Cell]) -> Iterator[Event]:
        """One pass over the cells, every datapath in a pod of its own, all pods new."""
        reasons = {cell: unsupported(cell, self.guest) for cell in cells}
        pods: dict[str, Pod | Error] = {}
        with ExitStack() as stack:
            for datapath in dict.fromkeys(cell.datapath for cell in cells if not reasons[cell]):
                yield _step(f"block {number}: building the pod of {datapath}")
                pairs = {c.pair for c in cells if c.datapath == datapath and not reasons[c]}
                pods[datapath] = self._pod(f"block{number}-{datapath}", datapath, pairs, stack)
            for order, cell in enumerate(cells):
                yield _step(f"block {number}: {cell.id}")
                result = Trial(cell.id, number, order, Status.UNSUPPORTED, reasons[cell])
                if not reasons[cell]:
                    pod = pods[cell.datapath]
                    if isinstance(pod, Pod):
                        result = self._trial(cell, pod, number, order)
                        if result.disturbed:
                            yield {"event": "trial", "trial": result.as_json()}
                            yield _step(f"block {number}: {cell.id} again: {result.disturbed}")
                            result = self._trial(cell, pod, number, order)
                        if result.status is Status.FAILED:
                            self.failed.append(pod)
                    else:
                        result = Trial(cell.id, number, order, Status.FAILED, str(pod))
                yield {"event": "trial", "trial": result.as_json()}

    def _pod(self, name: str, datapath: str, pairs: set[Pair], stack: ExitStack) -> Pod | Error:
        """The pod, ready, or why there is none: that fails its cells and not the campaign."""
        manifest = trial.manifest(pairs, self.guest.description.runtime)
        try:
            pod = Pod(self.node, name, manifest, datapaths.get(datapath), self.runtimes,
                      Path(self.job.directory, "consoles"))  # fmt: skip
        except Error as e:
            return e
        stack.callback(self._close, pod)
        try:
            pod.start()
        except Error as e:
            self.failed.append(pod)
            return e
        stack.enter_context(Supervisor(pod))
        return pod

    def _trial(self, cell: Cell, pod: Pod, number: int, order: int) -> Trial:
        result = trial.run(cell, pod, self.guest, self.job.warmup_s, self.job.duration_s)
        return replace(result, block=number, order=order)

    def _close(self, pod: Pod) -> None:
        if not (self.job.keep and pod in self.failed):
            pod.close()


def unsupported(cell: Cell, guest: runtimes.Prepared) -> str | None:
    """Why a cell cannot be measured with this guest, or None."""
    datapath = datapaths.get(cell.datapath)
    if cell.pair not in datapath.pairs:
        return f"{cell.datapath} does not carry {cell.pair.label('guest')}"
    if cell.pair.guests and cell.family not in guest.families:
        kernel = guest.description.kernel or guest.description.runtime
        return f"the guest's kernel ({kernel}) has no {cell.family.replace('ip', 'IP')}"
    if datapath.layout is datapaths.Layout.SOCKET and not guest.uses_tap:
        return f"{cell.datapath} carries frames of a virtual machine, which a stand-in is not"
    if datapath.layout is datapaths.Layout.ROUTED and guest.description.runtime is Runtime.OSV:
        return "OSv has its loopback in the kernel, which would have to be changed"
    return datapath.unsupported(cell)


def main() -> None:
    """Entry of `python -m testbed.worker`."""
    job = Job.from_json(json.loads(sys.stdin.readline()))

    def give_up_when_nobody_listens() -> None:
        while select.select([0], [], [], SILENCE_S)[0] and os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    def stop(*_: object) -> None:
        _be_deaf()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    threading.Thread(target=give_up_when_nobody_listens, daemon=True).start()
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
