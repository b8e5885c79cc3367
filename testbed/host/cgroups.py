"""Creates, empties and removes cgroups (cgroup v2), and reads the memory use of one."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import time
from pathlib import Path

from testbed.host.ledger import Scope
from testbed.model.errors import Error


@functools.cache
def mount_point() -> Path:
    """Mount point of cgroup2: /sys/fs/cgroup, or /sys/fs/cgroup/unified in hybrid setups."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, directory, kind, options, *_ = line.split()
        if kind == "cgroup2" and "rw" in options.split(","):
            return Path(directory)
    raise Error("no writable cgroup2 is mounted", hint="mount -t cgroup2 none /sys/fs/cgroup")


def create(owner: Scope, name: str, parent: Path | None = None) -> Path:
    """Make a cgroup below another, or the mount point. Undoing it kills the processes in it."""
    path = (parent or mount_point()) / name
    owner.defer(remove_cgroup, path=str(path))
    path.mkdir(parents=True, exist_ok=True)
    return path


def remove_cgroup(path: str) -> None:
    """Kill the processes in a cgroup and below, then remove it. A missing cgroup is no error."""
    if not Path(path).exists():
        return
    empty(Path(path))
    groups = [Path(path), *(p for p in Path(path).rglob("*") if p.is_dir())]
    for group in sorted(groups, reverse=True):
        group.rmdir()


def empty(group: Path) -> None:
    """Kill every process in the cgroup and below. Returns when no process is left.

    Kills by pid, since kernels before 5.14 lack `cgroup.kill`. New children of a dying process are
    killed in the next round. A process that is no longer listed may still exist for a moment.
    Raises `Error` if processes are left after 10 s.
    """
    deadline = time.monotonic() + 10
    while "populated 1" in (group / "cgroup.events").read_text():
        pids = [
            int(pid) for procs in group.rglob("cgroup.procs") for pid in procs.read_text().split()
        ]
        if time.monotonic() > deadline:
            raise Error(f"processes {pids} in {group} cannot be killed")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                fd = os.pidfd_open(pid)
                signal.pidfd_send_signal(fd, signal.SIGKILL)
                select.select([fd], [], [], 1)
                os.close(fd)
        time.sleep(0.001)


def resident_bytes(group: Path) -> int:
    """Memory of the processes in a cgroup and below: the sum of proportional set sizes (PSS).

    Of pages that several processes share, each is charged its share. Source:
    /proc/PID/smaps_rollup (proc(5)).
    """
    total = 0
    for pid in (p for procs in group.rglob("cgroup.procs") for p in procs.read_text().split()):
        with contextlib.suppress(OSError):  # ended meanwhile
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total * 1024
