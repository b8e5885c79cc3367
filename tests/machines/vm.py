"""Boots one of Debian's kernels in a virtual machine, with a folder as its root file system.

    with vm.boot(vm.Machine(kernel, root), console=Path("console.log")) as guest:
        status = guest.run("uname -r", sys.stdout.buffer, limit_s=60)

The guest reads the folder by 9p and writes to memory. So the folder does not change, and several
guests can use it at the same time. The guest has no network but `lo`. Kernel messages go to a file;
commands and their output go through a virtio port of their own. QEMU uses KVM if it works, else it
emulates. The guest ends with the block, and with this process.

virtme-ng is not used: it takes modules only from within the root, makes only single folders
writable, and mounts cgroups in its own way.
"""

from __future__ import annotations

import base64
import contextlib
import io
import lzma
import os
import secrets
import select
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from testbed.host import architecture
from testbed.host.architecture import Architecture
from testbed.images import cpio, rootfs
from testbed.images.kernels import LinuxKernel
from testbed.images.rofs import Node
from testbed.model.errors import Error
from testbed.runtimes.vm import accelerator
from testbed.runtimes.vm.qemu import value

BOOT_LIMIT_S = 600.0
GRACE_S = 60.0
"""Time after a command's own limit until the machine counts as hung."""

MODULES = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay")
"""Modules that the root file system and commands need. Their dependencies are added."""

_EMULATED_X86 = "max,la57=off"
"""All features that QEMU can emulate, but no fifth level of page tables, which is slow to walk."""

_PORT = "commands"

# /init of the initramfs: mounts the root file system.
_INIT = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /lower /upper /root
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/modules/$module"; done </modules/order
share() { # TAG WHERE OPTIONS
    mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,$3" "$1" "$2"
}
share root /lower ro,cache=loose
mount -t tmpfs -o size=90% upper /upper
mkdir /upper/data /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work root /root
cd /root
mkdir -p proc sys dev run tmp "lib/modules/$(uname -r)"
mount -t proc proc proc
mount -t sysfs sys sys
mount -t devtmpfs dev dev
mkdir -p dev/pts dev/shm
mount -t devpts -o ptmxmode=666 devpts dev/pts
mount -t tmpfs shm dev/shm
mount -t tmpfs -o mode=755 run run
mount -t tmpfs -o mode=1777 tmp tmp
mount -t bpf bpf sys/fs/bpf
mount -t tracefs tracefs sys/kernel/tracing
share modules "lib/modules/$(uname -r)" ro,cache=loose
# Device files whose modules are loaded on open, such as /dev/net/tun: kmod-static-nodes(8).
while IFS=': ' read -r module node major minor; do
    mkdir -p "dev/$(dirname "$node")"
    mknod "dev/$node" "${major%%[0-9]*}" "${major#[bc]}" "$minor"
done <"lib/modules/$(uname -r)/modules.devname" 2>/dev/null
while read -r tag where; do mkdir -p "./$where"; share "$tag" "./$where" rw; done </shares
mkdir run/vm
cp /bin/busybox /serve run/vm
[ -e sbin/modprobe ] || ln -s /run/vm/busybox sbin/modprobe
. /settle
ip link set lo up
exec switch_root /root /bin/sh /run/vm/serve
"""

# Commands that mount cgroups in the new root.
_CGROUPS = {
    "unified": "mount -t cgroup2 cgroup2 sys/fs/cgroup\n",
    "hybrid": """\
mount -t tmpfs -o mode=755 cgroup sys/fs/cgroup
mkdir sys/fs/cgroup/unified sys/fs/cgroup/systemd
mount -t cgroup2 cgroup2 sys/fs/cgroup/unified
mount -t cgroup -o none,name=systemd systemd sys/fs/cgroup/systemd
for controller in $(awk '!/^#/ {print $1}' proc/cgroups); do
    mkdir "sys/fs/cgroup/$controller"
    mount -t cgroup -o "$controller" "$controller" "sys/fs/cgroup/$controller" ||
        rmdir "sys/fs/cgroup/$controller" # cgroup2 alone has it
done
""",
    "none": "",
}
_HIDE_BTF = "mount -t tmpfs -o ro none sys/kernel/btf\n"

# PID 1 of the root file system: runs commands that it gets as LIMIT BASE64. After each it writes a
# mark and the exit status; no command's output contains the mark.
_SERVE = """\
export HOME=/root LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
hostname machine
until port=$(grep -lx {port} /sys/class/virtio-ports/*/name); do sleep 0.1; done 2>/dev/null
port=${{port%/name}}
exec 3<>"/dev/${{port##*/}}"
{modprobe}
echo '{mark}0' >&3
while read -r limit command <&3; do
    command=$(echo "$command" | base64 -d)
    (cd && exec timeout -k 10 "$limit" sh -c "$command" </dev/null >&3 2>&1 3>&-)
    echo "{mark}$?" >&3
done
/run/vm/busybox poweroff -f
"""


@dataclass(frozen=True)
class Machine:
    """Configuration of a virtual machine."""

    kernel: LinuxKernel
    """A generic kernel of Debian; the cloud kernels have no 9p."""
    root: Path
    arch: str = ""
    """Debian's name of the architecture; empty: this machine's."""
    cpus: int = 2
    memory_mib: int = 3072
    """Memory, which also holds the files that the guest writes."""
    cpu: str = ""
    """Model and features for QEMU's `-cpu`. Empty: the host's with KVM, else QEMU's best."""
    append: str = ""
    """Additional options of the kernel's command line."""
    modules: tuple[str, ...] = ()
    """Modules that modprobe loads before the first command."""
    cgroups: Literal["unified", "hybrid", "none"] = "unified"
    """`unified`: only cgroup2. `hybrid`: cgroup2 in the folder `unified`, beside controllers of
    version 1. `none`: not mounted."""
    btf: bool = True
    """Whether the kernel's BTF can be read."""
    shares: Mapping[str, Path] = field(default_factory=dict)
    """Path in the guest → folder of this machine, which the guest can write to."""


class Guest:
    """A machine that has booted."""

    def __init__(self, qemu: subprocess.Popen[bytes], mark: bytes, console: Path) -> None:
        self._qemu = qemu
        self._mark = mark
        self._console = console

    def run(self, command: str, output: BinaryIO, *, limit_s: float) -> int:
        """Run a shell command; returns its exit status, 124 if it took longer than `limit_s`.

        Its output, and that of its children, goes to `output` at once. Raises `Error` if the
        machine ends or hangs.
        """
        assert self._qemu.stdin
        encoded = base64.b64encode(command.encode()).decode()
        try:
            self._qemu.stdin.write(f"{limit_s:g} {encoded}\n".encode())
            self._qemu.stdin.flush()
        except BrokenPipeError:
            raise Error(f"the machine ended: {self._last_words()}") from None
        return self._read(output, limit_s + GRACE_S)

    def _read(self, output: BinaryIO, limit_s: float) -> int:
        """Copy output until the next mark; returns the number after the mark."""
        assert self._qemu.stdout
        deadline = time.monotonic() + limit_s
        pending = b""
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._qemu.stdout], [], [], left)[0]:
                raise Error(f"the machine hangs (for {limit_s:g} s): {self._last_words()}")
            part = os.read(self._qemu.stdout.fileno(), 1 << 16)
            if not part:
                raise Error(f"the machine ended: {self._last_words()}")
            pending += part
            before, mark, status = pending.partition(self._mark)
            if mark and not status.endswith(b"\n"):
                continue
            if not mark and (start := before.rfind(self._mark[:1])) >= 0:
                before = before[:start]  # the rest may be the beginning of the mark
            output.write(before)
            output.flush()
            if mark:
                return int(status)
            pending = pending[len(before) :]

    def _last_words(self) -> str:
        """The last message of the kernel, preferably a panic, or of QEMU."""
        lines = self._console.read_text(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        panic = [line for line in said if "Kernel panic" in line]
        return f"{(panic or said or ['it said nothing'])[-1]} (all of it: {self._console})"


@contextlib.contextmanager
def boot(machine: Machine, console: Path, *, limit_s: float = BOOT_LIMIT_S) -> Iterator[Guest]:
    """Boot a machine, which ends with the block. Its kernel's messages go to the file `console`.

    Raises `Error` if it has not booted within `limit_s`.
    """
    mark = f"\x1e{secrets.token_hex(8)} "
    console.parent.mkdir(parents=True, exist_ok=True)
    console.write_bytes(b"")
    # The initramfs is in memory, so that nothing is left of it however this process ends.
    with (
        os.fdopen(os.memfd_create("initramfs"), "wb") as initramfs,
        console.open("ab") as complaints,
    ):
        initramfs.write(cpio.pack(_initramfs(machine, mark)))
        initramfs.flush()
        qemu = subprocess.Popen(
            [
                "setpriv",
                "--pdeathsig",
                "KILL",
                *_command(machine, Path(f"/proc/self/fd/{initramfs.fileno()}"), console),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            bufsize=0,
            pass_fds=(initramfs.fileno(),),
            start_new_session=True,  # Ctrl-C in a terminal then reaches only this process
        )
    with qemu:
        try:
            guest = Guest(qemu, mark.encode(), console)
            guest._read(io.BytesIO(), limit_s)
            yield guest
        finally:
            qemu.kill()


def _command(machine: Machine, initramfs: Path, console: Path) -> list[str]:
    arch = _architecture(machine)
    if shutil.which(arch.qemu) is None:
        raise Error(f"no {arch.qemu}", hint=f"apt-get install {arch.qemu_package}")
    native = arch == architecture.native()
    kvm = native and accelerator.accelerator(machine.kernel.path).name == "kvm"
    emulated = _EMULATED_X86 if arch == architecture.X86_64 else arch.emulated_cpu
    append = f"{arch.linux_options} panic=-1 nokaslr mitigations=off {machine.append}"
    return [
        arch.qemu,
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-machine",
        arch.machine,
        "-accel",
        "kvm" if kvm else "tcg,thread=multi",
        "-cpu",
        machine.cpu or ("host" if kvm else emulated),
        "-smp",
        str(machine.cpus),
        "-m",
        f"{machine.memory_mib}M",
        "-kernel",
        str(machine.kernel.path),
        "-initrd",
        str(initramfs),
        "-append",
        append,
        "-chardev",
        f"file,id=console,append=on,path={value(console)}",
        "-serial",
        "chardev:console",
        "-chardev",
        f"stdio,id={_PORT},signal=off",
        "-device",
        "virtio-serial-pci",
        "-device",
        f"virtserialport,chardev={_PORT},name={_PORT}",
        *_share("root", machine.root, readonly=True),
        *_share("modules", machine.kernel.modules, readonly=True),
        *(
            word
            for n, folder in enumerate(machine.shares.values())
            for word in _share(f"share{n}", folder, readonly=False)
        ),
    ]


def _architecture(machine: Machine) -> Architecture:
    known = {each.debian: each for each in (architecture.X86_64, architecture.AARCH64)}
    return known[machine.arch] if machine.arch else architecture.native()


def _share(tag: str, folder: Path, *, readonly: bool) -> list[str]:
    """QEMU options of a 9p device. Owners of files are those of the host, so it needs root."""
    options = f"mount_tag={tag},security_model=passthrough,multidevs=remap"
    if readonly:
        options += ",readonly=on"
    return ["-virtfs", f"local,path={value(folder.resolve())},{options}"]


def _initramfs(machine: Machine, mark: str) -> dict[str, Node]:
    modules = with_dependencies(machine.kernel.modules, MODULES)
    settle = _CGROUPS[machine.cgroups] + ("" if machine.btf else _HIDE_BTF)
    modprobe = "\n".join(f"modprobe {name}" for name in machine.modules)
    texts = {
        "/init": _INIT,
        "/settle": settle,
        "/serve": _SERVE.format(port=_PORT, mark=mark, modprobe=modprobe),
        "/shares": "".join(f"share{n} {where}\n" for n, where in enumerate(machine.shares)),
        "/modules/order": "".join(f"{name}\n" for name in modules),
    }
    return {
        "/bin/busybox": _busybox(machine),
        **{path: text.encode() for path, text in texts.items()},
        **{f"/modules/{name}": module for name, module in modules.items()},
    }


def _busybox(machine: Machine) -> bytes:
    """A static busybox: that of the root, else this machine's if the architecture is the same."""
    for name in ("bin/busybox", "usr/bin/busybox"):
        if (machine.root / "var/lib/dpkg/info/busybox-static.list").exists() and (
            found := machine.root / name
        ).exists():
            return found.read_bytes()
    if _architecture(machine) == architecture.native():
        return rootfs.busybox().read_bytes()
    raise Error(f"{machine.root} has no static busybox", hint="install busybox-static in it")


def with_dependencies(folder: Path, wanted: tuple[str, ...]) -> dict[str, bytes]:
    """Name → content of modules and of their dependencies, in the order of loading.

    modules.dep lists all dependencies of each module; the last one is loaded first. A module that
    is not in modules.dep is built into the kernel.
    """
    lines = (folder / "modules.dep").read_text().splitlines()
    listed = dict(line.split(":", 1) for line in lines)
    paths = {Path(path).name.partition(".")[0].replace("-", "_"): path for path in listed}
    ordered: dict[str, bytes] = {}
    for path in filter(None, (paths.get(name) for name in wanted)):
        for each in (*reversed(listed[path].split()), path):
            data = (folder / each).read_bytes()
            name = Path(each).name.removesuffix(".xz")
            ordered[name] = lzma.decompress(data) if each.endswith(".xz") else data
    return ordered
