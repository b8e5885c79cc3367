"""Real hosts for SSH, made of namespaces, with sshd as their PID 1.

    namespace of the machine that campaigns are started on        a host
            br0 ─┬─ alpha ───────────────────────────────────────── eth0, 10.77.0.11, sshd
                 └─ beta …                                          own pids, mounts, /run, bpffs,
                                                                    name, cgroups and cache
A host shares files, kernel and CPUs with this machine and nothing else: killing its PID 1 is
pulling its plug.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from testbed.host import cgroups, namespaces
from testbed.host.facts import slowness
from testbed.host.ledger import Owner

CLIENT = "10.77.0.1"
LIMIT_S = 120 * slowness()


@dataclass
class Lan:
    """The machine that campaigns are started on, and the hosts at its bridge."""

    owner: Owner
    path: Path
    work: Path
    """DIRECTORY of all hosts."""
    hosts: dict[str, SshHost] = field(default_factory=dict)
    commands: list[Command] = field(default_factory=list)

    @property
    def netns(self) -> str:
        return f"tb-{self.owner.id}-lan"

    def inside(self, *command: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.netns}", *command]

    def run(self, *command: str) -> None:
        subprocess.run(self.inside(*command), check=True, capture_output=True)

    def testbed(self, *arguments: str | Path, environment: dict[str, str] | None = None) -> Command:
        """Start the command line on the machine."""
        settings = [f"{name}={value}" for name, value in (environment or {}).items()]
        command = Command(
            self.inside(
                "env", *settings, sys.executable, "-P", "-m", "testbed.cli", *map(str, arguments)
            )
        )
        self.commands.append(command)
        return command

    def inventory(self, *hosts: SshHost, directory: Path | None = None) -> Path:
        """The inventory of some hosts."""
        at = directory or self.work
        tables = [
            f'[[hosts]]\nname = "{host.name}"\naddress = "{host.address}"\n'
            f'key = "client"\ndirectory = "{at}"\n'
            f'link = ["{host.address}", "{host.address6}"]\n'
            for host in hosts
        ]
        path = self.path / f"{'-'.join(host.name for host in hosts)}.toml"
        path.write_text("\n".join(['known_hosts = "known_hosts"', *tables]))
        return path

    def add(self, name: str) -> SshHost:
        """Connect a host, and boot it."""
        host = self.hosts[name] = SshHost(self, name, 11 + len(self.hosts))
        host.boot()
        return host

    def down(self) -> None:
        for command in self.commands:
            command.kill()
        for host in self.hosts.values():
            host.kill()


class Command(subprocess.Popen[str]):
    """A command at work."""

    def __init__(self, command: Sequence[str]) -> None:
        super().__init__(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> tuple[int, str, str]:
        """Exit status and what it printed, when it has ended."""
        output, errors = self.communicate(timeout=LIMIT_S)
        return self.returncode, output, errors

    def kill(self) -> None:
        if self.poll() is None:
            super().kill()
        with suppress(ValueError):  # closed by `end`
            self.communicate()


class SshHost:
    """A host."""

    def __init__(self, lan: Lan, name: str, n: int) -> None:
        self.lan, self.name, self.address = lan, name, f"10.77.0.{n}"
        self.address6 = f"fd77:3::{n}"
        self.cache = lan.path / f"{name}.cache"
        netns = f"tb-{lan.owner.id}-{name}"
        namespaces.create(lan.owner, netns).close()
        peer = ("peer", "name", "eth0", "netns", netns)
        lan.run("ip", "link", "add", name, "type", "veth", *peer)
        lan.run("ip", "link", "set", name, "master", "br0", "up")
        self._cgroup = cgroups.create(lan.owner, netns)
        key = lan.path / f"{name}.key"
        subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", str(key)], check=True)
        kind, self.key, *_ = key.with_suffix(".key.pub").read_text().split()
        with (lan.path / "known_hosts").open("a") as file:
            file.write(f"{self.address} {kind} {self.key}\n")
        config = lan.path / f"{name}.conf"
        config.write_text(
            f"HostKey {key}\nAuthorizedKeysFile {lan.path / 'client.pub'}\nStrictModes no\n"
            "PasswordAuthentication no\nPermitRootLogin prohibit-password\nUsePAM no\n"
            f"UseDNS no\nPidFile none\nSetEnv XDG_CACHE_HOME={self.cache}\n"
        )
        script = lan.path / f"{name}.sh"
        script.write_text(
            _BOOT.format(
                name=name,
                address=self.address,
                address6=self.address6,
                config=config,
                cgroup=self._cgroup,
                mount=cgroups.mount_point(),
                aside=lan.path / f"{name}.cgroup",
            )
        )
        self._command = f"echo $$ > {self._cgroup}/cgroup.procs && exec " + shlex.join(
            [
                "nsenter",
                f"--net=/run/netns/{netns}",
                "unshare",
                "--mount",
                "--propagation",
                "private",
                "--uts",
                "--ipc",
                "--pid",
                "--fork",
                "--kill-child",
                "sh",
                str(script),
            ]
        )

    def boot(self) -> None:
        """Come up, after a kill too; returns when sshd answers."""
        self._cgroup.mkdir(exist_ok=True)
        with (self.lan.path / f"{self.name}.log").open("ab") as log:
            self._init = subprocess.Popen(
                ["sh", "-c", self._command], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        greeting = f"exec 3<>/dev/tcp/{self.address}/22 && read -t 1 -u 3"
        ask = self.lan.inside("bash", "-c", greeting)
        wait_until(
            lambda: not subprocess.run(ask, capture_output=True, check=False).returncode,
            f"sshd of {self.name}",
        )

    def kill(self) -> None:
        """Pull its plug."""
        self._init.kill()
        self._init.wait()
        cgroups.remove_cgroup(str(self._cgroup))

    def cable(self, state: str) -> None:
        """Pull its cable (`down`), or put it back (`up`)."""
        self.lan.run("ip", "link", "set", self.name, state)

    def shell(self, line: str) -> str:
        """What a line of shell prints on the host."""
        pid = self._init.pid
        init = Path(f"/proc/{pid}/task/{pid}/children").read_text().strip()
        command = ["nsenter", "-t", init, "--net", "--mount", "--uts", "--pid", "sh", "-c", line]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    @property
    def received_bytes(self) -> int:
        """By its end of its cable, so far."""
        return int(self.shell("cat /sys/class/net/eth0/statistics/rx_bytes"))

    @property
    def left(self) -> list[str]:
        """What a campaign has there now: ledgers and namespaces."""
        return self.shell("cd /run && ls -d testbed/*.ledger netns/* 2>/dev/null || true").split()


# The host's part of the cgroups stands where the tree's root is; /sys is mounted anew, as it shows
# the devices of the namespace it is mounted in.
_BOOT = """
set -e
mkdir -p {aside} && mount --bind {cgroup} {aside}
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd /run/netns /run/testbed
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /sys/fs/cgroup
mkdir -p {mount}
mount --move {aside} {mount}
mount -t bpf bpf /sys/fs/bpf
hostname {name}
ip link set lo up
ip address replace {address}/24 dev eth0
ip address replace {address6}/64 dev eth0 nodad
ip link set eth0 up
exec /usr/sbin/sshd -D -e -f {config}
"""


def wait_until(holds: Callable[[], object], what: str, limit_s: float = 10) -> None:
    limit_s *= slowness()
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.02)
