"""Runtime `container`: an OCI container, run by runc in the pod's network namespace, no daemon.

It has mount, PID, UTS and IPC namespaces of its own, Docker's default capabilities, and an overlay
above the image's files, which is new at every start.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from testbed.host import process
from testbed.host.ledger import Scope
from testbed.model.errors import Error
from testbed.model.terms import Runtime
from testbed.runtimes.interface import Description, Options, Placement
from testbed.runtimes.oci import (
    Bundles,
    cgroup_of,
    limits_of,
    monitor_of,
    namespaces_of,
    program_of,
)

FORBIDDEN = [
    "acct",
    "add_key",
    "bpf",
    "delete_module",
    "finit_module",
    "fsopen",
    "fspick",
    "fsmount",
    "init_module",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "ioperm",
    "iopl",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "lookup_dcookie",
    "mount",
    "mount_setattr",
    "move_mount",
    "open_by_handle_at",
    "open_tree",
    "perf_event_open",
    "pivot_root",
    "quotactl",
    "reboot",
    "request_key",
    "setns",
    "settimeofday",
    "swapoff",
    "swapon",
    "umount2",
    "unshare",
    "userfaultfd",
    "vhangup",
]
"""System calls that are refused with EPERM, since no workload needs them. Others are allowed."""
NEW_NAMESPACES = [
    0x00020000,  # CLONE_NEWNS
    0x02000000,  # CLONE_NEWCGROUP
    0x04000000,  # CLONE_NEWUTS
    0x08000000,  # CLONE_NEWIPC
    0x10000000,  # CLONE_NEWUSER
    0x20000000,  # CLONE_NEWPID
    0x40000000,  # CLONE_NEWNET
]
"""Flags of clone(2) that are refused, since in namespaces of its own a container has all
capabilities. The flags of clone3(2) cannot be seen: programs that are told that it does not exist
call clone(2)."""
AF_VSOCK = 40
"""The family of sockets that lead to the host's virtual machines."""

MASKED = [
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/firmware",
]
READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]


def prepare(options: Options) -> Container:
    """Find runc. Raises `Error` without it."""
    if shutil.which("runc") is None:
        raise Error("no runc, to run containers", hint="apt-get install runc")
    return Container()


class Container(Bundles):
    """Prepared runtime of OCI containers."""

    ready_limit_s = 10.0
    description = Description(Runtime.CONTAINER)

    def start(self, place: Placement) -> subprocess.Popen[bytes]:
        """Start the container, after removing the rest of the one before."""
        id = place.workload.name
        if (_state(place.scratch) / id).exists():
            _runc(place.scratch, "delete", "--force", id)
        bundle, seeing = self._make_bundle(place)
        return process.spawn(
            [*seeing, *_command(place.scratch), "run", "--bundle", str(bundle), id],
            cgroup=monitor_of(place),
            cpus=place.workload.cpus,
            output=place.console,
        )

    def runs(self, place: Placement) -> bool:
        """runc writes state.json when it has made the container, and removes exec.fifo when the
        program starts.
        """
        state = _state(place.scratch) / place.workload.name
        return (state / "state.json").exists() and not (state / "exec.fifo").exists()

    def enter(self, place: Placement, *, terminal: bool = False) -> list[str]:
        tty = ["--tty"] if terminal else []
        return [*_command(place.scratch), "exec", *tty, place.workload.name]

    def _config(self, place: Placement) -> dict[str, Any]:
        program = program_of(place.workload)
        return {
            **super()._config(place),
            "linux": {
                "cgroupsPath": cgroup_of(place),
                "namespaces": [
                    *namespaces_of(place.netns),
                    _pid_namespace(place.scratch, program.pids_of),
                ],
                "maskedPaths": MASKED,
                "readonlyPaths": READ_ONLY,
                # Devices are denied, except those that every container has.
                "resources": limits_of(program) | {"devices": [{"allow": False, "access": "rwm"}]},
                "seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": _refused_calls()},
            },
        }


def own(owner: Scope, scratch: Path, cgroup: str) -> None:
    """Write the containers of a pod down in the ledger, before the first one starts."""
    owner.defer(remove_containers, scratch=str(scratch), cgroup=cgroup)


def remove_containers(scratch: str, cgroup: str) -> None:
    """Remove a pod's containers, and its cgroups of version 1, if any, also those of gVisor.

    Their cgroups of version 2 are within the pod's, which is removed by itself.
    """
    for state in _state(Path(scratch)).glob("*"):
        _runc(Path(scratch), "delete", "--force", state.name)
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        if kind == "cgroup":
            for folder, _, _ in os.walk(f"{mount}/{cgroup}", topdown=False):
                Path(folder).rmdir()


def _state(scratch: Path) -> Path:
    return scratch / "runc"


def _command(scratch: Path) -> list[str]:
    return ["runc", "--root", str(_state(scratch))]


def _runc(scratch: Path, *arguments: str) -> None:
    command = [*_command(scratch), *arguments]
    subprocess.run(command, check=False, capture_output=True, process_group=0)


def _refused_calls() -> list[dict[str, Any]]:
    """The rules of seccomp."""
    forbidden: dict[str, Any] = {"names": FORBIDDEN}
    clone: list[dict[str, Any]] = [
        {
            "names": ["clone"],
            "args": [{"index": 0, "value": flag, "valueTwo": flag, "op": "SCMP_CMP_MASKED_EQ"}],
        }
        for flag in NEW_NAMESPACES
    ]
    vsock: dict[str, Any] = {
        "names": ["socket"],
        # The kernel looks at 32 bits, seccomp at 64.
        "args": [
            {"index": 0, "value": 2**32 - 1, "valueTwo": AF_VSOCK, "op": "SCMP_CMP_MASKED_EQ"}
        ],
    }
    rules = [{**rule, "errnoRet": errno.EPERM} for rule in (forbidden, *clone, vsock)]
    rules.append({"names": ["clone3"], "errnoRet": errno.ENOSYS})
    return [{**rule, "action": "SCMP_ACT_ERRNO"} for rule in rules]


def _pid_namespace(scratch: Path, holder: str) -> dict[str, str]:
    """A new PID namespace, or that of another container. Raises `Error` if that does not run."""
    if not holder:
        return {"type": "pid"}
    try:
        pid = json.loads((_state(scratch) / holder / "state.json").read_bytes())["init_process_pid"]
    except FileNotFoundError as e:
        raise Error(f"the container {holder!r}, whose PID namespace is shared, does not run") from e
    return {"type": "pid", "path": f"/proc/{pid}/ns/pid"}
