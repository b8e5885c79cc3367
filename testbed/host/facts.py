"""Facts about this machine: kernel, CPUs, versions, CPU time, memory, load.

All are read from /proc, /sys and the programs themselves; nothing is changed. Only the factor for
slow machines is set by the user (`slowness`).
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

from testbed.host import architecture
from testbed.model.errors import Error
from testbed.model.terms import Family


def slowness() -> float:
    """Factor of all time limits (boots, answers, tests): the variable `TESTBED_SLOWNESS`, or 1.

    It is for machines that are much slower than usual, such as emulated ones. Raises `Error` if it
    is no number above 0.
    """
    text = os.environ.get("TESTBED_SLOWNESS") or "1"
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < math.inf:
        raise Error(
            f"TESTBED_SLOWNESS is {text!r}, which is not a number above 0",
            hint="export TESTBED_SLOWNESS=8: every limit is 8 times as long",
        )
    return factor


def families() -> frozenset[Family]:
    """IP versions of this kernel. IPv6 can be compiled out, or disabled by `ipv6.disable=1`."""
    has_ipv6 = Path("/proc/sys/net/ipv6").exists()
    return frozenset(Family) if has_ipv6 else frozenset({Family.IPV4})


def facts() -> dict[str, str]:
    """Facts that every result states: kernel, CPU, frequency governor, host name, TCP congestion
    control.
    """
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "kernel": platform.release(),
        "cpu": f"{os.cpu_count()}x {cpu_model()}",
        "governor": governor.read_text().strip() if governor.exists() else "unknown",
        "host": platform.node(),
        "congestion_control": congestion_control(),
    }


def cpu_model() -> str:
    """Model of the first CPU, or the machine's architecture where the kernel names no model."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def congestion_control() -> str:
    """Default algorithm of TCP's congestion control. A new network namespace inherits it."""
    return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()


def versions() -> dict[str, str]:
    """Versions of the software that takes part in a measurement, by name."""
    from importlib import metadata  # not above: it takes longer than all else that is here

    found = {"python": platform.python_version()}
    for name in ("testbed", "pyroute2", "pandas", "scipy", "matplotlib", "wasmtime"):
        found[name] = metadata.version(name)
    for name, command in (
        ("qemu", [architecture.native().qemu, "--version"]),
        ("cc", ["cc", "--version"]),
    ):
        try:
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            continue
        found[name] = out.splitlines()[0].strip()
    return found | _packages("nftables", "haproxy", "nginx-light", "passt")


def _packages(*names: str) -> dict[str, str]:
    """Versions of the Debian packages that are installed, by name.

    The packages are asked, since passt does not print its own version.
    """
    command = ["dpkg-query", "--show", "--showformat", "${Package} ${Version}\n", *names]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return {}
    words = (line.split() for line in out.splitlines())
    return {word[0]: word[1] for word in words if len(word) == 2}


def cpus() -> list[int]:
    """Numbers of the CPUs that this process may use."""
    return sorted(os.sched_getaffinity(0))


def busy(guests: Sequence[Path] = ()) -> dict[str, float]:
    """CPU seconds since boot, summed over all CPUs, by use.

    `cpu_s`: total, of the following four. `softirq_s`. `system_s`: with hard interrupts. `guest_s`:
    user time of the cgroups `guests`, which hold virtual machines. Their virtual CPUs are threads
    in user space; the kernel counts what a guest runs under KVM as their user time, too. `user_s`:
    the rest of user time.

    `steal_s`, which is not in `cpu_s`: time that a hypervisor below this machine took.

    Source: /proc/stat (proc(5)) and cpu.stat (cgroup v2).
    """
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, irq, softirq, steal, *_ = (
        int(word) / tick for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    )
    guest = 0.0
    for group in guests:
        lines = (line.split() for line in (group / "cpu.stat").read_text().splitlines())
        guest += {key: int(value) for key, value in lines}["user_usec"] / 1e6
    return {
        "cpu_s": user + nice + system + irq + softirq,
        "softirq_s": softirq,
        "system_s": system + irq,
        "user_s": user + nice - guest,
        "guest_s": guest,
        "steal_s": steal,
    }


def kernel_bytes() -> int:
    """Memory that the kernel uses for itself: unreclaimable slab, page tables, per-CPU, vmalloc.

    Source: /proc/meminfo (proc(5)). `VmallocUsed` includes kernel stacks and eBPF maps.
    """
    names = ("SUnreclaim", "PageTables", "Percpu", "VmallocUsed")
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    found = {words[0].rstrip(":"): int(words[1]) for words in lines}
    return sum(found[name] for name in names) * 1024


def frequency_mhz() -> float | None:
    """Mean current frequency of the CPUs (cpufreq), or None if the kernel does not report it."""
    files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
    found = [int(file.read_text()) / 1e3 for file in files]
    return sum(found) / len(found) if found else None


def load1() -> float:
    """Load average over the last minute."""
    return os.getloadavg()[0]
