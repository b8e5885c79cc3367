"""Configuration of all tests: skips `root` tests without root, checks that nothing is left behind.

Things are namespaces, links, cgroups, pins, eBPF objects, nftables tables, ledgers and child
processes. Left behind is what exists after the run and did not exist before it. The kernel is asked
directly, not through the code under test. Things of other running testbeds are ignored.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import pytest
from pyroute2.nftables.main import NFTables

from testbed.host import architecture
from testbed.host.facts import slowness
from testbed.host.ledger import ROOT

pytest_plugins = ["tests.bench.gate", "tests.limits", "tests.processes", "tests.skips"]

KERNEL_PATIENCE_S = 10 * slowness()
"""Time for the kernel to free namespaces and programs after the call that removed them."""

PRELOAD = {"maps.debug", "progs.debug"}
"""Names of files that a kernel with BPF_PRELOAD itself puts into a bpffs (since 5.10)."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("testbed")
    group.addoption("--kills", type=int, default=20, help="how often to kill what is under test")
    group.addoption("--kill-seed", type=int, help="to have the same moments again")
    group.addoption("--soak", type=float, default=20, help="seconds of random operations on pods")
    group.addoption("--soak-seed", type=int, help="to have the same operations again")


def pytest_configure() -> None:
    """Restore SIGINT: a shell script that starts the tests in its background has them ignore it.

    Commands in messages are the same, whether `./bootstrap` started the tests or not.
    """
    os.environ.pop("TESTBED_BOOTSTRAP", None)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        for item in items:
            if item.get_closest_marker("root"):
                item.add_marker(pytest.mark.skip(reason="needs root"))


BEFORE = pytest.StashKey[AbstractSet[object]]()
LEFT = pytest.StashKey[list[str]]()


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[BEFORE] = snapshot()
    session.config.stash[LEFT] = []


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A process that ran tests has ended (pytest-xdist)."""
    node.config.stash[LEFT] += getattr(node, "workeroutput", {}).get("left", [])


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    from tests.processes import (
        is_one_of_several,
    )  # a plugin that is imported above is not rewritten

    config = session.config
    if BEFORE not in config.stash:
        return
    for name in ("last_value", "last_traceback", "last_exc"):  # their frames hold programs
        vars(sys).pop(name, None)
    # Other processes' tests have things of these kinds, too: looked for at the end of them all.
    shared = ("bpf ", "cgroup ") if is_one_of_several(config) else ()

    def left() -> list[str]:
        found = snapshot() - config.stash[BEFORE] - others()
        return sorted(thing for thing in found if not thing.startswith(shared))

    deadline = time.monotonic() + KERNEL_PATIENCE_S
    while left() and time.monotonic() < deadline:
        gc.collect()  # an eBPF program stays loaded as long as a Python object holds it
        time.sleep(0.1)
    config.stash[LEFT] += left()
    if is_one_of_several(config):
        config.workeroutput["left"] = config.stash[LEFT]  # type: ignore[attr-defined]
    elif config.stash[LEFT]:
        print("\nleft behind:", *config.stash[LEFT], sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def snapshot() -> set[str]:
    """All existing things of the kinds that a testbed makes, each as `kind name`."""
    return {
        *(f"nftables {name}" for name in nftables()),
        *(f"netns {p.name}" for p in Path("/run/netns").glob("*")),
        *(f"link {name}" for _, name in socket.if_nameindex()),
        *(f"cgroup {p}" for mount in mounts("cgroup2") for p in mount.iterdir() if p.is_dir()),
        *(f"pin {p}" for p in pins() if p.name not in PRELOAD),
        *(f"ledger {p.name}" for p in ROOT.glob("*.ledger")),
        *(f"process {pid} {name}" for pid, name in children()),
        *bpf_objects(),
    }


def others() -> set[str]:
    """Things of other running testbeds, by the id in their names. Pins and programs have none.

    Ledgers of hosts that tests make are not visible here, but their programs are. Nor are those of
    another run of tests, but its cgroups and programs are.
    """
    from tests.processes import is_of_another_run, words  # not above: see `pytest_sessionfinish`

    ours = {os.getpid(), *(pid for pid, _ in children())}
    locks = Path("/proc/locks").read_text().replace("-> ", "").splitlines()  # "->": waiting
    fields = [line.split() for line in locks]
    foreign = {inode.rpartition(":")[2] for *_, pid, inode, _, _ in fields if int(pid) not in ours}
    ids = {p.stem for p in ROOT.glob("*.ledger") if str(p.stat().st_ino) in foreign}
    processes = [p for p in Path("/proc").glob("[0-9]*") if int(p.name) not in ours]
    hidden: tuple[str, ...] = ()
    if ids or any("testbed.campaigns.worker" in words(p / "cmdline") for p in processes):
        hidden = ("pin ", "bpf ")
    if any(is_of_another_run(p) for p in processes):
        hidden = ("pin ", "bpf ", "cgroup ")
    return {
        thing for thing in snapshot() if any(id in thing for id in ids) or thing.startswith(hidden)
    }


def mounts(kind: str) -> list[Path]:
    """Mount points of file systems of this type."""
    lines = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    return [Path(where) for _, where, fs, *_ in lines if fs == kind]


def pins() -> Iterator[Path]:
    """All files and folders in bpffs. (Path.rglob fails if one disappears meanwhile.)"""
    for mount in mounts("bpf"):
        for folder, folders, files in os.walk(mount):
            yield from (Path(folder, name) for name in (*folders, *files))


def children() -> Iterator[tuple[int, str]]:
    """(pid, name) of this process's living descendants."""
    by_parent: dict[int, list[tuple[int, str]]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, tail = stat.read_text().rpartition(")")
        except OSError:
            continue  # it just ended
        pid, _, name = head.partition(" (")
        state, parent, *_ = tail.split()
        if state not in "ZX":
            by_parent.setdefault(int(parent), []).append((int(pid), name))
    queue = [os.getpid()]
    while queue:
        for child, name in by_parent.get(queue.pop(), []):
            yield child, name
            queue.append(child)


def nftables() -> set[str]:
    """Names of the nftables tables of this namespace; none without root."""
    if os.geteuid() != 0:
        return set()
    with NFTables(nfgen_family=0) as tables:
        return {str(table.get("name")) for table in tables.get_tables()}


def bpf_objects() -> Iterator[str]:
    """All eBPF programs and maps of the kernel, with id and name (bpf(2)); none without root."""
    libc = ctypes.CDLL(None)
    buffer = ctypes.create_string_buffer(256)

    def bpf(command: int, attributes: bytes) -> int:
        ctypes.memset(buffer, 0, len(buffer))
        ctypes.memmove(buffer, attributes, len(attributes))
        return int(libc.syscall(architecture.native().sys_bpf, command, buffer, 128))

    # kind, BPF_*_GET_NEXT_ID, BPF_*_GET_FD_BY_ID, offset of `name` in struct bpf_*_info
    for kind, next_id, fd_by_id, name_at in (("program", 11, 13, 64), ("map", 12, 14, 24)):
        id = 0
        while bpf(next_id, struct.pack("I", id)) == 0:
            id = struct.unpack_from("I", buffer, 4)[0]
            fd = bpf(fd_by_id, struct.pack("I", id))
            if fd < 0:
                continue  # it has just been freed
            info = ctypes.create_string_buffer(128)
            bpf(15, struct.pack("IIQ", fd, len(info), ctypes.addressof(info)))  # …_INFO_BY_FD
            os.close(fd)
            name = info.raw[name_at : name_at + 16].partition(b"\0")[0].decode()
            if not name.startswith("sd_"):  # systemd has programs for services that start
                yield f"bpf {kind} {id} {name}"
