"""Composes images of guests: a ROFS disk for OSv, an initramfs for Linux.

A definition (`osv/*.toml`) names a program, its arguments and extra files. An image for OSv has the
program and the libraries that it needs, one for Linux the root file system that a container has
(`rootfs`). This module adds the hosts patch (`osv/hosts`), by which the guest's `localhost` is the
pod's; for OSv the shim (`shim`), which does the same for 127.0.0.1 and ::1; and the files that the
system itself needs. Images are deterministic: the same input gives the same bytes, without any
time. The cache has them by their SHA-256. Kernels are not compiled, and guests are started by
`testbed.runtimes`.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import posixpath
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile

from testbed import agent, paths
from testbed.host import cache, compiler
from testbed.images import cpio, elf, kernels, rofs, rootfs, shim
from testbed.images.rofs import Directory, Node, Symlink, Tree
from testbed.images.rootfs import Process, Root
from testbed.model.addresses import Address, alias
from testbed.model.errors import Error
from testbed.model.terms import Family

AGENT = paths.OSV / "agent.toml"
"""Definition of guests that run the traffic agent."""

OSV_PROVIDES = frozenset(
    {
        "libc.so.6",
        "libm.so.6",
        "libpthread.so.0",
        "libdl.so.2",
        "librt.so.1",
        "libresolv.so.2",
        "libcrypt.so.1",
        "libaio.so.1",
        "libstdc++.so.6",
        "libgcc_s.so.1",
        "ld-linux-x86-64.so.2",
    }
)
"""Sonames of libraries that OSv's kernel contains (its `core/elf.cc`; of libgcc_s.so.1 it has only
the symbols). The last is that of x86-64 (`kernels.OSV_MACHINE`)."""

KEPT_S = 7 * 24 * 3600
"""Time for which an image stays in the cache after it was composed last, or as long as a process
that may boot it again holds it (`cache.hold`)."""

MOUNT_POINTS = ("/dev", "/proc", "/sys", "/tmp")
"""Folders of OSv guests over which OSv mounts file systems of its own (`_OSV_FSTAB`)."""

LINUX_MODULES = ("virtio_pci", "virtio_net")

_OSV_FSTAB = b"""\
/dev/vblk0.1 / rofs defaults 0 0
none /dev devfs defaults 0 0
none /proc procfs defaults 0 0
none /sys sysfs defaults 0 0
none /tmp ramfs defaults 0 0
"""

_LINUX_FILES = paths.OSV / "linux"
"""Init of Linux guests, and the sources of `run_as`, which runs the program as its user."""
_LINUX_FLAGS = ("-std=gnu17", "-O2", "-static")


@dataclass(frozen=True)
class Definition:
    """What an OSv image is made of: a program of this host with extra files, or a program in an
    unpacked root file system (`root`).
    """

    program: Path
    arguments: tuple[str, ...] = ()
    files: dict[str, Path] = field(default_factory=dict, hash=False)
    """Path in the guest → file of this machine."""
    shim: bool = True
    """Whether an OSv guest gets the shim, by which 127.0.0.1 and ::1 are the pod's."""
    root: Path | None = None
    """Root file system that has the program, all of which an OSv guest gets."""
    others: tuple[Path, ...] = ()
    """Further programs of this host. An OSv guest does without, as it runs one."""

    @property
    def programs(self) -> tuple[Path, ...]:
        """The program, and the others after it."""
        return (self.program, *self.others)

    @property
    def path(self) -> str:
        """Path of the program's file in an OSv guest."""
        return f"/{self.program.relative_to(self.root) if self.root else self.program.name}"

    @property
    def process(self) -> Process:
        """The process within an OSv guest."""
        return Process((self.path,), self.arguments)


@dataclass(frozen=True)
class Image:
    """A composed image in the cache."""

    path: Path
    sha256: str
    size_bytes: int
    files: tuple[str, ...]
    """Paths in the guest."""
    process: Process
    """The process in the guest."""


def load(path: Path) -> Definition:
    """Read a definition. Raises `Error` if it is invalid, or its program does not exist."""
    from testbed import schema  # not above: to run a plain program, no pydantic is needed
    from testbed.images.schema import DefinitionFile

    title = "image definition"
    given = schema.read(DefinitionFile, schema.toml(path, title), f"{title} {path}")
    program, package = given.program, given.package
    beside = path.parent
    file = beside / program
    if "/" not in program and not file.exists():
        file = rootfs.on_host(program) or file
    if package and not file.exists():
        raise Error(
            f"no {program}, which {path.name} runs",
            hint=f"apt-get install {package}; all that examples/ need: ./bootstrap --examples",
        )
    files = {inside: beside / outside for inside, outside in given.files.items()}
    for folder in given.folders:
        pattern = folder.strip("/")
        found = [each for each in Path("/").glob(pattern) if each.is_dir()] if pattern else []
        if not (found and folder.startswith("/")):
            raise Error(
                f"{title} {path}: there is no folder {folder}",
                hint="patterns begin with /, as /usr/lib/python3.*",
            )
        within = (file for each in found for file in each.rglob("*") if file.is_file())
        files = {**{str(file): file for file in within}, **files}
    return Definition(
        program=agent.build() if program == "agent" else file,
        arguments=tuple(given.arguments),
        files=files,
        shim=given.shim,
        others=tuple(beside / other for other in given.others),
    )


def hosts_file(*, patched: bool = True) -> Path:
    """/etc/hosts of guests: with the patch, or the usual one, in which `localhost` is the guest."""
    return paths.OSV / ("hosts" if patched else "hosts.stock")


def check_alias(addresses: Iterable[Address]) -> None:
    """Raises `Error` if an address of a guest or pod is the alias, which its `localhost` is."""
    for address in addresses:
        if address in (alias(family) for family in Family):
            raise Error(
                f"{address} cannot be an address of a guest or pod: it is `localhost` in guests",
                hint="choose another address",
            )


def definition_file(image: str) -> Path | None:
    """File of the definition that an image of a manifest names: FILE.toml, or a name in osv/.

    None: it names no definition.
    """
    if image.endswith(".toml"):
        return Path(image)
    file = paths.OSV / f"{image}.toml"
    return file if "/" not in image and file in paths.OSV.iterdir() else None


def find_definition(image: str) -> Definition | None:
    """Definition that an image of a manifest names (`definition_file`). None: it names none."""
    file = definition_file(image)
    return load(file) if file else None


def root_of_image(image: str) -> Root:
    """Root file system of an image: of `rootfs`, or the program of a definition and its files."""
    if definition := find_definition(image):
        return rootfs.of_programs(definition.programs, definition.files, definition.arguments)
    return rootfs.unpack(image)


def program_path(folder: Path, process: Process) -> str:
    """Path in the unpacked root file system `folder` of the program that a process runs.

    That path may be a link, by which some programs know what they are to do. Raises `Error` if the
    root file system has no such program.
    """
    command = process.command[0]
    searched = dict(each.split("=", 1) for each in process.env).get("PATH", rootfs.PATH).split(":")
    tried = [posixpath.join(process.working_dir, command)]
    if "/" not in command:
        tried = [posixpath.join("/", each, command) for each in searched]
    for path in tried:
        if rootfs.inside(folder, path).is_file():
            return path
    raise Error(f"the image has no program {command}", hint="give the workload another command")


def find_program(folder: Path, process: Process) -> tuple[Definition, Process]:
    """Find the program that a process runs in the unpacked root file system `folder`.

    Returns what its OSv image is made of, and the process with the program's path in its command,
    as OSv looks for none. Raises `Error` if the root file system has no such program, or it is a
    script.
    """
    path = program_path(folder, process)
    program = rootfs.inside(folder, path)
    if not elf.is_elf(program):
        raise Error(
            f"{path} is a script, and OSv runs none",
            hint="as command, give the container the program that the script starts",
        )
    found = replace(process, entrypoint=(path,), arguments=process.command[1:])
    return Definition(program, root=folder), found


def compose_osv(
    definition: Definition,
    process: Process | None = None,
    *,
    hosts_patch: bool = True,
    etc: Mapping[str, bytes] = {},
) -> Image:
    """Compose a disk for OSv: MBR and ROFS with program, libraries, shim, hosts, mount points.

    `process`: if it is another than that of the definition. `etc` are files that a pod gives to all
    its guests, by path. They override files of the image.

    Raises `Error` if the program cannot run on OSv, a file is missing, or something is where OSv
    mounts over it.
    """
    process = process or definition.process
    _check_not_hidden("working folder", definition.root, process.working_dir)
    _check_not_hidden("program", definition.root, process.command[0])
    ours = {_path_through_links(definition.root, path): data for path, data in etc.items()}
    tree = {**osv_tree(definition, hosts_patch=hosts_patch), **ours}
    if process.working_dir != "/":
        tree.setdefault(_path_through_links(definition.root, process.working_dir), Directory())
    return _store(rofs.pack(tree), "img", tree, process)


def _check_not_hidden(what: str, root: Path | None, path: str) -> None:
    """Raises `Error` for a path below a folder over which OSv mounts, be it by links."""
    found = Path("/", rootfs.inside(root, path).relative_to(root)) if root else Path(path)
    if hidden := [each for each in MOUNT_POINTS if f"{found}".startswith(f"{each}/")]:
        raise Error(
            f"the {what} {path} is not there in OSv, which mounts a file system of its own at "
            f"{hidden[0]}",
            hint="take another folder",
        )


def compose_linux(
    root: Root,
    kernel: kernels.LinuxKernel,
    *,
    hosts_patch: bool = True,
    etc: Mapping[str, bytes] = {},
) -> Image:
    """Compose an initramfs for Linux: a root file system, and what a guest's system needs.

    Its process is that of `root`, which has to have a command. `etc`: see `compose_osv`. Raises
    `Error` if a file is missing.
    """
    tree = {
        _path_through_links(root.path, path): node
        for path, node in {**_linux_tree(root.process, kernel, hosts_patch), **etc}.items()
    }
    files = {f"/{path}" for path in rootfs.files(root.path)}
    data = cpio.pack_folder(root.path)
    data += cpio.pack(tree)
    return _store(data, "cpio", {*files, *tree}, root.process)


def osv_tree(definition: Definition, *, hosts_patch: bool = True) -> Tree:
    """Files of an OSv image. Libraries go to /usr/lib, since OSv searches only / and /usr/lib."""
    program = elf.read_program(definition.program)
    root = definition.root
    if root:
        tree = _folder_tree(root)
    else:
        libraries = _libraries(definition)
        read = (definition.program, *libraries.values(), *definition.files.values())
        rootfs.check_size(path.stat().st_size for path in read if path.is_file())
        tree = {definition.path: _contents(definition.program)}
        for soname, path in libraries.items():
            tree[f"/usr/lib/{soname}"] = _contents(path)
    tree[_path_through_links(root, "/etc/hosts")] = _contents(hosts_file(patched=hosts_patch))
    for inside, outside in definition.files.items():
        if inside in tree:
            raise Error(f"extra file {inside} is in every image already", hint="rename it")
        tree[inside] = _contents(outside)
    if definition.shim and shim.reaches(program):
        tree[definition.path] = shim.bind(program)
        tree[_path_through_links(root, f"/usr/lib/{shim.SONAME}")] = shim.build().read_bytes()
    tree[_path_through_links(root, "/etc/fstab")] = _OSV_FSTAB
    for mount_point in MOUNT_POINTS:
        tree.setdefault(mount_point, Directory())
    return tree


def _path_through_links(folder: Path | None, path: str) -> str:
    """The path without links that `path` leads to in an unpacked root file system.

    Its last part is not followed: it is of a file that replaces what is there. Without a `folder`,
    there are no links.
    """
    if folder is None:
        return path
    parent, name = posixpath.split(path)
    return f"/{(rootfs.inside(folder, parent) / name).relative_to(folder)}"


def _libraries(definition: Definition) -> dict[str, Path]:
    """Name → file of the libraries that an OSv image needs."""
    return rootfs.libraries(definition.program, definition.files.values(), OSV_PROVIDES)


def lacking(definition: Definition, kernel: kernels.OsvKernel) -> list[str]:
    """Symbols that a program or its libraries need, and neither they nor OSv's kernel have.

    A program that calls such a function ends; it may never do so. They are not looked for in a
    root file system, which may have any libraries.
    """
    program = elf.read_program(definition.program)
    if definition.root or program.interpreter is None:
        return []
    needed, given = elf.symbols([definition.program, *_libraries(definition).values()])

    def read(new: Path) -> None:
        _, of_kernel = elf.symbols([kernel.path])
        new.write_text("\n".join(sorted(of_kernel)))

    of_kernel = cache.made(cache.cache_folder() / "symbols" / kernel.sha256, read)
    return sorted(needed - given - set(of_kernel.read_text().split()))


def _folder_tree(folder: Path) -> dict[str, Node]:
    """Files of a root file system, with links in /usr/lib to libraries in its other folders."""
    tree: dict[str, Node] = {}
    names = rootfs.files(folder)
    rootfs.check_size((folder / name).lstat().st_size for name in names)
    for name in names:
        path = folder / name
        if path.is_symlink():
            tree[f"/{name}"] = Symlink(str(path.readlink()))
        elif path.is_file():
            tree[f"/{name}"] = _contents(path)
        elif path.is_dir():
            tree[f"/{name}"] = Directory()
    searched = rootfs.inside(folder, "/usr/lib")
    others = ("/usr/local/lib", *elf.DEFAULT_FOLDERS)
    for other in (rootfs.inside(folder, each) for each in others):
        of_debian = (each for each in sorted(other.glob("*-linux-*")) if not each.is_symlink())
        for library in (path for each in (other, *of_debian) for path in each.glob("*.so*")):
            link = f"/{(searched / library.name).relative_to(folder)}"
            tree.setdefault(link, Symlink(f"/{library.relative_to(folder)}"))
    return tree


def _linux_tree(process: Process, kernel: kernels.LinuxKernel, hosts_patch: bool) -> Tree:
    """Files of a Linux guest beside its root file system: all but /etc in a folder of their own.

    The process is in a script, as the kernel's command line is short and has no quotes.
    """
    modules = _modules(kernel, LINUX_MODULES)
    starter = compiler.build("`run_as` of Linux guests", "run_as", _LINUX_FILES, _LINUX_FLAGS)
    groups = ",".join(map(str, (process.gid, *process.groups)))
    folder = process.working_dir
    command = [
        *("/.guest/busybox", "env", "-i", "--", *process.env),
        *("/.guest/run_as", str(process.uid), groups, folder, *process.command),
    ]
    script = f"""\
#!/.guest/busybox sh
/.guest/busybox mkdir -p -- {shlex.quote(folder)}
exec {shlex.join(command)} "$@"
"""
    return {
        "/etc/hosts": _contents(hosts_file(patched=hosts_patch)),
        "/dev": Directory(),
        "/.guest/init": _contents(_LINUX_FILES / "init"),
        "/.guest/busybox": _contents(rootfs.busybox()),
        "/.guest/run_as": _contents(starter),
        "/.guest/program": script.encode(),
        "/.guest/modules/list": "".join(f"{name}\n" for name in modules).encode(),
        **{f"/.guest/modules/{name}.ko": module for name, module in modules.items()},
    }


def build(definition: Definition, output: Path, *, hosts_patch: bool = True) -> Image:
    """Compose an OSv image, and copy it to `output`."""
    image = compose_osv(definition, hosts_patch=hosts_patch)
    shutil.copyfile(image.path, output)
    return image


def inspect(path: Path) -> dict[str, Any]:
    """Contents of an image as plain data. Raises `Error` if it is damaged, or no image of ours."""
    data = _contents(path)
    is_cpio = data.startswith(cpio.MAGIC)
    tree = cpio.unpack(data) if is_cpio else rofs.unpack(data)
    hosts = tree.get("/etc/hosts", b"")
    return {
        "format": "cpio" if is_cpio else "rofs",
        "sha256": hashlib.sha256(data).hexdigest(),
        "size_bytes": len(data),
        "localhost": localhost(hosts.decode() if isinstance(hosts, bytes) else ""),
        "files": {name: _describe(node) for name, node in sorted(tree.items())},
    }


def localhost(hosts: str) -> list[str]:
    """Addresses of `localhost` in a hosts file, in its order."""
    lines = (line.partition("#")[0].split() for line in hosts.splitlines())
    return [address for address, *names in filter(None, lines) if "localhost" in names]


def _describe(node: Node) -> dict[str, Any]:
    if isinstance(node, Directory):
        return {"type": "directory"}
    if isinstance(node, Symlink):
        return {"type": "symlink", "target": node.target}
    return {"type": "file", "size_bytes": len(node), "sha256": hashlib.sha256(node).hexdigest()}


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise Error(f"cannot read {path}: {e.strerror}") from e


def _modules(kernel: kernels.LinuxKernel, wanted: Iterable[str]) -> dict[str, bytes]:
    """Name → ELF file of kernel modules and their dependencies, in the order of loading.

    The package has no modules.dep, which depmod makes when a kernel is installed. But every module
    names its dependencies in its section `.modinfo`. A module without a file is built into the
    kernel.
    """
    files = {
        path.name.partition(".")[0].replace("-", "_"): path
        for suffix in ("ko", "ko.xz")  # Debian compresses them since 13
        for path in kernel.modules.rglob(f"*.{suffix}")
    }
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in ordered or name not in files:
            return
        module = _contents(files[name])
        if files[name].suffix == ".xz":
            module = lzma.decompress(module)
        section = ELFFile(BytesIO(module)).get_section_by_name(".modinfo")
        info = section.data() if section else b""
        depends = re.search(rb"(?:^|\0)depends=([^\0]*)", info)
        for other in filter(None, (depends[1] if depends else b"").decode().split(",")):
            add(other.replace("-", "_"))
        ordered[name] = module

    for name in wanted:
        add(name)
    return ordered


def _store(data: bytes | bytearray, kind: str, files: Iterable[str], process: Process) -> Image:
    """Store an image in the cache under its SHA-256, atomically, and remove those long unused."""
    sha256 = hashlib.sha256(data).hexdigest()
    path = cache.cache_folder() / "images" / f"{sha256}.{kind}"

    def write(new: Path) -> None:
        new.write_bytes(data)
        new.chmod(0o444)

    damaged = path.exists() and path.stat().st_size != len(data)
    cache.made(path, write, anew=damaged)
    os.utime(path)
    cache.remove_unused(path.parent, KEPT_S)
    return Image(path, sha256, len(data), tuple(sorted(files)), process)
