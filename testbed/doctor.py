"""Doctor: checks what this machine can run, by trying it.

It creates links, loads eBPF programs and boots guests. A thing is `missing` if no campaign can run
without it, and `degraded` if campaigns are limited without it; the finding then says how. Nothing
is installed or downloaded, and nothing is left behind.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from testbed import bpf, datapaths, runtimes
from testbed.host import cache, cgroups, facts, namespaces, netlink
from testbed.host.ledger import Owner
from testbed.images import kernels
from testbed.model.cells import Cell, Pair
from testbed.model.errors import Error
from testbed.model.metrics import Metric
from testbed.model.terms import UNPACED, Family, Runtime, Transport
from testbed.runtimes import osv
from testbed.runtimes.interface import Options
from testbed.runtimes.vm import accelerator, capabilities

KERNEL_FLOOR = (5, 10)
"""First Linux with bpf_redirect_peer (used by `capture`) and with getpeername hooks."""
MEMORY_MIB = 1024
"""Memory for two guests and the processes around them."""
DISK_MIB = 1024
"""Disk space for images, kernels and a campaign."""
ACCELERATOR = "accelerator"
"""Name of the finding about what guests run by."""


class State(StrEnum):
    """Result of one check."""

    FINE = "fine"
    MISSING = "missing"
    DEGRADED = "degraded"


@dataclass(frozen=True)
class Finding:
    """What the doctor found about one thing; `str` gives one line."""

    name: str
    state: State
    detail: str
    """What was found."""
    hint: str = ""
    """If missing: what to type. If degraded: what is limited, and what to type."""

    def __str__(self) -> str:
        text = f"{self.state:<9} {self.name:<13} {self.detail}"
        return f"{text}; {self.hint}" if self.hint else text


def probe() -> Iterator[Finding]:
    """Run all checks; yields each finding at once. The first boots of a kernel take seconds."""
    yield from host()
    yield from guests()
    yield from others()
    yield from room()


def ready(findings: Iterable[Finding]) -> bool:
    """Whether campaigns can run: nothing is missing."""
    return all(finding.state is not State.MISSING for finding in findings)


def next_command(findings: Iterable[Finding]) -> str:
    """What to type first on a machine that is ready: with stand-ins where guests are emulated."""
    emulated = any(f.name == ACCELERATOR and f.state is State.DEGRADED for f in findings)
    return "testbed run --plan quick" + (" --guest standin" if emulated else "")


def preflight() -> None:
    """Raises `Error` if no campaign can run on this machine."""
    for finding in list(host(anew=False)):
        if finding.state is State.MISSING:
            raise Error(f"{finding.name}: {finding.detail}", hint=finding.hint)


# --- what pods need -------------------------------------------------------------------------


def host(*, anew: bool = True) -> Iterator[Finding]:
    """Checks of what every pod needs: kernel, links, eBPF, cgroups, C compiler.

    With `anew`, the probe program is compiled also if it is in the cache, because a cached program
    would hide that the compiler does not work.
    """
    yield _kernel()
    if os.geteuid() != 0:
        yield Finding("root", State.MISSING, "pods need root", "sudo, in front of the command")
        return
    if Family.IPV6 not in facts.families():
        yield Finding(
            "IPv6",
            State.DEGRADED,
            "this kernel has none",
            "IPv6 cells and checks are unsupported; boot without ipv6.disable=1, or another kernel",
        )
    with Owner() as owner:
        netns = f"tb-{owner.id}-doctor"
        with namespaces.create(owner, netns) as ip:
            yield _try("veth", lambda: _link(ip, "veth", peer="peer"))
            yield _try("bridge", lambda: _link(ip, "bridge"))
            yield _try("tap", lambda: _link(ip, "tuntap", mode="tap"))
        yield _try("cgroup2", lambda: _cgroup(owner, netns))
        yield _try("headers", _headers)
        yield _try("eBPF", lambda: _programs(owner, netns, anew))
    yield _try("C compiler", _compiler)
    yield _congestion()


def _kernel() -> Finding:
    release = platform.release()
    major, minor = re.findall(r"\d+", release)[:2]
    if (int(major), int(minor)) >= KERNEL_FLOOR:
        return Finding("kernel", State.FINE, f"Linux {release}")
    floor = ".".join(map(str, KERNEL_FLOOR))
    return Finding("kernel", State.MISSING, f"Linux {release}", f"boot Linux {floor} or later")


def _try(name: str, work: Callable[[], str]) -> Finding:
    """The finding of one check: fine with the text that `work` returns, missing if it raises."""
    try:
        return Finding(name, State.FINE, work())
    except Error as e:
        return Finding(name, State.MISSING, e.message, e.hint or "")
    except (OSError, NetlinkError) as e:
        return Finding(
            name,
            State.MISSING,
            f"the kernel refuses: {e}",
            "load its module, or boot a kernel that has it",
        )


def _link(ip: IPRoute, kind: str, **options: Any) -> str:
    needed_by = {
        "veth": "stand-ins, and pods behind a bridge",
        "bridge": "datapaths bridge and capture",
        "tuntap": "links of OSv and Linux guests",
    }
    netlink.create_link(ip, f"{kind}0", kind=kind, **options)
    return f"for {needed_by[kind]}"


def _cgroup(owner: Owner, name: str) -> str:
    cgroups.create(owner, name)
    return f"at {cgroups.mount_point()}"


def _headers() -> str:
    found = bpf.headers()
    if found.exact:
        return f"of this kernel, {found.release}"
    return f"of {found.release}, not of this kernel: serves for programs of the network"


def _programs(owner: Owner, name: str, anew: bool) -> str:
    """Compile and load a probe, and attach it to `lo` of a namespace and to a cgroup."""
    cgroup = cgroups.create(owner, f"{name}-ebpf")
    if anew:
        bpf.compile("probe")
    with closing(bpf.load("probe", owner)) as loaded:
        bpf.attach_tc(owner, name, 1, bpf.INGRESS, loaded.program("redirect_peer"), "probe", 1)
        bpf.attach_cgroup(owner, cgroup, "getpeername4", loaded.program("getpeername4"))
    links = "clsact, tcx" if bpf.has_tcx() else "clsact"
    return f"compiles, loads, attaches to links ({links}, redirect_peer) and cgroups (getpeername)"


def _compiler() -> str:
    if path := shutil.which("cc") or shutil.which("gcc"):
        return path
    raise Error("none, for the traffic agent", hint="apt-get install gcc libc6-dev")


def _congestion() -> Finding:
    """Finding about TCP congestion control: one that paces limits what a stream can reach."""
    found = facts.congestion_control()
    if found in UNPACED:
        return Finding("TCP", State.FINE, f"congestion control {found}")
    return Finding(
        "TCP",
        State.DEGRADED,
        f"congestion control {found}",
        "if it paces, as bbr does, a stream in a pod reaches about 0.6 of its throughput; "
        "sysctl net.ipv4.tcp_congestion_control=cubic",
    )


# --- what guests need -----------------------------------------------------------------------


def guests() -> Iterator[Finding]:
    """Checks of what guests need: runsc for gVisor; QEMU, kernels and KVM for virtual machines.

    Without the latter, stand-ins replace guests.
    """
    try:
        gvisor = runtimes.prepare(Runtime.GVISOR, Options())
        yield Finding("gVisor", State.FINE, gvisor.description.kernel)
    except Error as e:
        yield Finding("gVisor", State.DEGRADED, e.message, f"no guests of that kind; {e.hint}")
    try:
        yield Finding("QEMU", State.FINE, accelerator.version())
    except Error as e:
        yield Finding("QEMU", State.DEGRADED, e.message, f"stand-ins only; {e.hint}")
        return
    kernel = None
    try:
        linux = kernels.linux_kernel(download=False)
        kernel = linux.path
        yield Finding("Linux kernel", State.FINE, f"{linux.release}, {linux.source}")
    except Error as e:
        yield Finding(
            "Linux kernel",
            State.DEGRADED,
            e.message,
            "downloaded when first needed, else no Linux guests",
        )
    try:
        kernels.check_osv()
        found = kernels.find_osv(download=False)
        kernel = found.path if found else kernel
        yield _osv(found)
    except Error as e:
        yield Finding("OSv kernel", State.DEGRADED, e.message, f"Linux guests only; {e.hint}")
    busybox = shutil.which("busybox")
    yield (
        Finding("busybox", State.FINE, busybox)
        if busybox
        else Finding(
            "busybox", State.DEGRADED, "none", "no Linux guests; apt-get install busybox-static"
        )
    )
    if kernel:
        yield _accelerator(kernel)
    yield _vhost_net()


def _osv(kernel: kernels.OsvKernel | None) -> Finding:
    if kernel is None:
        return Finding(
            "OSv kernel",
            State.DEGRADED,
            "none on this machine",
            "a run tries to download one, else Linux guests serve; give yours with --osv-kernel",
        )
    detail = f"{kernel.version}, {kernel.source}"
    if not kernel.listed:
        detail += " (not listed in osv/kernels.toml: flagged in results)"
    is_root = os.geteuid() == 0
    can = (
        osv.capabilities(kernel, lambda _: None) if is_root else capabilities.cached(kernel.sha256)
    )
    if can is None:
        return Finding("OSv kernel", State.FINE, detail)
    detail += f"; {can}"
    if Family.IPV6 not in can.families:
        return Finding(
            "OSv kernel",
            State.DEGRADED,
            detail,
            "IPv6 cells are unsupported; OSv's branch ipv6 has them",
        )
    return Finding("OSv kernel", State.FINE, detail)


def _accelerator(kernel: Path) -> Finding:
    found = accelerator.accelerator(kernel)
    if found.name == "kvm":
        return Finding(ACCELERATOR, State.FINE, f"KVM: {found.why}")
    return Finding(
        ACCELERATOR,
        State.DEGRADED,
        f"TCG: {found.why}",
        "these guests prove function, not speed; speed needs --guest standin, or a machine whose "
        "KVM boots them",
    )


def _vhost_net() -> Finding:
    if accelerator.vhost_net():
        return Finding("vhost-net", State.FINE, "/dev/vhost-net")
    return Finding(
        "vhost-net",
        State.DEGRADED,
        "no /dev/vhost-net",
        "packets of guests go through QEMU, which is slower; modprobe vhost_net",
    )


# --- what datapaths need in addition --------------------------------------------------------


def others() -> Iterator[Finding]:
    """Checks of each datapath: whether its eBPF programs load, and other programs it needs."""
    whole = []
    for name in datapaths.names():
        if Pair.NATIVE_GUEST not in datapaths.get(name).pairs:
            continue  # a datapath of natives alone needs nothing
        cells = (
            Cell(name, Pair.NATIVE_GUEST, Family.IPV4, transport, Metric.LATENCY, 64)
            for transport in Transport
        )
        lacks = {reason for cell in cells if (reason := datapaths.get(name).unsupported(cell))}
        if refused := _refused(datapaths.get(name).programs):
            yield Finding(name, State.MISSING, refused, "boot a kernel that docs/machines.md lists")
        elif lacks:
            parts = [reason.partition("; ") for reason in sorted(lacks)]
            costs = "its cells are unsupported"
            hint = "; ".join([costs, *filter(None, (remedy for *_, remedy in parts))])
            yield Finding(name, State.DEGRADED, ", ".join(what for what, *_ in parts), hint)
        else:
            whole.append(name)
    yield Finding("datapaths", State.FINE, ", ".join(whole))


def _refused(programs: Iterable[str]) -> str | None:
    """Why one of these sets of programs cannot be loaded, or None. None without root, too."""
    if os.geteuid() != 0:
        return None
    with Owner() as owner:
        try:
            for name in programs:
                bpf.load(name, owner).close()
        except Error as e:
            return e.message
    return None


# --- free memory and disk -------------------------------------------------------------------


def room() -> Iterator[Finding]:
    """Checks of free memory and free disk space."""
    memory = re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())
    assert memory is not None
    yield _enough("memory", int(memory[1]) >> 10, MEMORY_MIB, "guests may not start")
    folder = cache.cache_folder()
    while not folder.exists():
        folder = folder.parent
    yield _enough(
        "disk",
        shutil.disk_usage(folder).free >> 20,
        DISK_MIB,
        f"images and kernels may not fit; make room at {folder}",
    )


def _enough(name: str, free_mib: int, wanted_mib: int, hint: str) -> Finding:
    detail = f"{free_mib} MiB free"
    if free_mib >= wanted_mib:
        return Finding(name, State.FINE, detail)
    return Finding(name, State.DEGRADED, f"{detail}, {wanted_mib} are wanted", hint)
