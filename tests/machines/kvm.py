"""Tests of guests under KVM: on this machine if its KVM boots guests, else on an emulated machine.

QEMU's TCG emulates an AMD CPU with SVM. The Linux in it runs guests by kvm_amd, with vhost-net.
That takes 10 to 15 minutes. The tests are tests/integration/kvm.py, and others in which guests
under KVM may behave differently from emulated ones. Arguments go to pytest (`-k linux`).

Exit status: 1 a step failed; 3 none failed, but some could not be run, such as those of OSv without
an OSv kernel in the cache.
"""

from __future__ import annotations

import io
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast
from xml.etree import ElementTree as ET

from testbed.host import cache, facts
from testbed.images import kernels
from testbed.runtimes.vm import accelerator
from tests.machines import linux, roots, vm
from tests.machines.kernels import warm

KILLED = "test_peers_of_a_guest_that_is_killed_get_an_error_and_the_next_one_works"
TESTS = (
    "tests/integration/kvm.py",
    "tests/integration/test_multiqueue.py",
    f"tests/integration/test_guests.py::{KILLED}[best]",
)
LOGS = roots.REPOSITORY / "build/kvm"

SUITE, KERNEL = "bookworm", "6.12"
CPU = "max,svm=on,npt=on,la57=off,xsave=off,avx=off"
"""CPU of the emulated machine. With AVX, OSv in the QEMU of Debian 12 crashes in its allocator.
Five levels of page tables would be slow, because nested paging walks them twice.
"""
MODULES = ("kvm_amd", "vhost_net", "tun")
MEMORY_MIB = 5120
SLOWNESS = 8
"""Factor by which the emulated machine is slower than this one."""
LIMIT_S = 2400.0
HOLD = """
import fcntl, time
KVM_CREATE_VM = 0xAE01
machine = fcntl.ioctl(open("/dev/kvm"), KVM_CREATE_VM)
time.sleep(1e6)
"""
"""A machine that exists all the time. Linux patches its scheduler when the first is made and when
the last has gone (preempt_notifier_inc), and an emulated CPU may trap on the patch: the kernel
panics of "int3" in __schedule.
"""


@dataclass
class Steps:
    """Steps that were run, with outcome and duration."""

    rows: list[tuple[str, str, float]] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Run a step, which raises if it fails."""
        print(f"kvm: {name}", flush=True)
        began = time.monotonic()
        yield
        self.rows.append((name, "passed", time.monotonic() - began))

    def add_tests(self, report: Path) -> None:
        """Add the tests of pytest's report in JUnit XML."""
        for case in ET.parse(report).iter("testcase"):
            outcome = "passed"
            for child in case:
                if child.tag in ("failure", "error"):
                    outcome = "failed"
                elif child.tag == "skipped":
                    outcome = f"not run: {child.get('message')}"
            self.rows.append((case.get("name", ""), outcome, float(case.get("time", 0))))

    def __str__(self) -> str:
        width = max(len(name) for name, _, _ in self.rows)
        return "\n".join(
            f"{name:<{width}} {s:>5.0f} s  {outcome}" for name, outcome, s in self.rows
        )

    @property
    def exit_status(self) -> int:
        outcomes = {outcome for _, outcome, _ in self.rows}
        return 1 if "failed" in outcomes else 0 if outcomes == {"passed"} else 3


def main(args: Sequence[str]) -> int:
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True)
    steps, report = Steps(), LOGS / "steps.xml"
    with steps.step("try KVM of this machine"):
        here = accelerator.accelerator(kernels.linux_kernel().path)
    print(f"kvm: {here.name}, since {here.why}", flush=True)
    if here.name == "kvm":
        command = [sys.executable, *test_command(report, args)]
        status = subprocess.run(command, cwd=roots.REPOSITORY, check=False).returncode
    else:
        status = in_emulated(args, steps)
    if report.exists():
        steps.add_tests(report)
    print(steps, f"logs: {LOGS}", sep="\n", flush=True)
    return status or steps.exit_status


class Both(io.RawIOBase):
    """Writes the same data to several files, such as a log and standard output."""

    def __init__(self, *files: BinaryIO) -> None:
        self._files = files

    def write(self, data: Any) -> int:
        for file in self._files:
            file.write(data)
            file.flush()
        return len(data)


def test_command(report: Path, args: Sequence[str]) -> list[str]:
    """Arguments of Python that run the tests."""
    return ["-m", "pytest", "-v", f"--junit-xml={report}", *args, *TESTS]


def in_emulated(args: Sequence[str], steps: Steps) -> int:
    """Run the tests in an emulated machine; returns the exit status of pytest."""
    with steps.step(f"root of {SUITE} with this commit"):
        root = warm(SUITE)
    with steps.step(f"kernel {KERNEL}"):
        kernel = linux.kernel(KERNEL)
    out, built = Path("/root/out"), cache.cache_folder() / "kernels"
    osv = {f"/root/.cache/testbed/kernels/{p.name}": p for p in built.glob("osv-*")}
    emulated = vm.Machine(
        kernel,
        root,
        cpu=CPU,
        memory_mib=MEMORY_MIB,
        modules=MODULES,
        shares={str(out): LOGS, **osv},
    )
    slowness = facts.slowness()
    command = shlex.join([".venv/bin/python", *test_command(out / "steps.xml", args)])
    with ExitStack() as stack, (LOGS / "output.log").open("wb") as log:
        with steps.step(f"boot Linux {kernel.release}"):
            guest = stack.enter_context(
                vm.boot(emulated, LOGS / "console.log", limit_s=vm.BOOT_LIMIT_S * slowness)
            )
        return guest.run(
            f"cd /{roots.CLONE} && {{ python3 -c {shlex.quote(HOLD)} & }} && "
            f"TESTBED_SLOWNESS={SLOWNESS * slowness} {command}",
            cast(BinaryIO, Both(log, sys.stdout.buffer)),
            limit_s=LIMIT_S * slowness,
        )
