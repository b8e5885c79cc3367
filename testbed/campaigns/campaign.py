"""Runs a campaign: starts workers for the blocks of a plan, and stores each trial as it arrives.

This process measures nothing and builds nothing. One worker runs on this machine, or one on each of
several hosts. A block is always run by one worker, because ratios are taken within a block. If a
host fails, the cells of its blocks fail. An interrupted campaign is resumed: trials that are stored
are not run again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from testbed import datapaths, paths
from testbed.campaigns import noise
from testbed.campaigns.noise import Noise
from testbed.campaigns.pace import Pace
from testbed.campaigns.places import HERE, Place, Share, events_of
from testbed.campaigns.protocol import Event, Job
from testbed.campaigns.schedule import Blocks, order_blocks
from testbed.model.cells import Cell
from testbed.model.errors import Error
from testbed.model.progress import Progress
from testbed.model.trials import Status, Trial
from testbed.plan import Plan, applications_of, claims_of, preregistration_of
from testbed.reports.words import pacing_warning
from testbed.results import store
from testbed.results.analysis import summarise, widest
from testbed.results.store import Campaign, Store, frame


@dataclass(frozen=True)
class Choice:
    """Options of `testbed run` beside the plan."""

    guest: str = "best"
    osv_kernel: Path | None = None
    keep: bool = False
    """Stop at the first pod that fails, and leave it standing."""


Report = Callable[[Progress], None]


def start(
    plan: Plan,
    path: Path,
    choice: Choice,
    seed: int,
    report: Report,
    places: Sequence[Place] = HERE,
) -> Store:
    """Run a plan into a new campaign directory. Returns its store, which is still open.

    Raises `Error` if the directory has a campaign already, or if no worker can run.
    """
    if (path / "campaign.json").exists():
        raise Error(
            f"{path}: there is a campaign already", f"continue it: testbed run --resume {path}"
        )
    if plan.blocks < len(places):
        raise Error(
            f"{plan.blocks} blocks cannot be dealt out to {len(places)} hosts",
            f"--blocks {len(places)}, or fewer hosts by --on",
        )
    for name in {cell.datapath for cell in plan.cells}:
        datapaths.get(name)
    kernel = str(choice.osv_kernel.absolute()) if choice.osv_kernel else None
    job = _job(plan, path, choice.guest, kernel, choice.keep)
    trials_s = plan.blocks * len(plan.cells) * (plan.warmup_s + plan.duration_s) / len(places)
    first = replace(job, noise_s=noise.duration_s(trials_s))
    shares = _deal(first, order_blocks(plan, seed, range(plan.blocks), set()), places, {})
    began = time.monotonic()

    def make(ready: Event) -> Store:
        return store.create(path, _describe(plan, seed, job, ready, places))

    return _refine(_run(shares, make, report, plan), plan, job, places, report, began)


def resume(path: Path, keep: bool, report: Report, places: Sequence[Place] = HERE) -> Store:
    """Run the trials that a campaign still lacks, and its failed trials again.

    A block that was begun continues on the same host. If that host is not among `places`, the rest
    of the block fails.
    """
    stored = store.open(path)
    campaign = stored.campaign
    if (hosts := campaign.environment.get("hosts")) and places is HERE:
        raise Error(f"{path}: this campaign runs on {', '.join(hosts)}", "add --hosts FILE")
    if places is not HERE and not hosts:
        raise Error(f"{path}: this campaign runs on {campaign.host}", "leave out --hosts")
    plan = Plan(
        campaign.name,
        campaign.blocks,
        **{
            **campaign.plan,
            "claims": claims_of(campaign.plan),
            "applications": applications_of(campaign.plan),
            "preregistration": preregistration_of(campaign.plan),
        },
        cells=tuple(map(Cell.parse, campaign.cells)),
    )
    job = _job(plan, path, campaign.guest, campaign.environment["osv_kernel"], keep)
    begun = {t.block: t.host for t in stored.trials() if t.status is not Status.FAILED}
    numbers = range(max([plan.blocks - 1, *(t.block for t in stored.trials())]) + 1)
    blocks = order_blocks(plan, campaign.seed, numbers, stored.done())
    began = time.monotonic()
    if not blocks and (plan.target_width is None or _width(stored) <= plan.target_width):
        return stored
    with ExitStack() as stack:
        appended = stack.enter_context(store.resume(path))  # takes the lock before workers start
        if blocks:
            before, shares = len(stored.done()), _deal(job, blocks, places, begun)
            lacking = sum(len(ids) for share in shares for _, ids in share.job.blocks)
            text = f"{lacking} trials are lacking of {before + lacking}"
            report(Progress(text, before, before + lacking, stays=True))
            _run(shares, lambda _: appended, report, plan, before)
        finished = _refine(appended, plan, job, places, report, began)
        stack.pop_all()
        return finished


def _job(plan: Plan, path: Path, guest: str, osv_kernel: str | None, keep: bool) -> Job:
    """The job of a campaign's workers, without blocks."""
    directory = str(path.absolute())
    return Job(
        (),
        plan.warmup_s,
        plan.duration_s,
        guest,
        directory,
        osv_kernel,
        keep=keep,
        applications={name: found.model_dump() for name, found in plan.applications.items()},
    )


def _refine(
    finished: Store,
    plan: Plan,
    job: Job,
    places: Sequence[Place],
    report: Report,
    began: float,
) -> Store:
    """Add blocks, one at each place, until all intervals are as narrow as the plan asks.

    Stops earlier at the plan's time limit, counted from `began`, or if a trial failed and failed
    pods are to be left standing.
    """
    rounds = math.ceil(plan.blocks / len(places))
    while plan.target_width is not None and _width(finished) > plan.target_width:
        trials = finished.trials()
        elapsed_s = time.monotonic() - began
        if elapsed_s * (rounds + 1) / rounds > plan.limit_s:
            break
        if job.keep and any(trial.status is Status.FAILED for trial in trials):
            break
        first = 1 + max(trial.block for trial in trials)
        blocks = order_blocks(
            plan, finished.campaign.seed, range(first, first + len(places)), set()
        )
        _run(_deal(job, blocks, places, {}), lambda _: finished, report, plan)
        rounds += 1
    return finished


def _width(stored: Store) -> float:
    """Width of the widest interval (`analysis.widest`)."""
    return widest(summarise(frame(stored.trials()), stored.campaign.references))


def _deal(job: Job, blocks: Blocks, places: Sequence[Place], begun: dict[int, str]) -> list[Share]:
    """Distribute blocks to places: begun blocks to their hosts, the others round-robin."""
    dealt: dict[str, list[tuple[int, tuple[str, ...]]]] = {place.name: [] for place in places}
    new = 0
    for block in blocks:
        name = begun.get(block[0])
        if name is None:
            name = places[new % len(places)].name
            new += 1
        dealt.setdefault(name, []).append(block)
    by_name = {place.name: place for place in places}
    return [
        Share(name, by_name.get(name), replace(job, blocks=tuple(blocks_of_place)))
        for name, blocks_of_place in dealt.items()
        if blocks_of_place
    ]


def _run(
    shares: list[Share],
    open_store: Callable[[Event], Store],
    report: Report,
    plan: Plan,
    before: int = 0,
) -> Store:
    """Run all shares in parallel, each by a worker, and store their trials.

    `before`: number of trials that are stored already. Progress counts them.
    The cells that a failed worker had not finished fail. Raises `Error` if all workers fail.
    """
    campaign: Store | None = None
    left = {
        (number, id): (share, order)
        for share in shares
        for number, ids in share.job.blocks
        for order, id in enumerate(ids)
    }
    total, text = before + len(left), "starting"
    pace = Pace(shares[0].job.warmup_s + shares[0].job.duration_s)
    try:
        with closing(events_of(shares)) as events:
            for share, event in events:
                match event["event"]:
                    case "ready":
                        _refuse_pacing(plan, share, event)
                        campaign = campaign or open_store(event)
                        _record_host(campaign, share, event)
                        pace.ready(share.name, time.monotonic())
                    case "step":
                        text = f"{_prefix(share)}{event['text']}"
                    case "trial" if campaign:
                        trial = replace(Trial.from_json(event["trial"]), host=share.name)
                        campaign.append(trial)
                        pace.ended(trial, time.monotonic())
                        left.pop((trial.block, trial.cell), None)
                done = total - len(left)
                left_s = pace.left_s([(of.name, *place) for place, (of, _) in left.items()])
                for note in _notes(share, event, plan):
                    report(Progress(note, done, total, left_s, stays=True))
                report(Progress(text, done, total, left_s))
        failed = [share for share in shares if share.error]
        if campaign is None or len(failed) == len(shares):
            raise _all_failed(failed)
        for (number, id), (share, order) in left.items():
            if share.error:
                campaign.append(
                    Trial(id, number, order, Status.FAILED, share.error.message, host=share.name)
                )
        return campaign
    except BaseException:
        if campaign:
            campaign.close()
        raise


def _prefix(share: Share) -> str:
    return f"{share.name}: " if share.name else ""


def _notes(share: Share, event: Event, plan: Plan) -> Iterator[str]:
    """What a user should know of an event after the campaign, too."""
    prefix = _prefix(share)
    match event["event"]:
        case "ready":
            why = f": {event['why']}" if event["why"] else ""
            yield f"{prefix}guests are {event['guest']['runtime']}{why}"
            if warning := pacing_warning(event["machine"]["congestion_control"]):
                yield f"{prefix}{warning}; sysctl net.ipv4.tcp_congestion_control=cubic"
            if found := event["noise"]:
                yield f"{prefix}{Noise(**found).text(plan.blocks, plan.target_width)}"
        case "note":
            yield f"{prefix}{event['text']}"
        case "failed":
            yield f"failed: {share.error}"
        case "kept":
            yield f"{prefix}left standing: {', '.join(event['pods'])}"


def _all_failed(shares: list[Share]) -> Error:
    errors = [share.error for share in shares if share.error]
    if len(errors) == 1:
        return errors[0]
    return Error("; ".join(e.message for e in errors), errors[0].hint)


def _record_host(store: Store, share: Share, ready: Event) -> None:
    """Store what a host reports about itself; fail its share if it has other guests.

    Values of different kinds of guests must not be averaged over blocks.
    """
    campaign, guest = store.campaign, ready["guest"]
    if share.name:
        store.write_host(share.name, {k: ready[k] for k in ("machine", "versions", "guest")})
    ours = (campaign.guest, campaign.guest_kernel, campaign.accelerator)
    found = (guest["runtime"], guest["kernel"], guest["accelerator"] or "none")
    if found != ours:
        share.error = Error(
            f"{share.name or 'this machine'}: guests are {' '.join(found)}, "
            f"and the campaign's are {' '.join(ours)}",
            "start a new campaign, with --guest or on other hosts",
        )
        share.stop.set()


def _refuse_pacing(plan: Plan, share: Share, ready: Event) -> None:
    """Raises `Error` if a plan has claims to prove, and TCP may pace what they are about."""
    warning = pacing_warning(ready["machine"]["congestion_control"])
    if plan.preregistration and warning:
        raise Error(
            f"{_prefix(share)}{warning}, and plan {plan.name} claims something of it",
            hint="sysctl net.ipv4.tcp_congestion_control=cubic",
        )


def _describe(plan: Plan, seed: int, job: Job, ready: Event, places: Sequence[Place]) -> Campaign:
    """Description of the campaign for campaign.json, from the first host that is ready."""
    guest, facts = ready["guest"], ready["machine"]
    names = [place.name for place in places if place.name]
    return Campaign(
        name=plan.name,
        plan={
            "warmup_s": plan.warmup_s,
            "duration_s": plan.duration_s,
            "target_width": plan.target_width,
            "limit_s": plan.limit_s,
            "claims": [asdict(claim) for claim in plan.claims],
            "preregistration": asdict(plan.preregistration) if plan.preregistration else None,
            "sha256": plan.sha256,
            "applications": job.applications,
        },
        cells=tuple(cell.id for cell in plan.cells),
        blocks=plan.blocks,
        seed=seed,
        references={cell.datapath: datapaths.reference(cell.datapath) for cell in plan.cells},
        looks={d.name: asdict(d.look) for d in (datapaths.get(c.datapath) for c in plan.cells)},
        guest=guest["runtime"],
        guest_kernel=guest["kernel"],
        accelerator=guest["accelerator"] or "none",
        guests={
            name: {"kernel": named["kernel"], "accelerator": named["accelerator"] or "none"}
            for name, named in ready["guests"].items()
        },
        kernel=facts["kernel"],
        cpu=facts["cpu"],
        governor=facts["governor"],
        host=", ".join(names) or facts["host"],
        revision=paths.revision(),
        congestion_control=facts["congestion_control"],
        offloads=guest["offloads"],
        versions=ready["versions"],
        images=guest["digests"],
        environment={
            "osv_kernel": job.osv_kernel,
            "why": ready["why"],
            "vhost": guest["vhost"],
            "capabilities": guest["capabilities"],
            "queues": ready["queues"],
        }
        | ({"noise": ready["noise"]} if ready["noise"] else {})
        | ({"hosts": names} if names else {}),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )
