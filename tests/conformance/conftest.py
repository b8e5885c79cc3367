"""Runs cases of the suite, one pod per datapath and module, with stand-ins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from testbed import datapaths, runtimes
from testbed.conformance import Result, checks, suite
from testbed.conformance.bed import OwnStage
from testbed.datapaths import Datapath
from testbed.ledger import Owner
from testbed.model import Family, Runtime
from testbed.runtimes import Options

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
            key, pairs = (chosen.name, native, hosts_patch), suite.carried(chosen, native)
            if key not in stages:
                options = Options(hosts_patch=hosts_patch)
                guest = runtimes.prepare(Runtime.STANDIN, options)
                owner = stack.enter_context(Owner())
                stage = OwnStage(owner, chosen, pairs, guest, options, consoles)
                stages[key] = stack.enter_context(stage)
            cases = suite.cases(checks(globs), pairs, families)
            through = suite.through(stages[key], cases)
            return [event for event in through if isinstance(event, Result)]

        yield run
