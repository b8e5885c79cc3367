"""Debian root file systems: made by debootstrap, copied, and entered like containers.

`base` makes the root of a suite once a week and stores it in the cache folder. `copy` makes a copy
to work in. `run` runs a command in a root, with its own mounts, processes, host name and System V
IPC. It shares the network of this machine, because package registries must be reached, and eBPF and
cgroups, because there is one kernel.

A root gets from this machine only the settings that reach package registries: mirror, proxies and
certificates. This module needs root and the programs debootstrap, git and those of util-linux. It
uses only the standard library.
"""

from __future__ import annotations

import configparser
import fcntl
import hashlib
import os
import platform
import re
import secrets
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from testbed.host.cache import cache_folder
from testbed.model.errors import Error

REPOSITORY = Path(__file__).parents[2]
CLONE = Path("root/testbed")
"""Path in a root of the clone of this repository."""

SUFFIXES = ("", "-updates", "-security")
"""Suffixes of a suite's name: the archives of its packages."""

CERTIFICATES = Path("etc/ssl/machine.crt")
"""File of this machine's certificates in a root. It is none of the files of ca-certificates, which
its post-install script rewrites."""

CERTIFICATE_VARIABLES = (
    "SSL_CERT_FILE",
    "PIP_CERT",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
)

PIP_FILES = ("/etc/pip.conf", "~/.pip/pip.conf", "~/.config/pip/pip.conf")
PIP_SETTINGS = (
    "index-url",
    "extra-index-url",
    "proxy",
    "trusted-host",
    "default-timeout",
    "timeout",
    "retries",
)

INTERRUPT_GRACE_S = 60
"""Time after an interrupt for a command in a root to take down what it made."""

UNUSED_S = 24 * 3600
"""Time without use after which an outdated prepared root is removed."""

ENTER = """
set -e
cwd=$2
mount --bind "$1" "$1"
cd "$1"
shift 2
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
mount -t bpf bpf sys/fs/bpf
mount -t tmpfs -o mode=755 tmpfs run
pivot_root . mnt
cd /
umount -l /mnt
cd "$cwd"
trap : INT TERM HUP # this shell is the root's init: it outlives the command and reaps orphans
status=0
"$@" || status=$?
exit "$status"
"""
"""Enters a root by pivot_root(8). In a chroot, runc could not call pivot_root itself."""

REGISTER = """
set -e
trap "" INT TERM HUP
cd /proc/sys/fs/binfmt_misc
[ -e register ] || mount -t binfmt_misc binfmt_misc .
cd "$PWD"
printf %s "$2" >register
echo
read -r _ || echo -1 >"$1"
"""
"""Registers an interpreter for programs of another architecture, until standard input ends."""


MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
"""Debian's name of an architecture → its name in `uname -m`."""


def architecture() -> str:
    """Debian's name of this machine's architecture."""
    machine = platform.machine()
    return {name: debian for debian, name in MACHINES.items()}.get(machine, machine)


@contextmanager
def foreign(arch: str) -> Iterator[None]:
    """Make programs of this architecture run on this machine, in any root.

    If it is another architecture, they are emulated by binfmt_misc and QEMU's user mode, which is
    about ten times slower.
    """
    if arch == architecture():
        yield
        return
    file = Path(f"/usr/lib/binfmt.d/qemu-{MACHINES[arch]}.conf")
    if not file.exists():
        raise Error(f"nothing here emulates {arch}", "type: apt-get install qemu-user-static")
    name = f"testbed-{arch}-{secrets.token_hex(4)}"  # other processes register their own
    _, _, rule = file.read_text().strip().lstrip(":").partition(":")
    register = ["unshare", "--mount", "sh", "-c", REGISTER, "register", name, f":{name}:{rule}"]
    with subprocess.Popen(
        register, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdin
        assert process.stdout
        with process.stdin:
            if not process.stdout.read(1):
                raise Error(f"{arch} programs cannot be run", "is binfmt_misc in the kernel?")
            yield


def base(suite: str, arch: str | None = None) -> Path:
    """This week's root of a suite: minbase, git and ca-certificates. Copy it before use.

    It is made if it does not exist. Roots from before last week are removed.
    """
    arch = arch or architecture()
    root = _folder() / f"{suite}-{arch}-{week()}"
    with lock(f"{suite}-{arch}"):
        if not root.exists():
            with _made(root) as making, foreign(arch):
                _debootstrap(suite, arch, making)
            _remove_old(suite, arch, root)
    return root


@contextmanager
def copy(root: Path) -> Iterator[Path]:
    """A copy of a root to work in, removed afterwards."""
    with _scratch(root.name) as ours:
        _fill(ours, root)
        yield ours


def run(
    root: Path,
    command: Sequence[str],
    *,
    cwd: str = "/root",
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> int:
    """Run a command in a root, without standard input; returns its exit status.

    `on_line` gets each line of its output and standard error; without it, they go to those of this
    process. All processes that the command started end with it, and with this process, and nothing
    stays mounted. If this process is interrupted, the command gets SIGINT, and has
    `INTERRUPT_GRACE_S` to take down what it made.
    """
    unshare = ("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child")
    process = subprocess.Popen(
        [
            "setpriv",
            "--pdeathsig",
            "KILL",
            *unshare,
            "--propagation",
            "private",
            "sh",
            "-c",
            ENTER,
            "enter",
            root,
            cwd,
            *command,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if on_line else None,
        stderr=subprocess.STDOUT if on_line else None,
        env=environment(root) | dict(env or {}),
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C in a terminal then reaches only this process
    )
    with process:
        try:
            return _follow(process, on_line)
        except BaseException:
            patience = threading.Timer(INTERRUPT_GRACE_S, process.kill)
            patience.start()
            try:
                os.killpg(process.pid, signal.SIGINT)
                _follow(process, on_line)
            finally:
                patience.cancel()
            raise
        finally:
            process.kill()  # --kill-child then kills all processes in the root


def _follow(process: subprocess.Popen[str], on_line: Callable[[str], None] | None) -> int:
    """Read the output of a process until it ends; returns its exit status."""
    for line in process.stdout or ():
        assert on_line
        on_line(line.rstrip("\n"))
    return process.wait()


def environment(root: Path) -> dict[str, str]:
    """Environment variables of a command in a root.

    From this machine come only the settings that reach package registries, and TESTBED_SLOWNESS.
    """
    carried = {"http_proxy", "https_proxy", "no_proxy", "testbed_slowness"}
    certificates = f"/{CERTIFICATES}" if (root / CERTIFICATES).exists() else None
    return {
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        **{name: value for name, value in os.environ.items() if name.lower() in carried},
        **(dict.fromkeys(CERTIFICATE_VARIABLES, certificates) if certificates else {}),
        **pip_variables([Path(name).expanduser() for name in PIP_FILES], os.environ),
    }


def prepared(suite: str, arch: str | None = None) -> Path:
    """A root with this repository's HEAD in `CLONE`, after `./bootstrap --tests`.

    It must not be changed, only read or copied. A root of another architecture lacks the packages
    that only the tests need, which would take too long to install there. `bootstrap` runs once a
    week, and when the files that it reads have changed. The roots of commits share its result by
    hard links, except the clone.
    """
    arch = arch or architecture()
    bootstrap = ["./bootstrap", *(["--tests"] if arch == architecture() else []), "true"]
    root = base(suite, arch)
    commit = git("rev-parse", "HEAD")
    files = [git("show", f"{commit}:{name}") for name in ("bootstrap", "pyproject.toml")]
    # Only the lines of packages.txt that are installed: no comments and no other groups.
    for line in git("show", f"{commit}:packages.txt").splitlines():
        entry = line.partition("#")[0].strip()
        if re.match(r"(tests:|[^:]+$)", entry):
            files.append(entry)
    inputs = hashlib.sha256("\0".join(files).encode()).hexdigest()[:12]
    common = root.with_name(f"{root.name}-{inputs}")
    ours = root.with_name(f"{root.name}-{inputs}-{commit[:12]}")
    with lock(root.name):
        if not common.exists():
            with _made(common) as making:
                _fill(making, root)
                clone(commit, making)
                with foreign(arch):
                    if run(making, bootstrap, cwd=f"/{CLONE}"):
                        raise Error(f"bootstrap failed in a {suite} root", "see what it says above")
                    run(making, ["apt-get", "clean"])
        for other in root.parent.glob(f"{root.name}-*"):
            unused = time.time() - other.stat().st_mtime > UNUSED_S
            if unused and other not in (common, ours):
                shutil.rmtree(other)
        if not ours.exists():
            with _made(ours) as making:
                subprocess.run(["cp", "-al", f"{common}/.", making], check=True)
                (making / CLONE).rename(making / "root/before")
                clone(commit, making)
                for name in (".venv", "testbed.egg-info"):
                    (making / "root/before" / name).rename(making / CLONE / name)
                shutil.rmtree(making / "root/before")
        for used in (common, ours):
            os.utime(used)
    return ours


def clone(commit: str, root: Path) -> None:
    """Clone this repository into a root, at a commit."""
    _need("git")
    git("clone", "--quiet", "--no-hardlinks", str(REPOSITORY), str(root / CLONE))
    git("checkout", "--quiet", "--detach", commit, folder=root / CLONE)


def keep(root: Path) -> Path:
    """Keep a copy beyond its context, for a person to inspect and remove. Returns its new path."""
    return root.rename(_folder() / f"kept-{root.name}")


def git(*args: str, folder: Path = REPOSITORY) -> str:
    """Output of a git command, by default in this repository."""
    return _output("git", "-C", str(folder), *args)


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold a named lock among all processes that use the cache folder."""
    path = _folder() / f"{name}.lock"
    path.touch()
    with ExitStack() as stack:
        try:
            stack.enter_context(_locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            print(f"waiting for another process, which holds {path}", file=sys.stderr, flush=True)
            stack.enter_context(_locked(path, fcntl.LOCK_EX))
        yield


def week() -> str:
    """The ISO week, such as 2026-W01."""
    year, number, _ = datetime.now(UTC).isocalendar()
    return f"{year}-W{number:02}"


def archives(index_targets: str, codename: str) -> dict[str, str]:
    """Suffix ("", "-updates", "-security") → URI of this machine's Debian archive.

    `index_targets` has lines `URI RELEASE CODENAME`; CODENAME is missing before the first `apt-get
    update`. Empty if no archive has this machine's suite, `codename`.
    """
    found: dict[str, str] = {}
    for line in index_targets.splitlines():
        uri, *names = line.split()
        for suffix in SUFFIXES:
            if codename + suffix in names:
                found.setdefault(suffix, uri)
    return found


def apt_settings(dump: str) -> str:
    """The lines of `apt-config dump` that say how to reach archives."""
    carried = ("Acquire::http::", "Acquire::https::", "Acquire::Check-", "Acquire::Retries ")
    scripts = ("Proxy-Auto-Detect", "ProxyAutoDetect", "CaInfo", "CAInfo")  # this machine's files
    lines = (line for line in dump.splitlines() if line.startswith(carried))
    return "".join(f"{line}\n" for line in lines if not any(name in line for name in scripts))


def pip_variables(files: Sequence[Path], variables: Mapping[str, str]) -> dict[str, str]:
    """pip's settings that reach its index, from files and environment, as environment variables.

    Folders of this machine are left out, because a root does not have them.
    """
    found: dict[str, str] = {}
    parser = configparser.RawConfigParser()
    parser.read(files)
    for name in PIP_SETTINGS:
        variable = f"PIP_{name.upper().replace('-', '_')}"
        words = (variables.get(variable) or parser.get("global", name, fallback="") or "").split()
        if kept := [word for word in words if not word.startswith(("/", "file:"))]:
            found[variable] = " ".join(kept)
    return found


def _debootstrap(suite: str, arch: str, root: Path) -> None:
    """Make a root by debootstrap, with all archives of its suite. debootstrap leaves no mounts."""
    _need("debootstrap")
    known: dict[str, str] = {}
    release = platform.freedesktop_os_release()
    if release.get("ID") == "debian" and shutil.which("apt-get"):
        form = "$(REPO_URI) $(RELEASE) $(CODENAME)"
        targets = _output("apt-get", "indextargets", "--no-release-info", "--format", form)
        known = archives(targets, release.get("VERSION_CODENAME", ""))
    mirror = [known[""]] if "" in known else []
    log = _folder() / f"{suite}-{arch}.log"  # not beside the root, where there are only folders
    with log.open("w") as output:
        made = subprocess.run(
            [
                "setpriv",
                "--pdeathsig",
                "KILL",
                "unshare",
                "--mount",
                "--propagation",
                "private",
                "--pid",
                "--fork",
                "--kill-child",
                "debootstrap",
                f"--arch={arch}",
                "--variant=minbase",
                "--include=git,ca-certificates",
                suite,
                root,
                *mirror,
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
        )
    if made.returncode:
        raise Error(f"debootstrap made no root of {suite} for {arch}", f"read {log}")
    log.unlink()

    unsafe = root / "etc/dpkg/dpkg.cfg.d/unsafe-io"
    unsafe.write_text("force-unsafe-io\n")  # no fsync: a copy that a crash spoils is made again
    _carry(root)
    main = (root / "etc/apt/sources.list").read_text().split()[1]
    uris = {"-updates": main, "-security": f"{main.rstrip('/')}-security", **known}
    for suffix in SUFFIXES[1:]:
        extra = root / f"etc/apt/sources.list.d/{suite}{suffix}.list"
        extra.write_text(f"deb {uris[suffix]} {suite}{suffix} main\n")
        options = (
            "-o",
            f"Dir::Etc::SourceList=/{extra.relative_to(root)}",
            "-o",
            "Dir::Etc::SourceParts=-",
        )
        if run(root, ["apt-get", "-qq", *options, "update"], on_line=lambda _: None):
            extra.unlink()  # sid has no such archive
    for folder in ("var/cache/apt/archives", "var/lib/apt/lists"):
        for file in (root / folder).glob("*[._]*"):
            file.unlink()


def _certificates() -> Path | None:
    """The file of CA certificates that this machine trusts."""
    paths = ssl.get_default_verify_paths()
    for name in (paths.cafile, paths.openssl_cafile, "/etc/ssl/certs/ca-certificates.crt"):
        if name and Path(name).is_file():
            return Path(name)
    return None


def _remove_old(suite: str, arch: str, root: Path) -> None:
    """Remove roots of earlier weeks, except the newest of them, which may still be in use."""
    names = {
        p.name.removeprefix(f"{suite}-{arch}-")[:8] for p in root.parent.glob(f"{suite}-{arch}-*")
    }
    for old in sorted(names)[:-2]:
        for folder in root.parent.glob(f"{suite}-{arch}-{old}*"):
            shutil.rmtree(folder)


@contextmanager
def _made(root: Path) -> Iterator[Path]:
    """A folder to make a root in. It gets its name at the end of the block, or is removed."""
    with _scratch(root.name) as making:
        yield making
        making.rename(root)


@contextmanager
def _scratch(name: str) -> Iterator[Path]:
    """A folder that is removed afterwards, if it still exists. Removes those of ended processes."""
    folder = _folder() / "work"
    folder.mkdir(exist_ok=True)
    with ExitStack() as stack:
        with lock("work"):
            for left in folder.iterdir():
                with suppress(BlockingIOError), _locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(left, ignore_errors=True)  # its processes may still be ending
            ours = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder))
            stack.enter_context(_locked(ours, fcntl.LOCK_EX))
        ours.chmod(0o755)
        try:
            yield ours
        finally:
            if ours.exists():
                shutil.rmtree(ours)


def _fill(folder: Path, root: Path) -> None:
    """Copy a root into a folder."""
    subprocess.run(["cp", "-a", "--reflink=auto", f"{root}/.", folder], check=True)
    _carry(folder)


def _carry(root: Path) -> None:
    """Copy this machine's network settings into a root. (Those of pip are in `environment`.)"""
    for name in ("resolv.conf", "hosts"):
        shutil.copyfile(f"/etc/{name}", root / "etc" / name)
    settings = apt_settings(_output("apt-config", "dump")) if shutil.which("apt-config") else ""
    if bundle := _certificates():
        shutil.copyfile(bundle, root / CERTIFICATES)
        settings += f'Acquire::https::CaInfo "/{CERTIFICATES}";\n'
    (root / "etc/apt/apt.conf.d/90machine").write_text(settings)


def _folder() -> Path:
    if os.geteuid() != 0:
        raise Error("roots are made and entered as root", "type the command again with sudo")
    folder = cache_folder() / "debian"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _locked(path: Path, kind: int) -> Iterator[None]:
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, kind)
        yield
    finally:
        os.close(file)


def _need(program: str) -> None:
    if not shutil.which(program):
        raise Error(f"no program {program}", f"type: apt-get install {program}")


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Error(f"{' '.join(command[:4])} … failed: {done.stderr.strip()}")
    return done.stdout.strip()
