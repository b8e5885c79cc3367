"""Tests in several processes at once (pytest-xdist), each on a machine of its own.

Each process has its own network namespace, /run/testbed, /run/netns and bpffs, so that no test
meets links or ledgers of another process, and its `testbed clean` removes nothing of them. Control
groups, eBPF programs and CPUs are the whole machine's: a test that looks at all of these is marked
`alone`, and waits until no other test runs.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from testbed.host.process import started_at

CLONE_NEWNS, CLONE_NEWNET = 0x20000, 0x40000000
OWN = {"/run/testbed": "tmpfs", "/run/netns": "tmpfs", "/sys/fs/bpf": "bpf"}
"""Folder → type of the file system that a process of tests has there for itself."""

RUN = "TESTBED_TESTS"
"""Variable that all processes of one run of tests have: pid and start time of the first of them."""
os.environ.setdefault(RUN, f"{os.getpid()}.{started_at(os.getpid())}")

LOCKS = pytest.StashKey[Path]()
"""Folder for locks of the processes, which nobody else can have made before."""

LONG = (
    "remote/test_campaign.py",
    "integration/test_scale.py",
    "hostile/test_guest.py",
    "integration/test_examples.py",
    "integration/test_campaign.py",
    "integration/test_docs.py",
    "integration/test_cluster.py",
    "integration/test_taps.py",
    "integration/test_vm.py",
    "integration/test_manifests.py",
    "integration/test_killed.py",
    "integration/test_guests.py",
    "integration/test_blocks.py",
    "conformance/test_checks.py",
    "integration/test_isolation.py",
    "integration/test_shim.py",
    "integration/test_capabilities.py",
    "integration/test_wild.py",
    "integration/test_soak.py",
)
"""Files that take longest: they come first, so that no process is left with one at the end."""


def is_one_of_several(config: pytest.Config) -> bool:
    """Whether this process is one of several that run tests."""
    return hasattr(config, "workerinput")


def is_of_another_run(process: Path) -> bool:
    """Whether a process (a folder of /proc) belongs to another run of tests that still goes on.

    What an earlier run left behind does not.
    """
    runs = {word for word in words(process / "environ") if word.startswith(f"{RUN}=")}
    others = runs - {f"{RUN}={os.environ[RUN]}"}
    return any(_goes_on(run.removeprefix(f"{RUN}=")) for run in others)


def _goes_on(run: str) -> bool:
    """Whether the first process of a run lives. Its pid may be of a namespace within this one."""
    pid, _, start = run.partition(".")
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it just ended
            status = (process / "status").read_text()
            inner = re.search(r"^NSpid:.*\b(\d+)$", status, re.MULTILINE)
            if inner and inner[1] == pid and start in ("", str(started_at(int(process.name)))):
                return True
    return False


def words(file: Path) -> list[str]:
    """Command line or environment of a process; empty if it just ended."""
    try:
        return file.read_text(errors="replace").split("\0")
    except OSError:
        return []


def pytest_configure(config: pytest.Config) -> None:
    if is_one_of_several(config):
        config.stash[LOCKS] = Path(config.workerinput["locks"])  # type: ignore[attr-defined]
        if os.geteuid() == 0:
            _leave_others()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """A process that is to run tests begins (pytest-xdist)."""
    stash = node.config.stash
    if LOCKS not in stash:
        stash[LOCKS] = Path(tempfile.mkdtemp(prefix="tests-"))
    node.workerinput["locks"] = str(stash[LOCKS])


def pytest_unconfigure(config: pytest.Config) -> None:
    if LOCKS in config.stash and not is_one_of_several(config):
        shutil.rmtree(config.stash[LOCKS], ignore_errors=True)


def _leave_others() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS | CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    commands = [["mount", "--make-rprivate", "/"], ["ip", "link", "set", "lo", "up"]]
    for folder, kind in OWN.items():
        Path(folder).mkdir(parents=True, exist_ok=True)
        commands.append(["mount", "-t", kind, kind, folder])
    for command in commands:
        subprocess.run(command, check=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        file = item.nodeid.partition("::")[0].removeprefix("tests/")
        return LONG.index(file) if file in LONG else len(LONG)

    items.sort(key=place)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """Hold a lock during a test: one that all share, or that is for one process alone.

    The kernel gives a shared lock while another process waits for it alone. So who waits holds back
    the others, by a lock before that.
    """
    if not is_one_of_several(item.config):
        return (yield)
    locks = item.config.stash[LOCKS]
    with (locks / "running").open("w") as running, (locks / "next").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(running, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        return (yield)
