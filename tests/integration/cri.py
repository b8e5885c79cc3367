"""containerd on a host of the tests' own, called by the Container Runtime Interface.

containerd and all that it starts have mounts and cgroups of their own. Its image is made here.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from testbed.host import cgroups, namespaces, process
from testbed.host.facts import slowness
from testbed.host.ledger import Owner
from testbed.images import rootfs
from testbed.runtimes import container
from tests.children import ending

from . import oci
from .sockets import dial, wait_until

IMAGE = "localhost/busybox:v1"
CONFIG = """
version = 2
disabled_plugins = ["io.containerd.internal.v1.opt"] # it would make a folder in /opt
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{image}"
restrict_oom_score_adj = true # also where root may not lower it
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{plugins}"
conf_dir = "{networks}"
"""
OUTSIDE = 7000
"""Port of the host."""
CALL_S = 60 * slowness()
BOOT = """
mount -t bpf none /sys/fs/bpf
ip netns add first && ip netns del first # the first one makes /run/netns a mount
exec containerd -c "$0"
"""
PROTOCOL, SERVICES = grpc.protos_and_services("tests/integration/cri.proto")


@dataclass
class Containerd:
    """A running containerd."""

    pid: int
    netns: str
    cgroup: Path
    """What pods have their cgroups in."""
    runtime: Any
    """Stub of the CRI's service of pods and containers."""
    images: Any
    """Stub of its service of images."""

    @property
    def enter(self) -> list[str]:
        """Prefix of a command line that runs a command where containerd runs."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount"]

    def run(self, *command: str | Path) -> str:
        """Run a command where containerd runs."""
        done = subprocess.run(
            [*self.enter, *map(str, command)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def testbed(self, *command: str) -> str:
        return self.run(sys.executable, "-m", "testbed.cli", *command)

    def pods(self) -> list[dict[str, Any]]:
        """Pods of ours, each with its guests."""
        return list(json.loads(self.testbed("ps", "--json")))

    def state(self) -> set[tuple[str, str]]:
        """All that a pod could leave behind: (kind, line)."""
        asked = {
            "pod": self.testbed("ps"),
            "namespace": self.run("ip", "netns", "list"),
            "link": self.run("ip", "-brief", "link", "show", "type", "veth"),
            "mount": self.run("cut", "-d ", "-f5", "/proc/self/mountinfo"),
            "ledger": self.run("find", "/run", "-name", "*.ledger"),
            "process": (self.cgroup.parent / "daemon/cgroup.procs").read_text(),
        }
        return {(kind, line) for kind, text in asked.items() for line in text.splitlines()}

    def load(self, archive: Path, name: str) -> None:
        """Load the image of an archive, tagged v1 there, under a name."""
        repository, _, tag = name.rpartition(":")
        ctr = ("ctr", "-n", "k8s.io", "images")
        self.run(*ctr, "import", "--base-name", repository, archive)
        if tag != "v1":
            self.run(*ctr, "tag", f"{repository}:v1", name)
        image = PROTOCOL.ImageStatusRequest(image={"image": name})
        wait_until(
            lambda: self.images.ImageStatus(image, CALL_S).HasField("image"), f"{name} is known"
        )

    def clear(self) -> None:
        """Remove all guests and pods, also without a node daemon."""
        for left in self.pods():
            self.testbed("down", left["name"])
        for pod in self.runtime.ListPodSandbox(PROTOCOL.Empty(), CALL_S).items:
            self.remove(pod)

    def remove(self, pod: Any) -> None:
        self.runtime.StopPodSandbox(pod, CALL_S)
        self.runtime.RemovePodSandbox(pod, CALL_S)

    def serve(self, address: str) -> socket.socket:
        """A server on the host."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = namespaces.inside(
            self.netns, lambda: socket.create_server((address, OUTSIDE), family=family)
        )
        server.settimeout(CALL_S)
        return server

    def dial(self, address: str, port: int) -> socket.socket:
        return dial(self.netns, address, port, CALL_S)


def archive(work: Path, root: Path) -> Path:
    """Make the archive of an OCI image with a root file system, which by itself only sleeps."""
    folder = Path(tempfile.mkdtemp(dir=work))
    layout, file = folder / "image", folder / "image.tar"
    oci.image(layout, root, "cmd=/bin/sleep", "cmd=1000000")
    with tarfile.open(file, "w") as tar:
        tar.add(layout, ".")
    return file


def busybox(work: Path) -> Path:
    """Make the archive of an image that holds busybox."""
    return archive(work, rootfs.unpack("host:").path)


@contextmanager
def running(work: Path, mount: str, plugins: Path, networks: Path) -> Iterator[Containerd]:
    """containerd, with an image of busybox.

    `mount`: shell commands that mount what it has for itself, /run and more. `plugins` and
    `networks`: folders of CNI.
    """
    needed = ("containerd", "ctr", "runc", "umoci", "busybox")
    if missing := [p for p in needed if shutil.which(p) is None]:
        pytest.skip(f"no {', '.join(missing)}")
    config = CONFIG.format(image=IMAGE, plugins=plugins, networks=networks)
    (work / "config.toml").write_text(config)
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", f"{mount}\n{BOOT}"]
    with Owner() as owner:
        netns, group = f"tb-{owner.id}-node", f"tb-{owner.id}-containerd"
        namespaces.create(owner, netns).close()
        container.own(owner, work, group)
        cgroup = cgroups.create(owner, group)
        for name in ("daemon", "pods"):
            (cgroup / name).mkdir()
        daemon = process.spawn(
            [*command, work / "config.toml"],
            cgroup=cgroup / "daemon",
            netns=netns,
            output=work / "log",
        )
        address = f"unix:/proc/{daemon.pid}/root/run/containerd/containerd.sock"
        with ending(daemon), grpc.insecure_channel(address) as channel:
            containerd = Containerd(
                daemon.pid,
                netns,
                cgroup / "pods",
                SERVICES.RuntimeServiceStub(channel),
                SERVICES.ImageServiceStub(channel),
            )
            containerd.runtime.Version(PROTOCOL.Empty(), CALL_S, wait_for_ready=True)
            containerd.load(busybox(work), IMAGE)
            yield containerd
