"""Finds kernels of guests: OSv's, and Debian's cloud kernel for Linux guests.

An OSv kernel comes from where the user says, from an OSv tree, from the cache, or from those that
OSv's project publishes, in this order. `osv/kernels.toml` says where those are, and which files are
known, by SHA-256. What a kernel can do is found out by booting it (`runtimes.vm.capabilities`). OSv
kernels are for x86-64 alone (`OSV_MACHINE`).

The Linux kernel is Debian's package for this machine. It is unpacked into the cache but never
installed, since that would change the kernel which this host boots.

Nothing is compiled or booted here.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import json
import os
import re
import shutil
import tomllib
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed import paths
from testbed.host import architecture, cache, process
from testbed.images import elf
from testbed.model.errors import Error

FLAVORS = ("ipv6", "master")
"""Branches of OSv whose kernels are published, in order of preference: `ipv6` has both families."""

OSV_MACHINE = "x86_64"
"""Architecture of the OSv kernels, disks and consoles that are supported. OSv itself also runs on
aarch64."""

Progress = Callable[[int, int | None], None]
"""Called during a download with the bytes so far and, if known, the bytes in total."""
Say = Callable[[str], None]
"""Called with a line of text."""

_TIMEOUT_S = 5


@dataclass(frozen=True)
class OsvKernel:
    """An OSv kernel."""

    path: Path
    version: str
    """As the kernel prints it: `v0.57.0-398-g0e34e4dc`."""
    sha256: str
    listed: bool
    """Whether `osv/kernels.toml` has its digest."""
    source: str
    """Text that says where it was found."""


@dataclass(frozen=True)
class LinuxKernel:
    """A packaged Linux kernel with its modules."""

    path: Path
    modules: Path
    """Folder `lib/modules/RELEASE` of the package."""
    release: str
    """As `uname -r` prints it."""
    sha256: str
    source: str
    """Text that says where it is from."""


class Unreachable(Error):
    """A kernel cannot be downloaded: no network, or it is no longer published."""


# --- OSv ------------------------------------------------------------------------------------


def find_osv(
    explicit: Path | None = None,
    flavor: str | None = None,
    *,
    download: bool = True,
    progress: Progress | None = None,
    say: Say = print,
) -> OsvKernel | None:
    """Find the OSv kernel to use. Downloads it if there is none.

    Places, in order: `explicit` (a kernel, or an OSv tree), TESTBED_OSV_KERNEL (likewise), the
    cache, the published kernels. For the last two, `flavor` chooses the kernel; by default it is
    the first of `FLAVORS` that is there.

    Returns None if there is no kernel and it cannot be downloaded, or this machine cannot run it
    (`check_osv`). Raises `Error` if a file that the user names is no OSv kernel.
    """
    if explicit is not None:
        return read_osv(_in_tree(explicit), f"{explicit} (--osv-kernel)")
    if value := os.environ.get("TESTBED_OSV_KERNEL"):
        return read_osv(_in_tree(Path(value)), f"{value} (TESTBED_OSV_KERNEL)")
    if architecture.native().name != OSV_MACHINE:
        return None
    flavors = FLAVORS if flavor is None else (flavor,)
    for name in flavors:
        path = _cached(name)
        if path.exists():
            return read_osv(path, f"cache, {_origin(path)}")
    if download:
        with contextlib.suppress(Unreachable):
            return download_osv(flavors[0], progress=progress, say=say)
    return None


def check_osv() -> None:
    """Raises `Error` if this machine cannot run OSv guests."""
    if (machine := architecture.native().name) != OSV_MACHINE:
        raise Error(
            f"OSv guests need an {OSV_MACHINE} machine, this one is {machine}: guests run on "
            "their host's kind of processor, and no other OSv kernel is known here",
            hint="use Linux guests: --guest linux",
        )


def read_osv(path: Path, source: str) -> OsvKernel:
    """Read an OSv kernel. Raises `Error` if the file is none, or this machine cannot run it."""
    elf.read(path, OSV_MACHINE)
    check_osv()
    data = path.read_bytes()
    # The kernel's banner is "OSv v0.57.0-398-g0e34e4dc", by OSv's `git describe`.
    version = re.search(rb"OSv (v\d[\w.-]*)", data)
    if version is None:
        raise Error(f"{path} is no OSv kernel", hint="give loader-stripped.elf of an OSv build")
    sha256 = hashlib.sha256(data).hexdigest()
    return OsvKernel(
        path=path,
        version=version[1].decode(),
        sha256=sha256,
        listed=any(e.get("sha256") == sha256 for e in _listing()["flavor"].values()),
        source=source,
    )


def download_osv(
    flavor: str,
    *,
    listing: dict[str, Any] | None = None,
    progress: Progress | None = None,
    say: Say = print,
) -> OsvKernel:
    """Download a published kernel into the cache, through HTTP(S)_PROXY if set.

    `listing` is the content of a kernels.toml, by default ours. Tells if the release had another
    file before. Raises `Unreachable` without a network, `Error` if the file is not the listed one,
    or this machine cannot run it.
    """
    check_osv()
    listing = listing or _listing()
    entry = listing["flavor"][flavor]
    url = f"{listing['url']}/{entry['release']}/{entry['asset']}"
    packed = _get(url, progress)
    try:
        data = gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as e:
        raise Error(f"{url} is damaged ({e})", hint="try again, or give --osv-kernel") from e
    sha256 = hashlib.sha256(data).hexdigest()
    if entry.get("sha256", sha256) != sha256:
        raise Error(
            f"{url} has SHA-256 {sha256}, not {entry['sha256']}",
            hint="do not trust it; if OSv published anew, correct osv/kernels.toml",
        )

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "kernel.elf").write_bytes(data)
        (folder / "kernel.json").write_text(json.dumps({"source": url, "sha256": sha256}))
        read_osv(folder / "kernel.elf", url)

    cache.made(_cached(flavor).parent, make, anew=True)
    _record(url, sha256, say)
    return read_osv(_cached(flavor), url)


def _record(url: str, sha256: str, say: Say) -> None:
    """Keep the digest of a release, and tell if it had another one: releases move with a branch."""
    path = cache.cache_folder() / "kernels" / "releases.json"
    try:
        seen: dict[str, str] = json.loads(path.read_text())
    except (OSError, ValueError):
        seen = {}
    if (before := seen.get(url, sha256)) != sha256:
        say(f"{url} has moved: SHA-256 {sha256[:12]}, {before[:12]} when it was fetched last")
    seen[url] = sha256
    cache.made(path, lambda new: new.write_text(json.dumps(seen, indent=1)), anew=True)


def _listing() -> dict[str, Any]:
    return tomllib.loads((paths.OSV / "kernels.toml").read_text())


def _in_tree(path: Path) -> Path:
    """The kernel file of an OSv tree. A path that is no folder is returned as it is."""
    if not path.is_dir():
        return path
    for name in ("loader-stripped.elf", "loader.elf"):
        kernel = path / "build" / "release.x64" / name
        if kernel.exists():
            return kernel
    raise Error(f"{path} has no build/release.x64/loader-stripped.elf", hint="build OSv there")


def _cached(flavor: str) -> Path:
    if flavor not in FLAVORS:
        raise Error(f"no OSv kernel flavor {flavor!r}", hint=f"choose from {', '.join(FLAVORS)}")
    return cache.cache_folder() / "kernels" / f"osv-{flavor}" / "kernel.elf"


def _origin(kernel: Path) -> str:
    try:
        return f"from {json.loads((kernel.parent / 'kernel.json').read_text())['source']}"
    except (OSError, ValueError, KeyError):
        return "of unknown origin"


def _get(url: str, progress: Progress | None) -> bytes:
    parts: list[bytes] = []
    try:
        # A new opener reads the proxy variables now. urlopen reads them only at its first use.
        with urllib.request.build_opener().open(url, timeout=_TIMEOUT_S) as response:
            length = response.headers.get("Content-Length")
            total = int(length) if length else None
            while part := response.read(1 << 16):
                parts.append(part)
                if progress:
                    progress(sum(map(len, parts)), total)
    except (OSError, http.client.HTTPException) as e:
        why = getattr(e, "reason", e)
        if isinstance(e, urllib.error.HTTPError):
            why = f"{e.code} {e.reason}"
            e.close()  # the error is the response, too
        raise Unreachable(
            f"cannot download {url}: {why}",
            hint="set HTTPS_PROXY, or give a kernel with --osv-kernel",
        ) from e
    data = b"".join(parts)
    if total is not None and len(data) != total:
        raise Unreachable(f"{url} broke off after {len(data)} of {total} bytes", hint="try again")
    return data


# --- Linux ----------------------------------------------------------------------------------


def linux_kernel(*, download: bool = True) -> LinuxKernel:
    """Find Debian's cloud kernel in the cache, or download it by apt, which checks its signature.

    Raises `Error` if it is not in the cache and cannot be downloaded.
    """
    folder = cache.cache_folder() / "kernels" / "linux"
    cached = sorted(folder.glob("*/boot/vmlinuz-*"), key=_version)
    if not cached:
        if not download:
            raise Error(f"no Linux kernel for guests in {folder}", hint="./bootstrap")
        _download_linux(folder)
        cached = sorted(folder.glob("*/boot/vmlinuz-*"), key=_version)
    path = cached[-1]
    release = path.name.removeprefix("vmlinuz-")
    package = path.parents[1]
    lib = "usr/lib" if (package / "usr/lib/modules").exists() else "lib"  # since Debian 13
    return LinuxKernel(
        path=path,
        modules=package / lib / "modules" / release,
        release=release,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        source=f"Debian package {package.name}",
    )


def _download_linux(folder: Path) -> None:
    wanted = f"linux-image-cloud-{architecture.native().debian}"
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise Error(
            "no Linux kernel for guests, and no apt to get Debian's",
            hint=f"unpack a {wanted} package below {folder}/NAME",
        )
    # This is a metapackage: it depends on the newest package that has files.
    depends = _apt("apt-cache", "depends", "--important", wanted)
    if (package := re.search(r"Depends: (linux-image-\S+)", depends)) is None:
        raise Error(f"apt does not know {wanted}", hint="apt-get update")
    # Since Linux 6.17, image and modules are packages of their own.
    depends = _apt("apt-cache", "depends", "--important", package[1])
    parts = re.findall(r"Depends: (linux-(?:binary|modules)-\S+)", depends)
    options = (f"Acquire::http::Timeout={_TIMEOUT_S}", "Acquire::Retries=0")
    quick = [word for option in (*options, "APT::Sandbox::User=root") for word in ("-o", option)]

    def make(unpacked: Path) -> None:
        unpacked.mkdir()
        _apt("apt-get", *quick, "--quiet", "download", package[1], *parts, cwd=unpacked)
        for deb in list(unpacked.glob("*.deb")):
            _apt("dpkg-deb", "--extract", str(deb), str(unpacked))
            deb.unlink()
        for image in list(unpacked.glob("usr/lib/modules/*/vmlinuz")):
            (unpacked / "boot").mkdir(exist_ok=True)
            image.rename(unpacked / "boot" / f"vmlinuz-{image.parent.name}")

    cache.made(folder / package[1], make, anew=True)


def _apt(*command: str, cwd: Path | None = None) -> str:
    hint = "apt-get update, and check the network"
    return process.run(command, " ".join(command), hint, cwd=cwd)


def _version(vmlinuz: Path) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", vmlinuz.name))
