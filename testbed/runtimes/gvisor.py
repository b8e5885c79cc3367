"""Runtime `gvisor`: a container in a sandbox with a network stack of its own, run by runsc.

gVisor's stack is no Linux, and needs no hardware. It takes over the link and the addresses that the
guest's namespace has when the sandbox starts.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from testbed.host import ledger, process
from testbed.images import compose
from testbed.model.errors import Error
from testbed.model.manifest import Workload
from testbed.model.terms import Runtime
from testbed.runtimes.interface import Absent, Description, Options, Placement
from testbed.runtimes.oci import (
    Bundles,
    cgroup_of,
    limits_of,
    monitor_of,
    namespaces_of,
    program_of,
)
from testbed.runtimes.program import join

# runsc refuses to run in the host's network namespace, which it recognizes by rmem_default in this
# folder. Newer kernels show that file in every namespace.
_HIDE = 'mount -t tmpfs tmpfs /proc/sys/net/core && exec "$@"'


def prepare(options: Options) -> Gvisor:
    """Find runsc. Raises `Absent` without it."""
    if shutil.which("runsc") is None:
        raise Absent("no runsc, to run gVisor", hint="apt-get install runsc")
    version = process.run(["runsc", "--version"], "runsc does not run").split()[2]
    return Gvisor(version, compose.hosts_file(patched=options.hosts_patch))


class Gvisor(Bundles):
    """Prepared runtime of gVisor's sandboxes."""

    kernel_has_sockets = False
    ready_limit_s = 15.0

    def __init__(self, version: str, hosts: Path) -> None:
        super().__init__()
        self._hosts = hosts
        self.description = Description(Runtime.GVISOR, kernel=f"gVisor {version}")

    def compose(self, workload: Workload) -> None:
        if program_of(workload).pids_of:
            raise Error(
                f"{workload.name!r} shares no PIDs: gVisor has a kernel of its own",
                hint="leave out shareProcessNamespace",
            )
        super().compose(workload)

    def start(self, place: Placement) -> subprocess.Popen[bytes]:
        """Start the sandbox, after removing what is left of the one before."""
        if not place.loopback:
            raise Error(
                "gVisor has its loopback in its own kernel", hint="another datapath or guest"
            )
        ledger.remove_tree(_state(place))
        bundle, seeing = self._make_bundle(place)
        run = [*_runsc(place), "--network=sandbox", "run", "--bundle", str(bundle)]
        return process.spawn(
            [*seeing, "sh", "-c", _HIDE, "sh", *run, place.workload.name],
            cgroup=monitor_of(place),
            netns=place.netns,
            cpus=place.workload.cpus,
            output=place.console,
        )

    def runs(self, place: Placement) -> bool:
        for file in _state(place).glob("*.state"):
            with suppress(OSError, ValueError):  # runsc is writing it, or removing it
                return bool(json.loads(file.read_bytes())["status"] == "running")
        return False

    def enter(self, place: Placement, *, terminal: bool = False) -> list[str]:
        # runsc's control socket may be in the guest's network namespace. Without -user, exec runs
        # as root.
        described = self._process(place.workload)
        options = ["-user", f"{described.uid}:{described.gid}"]
        for group in described.groups:
            options += ["-additional-gids", str(group)]
        inside = join(monitor_of(place), place.netns)
        return [*inside, *_runsc(place), "exec", *options, place.workload.name]

    def _etc(self, place: Placement) -> dict[Path, str]:
        return place.etc if place.workload.program else {self._hosts: "/etc/hosts"}

    def _config(self, place: Placement) -> dict[str, Any]:
        return {
            **super()._config(place),
            "linux": {
                "cgroupsPath": cgroup_of(place),
                "namespaces": namespaces_of(place.netns),
                "resources": limits_of(program_of(place.workload)),
            },
        }


def _state(place: Placement) -> Path:
    return place.scratch / "runsc" / place.workload.name


def _runsc(place: Placement) -> list[str]:
    """Command line of runsc, without that of a command.

    It makes cgroups only for limits, as it is in the guest's already. config.json alone decides
    about CAP_NET_RAW.
    """
    cgroups = [] if limits_of(program_of(place.workload)) else ["--ignore-cgroups"]
    return ["runsc", "--root", str(_state(place)), *cgroups, "--net-raw"]
