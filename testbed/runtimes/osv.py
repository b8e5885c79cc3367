"""Runtime `osv`: an OSv unikernel on QEMU, booted from a composed image."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from testbed import bpf
from testbed.images import compose, elf, kernels, rootfs, shim
from testbed.images.compose import Definition, Image
from testbed.images.kernels import OsvKernel
from testbed.images.rootfs import Process
from testbed.model.addresses import CONTROL_PORT
from testbed.model.errors import Error
from testbed.model.manifest import Workload, without_late
from testbed.model.terms import Family, Runtime
from testbed.runtimes.interface import Absent, Options, Placement, process_of, refuse_isolation
from testbed.runtimes.vm import accelerator, qemu
from testbed.runtimes.vm.capabilities import ALL, Capabilities, cached, probe
from testbed.runtimes.vm.guest import KILLED, VirtualMachines
from testbed.runtimes.vm.qemu import Vm

ABORTED = 128 + signal.SIGABRT
CRASHES = {"failed looking up symbol": 127, "mmu::vm_fault": 128 + signal.SIGSEGV}
"""What the console says before the machine ends → exit status as a shell has it; else `ABORTED`."""
NOT_LOADED = "\nFailed to load object: "
"""What it says instead, if it cannot start a program."""

MAX_PROGRAM_BYTES = 3000
"""Longest part of OSv's command line that is variables, working folder and command. The rest has
200 bytes at most. Kernels of both flavors take lines of up to 3637 bytes. If a longer one has
variables, its end is overwritten: the program lacks arguments, or none is started. Lines above 4096
bytes end the kernel or hang it: it copies the line before its allocator is ready, and then memory
comes in pieces of at most a page (`early_alloc_object` in OSv's core/mempool.cc)."""

NOT_OF_PROGRAM = re.compile(
    r"OSv v\d|eth\d+: |Booted up in |Cmdline: |\[backtrace\]|0x[0-9a-f]{16} <"
)
"""Beginning of a line of the console that OSv writes while it boots, or of a crash's backtrace."""

NO_CHECKSUM_OFFLOAD = ("guest_csum", "guest_tso4", "guest_tso6", "guest_ecn", "guest_ufo")
"""Features of virtio-net by which the host may leave a checksum to the device."""

GO_CRASHES = "Go programs that need libc, or are PIE, crash in OSv: build it with CGO_ENABLED=0"

SHOWN = 5
"""Symbols that a warning names."""


def prepare(options: Options) -> Osv:
    """Find or download the kernel, and compose the image.

    Raises `Absent` if there is no kernel, or this machine cannot run one.
    """
    try:
        kernels.check_osv()
    except Error as e:
        raise Absent(e.message, e.hint) from e

    def progress(done_bytes: int, all_bytes: int | None) -> None:
        share = f" of {all_bytes / 2**20:.1f}" if all_bytes else ""
        options.say(f"downloading an OSv kernel: {done_bytes / 2**20:.1f}{share} MiB")

    kernel = kernels.find_osv(options.osv_kernel, progress=progress, say=options.say)
    if kernel is None:
        raise Absent("no OSv kernel, and none can be downloaded", hint="give one by --osv-kernel")
    return Osv(kernel, capabilities(kernel, options.say), options)


def capabilities(kernel: OsvKernel, say: Callable[[str], None]) -> Capabilities:
    """What a kernel can do: from the cache, or by booting it once.

    Raises `Error` if it does not boot.
    """
    if found := cached(kernel.sha256):
        return found
    say(f"probing what OSv kernel {kernel.version} can do, once: some seconds")
    agent = compose.load(compose.AGENT)
    image = compose.compose_osv(agent)

    def boot(machine: Vm) -> list[str]:
        arguments = ("--control-port", str(CONTROL_PORT))
        return command(machine, kernel.path, ALL, image, arguments)

    try:
        return probe(kernel.sha256, boot, accelerator.accelerator(kernel.path).name)
    except Error as e:
        raise Error(
            f"OSv kernel {kernel.path} cannot be used: {e.message}",
            hint="give another one by --osv-kernel",
        ) from e


class Osv(VirtualMachines):
    """An OSv kernel and its images."""

    has_shell = False
    ready_limit_s = 15.0
    """A boot takes 0.3 s on an idle machine, and a second more for IPv6's duplicate address
    detection."""

    def __init__(self, kernel: OsvKernel, can: Capabilities, options: Options) -> None:
        self.kernel, self.can = kernel, can
        self.families, self.multiqueue, self.smp = can.families, can.multiqueue, can.smp
        self.needs_ipv6_checksums = needs_ipv6_checksums(can)
        flavor = "ipv6" if Family.IPV6 in can.families else "master"
        super().__init__(
            Runtime.OSV,
            kernel,
            options,
            version=f"{flavor} {kernel.version}" + ("" if kernel.listed else ", unlisted"),
            offloads=offloads(can),
            capabilities=can.plain(),
        )

    def dialed(self, family: Family) -> str:
        """OSv's resolver has one address per name, whatever the family. IPv6 has another name."""
        return "localhost" if family is Family.IPV4 else "ip6-localhost"

    def enter(self, place: Placement, *, terminal: bool = False) -> list[str]:
        raise Error(f"{place.workload.name!r} is a unikernel: it runs nothing but its program")

    def _compose(self, workload: Workload, *, hosts_patch: bool, etc: Mapping[str, bytes]) -> Image:
        refuse_isolation(workload)
        if workload.program is None:
            wanted = replace(compose.load(compose.AGENT), shim=self._options.shim)
            process = wanted.process
        elif defined := _definition(workload):
            wanted = defined
            process = process_of(workload, wanted.process)
        else:
            root = rootfs.unpack(workload.program.image)
            described = process_of(workload, root.process)
            with rootfs.reading(workload.program.image):
                wanted, process = compose.find_program(root.path, described)
        _check(process)
        if workload.program:
            self._warn(workload.name, wanted)
        with rootfs.reading(workload.program.image if workload.program else rootfs.AGENT):
            return compose.compose_osv(wanted, process, hosts_patch=hosts_patch, etc=etc)

    def _warn(self, name: str, wanted: Definition) -> None:
        """Tell what a program will lack in OSv."""
        program = elf.read(wanted.program)
        if program.is_go and program.interpreter:
            self._options.say(f"{name}: {GO_CRASHES}")
        elif wanted.shim and not shim.reaches(program):
            self._options.say(f"{name}: {shim.UNREACHED}")
        if lacking := compose.lacking(wanted, self.kernel):
            self._options.say(f"{name}: {lacks(wanted.program.name, lacking)}")

    def _command(self, vm: Vm, image: Image, arguments: Sequence[str]) -> list[str]:
        return command(vm, self.kernel.path, self.can, image, arguments)

    def is_of_program(self, line: str) -> bool:
        return super().is_of_program(line) and not NOT_OF_PROGRAM.match(line)

    def _untold_status(self, image: Image | None, first: str, last: str) -> int:
        """The shim tells the status; without it, a program that starts and does not crash ends
        with 0.
        """
        if "\n[backtrace]" in last:
            return next((status for said, status in CRASHES.items() if said in last), ABORTED)
        if image is None or _has_shim(image) or NOT_LOADED in last:
            return KILLED
        started = f"\nCmdline: {_quoted(image.process.command[0])}"
        return 0 if started in first else KILLED


def _definition(workload: Workload) -> Definition | None:
    """What the image is made of if the manifest names a program of this host.

    That is `host:PROGRAM`, or a definition. None: it names a root file system.
    """
    program = workload.program
    assert program is not None
    if program.image.startswith(rootfs.HOST):
        found = rootfs.programs(program.image)
        if len(found) != 1:
            raise Error(f"guest {workload.name!r} has {len(found)} programs", hint="give it one")
        return Definition(program=found[0])
    return compose.find_definition(program.image)


def lacks(program: str, functions: Sequence[str]) -> str:
    """What to tell of functions that OSv lacks. Most programs never call them."""
    shown = ", ".join(functions[:SHOWN]) + (", …" if len(functions) > SHOWN else "")
    count, which = (
        ("a function", "it") if len(functions) == 1 else (f"{len(functions)} functions", "one")
    )
    return (
        f"OSv lacks {count} that {program} or its libraries name ({shown}); it ends with 127 if it "
        f"calls {which}"
    )


def _has_shim(image: Image) -> bool:
    return any(file.endswith(f"/{shim.SONAME}") for file in image.files)


def command(
    machine: Vm,
    kernel: Path,
    can: Capabilities,
    image: Image,
    arguments: Sequence[str] = (),
) -> list[str]:
    """QEMU's command line (argv). Addresses of families that the kernel lacks are left out.

    `arguments` follow those of the image.
    """
    disk = qemu.value(image.path)
    extra = [
        "-drive",
        f"if=none,id=disk,format=raw,readonly=on,file={disk}",
        "-device",
        "virtio-blk-pci,drive=disk",
    ]
    process = replace(image.process, arguments=(*image.process.arguments, *arguments))
    line = boot_line(machine, can.families, process)
    return qemu.command(machine, kernel, line, nic=nic(can), extra=extra)


def needs_ipv6_checksums(can: Capabilities) -> bool:
    """Whether the host has to complete checksums for a kernel, and can (`testbed.pods.checksums`).

    It can in IPv6 alone, and from Linux 6.6 on: the program has to be the first at the tap.
    """
    return can.families - can.partial_checksums == {Family.IPV6} and bpf.has_tcx()


def nic(can: Capabilities) -> tuple[str, ...]:
    """Properties that QEMU's network device must have for a kernel that can do so much."""
    if can.families <= can.partial_checksums or needs_ipv6_checksums(can):
        return ()
    return tuple(f"{feature}=off" for feature in NO_CHECKSUM_OFFLOAD)


def offloads(can: Capabilities) -> str:
    """What differs from QEMU's default, for the description of the runtime."""
    return "ipv6 checksums by host" if needs_ipv6_checksums(can) else ",".join(nic(can))


def boot_line(machine: Vm, families: frozenset[Family], process: Process) -> str:
    """OSv's kernel command line: its own options, then the program and arguments in quotes.

    OSv's options have no quotes, but spaces in them can be escaped. It wants the mask of an IPv4
    address dotted, of an IPv6 address as a prefix length. Raises `Error` as `_check` does.
    """
    _check(process)
    options = ["--rootfs=rofs", "--power-off-on-abort"]
    for address in machine.addresses:
        if Family(f"ipv{address.version}") in families:
            mask = address.netmask if address.version == 4 else address.network.prefixlen
            options.append(f"--ip=eth0,{address.ip},{mask}")
    gateways = (g for g in machine.gateways if Family(f"ipv{g.version}") in families)
    options += (f"--defaultgw={gateway}" for gateway in gateways)
    return " ".join((*options, program_line(process)))


def program_line(process: Process) -> str:
    """The end of OSv's kernel command line: variables, working folder, program and arguments."""
    options = [_escaped(f"--env={variable}") for variable in process.env]
    if process.working_dir != "/":
        options.append(_escaped(f"--cwd={process.working_dir}"))
    return " ".join((*options, *map(_quoted, process.command)))


def _escaped(option: str) -> str:
    return option.replace("\\", "\\\\").replace(" ", "\\ ")


def _quoted(word: str) -> str:
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _check(process: Process) -> None:
    """Raises `Error` for what OSv's kernel command line cannot hold.

    OSv reads a variable after `$`, even in quotes. Its parser of words is for ASCII, that of its
    own options is not (measured with kernels of both branches).
    """
    words = [("printable ASCII", word, word.isascii()) for word in process.command]
    options = [("printable text", text, True) for text in (*process.env, process.working_dir)]
    for kind, text, is_kind in (*words, *options):
        text = without_late(text)
        if "$" in text or not (is_kind and text.isprintable()):
            raise Error(
                f"OSv takes only {kind}, without '$': {text!r}",
                hint="let the program read it from a file of the image",
            )
    if (size := len(os.fsencode(without_late(program_line(process))))) > MAX_PROGRAM_BYTES:
        raise Error(
            f"command and variables of {process.command[0]} have {size} bytes, more than the "
            f"{MAX_PROGRAM_BYTES} that OSv takes",
            hint="let the program read them from a file of the image",
        )
