"""Real hosts for SSH, made of namespaces, with sshd as their PID 1.

    namespace of the machine that campaigns are started on        a host
            br0 ─┬─ h1 ──────────────────────────────────────────── eth0, 10.77.0.11, sshd
                 └─ h2 …                                            own pids, mounts, /run, bpffs,
                                                                    name and cgroups
A host shares files, kernel and CPUs with this machine and nothing else: killing its PID 1 is
pulling its plug.
"""

from __future__ import annotations

import shlex
import time
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from testbed import netlink, process
from testbed.ledger import Owner

CLIENT = "10.77.0.1"
LIMIT_S = 80


@dataclass
class SshHost:
    """A host that is up."""

    name: str
    address: str
    init: subprocess.Popen[bytes]
    lan: Lan

    @property
    def netns(self) -> str:
        return f"tb-{self.lan.owner.id}-{self.name}"

    def kill(self) -> None:
        """Pull its plug."""
        self.init.kill()
        self.init.wait()

    def shell(self, line: str) -> str:
        """What a line of shell prints on the host."""
        pid = Path(f"/proc/{self.init.pid}/task/{self.init.pid}/children").read_text().split()[0]
        command = ["nsenter", "-t", pid, "--net", "--mount", "--uts", "--pid", "sh", "-c", line]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def link(self, state: str) -> None:
        """Pull its cable (`down`), or put it back (`up`)."""
        self.lan.run("ip", "link", "set", self.name, state)


@dataclass
class Lan:
    """The machine that campaigns are started on, and the hosts at its bridge."""

    owner: Owner
    path: Path
    work: Path
    """DIRECTORY of all hosts."""
    hosts: dict[str, SshHost] = field(default_factory=dict)

    @property
    def netns(self) -> str:
        return f"tb-{self.owner.id}-lan"

    @property
    def known_hosts(self) -> Path:
        return self.path / "known_hosts"

    def run(self, *command: str) -> None:
        subprocess.run(self.inside(command), check=True, capture_output=True)

    def inside(self, command: Sequence[str]) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.netns}", *command]

    def inventory(self, *hosts: SshHost, directory: Path | None = None) -> Path:
        """The inventory of some hosts."""
        at = directory or self.work
        tables = [
            f'[[hosts]]\nname = "{host.name}"\naddress = "{host.address}"\n'
            f'key = "client"\ndirectory = "{at}"\n'
            for host in hosts
        ]
        path = self.path / f"{'-'.join(host.name for host in hosts)}.toml"
        path.write_text("\n".join(['known_hosts = "known_hosts"', *tables]))
        return path

    def testbed(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start the command line on the machine."""
        command = [sys.executable, "-P", "-m", "testbed.cli", *map(str, arguments)]
        return subprocess.Popen(
            self.inside(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def add(self, name: str) -> SshHost:
        """Bring up a host."""
        n = 10 + len(self.hosts) + 1
        address = f"10.77.0.{n}"
        netns = f"tb-{self.owner.id}-{name}"
        with netlink.create_netns(self.owner, netns):
            pass
        self.run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", netns)
        self.run("ip", "link", "set", name, "master", "br0", "up")
        cgroup = process.create_cgroup(self.owner, netns)
        key = self.path / f"{name}.key"
        subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", str(key)], check=True)
        public = key.with_suffix(".key.pub").read_text().split()
        with self.known_hosts.open("a") as file:
            file.write(f"{address} {public[0]} {public[1]}\n")
        config = self.path / f"{name}.conf"
        config.write_text(
            f"HostKey {key}\nAuthorizedKeysFile {self.path / 'client.pub'}\nStrictModes no\n"
            "PasswordAuthentication no\nPermitRootLogin prohibit-password\nUsePAM no\n"
            "UseDNS no\nPidFile none\n"
        )
        up = self.path / f"{name}.sh"
        up.write_text(_UP.format(name=name, address=address, config=config, cgroup=cgroup,
                                 mount=process.cgroup_mount()))  # fmt: skip
        line = f"echo $$ > {cgroup}/cgroup.procs && exec " + shlex.join([
            "nsenter", f"--net=/run/netns/{netns}", "unshare", "--mount", "--propagation",
            "private", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "sh", str(up),
        ])  # fmt: skip
        with (self.path / f"{name}.log").open("wb") as log:
            init = subprocess.Popen(["sh", "-c", line], stdin=subprocess.DEVNULL, stdout=log,
                                    stderr=log)  # fmt: skip
        host = self.hosts[name] = SshHost(name, address, init, self)
        greeting = f"exec 3<>/dev/tcp/{address}/22 && read -t 1 -u 3 hello"
        wait_until(
            lambda: not subprocess.run(self.inside(["bash", "-c", greeting]), stderr=-3).returncode,
            f"sshd of {name}",
        )
        return host

    def down(self) -> None:
        for host in self.hosts.values():
            host.kill()


# What comes first is still seen from outside; /sys is mounted anew, as it shows the namespace's own
# devices, and the host's part of the cgroups stands where the tree's root is.
_UP = """
set -e
mkdir -p {mount} /tmp/.keep-$$ && mount --bind {cgroup} /tmp/.keep-$$
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd /run/netns
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /sys/fs/cgroup
mkdir -p {mount}
mount --move /tmp/.keep-$$ {mount} && rmdir /tmp/.keep-$$
mount -t bpf bpf /sys/fs/bpf
hostname {name}
ip link set lo up
ip address add {address}/24 dev eth0
ip link set eth0 up
exec /usr/sbin/sshd -D -e -f {config}
"""


def wait_until(holds: Callable[[], bool], what: str, limit_s: float = 10) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.02)
