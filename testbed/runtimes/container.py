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

from testbed.host import cgroups, ledger, process
from testbed.host.ledger import Scope
from testbed.images import compose, rootfs
from testbed.images.rootfs import Root
from testbed.model.errors import Error
from testbed.model.manifest import Program, Security, Workload
from testbed.model.terms import Family, Runtime
from testbed.runtimes.interface import VOLUMES, Description, Options, Placement

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
"""Capabilities that a container may get besides. Of the others, the system calls are refused."""

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
CPU_PERIOD_US = 100_000


def prepare(options: Options) -> Container:
    """Find runc. Raises `Error` without it."""
    if shutil.which("runc") is None:
        raise Error("no runc, to run containers", hint="apt-get install runc")
    return Container()


class Container:
    """Prepared runtime of OCI containers."""

    families = frozenset(Family)
    uses_tap = multiqueue = False
    ready_limit_s = 10.0
    description = Description(Runtime.CONTAINER)

    def __init__(self) -> None:
        self._roots: dict[str, Root] = {}

    def dialed(self, family: Family) -> str:
        return "localhost"

    def compose(self, workload: Workload) -> None:
        root, security = self._root(workload), _program(workload).security
        _capabilities(workload.name, security)
        if security.non_root and (root.uid if security.user is None else security.user) == 0:
            raise Error(
                f"{workload.name!r} is to run as another user than root, and its image says root",
                hint="give it a securityContext.runAsUser",
            )

    def start(self, place: Placement) -> subprocess.Popen[bytes]:
        """Start the container, after removing the rest of the one before.

        The overlay is mounted in a mount namespace of runc, and goes with it.
        """
        root, bundle, id = self._root(place.workload), _bundle(place), place.workload.name
        if (_state(place.scratch) / id).exists():
            _runc(place.scratch, "delete", "--force", id)
        ledger.remove_tree(bundle)
        layers = {name: bundle / name for name in ("upper", "work", "root")}
        for layer in layers.values():
            layer.mkdir(parents=True)
        layers["root"].chmod(0o755)
        (bundle / "config.json").write_text(json.dumps(_config(place, root)))
        options = f"lowerdir={root.path},upperdir={layers['upper']},workdir={layers['work']}"
        monitor = place.cgroup / "monitor"
        monitor.mkdir(exist_ok=True)
        script = 'mount -t overlay overlay -o "$0" "$1" && shift && exec "$@"'
        return process.spawn(
            [
                "unshare",
                "--mount",
                "sh",
                "-c",
                script,
                options,
                str(layers["root"]),
                *_command(place.scratch),
                "run",
                "--bundle",
                str(bundle),
                id,
            ],
            cgroup=monitor,
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

    def _root(self, workload: Workload) -> Root:
        image = _program(workload).image
        if image not in self._roots:
            if image.endswith(".toml"):
                made = compose.load(Path(image))
                root = rootfs.of_program(made.program, made.files, made.arguments)
            else:
                root = rootfs.unpack(image)
            self._roots[image] = root
        return self._roots[image]


def _program(workload: Workload) -> Program:
    """The workload's program, or the traffic agent."""
    port = str(workload.control_port)
    return workload.program or Program(rootfs.AGENT, args=("--control-port", port))


def own(owner: Scope, scratch: Path, cgroup: str) -> None:
    """Write the containers of a pod down in the ledger, before the first one starts."""
    owner.defer(remove_containers, scratch=str(scratch), cgroup=cgroup)


def remove_containers(scratch: str, cgroup: str) -> None:
    """Remove a pod's containers, and their cgroups of version 1, if any.

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


def _bundle(place: Placement) -> Path:
    return place.scratch / "bundles" / place.workload.name


def _command(scratch: Path) -> list[str]:
    return ["runc", "--root", str(_state(scratch))]


def _runc(scratch: Path, *arguments: str) -> None:
    subprocess.run([*_command(scratch), *arguments], check=False, capture_output=True)


def _config(place: Placement, root: Root) -> dict[str, Any]:
    """Contents of config.json (OCI runtime specification 1.0.2)."""
    program = _program(place.workload)
    arguments = program.args or (() if program.command else root.arguments)
    command = [*(program.command or root.entrypoint), *arguments]
    if not command:
        raise Error(
            f"the image of {place.workload.name!r} has no command", hint="give the workload one"
        )
    file = place.scratch / "hostname"
    hostname = file.read_text().strip() if file.exists() else place.workload.name
    env = {"PATH": rootfs.PATH, "HOSTNAME": hostname, "HOME": "/root"}
    env |= dict(variable.split("=", 1) for variable in root.env) | dict(program.env)
    group = place.cgroup.relative_to(cgroups.mount_point()) / "container"
    sets, security = ("bounding", "effective", "permitted"), program.security
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": _user(root, security),
            "args": command,
            "env": [f"{name}={value}" for name, value in env.items()],
            "cwd": program.working_dir or root.working_dir,
            "capabilities": dict.fromkeys(sets, _capabilities(place.workload.name, security)),
            "noNewPrivileges": not security.escalation,
        },
        "root": {"path": "root", "readonly": security.read_only_root},
        "hostname": hostname,
        "mounts": _mounts(place),
        "linux": {
            "cgroupsPath": f"/{group}",
            "namespaces": [
                *({"type": kind} for kind in ("mount", "uts", "ipc")),
                _pid_namespace(place.scratch, program.pids_of),
                {"type": "network", "path": f"/run/netns/{place.netns}"},
            ],
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
            "resources": _resources(program.memory_bytes, program.cpus),
            "seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": _refused_calls()},
        },
    }


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
        "args": [{"index": 0, "value": AF_VSOCK, "op": "SCMP_CMP_EQ"}],
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


def _user(root: Root, security: Security) -> dict[str, Any]:
    """User and groups: those of the image, unless the manifest says others."""
    uid, gid, groups = root.uid, root.gid, root.groups
    if security.user is not None:
        uid, gid, groups = security.user, 0, ()
    if security.group is not None:
        gid = security.group
    return {"uid": uid, "gid": gid, "additionalGids": [*groups, *security.groups]}


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


def _mounts(place: Placement) -> list[dict[str, Any]]:
    safe = ["nosuid", "noexec", "nodev"]
    files = dict(place.etc)
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
            for mount in _program(place.workload).mounts
        ),
    ]


def _resources(memory_bytes: int | None, cpus: float | None) -> dict[str, Any]:
    """Limits of CPUs and memory. Devices are denied, except those that every container has."""
    resources: dict[str, Any] = {"devices": [{"allow": False, "access": "rwm"}]}
    if memory_bytes:
        resources["memory"] = {"limit": memory_bytes}
    if cpus:
        resources["cpu"] = {"quota": int(cpus * CPU_PERIOD_US), "period": CPU_PERIOD_US}
    return resources
