"""Root file systems of containers, from a folder, a tar, an OCI image, or programs of this host.

    /some/root                a folder
    /some/root.tar[.gz…]      a tar of one
    oci:FOLDER[:TAG]          an OCI image layout, read by skopeo and unpacked by umoci
    oci-archive:FILE[:TAG]    a tar of one
    docker-archive:FILE[:NAME]  what `docker save` writes
    host:PROGRAM[,PROGRAM…]   static busybox, and programs of this host with their libraries. The
                              first is run. Without a first (host: and host:,bash) it is a shell,
                              or what args say
    agent                     the same with the traffic agent

Root file systems that are unpacked or put together are cached under the digest of their source.
Nobody writes there: each container has an overlay of its own above it.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from testbed import agent
from testbed.host import cache, process
from testbed.images import elf
from testbed.model.errors import Error

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MAX_LINKS = 40
"""Symbolic links that a path leads through, at most, as in Linux."""
MAX_BYTES = 2 << 30
"""Size of all files of a guest's image, at most."""
SHOWN = 200
"""Characters of a path that an error shows."""
HOST = "host:"
LOCATED = ("oci", "oci-archive", "docker-archive")
"""Kinds of images that are followed by a path."""
ARCHIVES = {"docker-archive": "manifest.json", "oci-archive": "oci-layout"}
"""Kinds of archives of images → a file that they have."""
AGENT = "agent"

FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "hosts: files dns\n",
}
"""Files that libc reads, for root file systems that are put together here."""

_HOST_FOLDERS = ("dev", "proc", "root", "run", "sys", "tmp", "var/log", "var/run", "var/tmp")


@dataclass(frozen=True)
class Process:
    """A process as an image describes it."""

    entrypoint: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    """`NAME=VALUE`."""
    working_dir: str = "/"
    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()

    @property
    def command(self) -> tuple[str, ...]:
        """Its command line."""
        return (*self.entrypoint, *self.arguments)


@dataclass(frozen=True)
class Root:
    """A root file system, and the process that its image describes."""

    path: Path
    process: Process = Process()


def unpack(image: str) -> Root:
    """Return the root file system of an image, made if it is not in the cache.

    Raises `Error` if there is no such image or it cannot be unpacked.
    """
    kind, colon, rest = image.partition(":")
    if is_of_host(image):
        root, names = _of_host(programs(image)), image.removeprefix(HOST).split(",")
        return root if names[0] else replace(root, process=Process(arguments=("sh",)))
    if colon and kind in LOCATED:
        return _of_layout(_copied(kind, rest), image)
    path = Path(image)
    try:
        is_layout = (path / "oci-layout").exists()
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as e:  # its name is too long
        raise Error(f"no image {image[:SHOWN]!r}: {e.strerror}") from e
    if is_layout:
        raise Error(f"{path} is a folder of OCI images", hint=f"name it oci:{path}[:TAG]")
    if is_folder:
        return Root(path)
    if is_file:
        return Root(_of_tar(path))
    if image.startswith((".", "/")):
        raise Error(f"no file or folder {image}")
    raise Error(
        f"no image {image!r}",
        hint=f"nothing is pulled: skopeo copy docker://{image} docker-archive:image.tar, then "
        f"--image {image}=docker-archive:image.tar",
    )


def of_programs(
    programs: Sequence[Path], extra: Mapping[str, Path], arguments: tuple[str, ...]
) -> Root:
    """Root file system with programs of this host, their libraries, busybox and further files.

    The first program is run. `extra`: path inside → file of this host.
    """
    if missing := [path for path in (*programs, *extra.values()) if not path.is_file()]:
        raise Error(f"no file {missing[0]}")
    made = _of_host(programs, extra)
    return replace(made, process=replace(made.process, arguments=arguments))


@contextmanager
def reading(image: str) -> Iterator[None]:
    """Faults of an image that is read within the context, as `Error` with the image's name.

    The paths that they tell are those of the cache.
    """
    try:
        yield
    except Error as e:
        raise Error(f"image {image!r}: {e.message}", e.hint) from e
    except RecursionError as e:
        raise Error(f"image {image!r}: its folders are nested too deeply") from e
    except OSError as e:
        raise Error(f"image {image!r}: {e.strerror}: {str(e.filename)[:SHOWN]!r}") from e


def libraries(
    program: Path, others: Iterable[Path], provided: Iterable[str] = ()
) -> dict[str, Path]:
    """Name → file of libraries that a program needs, and modules among the `others` files.

    `provided`: see `elf.closure`.
    """
    modules = [program, *(file for file in others if re.search(r"\.so(\.\d+)*$", file.name))]
    found = (elf.closure(elf.read(module), provided) for module in modules)
    return {Path(name).name: path for each in found for name, path in each.items()}


def files(root: Path) -> list[str]:
    """Paths of all that is in a root file system, without the root, folders before their contents.

    The order does not depend on the file system.
    """
    start = len(posixpath.join(root, ""))
    return sorted(
        posixpath.join(folder, name)[start:]
        for folder, *kinds in os.walk(root, onerror=_refuse)
        for names in kinds
        for name in names
    )


def _refuse(fault: OSError) -> NoReturn:
    raise fault


def check_size(files: Iterable[int]) -> None:
    """Raises `Error` if files of these sizes are too large for an image: they are read into memory.

    A sparse file counts as if it were full.
    """
    size = sum(files)
    if size > MAX_BYTES:
        raise Error(
            f"the files have {size >> 20} MiB, more than the {MAX_BYTES >> 20} that a guest's "
            "image may hold",
            hint="take a smaller image, or run it as a container",
        )


def inside(root: Path, path: str) -> Path:
    """File of this machine that a path in a root file system leads to, by the links there."""
    found, left, links = root, path.split("/")[::-1], 0
    while left:
        part = left.pop()
        if part == "..":
            found = root if found == root else found.parent
        elif part not in ("", "."):
            found /= part
            if found.is_symlink():
                links += 1
                if links > MAX_LINKS:
                    raise Error(f"too many symbolic links at {path} in {root}")
                target = str(found.readlink())
                found = root if target.startswith("/") else found.parent
                left += target.split("/")[::-1]
    return found


def is_of_host(image: str) -> bool:
    """Whether an image is put together from programs of this host."""
    return image == AGENT or image.startswith(HOST)


def programs(image: str) -> tuple[Path, ...]:
    """Programs of this host in such an image, without busybox. `host:` alone has none."""
    if image == AGENT:
        return (agent.build(),)
    found = []
    for name in filter(None, image.removeprefix(HOST).split(",")):
        path = on_host(name)
        if path is None:
            raise Error(
                f"image {image!r}: this host has no program {name}",
                hint="install it; all that examples/ need: ./bootstrap --examples",
            )
        found.append(path)
    return tuple(found)


def on_host(program: str) -> Path | None:
    """A program of this host, by its name or path. None: there is none."""
    path = shutil.which(program, path=PATH) or shutil.which(program)
    return Path(path) if path else None


def busybox() -> Path:
    """Path of a static busybox. Raises `Error` if there is none."""
    path = shutil.which("busybox")
    if path is None or elf.read(Path(path)).interpreter:
        raise Error("no static busybox", hint="apt-get install busybox-static")
    return Path(path)


# --- kinds ----------------------------------------------------------------------------------


def _of_host(wanted: Iterable[Path], extra: Mapping[str, Path] = {}) -> Root:
    files = {"bin/busybox": busybox()}
    files |= {inside.lstrip("/"): outside for inside, outside in extra.items()}
    for program in wanted:
        found = elf.read(program.resolve())
        files[f"usr/bin/{program.name}"] = program
        if found.interpreter:
            files[found.interpreter.lstrip("/")] = Path(found.interpreter)
        for name, library in libraries(program.resolve(), extra.values()).items():
            files[f"usr/lib/{name}"] = library

    def fill(folder: Path) -> None:
        for name in _HOST_FOLDERS:
            (folder / name).mkdir(parents=True, exist_ok=True)
        for inside, outside in files.items():
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(outside, folder / inside)
        for name, text in FILES.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        applets = subprocess.run(
            [folder / "bin/busybox", "--list"], check=True, capture_output=True, text=True
        )
        for applet in applets.stdout.split():
            if applet != "busybox" and not (folder / "usr/bin" / applet).exists():
                (folder / "bin" / applet).symlink_to("busybox")
        (folder / "tmp").chmod(0o1777)

    return Root(
        _cached((f"{at}\0{_digest(file)}" for at, file in files.items()), fill),
        Process(tuple(f"/usr/bin/{p.name}" for p in wanted)[:1]),
    )


def _of_tar(path: Path) -> Path:
    if not path.is_file():
        raise Error(f"no file {path}")

    def fill(folder: Path) -> None:
        options = ("--extract", "--numeric-owner", "--xattrs")
        process.run(
            ["tar", *options, "--file", path, "-C", folder],
            f"{path} is no tar that can be unpacked",
        )
        for kind, sign in ARCHIVES.items():
            if (folder / sign).exists():
                raise Error(f"{path} is an archive of images", hint=f"name it {kind}:{path}")

    return _cached([_digest(path)], fill)


def _copied(kind: str, rest: str) -> Path:
    """Copy an image to an OCI image layout, with the tag `latest`.

    Of an image for several platforms, it is the one for this machine.
    """
    location, _, _ = rest.partition(":")
    file = Path(location, "index.json") if kind == "oci" else Path(location)
    if kind == "oci" and Path(location).is_dir() and not file.is_file():
        raise Error(
            f"{location} is no OCI layout: it has no index.json",
            hint=f"a root file system is named by its folder alone: {location}",
        )
    if not file.is_file():
        raise Error(f"no file {file}")
    if shutil.which("skopeo") is None:
        raise Error(f"no skopeo, to read {location}", hint="apt-get install skopeo")

    def fill(folder: Path) -> None:
        copy = ["skopeo", "--insecure-policy", "copy", f"{kind}:{rest}", f"oci:{folder}:latest"]
        try:
            process.run(copy, f"skopeo cannot read {kind}:{rest}")
        except Error as e:
            said = re.sub(r'time=\S+ level=fatal msg="(.*)"$', r"\1", e.message)
            raise Error(said.replace('\\"', '"'), hint=_better_name(kind, file) or e.hint) from e

    return _cached([kind, rest, _digest(file)], fill)


def _better_name(kind: str, file: Path) -> str:
    """How an image may be named that skopeo does not find in `file`; empty if that is not known.

    `file`: an archive, or the index.json of an OCI image layout.
    """
    with suppress(OSError, ValueError, LookupError, AttributeError, tarfile.TarError):
        if kind == "oci":
            manifests = json.loads(file.read_bytes())["manifests"]
            tags = [m["annotations"]["org.opencontainers.image.ref.name"] for m in manifests]
            return f"it has {', '.join(tags)}: name one, as oci:{file.parent}:{tags[0]}"
        with tarfile.open(file) as tar:
            names = {posixpath.normpath(name) for name in tar.getnames()}
        kinds = [other for other, sign in ARCHIVES.items() if sign in names]
        if kinds and kind not in kinds:
            return f"name it {kinds[0]}:{file}"
    return ""


def _of_layout(layout: Path, image: str) -> Root:
    """Unpack an OCI image layout of one image with umoci.

    Entry point and arguments come from the image: umoci's config.json has them in one list.
    """
    try:
        [manifest] = json.loads((layout / "index.json").read_bytes())["manifests"]
        config = _blob(layout, _blob(layout, manifest["digest"])["config"]["digest"])
        config = config.get("config") or {}
    except (OSError, ValueError, KeyError) as e:
        raise Error(f"{image!r} is no image of a container: {e!r}") from e
    if shutil.which("umoci") is None:
        raise Error(f"no umoci, to unpack {image!r}", hint="apt-get install umoci")

    def fill(folder: Path) -> None:
        bundle = folder / "bundle"
        process.run(
            ["umoci", "unpack", "--image", f"{layout}:latest", bundle],
            f"umoci cannot unpack {image!r}",
        )

    bundle = _cached([manifest["digest"]], fill) / "bundle"
    config_process = json.loads((bundle / "config.json").read_bytes())["process"]
    user = config_process.get("user", {})
    described = Process(
        entrypoint=tuple(config.get("Entrypoint") or ()),
        arguments=tuple(config.get("Cmd") or ()),
        env=tuple(each for each in config.get("Env") or () if "=" in each),
        working_dir=config_process.get("cwd") or "/",
        uid=user.get("uid", 0),
        gid=user.get("gid", 0),
        groups=tuple(user.get("additionalGids") or ()),
    )
    return Root(bundle / "rootfs", described)


def _blob(layout: Path, digest: str) -> Any:
    return json.loads((layout / "blobs" / digest.replace(":", "/")).read_bytes())


# --- the cache ------------------------------------------------------------------------------


def _cached(key: Iterable[str], fill: Callable[[Path], None]) -> Path:
    """Return the cached folder of a key. If it is missing, `fill` fills it, atomically."""
    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()

    def make(new: Path) -> None:
        new.mkdir()
        new.chmod(0o755)  # whatever the umask is
        fill(new)

    return cache.made(cache.cache_folder() / "roots" / digest, make)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return f"{hashlib.file_digest(opened, 'sha256').hexdigest()} {file.stat().st_mode:o}"
