"""What QEMU can do on this host: its version, vhost-net, and which accelerator really works.

/dev/kvm may open, answer its version and create virtual machines, and yet hang every real kernel
(nested and paravirtual KVM that emulates but a part of the instructions; it runs firmware well), or
be slower than QEMU's own emulation. So KVM counts only after the kernel of a guest has booted with
it, and not later than without it. How long a boot takes differs by machine (0.3 s on real KVM, 10 s
where the CPU that runs KVM is itself emulated), so a guest that is not through soon races with the
same guest under TCG. No runtime itself: the command lines of guests stand with their runtimes.
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
"""A kernel without a disk comes to its end in under a second with KVM, where KVM works."""
PROBE_LIMIT_S = 60.0
"""For both. Both times are multiplied by `machine.slowness`, as those of all boots."""


@dataclass(frozen=True)
class Accelerator:
    """How guests are executed."""

    name: str
    """`kvm`, or `tcg` (emulated: proves function, not speed)."""
    why: str
    """In words: what booted, or why KVM cannot be used."""


def version() -> str:
    """QEMU's version, `7.2.22`. Raises `Error` if there is none."""
    here = architecture.native()
    qemu = here.qemu
    if shutil.which(qemu) is None:
        install = f"apt-get install --no-install-recommends {here.qemu_package}"
        raise Error(f"no {qemu}", hint=install)
    out = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout
    return out.split("version ", 1)[1].split()[0]


def vhost_net() -> bool:
    """Whether the kernel itself can move packets between a tap and a guest under KVM."""
    return os.access("/dev/vhost-net", os.R_OK | os.W_OK)


def accelerator(kernel: Path) -> Accelerator:
    """KVM if this kernel (OSv's or Linux's) boots with it, else TCG.

    Tried once per kernel, boot of the host and version of QEMU, then remembered in the cache.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        absent = "cannot be opened" if Path("/dev/kvm").exists() else "is missing"
        return Accelerator("tcg", f"/dev/kvm {absent}")
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    stat = kernel.stat()
    question = f"{boot_id} {version()} {kernel.absolute()} {stat.st_size} {stat.st_mtime_ns}"
    memory = cache_folder() / "accelerator.json"
    try:
        answers: dict[str, dict[str, str]] = json.loads(memory.read_text())
    except (OSError, ValueError):
        answers = {}
    if question not in answers:
        why = boot(probe(kernel, "kvm"), rival=probe(kernel, "tcg"))
        answer = Accelerator("kvm", f"{kernel.name} booted with it")
        if why:
            answer = Accelerator("tcg", f"KVM is there, but {kernel.name} does not boot: {why}")
        answers = {q: a for q, a in answers.items() if q.startswith(boot_id)}
        answers[question] = asdict(answer)
        made(memory, lambda new: new.write_text(json.dumps(answers, indent=1)), anew=True)
    return Accelerator(**answers[question])


def probe(kernel: Path, accelerator: str) -> list[str]:
    """QEMU's argv for an OSv or Linux kernel that is given nothing to run.

    OSv powers off, Linux panics for want of a root file system and is not restarted.
    """
    here = architecture.native()
    return [
        here.qemu,
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-accel",
        accelerator,
        "-machine",
        here.machine,
        "-cpu",
        "max",
        "-m",
        "256",
        "-serial",
        "stdio",
        "-kernel",
        str(kernel),  # OSv wants its own option first
        "-append",
        f"--nomount console={here.console} quiet panic=-1",
    ]


def boot(command: Sequence[str], rival: Sequence[str] = ()) -> str | None:
    """Boot what `probe` says: None if it comes to its end, or why not.

    The rival is started when the guest has not ended after `HEAD_START_S`. If it comes to its end
    first, the guest has failed.
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
    """One that boots, and what it and QEMU print."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]

    def fault(self) -> str | None:
        """Of a guest that has ended: None if it came to its end."""
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
