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
from xdist.scheduler import LoadFileScheduling

from testbed.host import architecture
from testbed.host.facts import slowness
from testbed.host.ledger import ROOT

pytest_plugins = ["tests.bench.gate", "tests.limits", "tests.skips"]

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


class Scheduling(LoadFileScheduling):  # type: ignore[misc]
    """Distributes tests over processes by file, with all tests that clean the host in one process.

    Otherwise `testbed clean` in one test could remove what a test in another process left.
    """

    def _split_scope(self, nodeid: str) -> str:
        folder = Path(nodeid.partition("::")[0]).parent.name
        return "host" if folder in ("integration", "bpf") else super()._split_scope(nodeid)


def pytest_configure() -> None:
    """Restore SIGINT: a shell script that starts the tests in its background has them ignore it.

    Commands in messages are the same, whether `./bootstrap` started the tests or not.
    """
    os.environ.pop("TESTBED_BOOTSTRAP", None)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        for item in items:
            if item.get_closest_marker("root"):
                item.add_marker(pytest.mark.skip(reason="needs root"))


BEFORE = pytest.StashKey[AbstractSet[object]]()


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # with xdist, only the controller checks
        session.config.stash[BEFORE] = snapshot()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if BEFORE not in session.config.stash:
        return
    for name in ("last_value", "last_traceback", "last_exc"):  # their frames hold programs
        vars(sys).pop(name, None)
    deadline = time.monotonic() + KERNEL_PATIENCE_S
    while left := snapshot() - session.config.stash[BEFORE] - others():
        if time.monotonic() > deadline:
            print("\nleft behind:", *sorted(left), sep="\n  ")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            break
        gc.collect()  # an eBPF program stays loaded as long as a Python object holds it
        time.sleep(0.1)


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
    """Things of other running testbeds: by the id in their names; pins and eBPF objects have none.

    Ledgers of hosts that tests make are not visible here, but their eBPF programs are.
    """
    ours = {os.getpid(), *(pid for pid, _ in children())}
    locks = Path("/proc/locks").read_text().replace("-> ", "").splitlines()  # "->": waiting
    fields = [line.split() for line in locks]
    foreign = {inode.rpartition(":")[2] for *_, pid, inode, _, _ in fields if int(pid) not in ours}
    ids = {p.stem for p in ROOT.glob("*.ledger") if str(p.stat().st_ino) in foreign}
    working = bool(ids) or any(
        is_worker(p) for p in Path("/proc").glob("[0-9]*") if int(p.name) not in ours
    )
    return {
        thing
        for thing in snapshot()
        if any(id in thing for id in ids) or (working and thing.startswith(("pin ", "bpf ")))
    }


def is_worker(process: Path) -> bool:
    """Whether a process is a campaign's worker."""
    try:
        return b"testbed.campaigns.worker" in (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False  # it just ended


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
