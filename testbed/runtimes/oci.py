"""OCI bundles: the common part of runtimes that run images of containers, `container` and `gvisor`.

A bundle is a folder with config.json and a root file system: an overlay above the image's files,
which is new at every start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from testbed.host import cgroups, ledger
from testbed.images import compose, rootfs
from testbed.images.rootfs import Process, Root
from testbed.model.errors import Error
from testbed.model.manifest import Program, Security, Workload
from testbed.model.terms import Family
from testbed.runtimes.interface import VOLUMES, Placement, Prepared, process_of

CAPABILITIES = [
    f"CAP_{name}"
    for name in (
        "CHOWN",
        "DAC_OVERRIDE",
        "FSETID",
        "FOWNER",
        "MKNOD",
        "NET_RAW",
        "SETGID",
        "SETUID",
        "SETFCAP",
        "SETPCAP",
        "NET_BIND_SERVICE",
        "SYS_CHROOT",
        "KILL",
        "AUDIT_WRITE",
    )
]
"""Docker's default capabilities."""

ADDABLE = frozenset(
    f"CAP_{name}"
    for name in (
        "BLOCK_SUSPEND",
        "IPC_LOCK",
        "IPC_OWNER",
        "LEASE",
        "MAC_ADMIN",
        "MAC_OVERRIDE",
        "NET_ADMIN",
        "NET_BROADCAST",
        "SYS_NICE",
        "SYS_PTRACE",
        "SYS_RESOURCE",
        "SYS_TIME",
        "SYS_TTY_CONFIG",
        "SYSLOG",
        "WAKE_ALARM",
    )
)
"""Capabilities that a container may get besides. Of the others, the system calls are refused, or
(LINUX_IMMUTABLE) files could be made that nobody removes."""

CPU_PERIOD_US = 100_000


class Bundles(Prepared):
    """What prepared runtimes of OCI bundles have in common."""

    families = frozenset(Family)
    uses_tap = multiqueue = False
    kernel_has_sockets = has_shell = True

    def __init__(self) -> None:
        self._roots: dict[str, Root] = {}

    def dialed(self, family: Family) -> str:
        return "localhost"

    def compose(self, workload: Workload) -> None:
        self._process(workload)
        _capabilities(workload.name, program_of(workload).security)

    def _make_bundle(self, place: Placement) -> tuple[Path, list[str]]:
        """Make the bundle of a workload anew.

        Returns it, and the prefix of a command line that runs a command which sees its root. The
        overlay is mounted in a mount namespace of that command, and goes with it.
        """
        root, bundle = self._root(place.workload), place.scratch / "bundles" / place.workload.name
        ledger.remove_tree(bundle)
        layers = {name: bundle / name for name in ("upper", "work", "root")}
        for layer in layers.values():
            layer.mkdir(parents=True)
        layers["root"].chmod(0o755)
        (bundle / "config.json").write_text(json.dumps(self._config(place)))
        options = f"lowerdir={root.path},upperdir={layers['upper']},workdir={layers['work']}"
        script = 'mount -t overlay overlay -o "$0" "$1" && shift && exec "$@"'
        return bundle, ["unshare", "--mount", "sh", "-c", script, options, str(layers["root"])]

    def _config(self, place: Placement) -> dict[str, Any]:
        """Contents of config.json (OCI runtime specification 1.0.2); runtimes add to these."""
        file = place.scratch / "hostname"
        hostname = file.read_text().strip() if file.exists() else place.workload.name
        defaults = {"PATH": rootfs.PATH, "HOSTNAME": hostname, "HOME": "/root"}
        process = self._process(place.workload, defaults)
        security = program_of(place.workload).security
        # Another user than root has none in effect. runc sees to that by itself, gVisor does not.
        sets = ("bounding",) if process.uid else ("bounding", "effective", "permitted")
        return {
            "ociVersion": "1.0.2",
            "process": {
                "user": {
                    "uid": process.uid,
                    "gid": process.gid,
                    "additionalGids": list(process.groups),
                },
                "args": list(process.command),
                "env": list(process.env),
                "cwd": process.working_dir,
                "capabilities": dict.fromkeys(sets, _capabilities(place.workload.name, security)),
                "noNewPrivileges": not security.escalation,
            },
            "root": {"path": "root", "readonly": security.read_only_root},
            "hostname": hostname,
            "mounts": _mounts(place, self._etc(place)),
        }

    def _etc(self, place: Placement) -> dict[Path, str]:
        """Files of the pod → paths at which the workload sees them."""
        return place.etc

    def _process(self, workload: Workload, defaults: Mapping[str, str] = {}) -> Process:
        workload = replace(workload, program=program_of(workload))
        return process_of(workload, self._root(workload).process, defaults)

    def _root(self, workload: Workload) -> Root:
        image = program_of(workload).image
        if image not in self._roots:
            self._roots[image] = compose.root_of_image(image)
        return self._roots[image]


def program_of(workload: Workload) -> Program:
    """The workload's program, or the traffic agent."""
    port = str(workload.control_port)
    return workload.program or Program(rootfs.AGENT, args=("--control-port", port))


def monitor_of(place: Placement) -> Path:
    """The cgroup of the runtime's own processes, beside `cgroup_of`: with cgroups of version 2 a
    group that has limited groups below has no processes itself.
    """
    group = place.cgroup / "monitor"
    group.mkdir(exist_ok=True)
    return group


def cgroup_of(place: Placement) -> str:
    """Path of the cgroup that a runtime makes for a workload with its limits."""
    return f"/{place.cgroup.relative_to(cgroups.mount_point())}/container"


def limits_of(program: Program) -> dict[str, Any]:
    """Limits of CPUs and memory as config.json has them."""
    limits: dict[str, Any] = {}
    if program.memory_bytes:
        limits["memory"] = {"limit": program.memory_bytes}
    if program.cpus:
        limits["cpu"] = {"quota": int(program.cpus * CPU_PERIOD_US), "period": CPU_PERIOD_US}
    return limits


def namespaces_of(netns: str) -> list[dict[str, str]]:
    """Namespaces of a container in config.json, all but that of PIDs."""
    new = [{"type": kind} for kind in ("mount", "uts", "ipc")]
    return [*new, {"type": "network", "path": f"/run/netns/{netns}"}]


def _capabilities(name: str, security: Security) -> list[str]:
    """Capabilities of a container. Raises `Error` for one that it cannot get."""
    known = {*CAPABILITIES, *ADDABLE}
    add, drop = (
        {f"CAP_{c.removeprefix('CAP_')}" for c in s} for s in (security.add, security.drop)
    )
    if wrong := add - known - {"CAP_ALL"}:
        shown = ", ".join(sorted(c.removeprefix("CAP_") for c in known))
        raise Error(
            f"{name!r} cannot get the capability {min(wrong).removeprefix('CAP_')}",
            hint=f"one of {shown}, or ALL of them",
        )
    # As in Kubernetes: what is added by name is there, even if all are dropped.
    usual = set() if "CAP_ALL" in drop else known if "CAP_ALL" in add else set(CAPABILITIES)
    return sorted((usual | add - {"CAP_ALL"}) - (drop - {"CAP_ALL"}))


def _mounts(place: Placement, etc: Mapping[Path, str]) -> list[dict[str, Any]]:
    safe = ["nosuid", "noexec", "nodev"]
    files = dict(etc)
    if (hostname := place.scratch / "hostname").exists():
        files[hostname] = "/etc/hostname"
    return [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": safe},
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
        },
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        },
        {
            "destination": "/dev/shm",
            "type": "tmpfs",
            "source": "shm",
            "options": [*safe, "mode=1777", "size=65536k"],
        },
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": safe},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*safe, "ro"]},
        *(
            {
                "destination": inside,
                "type": "bind",
                "source": str(file),
                "options": ["bind", "ro" if file == hostname else "rw"],
            }
            for file, inside in files.items()
        ),
        *(
            {
                "destination": mount.path,
                "type": "bind",
                "source": str(place.scratch / VOLUMES / mount.volume),
                "options": ["bind", "ro" if mount.read_only else "rw"],
            }
            for mount in program_of(place.workload).mounts
        ),
    ]
