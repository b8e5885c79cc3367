"""Hosts reached by SSH: an inventory names them, fabric reaches them, a worker is started on each.

What a host needs is carried there by content, and only once: this project's files, an OSv kernel
that is found here. Its Python environment is made by `bootstrap`, once for each set of
requirements; images are composed there, by the same code, of the host's own libraries. At every
contact the host's doctor is asked, and what a killed run has left there is taken down (a pod that
was kept, too).

    DIRECTORY/packages/HASH        this project's files
    DIRECTORY/environments/HASH    where `bootstrap` ran, by what it reads
    DIRECTORY/kernels/HASH.elf     OSv kernels
    DIRECTORY/campaigns/HASH       consoles, until they are fetched

A host is believed only by the key that is on file for it. What fails on one host is that host's
error; nothing is ever run here in its place. Cells between two hosts take hosts by twos: the first
of each has the worker, the second the servers' pod (`far`), and measures nothing itself.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import re
import shlex
import socket
import subprocess
import tarfile
import threading
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from ipaddress import ip_address
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import Any, BinaryIO, Self

import fabric
import paramiko

from testbed import paths
from testbed.campaigns.worker import Job
from testbed.datapaths.routed import Side
from testbed.images import kernels
from testbed.model.errors import Error
from testbed.model.terms import Family

CONNECT_LIMIT_S = 10
LINK_LIMIT_S = 20
"""How long what was sent may stay unacknowledged until the link is given up (TCP_USER_TIMEOUT)."""
END_LIMIT_S = 60
"""How long a worker may take to take everything down."""

Say = Callable[[str], None]


# --- inventory ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Host:
    """One `[[hosts]]` table of an inventory."""

    name: str
    address: str
    known_hosts: Path
    """Where the host's key is on file; one file for the whole inventory."""
    port: int = 22
    user: str = "root"
    key: Path | None = None
    """Private key; None: the agent's keys, and those in ~/.ssh."""
    sudo: bool = False
    """Become root there by `sudo -n`."""
    labels: tuple[str, ...] = ()
    """Names of groups, for --on."""
    cpus: tuple[int, ...] = ()
    """CPUs to use; none: all."""
    directory: str = "/var/lib/testbed"
    """Where to work there."""
    link: tuple[str, ...] = ()
    """Its addresses on the link to other hosts, for cells between two; none: `address`."""

    @property
    def on_link(self) -> dict[Family, str]:
        """Where it is met on that link. Raises `Error` for a name that has no address."""
        found: dict[Family, str] = {}
        for word in self.link or (self.address,):
            try:
                infos = socket.getaddrinfo(word, None, type=socket.SOCK_STREAM)
            except OSError as e:
                raise Error(f"{self.name}: {word} has no address: {e.strerror}") from e
            for *_, (address, *_) in infos:
                found.setdefault(Family(f"ipv{ip_address(address).version}"), str(address))
        return found


_HOST_KEYS = ("name", "address", "port", "user", "key", "sudo", "labels", "cpus", "directory",
              "link")  # fmt: skip


def load(path: Path) -> tuple[Host, ...]:
    """The hosts of an inventory; paths in it are relative to it.

    Raises `Error` that names file, key and what was expected there.
    """
    try:
        data = tomllib.loads(path.read_text())
    except OSError as e:
        raise Error(f"inventory {path}: {e.strerror}", "see experiments/hosts.example.toml") from e
    except ValueError as e:
        raise Error(f"inventory {path}: not TOML: {e}") from e
    _only(data, ("known_hosts", "hosts"), str(path))
    tables = data.get("hosts")
    if not (isinstance(tables, list) and tables and all(isinstance(t, dict) for t in tables)):
        raise _wrong(str(path), "hosts", tables, "one or more [[hosts]] tables")
    known = _file(data, "known_hosts", path, str(path)) or Path("~/.ssh/known_hosts").expanduser()
    hosts = tuple(
        _host(table, known, path, f"{path}: [[hosts]] {n}") for n, table in enumerate(tables, 1)
    )
    names = [host.name for host in hosts]
    if twice := {name for name in names if names.count(name) > 1}:
        raise Error(f"inventory {path}: two hosts are called {', '.join(sorted(twice))}")
    return hosts


def choose(hosts: Sequence[Host], wanted: Sequence[str]) -> tuple[Host, ...]:
    """The hosts that are wanted by name or label, in the inventory's order; all if none is named.

    Raises `Error` for a word that is neither.
    """
    for word in wanted:
        if not any(word in (host.name, *host.labels) for host in hosts):
            raise Error(f"no host has the name or label {word!r}",
                        f"hosts are {', '.join(host.name for host in hosts)}")  # fmt: skip
    return tuple(h for h in hosts if not wanted or {h.name, *h.labels} & set(wanted))


def _host(table: Mapping[str, Any], known_hosts: Path, path: Path, where: str) -> Host:
    _only(table, _HOST_KEYS, where)

    def get(key: str, default: Any, expected: str, good: Callable[[Any], object]) -> Any:
        value = table.get(key, default)
        if not good(value):
            raise _wrong(where, key, value, expected)
        return value

    def word(value: object) -> object:
        return isinstance(value, str) and re.fullmatch(r"[a-z0-9][a-z0-9._-]*", value)

    def text(value: object) -> bool:
        return isinstance(value, str) and bool(value) and value.isprintable()

    def number(value: object, low: int, high: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    def several(value: object, good: Callable[[Any], object]) -> bool:
        return isinstance(value, list | tuple) and all(good(v) for v in value)

    return Host(
        name=get("name", None, "a word of lower-case letters, digits, ., - and _", word),
        address=get("address", None, "a name or an IP address", text),
        known_hosts=known_hosts,
        port=get("port", 22, "a port", lambda v: number(v, 1, 65535)),
        user=get("user", "root", "a user's name", text),
        key=_file(table, "key", path, where),
        sudo=get("sudo", False, "true or false", lambda v: isinstance(v, bool)),
        labels=tuple(get("labels", (), "a list of words", lambda v: several(v, word))),
        cpus=tuple(get("cpus", (), "a list of numbers of CPUs",
                       lambda v: several(v, lambda n: number(n, 0, 1 << 16)))),
        directory=get("directory", "/var/lib/testbed", "an absolute path",
                      lambda v: text(v) and v.startswith("/")),
        link=tuple(get("link", (), "a list of names or IP addresses",
                       lambda v: several(v, text))),
    )  # fmt: skip


def _file(table: Mapping[str, Any], key: str, beside: Path, where: str) -> Path | None:
    value = table.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise _wrong(where, key, value, "a path")
    file = beside.parent / Path(value).expanduser()
    if not file.is_file():
        raise Error(f"inventory {where}: {key}: no file {file}")
    return file


def _wrong(where: str, key: str, value: object, expected: str) -> Error:
    found = "nothing" if value is None else repr(value)
    return Error(f"inventory {where}: {key}: expected {expected}, found {found}")


def _only(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise Error(f"inventory {where}: {key}: no such key", f"keys are {', '.join(known)}")


# --- what is carried ------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """This project's files as they are now."""

    files: Mapping[str, Path]
    sha256: str
    """Of names, modes and contents."""
    environment: str
    """SHA-256 of what `bootstrap` reads: hosts with the same need no new Python environment."""

    def archive(self) -> bytes:
        """All files as a compressed tar."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for name, path in self.files.items():
                tar.add(path, name, recursive=False)
        return buffer.getvalue()


@cache
def package() -> Package:
    """The files of this clone that git has or would take, but for texts, tests and results."""
    command = ["git", "-C", str(paths.ROOT), "ls-files", "-z", "--cached", "--others",
               "--exclude-standard", "--", ".", ":!paper", ":!results", ":!tests"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Error(
            f"{paths.ROOT} cannot be carried to other hosts: it is no git clone", "git clone it"
        )
    listed = {
        name: paths.ROOT / name for name in sorted(set(filter(None, done.stdout.split("\0"))))
    }
    files = {name: path for name, path in listed.items() if path.is_file()}  # not deleted ones
    reads = [files[name] for name in ("bootstrap", "packages.txt", "pyproject.toml")]
    return Package(files, _digest(files), _digest({path.name: path for path in reads}))


def _digest(files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, path in files.items():
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{name}\0{path.stat().st_mode & 0o111:o}\0{content}\n".encode())
    return digest.hexdigest()


# --- link -----------------------------------------------------------------------------------


class _Unknown:
    """A host whose key is not on file is refused (paramiko's MissingHostKeyPolicy)."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def missing_host_key(self, client: object, hostname: str, key: paramiko.PKey) -> None:
        host = self._host
        raise Error(
            f"{host.name}: its host key is not on file in {host.known_hosts} "
            f"({key.get_name()} {key.fingerprint})",
            f"if that is its key: ssh-keyscan -p {host.port} {host.address} >> {host.known_hosts}",
        )


class Link:
    """A connection to a host. Raises `Error` if it cannot be made, or a command there fails."""

    def __init__(self, host: Host) -> None:
        self.host = host
        keys = {"key_filename": str(host.key), "look_for_keys": False} if host.key else {}
        self._connection = fabric.Connection(
            host.address, host.user, host.port, connect_timeout=CONNECT_LIMIT_S, connect_kwargs=keys
        )
        client = self._connection.client
        client.set_missing_host_key_policy(_Unknown(host))
        where = f"{host.name}: {host.address} port {host.port}"
        try:
            if host.known_hosts.exists():
                client.load_system_host_keys(str(host.known_hosts))
            self._connection.open()
            # Workers speak in short lines; both ends must notice when the other is gone.
            wire = self._connection.transport.sock
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LINK_LIMIT_S * 1000)
            self._connection.transport.set_keepalive(5)
        except paramiko.BadHostKeyException as e:
            raise Error(f"{where} shows another host key than the one in {host.known_hosts}",
                        "somebody may be in its place; if it was installed anew: ssh-keygen "
                        f"-f {host.known_hosts} -R '{e.hostname}'") from e  # fmt: skip
        except paramiko.PasswordRequiredException as e:
            raise Error(f"{where}: the key {host.key} needs a passphrase",
                        f"ssh-add {host.key}") from e  # fmt: skip
        except paramiko.AuthenticationException as e:
            login = f"-p {host.port} {host.user}@{host.address}"
            raise Error(f"{where} does not let {host.user} in", f"ssh-copy-id {login}") from e
        except (OSError, EOFError, paramiko.SSHException) as e:
            first = next(iter(getattr(e, "errors", {}).values()), e)  # one for each address
            why = getattr(first, "strerror", None) or str(first) or type(first).__name__
            raise Error(f"{where} cannot be reached: {why}",
                        f"ssh -p {host.port} {host.user}@{host.address}") from e  # fmt: skip
        finally:
            if not self._connection.is_connected:
                client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the host. A worker there takes that as its order to end."""
        self._connection.close()

    def run(self, line: str, data: bytes = b"") -> bytes:
        """What a line of shell, run as root there, prints; `data` is its standard input."""
        with self.start(line) as channel:
            errors: list[bytes] = []
            listener = threading.Thread(target=lambda: errors.extend(_In(channel.recv_stderr)))
            listener.start()
            with suppress(OSError):  # it ended before it had read all: its status tells why
                channel.sendall(data)
                channel.shutdown_write()
            output = _In(channel.recv).readall()
            listener.join()
            if status := channel.recv_exit_status():
                self._fail(status, b"".join(errors).decode(errors="replace"), line)
            return output

    def test(self, line: str) -> bool:
        """Whether a line of shell succeeds there."""
        return self.run(f"{line} && echo yes || true") == b"yes\n"

    def start(self, line: str) -> paramiko.Channel:
        """Start a line of shell as root there; its streams are the channel's."""
        command = f"sh -c {quote(line)}"
        if self.host.sudo:
            command = f"sudo -n -H {command}"
        try:
            channel = self._connection.transport.open_session(timeout=CONNECT_LIMIT_S)
            channel.exec_command(command)
        except (OSError, EOFError, paramiko.SSHException) as e:
            raise Error(f"{self.host.name}: lost the link ({e})") from e
        return channel

    def _fail(self, status: int, errors: str, line: str) -> None:
        if status < 0:
            raise Error(f"{self.host.name}: lost the link")
        last = errors.strip().rpartition("\n")[2] or f"status {status} of {line}"
        raise Error(f"{self.host.name}: {last}")


class _In(io.RawIOBase):
    """A stream of a channel as Python's own: paramiko's complain when they are collected late."""

    def __init__(self, receive: Callable[[int], bytes]) -> None:
        self._receive = receive

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._receive(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Out(io.RawIOBase):
    """The standard input of channels, the same for all; closing it is its end."""

    def __init__(self, *channels: paramiko.Channel) -> None:
        self._channels = channels

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        for channel in self._channels:
            channel.sendall(bytes(data))
        return len(data)

    def close(self) -> None:
        if not self.closed:
            for channel in self._channels:
                with suppress(OSError):  # the link is gone, and the stream with it
                    channel.shutdown_write()
        super().close()


# --- a host at work -------------------------------------------------------------------------


class Site:
    """A host that has been reached, has what it needs, and had its doctor asked."""

    def __init__(self, link: Link, say: Say) -> None:
        self.link, self.host = link, link.host
        self._at = self.host.directory
        self._bring_package(say)

    def _bring_package(self, say: Say) -> None:
        bundle, link = package(), self.link
        self._package = f"{self._at}/packages/{bundle.sha256}"
        self._environment = f"{self._at}/environments/{bundle.environment}"
        if not link.test(f"test -d {quote(self._package)}"):
            say("carrying the testbed there")
            link.run(_filling(self._package, "tar -xzf - -C"), bundle.archive())
        if not link.test(f"test -d {quote(self._environment)}"):
            link.run(_filling(self._environment, f"cp -a {quote(self._package)}/. "))
        if not link.test(f"test -e {quote(self._environment)}/.venv/installed"):
            say("making its Python environment (minutes, once)")
        link.run(f"{quote(self._environment)}/bootstrap >&2")

    def testbed(self, *arguments: str) -> str:
        """The line of shell that is a command of the testbed there."""
        return self.python("testbed.cli", *arguments)

    def python(self, module: str, *arguments: str) -> str:
        """The line of shell that runs a module of the testbed there."""
        at, pin = quote(self._package), ""
        if self.host.cpus:
            pin = f"taskset --cpu-list {','.join(map(str, self.host.cpus))} "
        return (f"cd {at} && export PYTHONPATH={at} PYTHONDONTWRITEBYTECODE=1 && "
                f"exec {pin}{quote(self._environment)}/bootstrap "
                f"{shlex.join(['python', '-P', '-m', module, *arguments])}")  # fmt: skip

    def findings(self) -> list[dict[str, str]]:
        """What the host's doctor finds: the fields of each `doctor.Finding`."""
        output = self.link.run(f"({self.testbed('doctor', '--json')}) || test $? = 1")
        try:
            found: list[dict[str, str]] = json.loads(output)
        except ValueError as e:
            raise Error(f"{self.host.name}: its doctor does not answer ({e})") from e
        return found

    def clean(self) -> None:
        """Take down what killed runs have left there."""
        self.link.run(self.testbed("clean"))

    def kernel(self, job: Job) -> str | None:
        """Where the OSv kernel that is found here stands there; carried, if it does not yet."""
        if job.guest not in ("osv", "best"):
            return None
        explicit = Path(job.osv_kernel) if job.osv_kernel else None
        found = kernels.find_osv(explicit, download=False)
        if found is None:
            return None  # the host has one itself, or can download it, or says that it has none
        there = f"{self._at}/kernels/{found.sha256}.elf"
        if not self.link.test(f"test -e {quote(there)}"):
            new = f"{quote(there)}.$$"
            self.link.run(f"mkdir -p {quote(self._at)}/kernels && cat > {new} && "
                          f"mv {new} {quote(there)} || {{ rm -f {new}; false; }}",
                          found.path.read_bytes())  # fmt: skip
        return there


def _filling(folder: str, command: str) -> str:
    """A line of shell that makes a folder, with its name only when `command` has filled it."""
    above = quote(str(PurePosixPath(folder).parent))
    return f"""set -e; umask 077; mkdir -p {above}; new=$(mktemp -d {quote(folder)}.XXXXXX)
trap 'rm -rf "$new"' EXIT
why=$({command} "$new" 2>&1) || {{
  free=$(df -h --output=avail "$new" | tail -n 1)
  echo "$(echo "$why" | grep -m 1 :) (free:$free)" >&2
  exit 1
}}
mv -T "$new" {quote(folder)} 2>/dev/null || test -d {quote(folder)}"""


class Place:
    """Where a campaign's worker runs: a host."""

    def __init__(self, host: Host, far: Host | None = None, number: int = 0) -> None:
        """`far`: the other host of cells between two, of which this is the `number`-th first."""
        self.host, self.name = host, host.name
        self._far, self._number = far, number

    def start(self, job: Job, log: BinaryIO, say: Say) -> Worker:
        """Bring the host up to date and start a worker there, with its job; it complains to `log`.

        Raises `Error` if the host cannot be reached or cannot run it.
        """
        say("connecting")
        link = Link(self.host)
        try:
            site = Site(link, say)
            say("asking its doctor")
            site.clean()
            for finding in site.findings():
                if finding["state"] == "missing":
                    what = f"{self.name}: {finding['name']}: {finding['detail']}"
                    raise Error(what, finding["hint"])
            if not self._far:
                return Worker(site, job, log)
            say(f"starting servers on {self._far.name}")
            clients = Side(2 * self._number, self._far.on_link)
            servers = Side(2 * self._number + 1, self.host.on_link)
            far = _Far(self._far, servers, log)
            try:
                return Worker(site, replace(job, side=replace(clients, lacks=far.lacks)), log, far)
            except BaseException:
                far.close()
                raise
        except BaseException:
            link.close()
            raise


def places(hosts: Sequence[Host], between: bool) -> list[Place]:
    """Where workers run: on every host, or, for cells `between` two, on the first of each two.

    Raises `Error` if one host is left alone.
    """
    if not between:
        return [Place(host) for host in hosts]
    if len(hosts) % 2:
        raise Error(f"cells between hosts take hosts by twos, and {len(hosts)} are chosen",
                    "choose by --on NAME")  # fmt: skip
    twos = zip(hosts[::2], hosts[1::2], strict=True)
    return [Place(first, second, number) for number, (first, second) in enumerate(twos)]


class _Far:
    """The servers' pod on the other host, as long as it is wanted."""

    def __init__(self, host: Host, side: Side, log: BinaryIO) -> None:
        self._link = Link(host)
        try:
            site = Site(self._link, lambda _: None)
            site.clean()
            self.channel = self._link.start(site.python("testbed.campaigns.far_end"))
            self.channel.sendall((json.dumps(asdict(side)) + "\n").encode())
            said = io.BufferedReader(_In(self.channel.recv)).readline()
            if not said:
                log.write(_In(self.channel.recv_stderr).readall())
                raise Error(f"{host.name}: its servers do not start", f"see {log.name}")
            answer = json.loads(said)
            if "error" in answer:
                raise Error(f"{host.name}: {answer['error']}", answer["hint"])
            self.lacks = {Family(family): why for family, why in answer["lacks"].items()}
        except BaseException:
            self._link.close()
            raise

    def close(self) -> None:
        """Have it taken down, and wait for that."""
        with suppress(OSError):
            self.channel.shutdown_write()
        self.channel.status_event.wait(END_LIMIT_S)
        self._link.close()


class Worker:
    """A worker on a host, with what `campaign` uses of the Popen of a local one."""

    def __init__(self, site: Site, job: Job, log: BinaryIO, far: _Far | None = None) -> None:
        """`far` ends with it."""
        self._link, self._far = site.link, far
        self._consoles = Path(job.directory, "consoles")
        # The same for every contact of a campaign: what a lost link left is fetched by the next.
        campaign = hashlib.sha256(f"{platform.node()}:{job.directory}".encode()).hexdigest()
        self._directory = f"{site.host.directory}/campaigns/{campaign}"
        job = replace(job, directory=self._directory, osv_kernel=site.kernel(job))
        # Its shell outlives it, to tell of a signal that ended it.
        self._channel = site.link.start(f"({site.python('testbed.campaigns.worker')}); exit $?")
        channels = [self._channel, *([far.channel] if far else ())]
        self.stdin = io.TextIOWrapper(io.BufferedWriter(_Out(*channels)))
        self.stdout = io.TextIOWrapper(io.BufferedReader(_In(self._channel.recv)))
        self._complaints = threading.Thread(target=self._copy, args=(log,), daemon=True)
        self._complaints.start()
        with suppress(OSError):
            self._channel.sendall((json.dumps(asdict(job)) + "\n").encode())

    def _copy(self, log: BinaryIO) -> None:
        for line in _In(self._channel.recv_stderr):
            log.write(line)
            log.flush()

    def wait(self) -> int:
        """Its exit status, when it has ended; -1 if the link was lost. Consoles are fetched."""
        try:
            self._channel.status_event.wait(END_LIMIT_S)
            status = self._channel.exit_status
            self._complaints.join(END_LIMIT_S)
            if status >= 0:
                with suppress(Error):
                    self._fetch()
            return int(status)
        finally:
            if self._far:
                self._far.close()
            self._link.close()

    def _fetch(self) -> None:
        at = quote(self._directory)
        packed = self._link.run(f"mkdir -p {at}/consoles && tar -C {at}/consoles -czf - .")
        for name, text in _files(packed):
            path = self._consoles / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
        self._link.run(f"rm -rf {at}")


def _files(packed: bytes) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Plain files of a tar that stay below where they are unpacked."""
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as tar:
        for member in tar:
            name, file = PurePosixPath(member.name), tar.extractfile(member)
            if member.isreg() and file and not name.is_absolute() and ".." not in name.parts:
                yield name, file.read()


# --- looking ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a look at a host tells; nothing is carried there for it, and no guest booted."""

    kernel: str
    cpus: int
    load: tuple[float, float, float]
    """Averages over 1, 5 and 15 minutes."""
    kvm: bool
    """There is a /dev/kvm; whether guests boot with it is for the doctor to tell."""
    vhost_net: bool

    def __str__(self) -> str:
        load = " ".join(f"{average:.2f}" for average in self.load)
        devices = f"{'' if self.kvm else 'no '}KVM, {'' if self.vhost_net else 'no '}vhost-net"
        return f"Linux {self.kernel}, {self.cpus} CPUs, load {load}, {devices}"


_LOOK = """uname -r; nproc; cut -d' ' -f1-3 /proc/loadavg
for device in kvm vhost-net; do test -e /dev/$device && echo yes || echo no; done"""


def look(host: Host) -> Seen:
    """A look at a host. Raises `Error` if it cannot be reached, or refuses."""
    with Link(host) as link:
        kernel, cpus, load, kvm, vhost_net = link.run(_LOOK).decode().splitlines()
    one, five, fifteen = map(float, load.split())
    return Seen(kernel, int(cpus), (one, five, fifteen), kvm == "yes", vhost_net == "yes")


def examine(host: Host) -> list[dict[str, str]]:
    """What the doctor finds on a host, which is brought up to date for it."""
    with Link(host) as link:
        return Site(link, lambda _: None).findings()


def each(hosts: Sequence[Host], ask: Callable[[Host], Any]) -> Iterator[tuple[Host, Any]]:
    """Ask all hosts at once; (host, answer or `Error`), in their order."""

    def answer(host: Host) -> Any:
        try:
            return ask(host)
        except Error as e:
            return e

    with ThreadPoolExecutor(len(hosts)) as pool:
        yield from zip(hosts, pool.map(answer, hosts), strict=True)
