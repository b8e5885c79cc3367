"""What else the machine does during a trial: CPU time of others, and time that was stolen.

The trial's own are the processes in its pods' cgroups, this process (the worker) and softirqs,
which move the trial's packets. All else is others': programs of other users, and pods that stand
beside those of the trial.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from testbed.host import facts

OTHERS_SHARE = 0.05
"""Share of the CPUs' time used by others above which a trial is disturbed.

On two CPUs, in trials of 0.3 s and 1 s, it was at most 0.03 while nothing else was seen to run:
that is how far ticks of /proc/stat and the scheduler's clock differ. A program at work beside the
trials made it 0.1 to 0.9. When all pods of plan `paper` stood at once, user time in trials of
stand-ins was up to 0.29 CPUs, which is 0.15 of two, above what it was without.
"""
STOLEN_SHARE = 0.02
"""Share of the CPUs' time taken by a hypervisor (steal) above which a trial is disturbed."""


@dataclass(frozen=True)
class Reading:
    """CPU seconds of others since boot, summed over the CPUs that this process may use.

    Only the difference of two readings has a meaning.
    """

    user_s: float
    system_s: float
    """With hard interrupts, without softirqs."""

    @classmethod
    def now(cls, pods: Sequence[Path]) -> Reading:
        """Read the CPU time of all but the cgroups `pods`, this process and softirqs.

        Source: /proc/stat (proc(5)), cpu.stat (cgroup v2), getrusage(2).
        """
        tick, names = os.sysconf("SC_CLK_TCK"), {f"cpu{n}" for n in facts.cpus()}
        lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
        user_s = system_s = 0.0
        for name, *words in lines:
            if name in names:
                user, nice, system, _, _, irq, *_ = (int(word) / tick for word in words)
                user_s, system_s = user_s + user + nice, system_s + system + irq
        worker = resource.getrusage(resource.RUSAGE_SELF)
        user_s, system_s = user_s - worker.ru_utime, system_s - worker.ru_stime
        for pod in pods:
            used = dict(line.split() for line in (pod / "cpu.stat").read_text().splitlines())
            user_s -= int(used["user_usec"]) / 1e6
            system_s -= int(used["system_usec"]) / 1e6
        return cls(user_s, system_s)

    def since(self, before: Reading) -> float:
        """CPU seconds of others since another reading; not below 0.

        User and system time are each taken as 0 if they are below. System time is: a kernel without
        CONFIG_IRQ_TIME_ACCOUNTING counts softirqs also as system time of the process that they
        interrupt, so that they are taken off twice. Then system time of others is found only as far
        as it exceeds the trial's softirqs. User time is not affected.
        """
        user_s, system_s = self.user_s - before.user_s, self.system_s - before.system_s
        return max(0.0, user_s) + max(0.0, system_s)


def disturbance(spent: Mapping[str, float]) -> str | None:
    """What disturbed a trial, or None. `spent` is what the trial stores as `machine`."""
    if (found := share(spent, "steal_s")) > STOLEN_SHARE:
        return f"{found:.1%} of the CPUs' time was stolen"
    if (found := share(spent, "others_s")) > OTHERS_SHARE:
        return f"{found:.1%} of the CPUs' time was used by others"
    return None


def share(spent: Mapping[str, float], use: str) -> float:
    """Share of the CPUs' time in a trial that one use of `spent` took."""
    return spent[use] / spent["elapsed_s"] / len(facts.cpus())
