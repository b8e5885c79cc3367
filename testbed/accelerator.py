"""What QEMU can do on this host: its version, vhost-net, and which accelerator really works.

/dev/kvm may open, answer its version and create virtual machines, and yet hang every real kernel
(nested and paravirtual KVM that emulates but a part of the instructions; it runs firmware well).
So KVM counts only after the kernel of a guest has booted with it. No runtime itself: the command
lines of guests stand with their runtimes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from testbed import architecture
from testbed.machine import cache_folder
from testbed.model import Error

PROBE_LIMIT_S = 5.0
"""A kernel without a disk comes to its end in under a second with KVM, where KVM works."""


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
        why = boot(kernel, "kvm")
        answer = Accelerator("kvm", f"{kernel.name} booted with it")
        if why:
            answer = Accelerator("tcg", f"KVM is there, but {kernel.name} does not boot: {why}")
        answers = {q: a for q, a in answers.items() if q.startswith(boot_id)}
        answers[question] = asdict(answer)
        memory.parent.mkdir(parents=True, exist_ok=True)
        new = memory.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(answers, indent=1))
        new.replace(memory)
    return Accelerator(**answers[question])


def boot(kernel: Path, accelerator: str, limit_s: float = PROBE_LIMIT_S) -> str | None:
    """Boot an OSv or Linux kernel that is given nothing to run: None if it works, or why not.

    OSv powers off, Linux panics for want of a root file system and is not restarted.
    """
    here = architecture.native()
    command = [
        here.qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-accel", accelerator, "-machine", here.machine, "-cpu", "max", "-m", "256",
        "-serial", "stdio", "-kernel", str(kernel),
        "-append", f"--nomount console={here.console} panic=-1",  # OSv wants its option first
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not through after {limit_s:g} s"
    if b"Powering off" in done.stdout or b"not syncing: VFS" in done.stdout:
        return None
    last = (done.stdout + done.stderr).decode(errors="replace").strip().splitlines()[-1:]
    return f"QEMU ended with status {done.returncode}: {''.join(last)}"
