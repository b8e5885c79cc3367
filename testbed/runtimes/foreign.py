"""Runtime `foreign`: a guest that somebody else boots, on a tap that is or will be in the pod.

No program of the guest is run here. A process that sleeps stands for it: the guest's link starts it
anew when the tap vanishes or appears.
"""

from __future__ import annotations

import subprocess

from testbed.host.process import spawn
from testbed.model.errors import Error
from testbed.model.manifest import Workload
from testbed.model.terms import Family, Runtime
from testbed.runtimes.interface import Description, Options, Placement, Prepared


def prepare(options: Options) -> Foreign:
    """Nothing is needed for it."""
    return Foreign()


class Foreign(Prepared):
    """A guest of somebody else's."""

    families = frozenset(Family)
    uses_tap = True
    kernel_has_sockets = False
    multiqueue = has_shell = False
    ready_limit_s = 60.0
    description = Description(Runtime.FOREIGN)

    def dialed(self, family: Family) -> str:
        return "localhost"

    def compose(self, workload: Workload) -> None:
        if workload.tap is None:
            raise Error(f"{workload.name!r} is booted by somebody else", hint="name its tap")

    def runs(self, place: Placement) -> bool:
        return True

    def start(self, place: Placement) -> subprocess.Popen[bytes]:
        return spawn(["sleep", "infinity"], cgroup=place.cgroup, output=place.console)

    def enter(self, place: Placement, *, terminal: bool = False) -> list[str]:
        raise Error(
            f"somebody else runs {place.workload.name!r}", hint="use the tools of its runtime"
        )
