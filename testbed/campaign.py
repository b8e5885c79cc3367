"""From a plan to a campaign directory: a worker runs the blocks, each trial is stored as it comes.

A campaign that was interrupted, however, is resumed: what is stored is not run again. Nothing is
measured in this process and nothing is built by it.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from testbed import datapaths, store
from testbed.model import Cell, Error, Trial
from testbed.plan import Plan
from testbed.store import Campaign, Store
from testbed.worker import Job


@dataclass(frozen=True)
class Choice:
    """What a user may choose about a campaign besides its plan."""

    guest: str = "best"
    osv_kernel: Path | None = None
    keep: bool = False


@dataclass(frozen=True)
class Progress:
    """How far a campaign is."""

    text: str
    done: int
    total: int
    left_s: float | None
    """Seconds to go; None while nobody can tell."""


Report = Callable[[Progress], None]


def start(plan: Plan, path: Path, choice: Choice, seed: int, report: Report) -> Store:
    """Run a plan into a new campaign directory. Returns it complete, and still open.

    Raises `Error` if the directory has a campaign already, or nothing can be run here.
    """
    if (path / "campaign.json").exists():
        raise Error(f"{path}: there is a campaign already", f"continue it: --resume {path}")
    for name in {cell.datapath for cell in plan.cells}:
        datapaths.get(name)
    job = Job(_blocks(plan, seed, set()), plan.warmup_s, plan.duration_s, choice.guest,
              str(path.absolute()),
              str(choice.osv_kernel.absolute()) if choice.osv_kernel else None,
              keep=choice.keep)  # fmt: skip

    def make(ready: dict[str, Any]) -> Store:
        return store.create(path, _describe(plan, seed, job, ready))

    return _run(job, make, total=len(plan.cells) * plan.blocks, report=report)


def resume(path: Path, keep: bool, report: Report) -> Store:
    """Run what a campaign still lacks. Failed trials are run again."""
    stored = store.open(path)
    campaign = stored.campaign
    plan = Plan(
        campaign.name,
        campaign.blocks,
        **campaign.plan,
        cells=tuple(map(Cell.parse, campaign.cells)),
    )
    job = Job(_blocks(plan, campaign.seed, stored.done()), plan.warmup_s, plan.duration_s,
              campaign.guest, str(path.absolute()),
              campaign.environment["osv_kernel"], keep=keep)  # fmt: skip
    total = sum(len(cells) for _, cells in job.blocks)
    if not total:
        return stored
    with ExitStack() as stack:
        appended = stack.enter_context(store.resume(path))  # before anybody touches its files
        finished = _run(job, lambda _: appended, total=total, report=report)
        stack.pop_all()
        return finished


def _blocks(
    plan: Plan, seed: int, done: set[tuple[str, int]]
) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """Every block's cells in its random order, without those that are done."""
    blocks = []
    for number in range(plan.blocks):
        order = [cell.id for cell in plan.cells]
        random.Random(f"{seed}/{number}").shuffle(order)
        if left := tuple(id for id in order if (id, number) not in done):
            blocks.append((number, left))
    return tuple(blocks)


def _run(
    job: Job, open_store: Callable[[dict[str, Any]], Store], total: int, report: Report
) -> Store:
    """Have a worker do the job; store its trials."""
    campaign: Store | None = None
    done, text, began = 0, "starting", time.monotonic()
    try:
        for event in _events(job):
            match event["event"]:
                case "ready":
                    campaign = open_store(event)
                    began = time.monotonic()
                    text = event["why"] or text
                case "step":
                    text = event["text"]
                case "trial" if campaign:
                    campaign.append(Trial.from_json(event["trial"]))
                    done += 1
                case "kept":
                    text = f"left standing: {', '.join(event['pods'])}"
            left_s = (time.monotonic() - began) / done * (total - done) if done else None
            report(Progress(text, done, total, left_s))
        assert campaign is not None
        return campaign
    except BaseException:
        if campaign:
            campaign.close()
        raise


def _events(job: Job) -> Iterator[dict[str, Any]]:
    """Start a worker, give it the job, pass on what it says. When this returns the worker is gone.

    What it complains of stays in `worker.log` of the campaign.
    """
    log = Path(job.directory) / "worker.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        complaints = log.open("w")
    except OSError as e:
        raise Error(f"cannot write {log}: {e.strerror}", "choose a directory with --out") from e
    with complaints:
        worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "testbed.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, text=True,
        )  # fmt: skip
    with worker.stdin as orders, worker.stdout as answers:  # type: ignore[union-attr]
        try:
            orders.write(json.dumps(asdict(job)) + "\n")
            orders.flush()
            for line in answers:
                event = json.loads(line)
                if event["event"] == "error":
                    raise Error(event["message"], event["hint"])
                yield event
        finally:
            orders.close()
            status = _wait(worker)
    if status:
        last = log.read_text().strip().rpartition("\n")[2] or "it said nothing"
        raise Error(f"the worker ended with status {status}: {last}", f"see {log}, then --resume")


def _wait(worker: subprocess.Popen[str]) -> int:
    """The worker takes everything down before it ends, also if somebody is in a hurry."""
    while True:
        try:
            return worker.wait()
        except KeyboardInterrupt:
            continue


def _describe(plan: Plan, seed: int, job: Job, ready: dict[str, Any]) -> Campaign:
    guest, facts = ready["guest"], ready["machine"]
    return Campaign(
        name=plan.name,
        plan={"warmup_s": plan.warmup_s, "duration_s": plan.duration_s},
        cells=tuple(cell.id for cell in plan.cells),
        blocks=plan.blocks,
        seed=seed,
        references={cell.datapath: datapaths.get(cell.datapath).reference for cell in plan.cells},
        guest=guest["runtime"],
        guest_kernel=guest["kernel"],
        accelerator=guest["accelerator"] or "none",
        kernel=facts["kernel"],
        cpu=facts["cpu"],
        governor=facts["governor"],
        host=facts["host"],
        revision=revision(),
        offloads=guest["offloads"],
        versions=ready["versions"],
        images=guest["digests"],
        environment={"osv_kernel": job.osv_kernel, "why": ready["why"]},
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def revision() -> str:
    """Git revision of this project, with `-dirty` if it was changed; `unknown` outside a clone."""
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"
