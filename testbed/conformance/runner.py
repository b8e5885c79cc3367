"""Runs conformance checks case by case, in one pod per datapath, disruptive checks last."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

from testbed import datapaths, runtimes
from testbed.campaigns.roles import ROLES, unsupported
from testbed.conformance import checks, known_limits
from testbed.conformance.bed import Bed
from testbed.conformance.check import EVERY, Case, Check, Failure, Result, Status, Unsupported
from testbed.conformance.stage import ForeignStage, OwnStage, Stage
from testbed.datapaths.interface import Datapath
from testbed.host.ledger import Owner
from testbed.model.cells import Cell, Pair
from testbed.model.errors import Error
from testbed.model.metrics import Metric
from testbed.model.progress import Progress
from testbed.model.terms import Family, Runtime
from testbed.runtimes import interface
from testbed.runtimes.interface import Description


@dataclass(frozen=True)
class Choice:
    """Options of a conformance run: which datapaths, guests and checks."""

    datapaths: tuple[str, ...]
    guest: str = "best"
    families: tuple[Family, ...] = tuple(Family)
    globs: tuple[str, ...] = ("*",)
    native: Runtime = Runtime.PROCESS
    """Runtime of the natives: processes, or WASI components, which have other pairs."""
    osv_kernel: Path | None = None
    hosts_patch: bool = True
    shim: bool = False
    """Whether the traffic agent in OSv guests gets the shim."""
    netns: Path | None = None
    """Namespace of an existing pod to check. None: build pods."""
    control: str = ""
    """Address of the traffic agent of the guest in that pod."""
    cgroup: Path | None = None
    """Cgroup of that pod's processes, in which natives are started. None: in none of the pod's."""


def run(choice: Choice) -> Iterator[Result | Progress | Description]:
    """Run the checks; yields progress before each case, and results as they arrive.

    First it yields the description of the guests, unless they are somebody else's.
    """
    chosen = checks.matching(choice.globs)
    for name in choice.datapaths:
        datapath = None if choice.netns else datapaths.get(name)
        if datapath and not datapath.localhost:
            raise Error(
                f"{name} does not make localhost work: there is nothing to check",
                hint="choose another --datapath",
            )
    options = interface.Options(choice.osv_kernel, choice.hosts_patch, choice.shim)
    with Owner() as owner, TemporaryDirectory(prefix="testbed-") as consoles:
        if choice.netns:
            if choice.native is not Runtime.PROCESS:
                raise Error(
                    f"no {choice.native} is brought to a pod that is there already",
                    hint="leave out --native",
                )
            stage = ForeignStage(
                owner, choice.netns, choice.control, choice.cgroup, choice.datapaths[0]
            )
            yield from through(stage, cases(chosen, stage.pairs, choice.families))
            return
        guest, why = runtimes.choose(choice.guest, options)
        yield guest.description
        if why:
            yield Progress(f"guests are {guest.description.runtime}: {why}", 0, 0)
        for name in choice.datapaths:
            datapath = datapaths.get(name)
            pairs = carried(datapath, choice.native)
            chosen_cases = cases(chosen, pairs, choice.families)
            lacking = {}
            for case in chosen_cases:
                if reason := unsupported(datapath, _cell(name, case), guest):
                    lacking[case] = reason
            if len(lacking) == len(chosen_cases):  # such a pod may be impossible to build
                for case, reason in lacking.items():
                    yield Result(
                        case.check.name,
                        name,
                        guest.description.runtime,
                        guest.description.kernel,
                        case.pair,
                        case.family,
                        case.transport,
                        Status.UNSUPPORTED,
                        reason,
                        0,
                    )
                continue
            yield Progress(f"building the pod of {name}", 0, 0)
            with OwnStage(owner, datapath, pairs, guest, options, Path(consoles)) as own:
                yield from through(own, chosen_cases, lacking)


def carried(datapath: Datapath, native: Runtime) -> frozenset[Pair]:
    """Pairs that the datapath supports, with processes or with another kind of native."""
    others = {pair for pair in Pair if native in pair.split("-")}
    wanted = EVERY if native is Runtime.PROCESS else others
    return frozenset(pair for pair in wanted if pair.shape in datapath.pairs)


def cases(
    chosen: Iterable[Check], pairs: Collection[Pair], families: tuple[Family, ...]
) -> list[Case]:
    """The cases of the checks with these pairs and families, disruptive checks last."""
    return [
        Case(check, pair, family, transport)
        for check in sorted(chosen, key=lambda c: c.disruptive)
        for pair in Pair
        if pair in pairs and pair.shape in check.pairs
        for family in families
        if family in check.families
        for transport in check.transports
    ]


def _cell(datapath: str, case: Case) -> Cell:
    return Cell(datapath, case.pair, case.family, case.transport, Metric.LATENCY, size_bytes=64)


def through(
    stage: Stage, cases: Sequence[Case], lacking: Mapping[Case, str] = MappingProxyType({})
) -> Iterator[Result | Progress]:
    """Run cases in one pod. Cases in `lacking` are not run: they are unsupported, with a reason."""
    runner = _Runner(stage, _families(stage), lacking)
    done = 0

    def progress(text: str) -> Progress:
        return Progress(f"{stage.datapath}: {text}", done, len(cases))

    for case in cases:
        if case.check.disruptive and runner.parked:
            for resumed in runner.resume():
                yield resumed
                done += 1
        yield progress(f"{case.check.name} {case.pair} {case.family}")
        if result := runner.run(case):
            yield result
            done += 1
    yield progress("resuming idle checks")
    yield from runner.resume()


def _families(stage: Stage) -> dict[str, frozenset[Family]]:
    """Workload → families that its network stack supports."""
    found = {}
    for name in {name for pair in stage.pairs for name in ROLES[pair]}:
        with stage.agent(name) as agent:
            found[name] = agent.hello().families
    return found


@dataclass
class _Parked:
    """A case whose check is suspended, so that its connections are idle."""

    case: Case
    bed: Bed
    rest: Iterator[None]
    duration_s: float


@dataclass
class _Runner:
    """Runs cases on one stage, and holds those that are suspended."""

    stage: Stage
    families: dict[str, frozenset[Family]]
    lacking: Mapping[Case, str]
    parked: list[_Parked] = field(default_factory=list)

    def run(self, case: Case) -> Result | None:
        """Run a case. The result; None if the check is suspended until `resume`."""
        if case in self.lacking:
            return self._result(case, Status.UNSUPPORTED, self.lacking[case], 0)
        for name in ROLES[case.pair]:
            if case.family not in self.families[name]:
                reason = f"{name} has no {case.family.replace('ip', 'IP')}"
                return self._result(case, Status.UNSUPPORTED, reason, 0)
        began = time.monotonic()
        with ExitStack() as stack:
            try:
                self.stage.revive()
                bed = Bed(self.stage, case)
                stack.callback(bed.close)
                rest = case.check.body(bed)
                if rest is not None:
                    next(rest)
                    stack.pop_all()
                    self.parked.append(_Parked(case, bed, rest, time.monotonic() - began))
                    return None
            except _OUTCOMES as e:
                return self._outcome(case, e, time.monotonic() - began)
        return self._result(case, Status.PASS, "", time.monotonic() - began)

    def resume(self) -> Iterator[Result]:
        """Resume the suspended cases; yields their results."""
        parked, self.parked = self.parked, []
        for waiting in parked:
            began = time.monotonic() - waiting.duration_s
            try:
                next(waiting.rest, None)
                result = self._result(waiting.case, Status.PASS, "", time.monotonic() - began)
            except _OUTCOMES as e:
                result = self._outcome(waiting.case, e, time.monotonic() - began)
            finally:
                waiting.bed.close()
            yield result

    def _outcome(self, case: Case, e: Exception, duration_s: float) -> Result:
        status = Status.UNSUPPORTED if isinstance(e, Unsupported) else Status.FAIL
        text = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        why = known_limits.why(self.stage.datapath, self.stage.guest, case)
        if status is Status.FAIL and why:
            status, text = Status.UNSUPPORTED, why
        return self._result(case, status, text, duration_s)

    def _result(self, case: Case, status: Status, reason: str, duration_s: float) -> Result:
        return Result(
            case.check.name,
            self.stage.datapath,
            self.stage.guest,
            self.stage.kernel,
            case.pair,
            case.family,
            case.transport,
            status,
            reason,
            round(duration_s, 4),
        )


_OUTCOMES = (Failure, Unsupported, Error, OSError)
"""Exceptions that a case may end with. Any other exception is a fault of the suite."""
