"""docs/cluster.md, typed on a node with containerd; and the DaemonSet of deploy/, as its pod there.

a node of the test's own: network, /run, /etc, /opt, cgroups       ┊  the pod of deploy/web.yaml
  containerd, called as kubelet calls it                           ┊
  the node daemon, by its unit's command or as a privileged pod    ┊  a container of busybox
  cni0, a bridge ── veth ──────────────────────────────────────────┊─ eth0
                                                      guest ─ g1 ──┊─ by `testbed-cni`

There is no cluster: what kubectl and systemctl ask for is done here (`Node.type`).
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from testbed import paths
from testbed.host import cgroups
from testbed.host.facts import slowness
from testbed.images import kernels
from testbed.pods import networks

from . import chain, cri
from .cri import Containerd
from .kubelet import Image, Kubelet
from .pages import ROOT, check, commands, make_clone
from .sockets import wait_until

pytestmark = pytest.mark.root

PAGE = ROOT / "docs/cluster.md"
BUSYBOX, TESTBED = "docker.io/library/busybox:1.36", "localhost/testbed:v1"
MOUNT = """
mount --make-rshared / # as systemd does
mount -t tmpfs none /run
for folder in /etc /opt /var; do
  mkdir -p /run/node$folder/upper /run/node$folder/work
  options=lowerdir=$folder,upperdir=/run/node$folder/upper,workdir=/run/node$folder/work
  mount -t overlay overlay -o $options $folder
done
rm -rf /etc/cni /etc/testbed /opt/cni
mkdir -p /etc/cni/net.d /etc/systemd/system /opt/cni/bin /var/lib/containerd /var/lib/cni
for folder in /var/lib/containerd /var/lib/cni; do mount -t tmpfs none $folder; done
"""
CGROUPS = Path("/sys/fs/cgroup")
"""Where cgroup2 is mounted, unless there are cgroups of version 1."""
ANSWER = "a guest, whose localhost is a container\n"


def manifest(file: str) -> Any:
    return yaml.safe_load((paths.DEPLOY / file).read_text())


@dataclass
class Node:
    """A node, and whoever types there."""

    containerd: Containerd
    kubelet: Kubelet
    clone: Path
    runtime: str
    """What runs the guest in place of OSv."""
    services: dict[str, ExitStack] = field(default_factory=dict)

    def type(self, command: str, printed: list[str]) -> None:
        """Do what a command of the page says, and check what it prints."""
        word, *words = shlex.split(command, comments=True)
        if word == "systemctl":
            self.systemctl(words)
            output = ""
        elif word == "kubectl":
            output = self.kubectl(words)
        else:
            output = self.containerd.run("bash", "-euc", f"cd {self.clone} && {command}")
        check(command, [line.replace("osv", self.runtime) for line in printed], output)
        self.use_runtime()

    def use_runtime(self) -> None:
        """Say what runs the guest, as on nodes without an OSv kernel, if its manifest is there."""
        edit = f"sed -i 's/: osv/: {self.runtime}/' /etc/testbed/guests/web.yaml"
        self.containerd.run("sh", "-c", f"[ ! -e /etc/testbed/guests ] || {edit}")

    def deploy(self, file: str) -> None:
        """Start the pod of a DaemonSet, and wait until it is ready."""
        daemon_set = manifest(file)
        template = daemon_set["spec"]["template"]
        self.kubelet.start(daemon_set["metadata"]["name"], template).wait_ready()

    def asks_guest(self) -> str:
        """What the guest answers the pod's container."""
        status, output = self.kubelet.pods["web"].execute("box", "nc", "localhost", "8080")
        assert status == 0, output
        return output

    def systemctl(self, words: list[str]) -> None:
        action, now, name = words
        assert now == "--now"
        if action == "disable":
            self.services.pop(name).close()
            return
        unit = self.containerd.run("cat", f"/etc/systemd/system/{name}.service")
        started = re.search(r"^ExecStart=(\S*/testbed) noded (.*)$", unit, re.MULTILINE)
        assert started
        assert started[1] == "/opt/testbed/.venv/bin/testbed"
        daemon = chain.daemon(
            self.containerd.enter,
            *shlex.split(started[2]),
            first=["/opt/cni/bin/testbed-cni is there"],
        )
        self.services[name] = ExitStack()
        self.services[name].enter_context(daemon)

    def kubectl(self, words: list[str]) -> str:
        match words:
            case ["apply", *files]:
                return "".join(self.apply(file) for file in files if file != "-f")
            case ["exec", pod, "--", *command]:
                [container] = self.kubelet.pods[pod].containers
                status, output = self.kubelet.pods[pod].execute(container, *command)
                assert status == 0, output
                return output
            case ["delete", "-f", "deploy/web.yaml"]:
                self.kubelet.remove("web")
                return 'pod "web" deleted\n'
        raise AssertionError(f"kubectl {words}")

    def apply(self, file: str) -> str:
        applied = yaml.safe_load((ROOT / file).read_text())
        name = applied["metadata"]["name"]
        if applied["kind"] == "RuntimeClass":
            self.kubelet.handlers[name] = applied["handler"]
            return f"runtimeclass.node.k8s.io/{name} created\n"
        assert applied["kind"] == "Pod"
        self.kubelet.start(name, applied)
        self.wait_guest()
        return f"pod/{name} created\n"

    def wait_guest(self) -> None:
        wait_until(lambda: self.guests()["ready"] is True, "the guest serves", 120)

    def guests(self) -> dict[str, Any]:
        """What `testbed ps` says of the guests' pod."""
        [found] = self.containerd.pods()
        assert found["name"] == self.kubelet.pods["web"].id
        return found


@pytest.fixture
def node(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Node]:
    runtime = getattr(request, "param", "standin")
    if runtime == "osv" and kernels.find_osv(download=False) is None:
        pytest.skip("no OSv kernel here")
    clone, work = tmp_path / "clone", tmp_path / "work"
    for folder in (clone, work):
        folder.mkdir()
    make_clone(clone)
    folders = Path("/opt/cni/bin"), Path("/etc/cni/net.d")
    plugins = [program for program in chain.programs() if program != chain.own()]
    with cri.running(work, MOUNT, *folders) as containerd:
        containerd.run("ln", "-s", *plugins, folders[0])
        containerd.load(cri.busybox(work), BUSYBOX)
        image = as_this_machine(work)
        containerd.load(cri.archive(work, work / "root"), TESTBED)
        kubelet = Kubelet(containerd, work, {TESTBED: image})
        node = Node(containerd, kubelet, clone, runtime)
        try:
            yield node
        finally:
            containerd.clear()
            for service in node.services.values():
                service.close()


def as_this_machine(work: Path) -> Image:
    """The image of the node daemon: what this machine has, instead of what Containerfile makes.

    Its root file system, `work`/root, has only the folders that are mounted there.
    """
    folders = {Path("/usr"), Path("/etc"), ROOT, Path(sys.prefix), Path.home() / ".cache"}
    for folder in (*folders, Path("/tmp"), Path("/var")):
        (work / "root" / folder.relative_to("/")).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (work / "root" / name).symlink_to(f"usr/{name}")
    (work / "root/var/run").symlink_to("/run")
    variables = {
        "PATH": f"{sys.prefix}/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": str(ROOT),
        "HOME": str(Path.home()),
        "TESTBED_SLOWNESS": str(slowness()),
    }
    return Image(tuple(sorted(folders)), variables)


@pytest.mark.parametrize("node", ["osv", "linux", "standin"], indirect=True)
def test_the_page_leads_to_a_pod_with_a_guest_and_back(node: Node) -> None:
    before = node.containerd.state()
    for command, printed in commands(PAGE, "node"):
        node.type(command, printed)
    wait_until(lambda: node.containerd.state() - before == set(), "nothing is left", 30)
    assert not node.services
    assert not node.kubelet.pods


def test_the_daemon_set_brings_guests_into_pods_and_its_removal_leaves_nothing(node: Node) -> None:
    kubelet, before = node.kubelet, node.containerd.state()
    file = "/etc/cni/net.d/10-net.conflist"
    network = json.loads(networks.SHIPPED.read_text())
    del network["plugins"][-1]
    write = ("sh", "-c", f"echo '{json.dumps(network)}' >{file}")
    node.containerd.run(*write)
    kubelet.config_maps["guests"] = paths.DEPLOY / "guests"
    kubelet.handlers["testbed-guests"] = manifest("runtimeclass.yaml")["handler"]
    node.deploy("daemonset.yaml")
    node.use_runtime()
    assert node.containerd.run("stat", "-c", "%a", "/run/testbed") == "700\n"
    kubelet.start("web", manifest("web.yaml"))
    node.wait_guest()
    assert node.asks_guest() == ANSWER
    kubelet.remove("web")
    kubelet.remove("noded")
    node.deploy("removal.yaml")
    kubelet.remove("removal")
    assert json.loads(node.containerd.run("cat", file)) == network
    node.containerd.run("test", "!", "-e", "/opt/cni/bin/testbed-cni")
    wait_until(lambda: node.containerd.state() - before == set(), "nothing is left", 30)


def test_guests_go_on_while_the_daemons_pod_is_replaced(node: Node) -> None:
    """Guests leave the cgroup of version 2 of the daemon's container, which ends with all in it."""
    if cgroups.mount_point() != CGROUPS:
        pytest.skip("containers have cgroups of version 1")
    kubelet = node.kubelet
    node.containerd.run("cp", networks.SHIPPED, "/etc/cni/net.d")
    kubelet.config_maps["guests"] = paths.DEPLOY / "guests"
    node.deploy("daemonset.yaml")
    node.use_runtime()
    kubelet.start("web", manifest("web.yaml"))
    node.wait_guest()
    [guest] = node.guests()["workloads"]
    supervisor = node.guests()["supervisor"]
    kubelet.remove("noded")
    assert node.guests()["supervisor"] is None
    assert node.asks_guest() == ANSWER
    node.deploy("daemonset.yaml")
    wait_until(lambda: node.guests()["supervisor"] not in (None, supervisor), "it is adopted", 30)
    [after] = node.guests()["workloads"]
    assert (after["pid"], after["restarts"]) == (guest["pid"], 0)
    assert node.asks_guest() == ANSWER
    kubelet.remove("web")
    assert node.containerd.pods() == []
