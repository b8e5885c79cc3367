"""Runs cases of the suite, one pod per datapath and module, with stand-ins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from testbed import datapaths, runtimes
from testbed.conformance import checks, runner
from testbed.conformance.check import Result
from testbed.conformance.stage import OwnStage
from testbed.datapaths.interface import Datapath
from testbed.host.ledger import Owner
from testbed.model.terms import Family, Runtime
from testbed.runtimes.interface import Options

Run = Callable[..., list[Result]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """`run(datapath, *globs)`: the results of the checks that match."""
    stages: dict[tuple[str, Runtime, bool], OwnStage] = {}
    consoles = tmp_path_factory.mktemp("consoles")
    with ExitStack() as stack:

        def run(
            datapath: str | Datapath,
            *globs: str,
            native: Runtime = Runtime.PROCESS,
            hosts_patch: bool = True,
            families: tuple[Family, ...] = tuple(Family),
        ) -> list[Result]:
            chosen = datapaths.get(datapath) if isinstance(datapath, str) else datapath
            key, pairs = (chosen.name, native, hosts_patch), runner.carried(chosen, native)
            if key not in stages:
                options = Options(hosts_patch=hosts_patch)
                guest = runtimes.prepare(Runtime.STANDIN, options)
                owner = stack.enter_context(Owner())
                stage = OwnStage(owner, chosen, pairs, guest, options, consoles)
                stages[key] = stack.enter_context(stage)
            cases = runner.cases(checks.matching(globs), pairs, families)
            through = runner.through(stages[key], cases)
            return [event for event in through if isinstance(event, Result)]

        yield run
