"""Chooses QEMU's accelerator on this host (KVM or TCG) by booting a guest's kernel with it.

/dev/kvm may open, report its version and create virtual machines, and still be of no use. It may
hang every real kernel: nested and paravirtual KVM may emulate only a part of the instructions, and
run firmware without a fault. Or it may be slower than QEMU's own emulation. So KVM is used only if
the guest's kernel has booted with it, and not later than with TCG. The time of a boot depends on
the machine (0.3 s on real KVM, 10 s if the CPU that runs KVM is itself emulated). So after a head
start the same guest is booted with TCG, too, and the first one to end wins.

The version of QEMU and vhost-net are looked up here, too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from testbed.host import architecture
from testbed.host.cache import cache_folder, made
from testbed.host.facts import slowness
from testbed.model.errors import Error

HEAD_START_S = 5.0
"""Time before TCG starts, too. With working KVM, a kernel without a disk ends in under a second."""
PROBE_LIMIT_S = 60.0
"""Time limit of the boot. Both times are multiplied by `facts.slowness`, as those of all boots."""


@dataclass(frozen=True)
class Accelerator:
    """QEMU's accelerator for guests, and the reason for its choice."""

    name: str
    """kvm, or tcg (emulated: proves function, not speed)."""
    why: str
    """Text: what booted, or why KVM cannot be used."""


def version() -> str:
    """QEMU's version, such as 7.2.22. Raises `Error` if QEMU is not installed."""
    native = architecture.native()
    qemu = native.qemu
    if shutil.which(qemu) is None:
        install = f"apt-get install --no-install-recommends {native.qemu_package}"
        raise Error(f"no {qemu}", hint=install)
    out = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout
    return out.split("version ", 1)[1].split()[0]


def vhost_net() -> bool:
    """Whether the kernel can move packets between a tap and a guest under KVM (vhost-net)."""
    return os.access("/dev/vhost-net", os.R_OK | os.W_OK)


def accelerator(kernel: Path) -> Accelerator:
    """Choose KVM if this kernel (OSv's or Linux's) boots with it, else TCG.

    The result is cached per kernel, boot of the host, and version of QEMU.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        absent = "cannot be opened" if Path("/dev/kvm").exists() else "is missing"
        return Accelerator("tcg", f"/dev/kvm {absent}")
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    stat = kernel.stat()
    question = f"{boot_id} {version()} {kernel.absolute()} {stat.st_size} {stat.st_mtime_ns}"
    cached = cache_folder() / "accelerator.json"
    try:
        answers: dict[str, dict[str, str]] = json.loads(cached.read_text())
    except (OSError, ValueError):
        answers = {}
    if question not in answers:
        why = boot(probe(kernel, "kvm"), rival=probe(kernel, "tcg"))
        answer = Accelerator("kvm", f"{kernel.name} booted with it")
        if why:
            answer = Accelerator("tcg", f"KVM is there, but {kernel.name} does not boot: {why}")
        answers = {q: a for q, a in answers.items() if q.startswith(boot_id)}
        answers[question] = asdict(answer)
        made(cached, lambda new: new.write_text(json.dumps(answers, indent=1)), anew=True)
    return Accelerator(**answers[question])


def probe(kernel: Path, accelerator: str) -> list[str]:
    """QEMU's command line (argv) for an OSv or Linux kernel without a program to run.

    OSv powers off. Linux panics without a root file system, and is not restarted.
    """
    native = architecture.native()
    return [
        native.qemu,
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-accel",
        accelerator,
        "-machine",
        native.machine,
        "-cpu",
        "max",
        "-m",
        "256",
        "-serial",
        "stdio",
        "-kernel",
        str(kernel),
        "-append",
        f"--nomount {native.linux_options} quiet panic=-1",  # OSv wants its own option first
    ]


def boot(command: Sequence[str], rival: Sequence[str] = ()) -> str | None:
    """Boot a guest with a command of `probe`. Returns None if it comes to its end, or why not.

    The command `rival` is started if the guest has not ended after `HEAD_START_S`. If the rival
    comes to its end first, the guest has failed.
    """
    factor, began, passed_s = slowness(), time.monotonic(), 0.0
    with ExitStack() as stack:
        guest = stack.enter_context(_started(command))
        other = None
        while passed_s < PROBE_LIMIT_S * factor:
            if guest.process.poll() is not None:
                return guest.fault()
            if other and other.process.poll() is not None and other.fault() is None:
                return f"not through after {passed_s:.1f} s, when emulation was"
            if rival and not other and passed_s >= HEAD_START_S * factor:
                other = stack.enter_context(_started(rival))
            time.sleep(0.01)
            passed_s = time.monotonic() - began
    return f"not through after {passed_s:.0f} s"


@dataclass(frozen=True)
class _Guest:
    """A booting guest, and the output of it and QEMU."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]

    def fault(self) -> str | None:
        """Why the ended guest did not boot, or None if it did."""
        self.output.seek(0)
        text = self.output.read()
        if b"Powering off" in text or b"not syncing: VFS" in text:
            return None
        last = text.decode(errors="replace").strip().splitlines()[-1:]
        return f"QEMU ended with status {self.process.returncode}: {''.join(last)}"


@contextmanager
def _started(command: Sequence[str]) -> Iterator[_Guest]:
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            yield _Guest(process, output)
        finally:
            process.kill()
            process.wait()
