"""Time limits of tests: a test that takes longer fails. TESTBED_SLOWNESS multiplies all limits.

pytest-timeout raises an exception in the test. If the test still does not end, because it waits for
a thread for example, the process is ended soon after, with the stacks of all threads. xdist then
starts another process.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator

import pytest

from testbed.host.facts import slowness

LIMIT_S = 300
"""Limit of a test with its fixtures; the marker `timeout` sets another one."""
GRACE_S = 60
"""Time for clean-up after the limit, and for the end of the process after the last test."""

STDERR = pytest.StashKey[int]()
"""A duplicate of descriptor 2, because pytest captures descriptor 2 while tests run."""
LIMIT = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    given_s = config.getoption("timeout")
    for item in items:
        marker = item.get_closest_marker("timeout")
        limit_s = marker.args[0] if marker else LIMIT_S
        item.stash[LIMIT] = limit_s * slowness() if given_s is None else given_s
        item.add_marker(pytest.mark.timeout(item.stash[LIMIT]), append=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if limit_s := item.stash[LIMIT]:
        _end_after(limit_s, item.config)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_unconfigure(config: pytest.Config) -> None:
    from tests.processes import is_one_of_several  # not above: a plugin of its own (`conftest`)

    if not is_one_of_several(config):  # a worker of xdist waits for the others
        _end_after(0, config)  # running threads would keep Python from ending


def _end_after(limit_s: float, config: pytest.Config) -> None:
    after_s = limit_s + GRACE_S * slowness()
    faulthandler.dump_traceback_later(after_s, exit=True, file=config.stash[STDERR])
