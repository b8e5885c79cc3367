"""Guests in pods of containerd, by the Container Runtime Interface, as kubelet calls it.

a host of the test's own                      ┊  a pod
  containerd                                  ┊
  cni0, a bridge ── veth, by `bridge` ────────┊─ eth0
                                              ┊  lo, a container of busybox
                                  guest ─ g1 ─┊─ by `testbed-cni`
"""

from __future__ import annotations

import json
import os
import random
import signal
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest

from testbed.host import cgroups

from . import chain, cri
from .commands import there
from .cri import CALL_S, IMAGE, OUTSIDE, PROTOCOL, Containerd
from .sockets import transfer, wait_until
from .spdy import Forward

pytestmark = pytest.mark.root

DNS = {"servers": ["10.99.0.1"], "searches": ["shop.example"], "options": ["ndots:2"]}
PORT, SHELL, NATIVE = 9000, 9001, 8000
"""Of the guest, where it echoes and where it runs commands; of the container."""
MOUNT = "for folder in /run /var/lib; do mount -t tmpfs none $folder; done"


def guest(runtime: str) -> dict[str, Any]:
    """A Pod with a guest that echoes, and does what it is told."""
    nc = "busybox nc -ll"
    container = {
        "name": "guest",
        "image": "host:sh",
        "args": ["-c", f"{nc} -p {PORT} -e cat & exec {nc} -p {SHELL} -e sh"],
        "ports": [{"containerPort": port} for port in (PORT, SHELL)],
    }
    spec = {"runtimeClassName": runtime, "containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "guests"}, "spec": spec}


@dataclass
class Sandbox:
    """A pod with a container."""

    containerd: Containerd
    config: dict[str, Any]
    cgroup: Path
    id: str = ""
    container: str = ""
    addresses: list[str] = field(default_factory=list)

    def start(self) -> None:
        call, message = self.containerd.runtime, PROTOCOL
        self.id = call.RunPodSandbox(message.RunPodSandboxRequest(config=self.config), CALL_S).id
        status = call.PodSandboxStatus(message.PodSandbox(id=self.id), CALL_S).status.network
        self.addresses = [status.ip, *(other.ip for other in status.additional_ips)]
        box = {
            "metadata": {"name": "box"},
            "image": {"image": IMAGE},
            "command": ["nc", "-ll", "-p", str(NATIVE), "-e", "cat"],
        }
        create = message.CreateContainerRequest(
            pod_sandbox_id=self.id, config=box, sandbox_config=self.config
        )
        self.container = call.CreateContainer(create, CALL_S).id
        call.StartContainer(message.Container(id=self.container), CALL_S)
        wait_until(lambda: self.guests["ready"] is True, "the guest serves", 60)

    def remove(self) -> None:
        """As kubelet does: its cgroup goes last, and has to be empty."""
        self.containerd.remove(PROTOCOL.PodSandbox(id=self.id))
        self.cgroup.rmdir()

    def execute(self, *command: str) -> str:
        """Run a command in the container."""
        request = PROTOCOL.ExecSyncRequest(container_id=self.container, cmd=command)
        done = self.containerd.runtime.ExecSync(request, CALL_S)
        assert done.exit_code == 0, done.stderr
        return str(done.stdout.decode())

    def command_guest(self, command: str) -> str:
        """Run a command in the guest, over a connection from outside."""
        with self.containerd.dial(self.addresses[0], SHELL) as shell:
            shell.sendall(f"{command}\nexit\n".encode())
            return shell.makefile().read()

    def forward(self, port: int) -> Forward:
        request = PROTOCOL.PortForwardRequest(pod_sandbox_id=self.id, port=[port])
        url = self.containerd.runtime.PortForward(request, CALL_S).url
        server = urlsplit(url)
        assert server.hostname
        assert server.port
        return Forward(self.containerd.dial(server.hostname, server.port), server.path, port)

    def asks_guest(self, address: str) -> str:
        """What the guest echoes to the container."""
        return self.execute("sh", "-c", f"echo hello | nc {address} {PORT}")

    @property
    def guests(self) -> dict[str, Any]:
        """What `testbed ps` says of the pod."""
        [found] = [pod for pod in self.containerd.pods() if pod["name"] == self.id]
        return found


@pytest.fixture(scope="module")
def containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    work = tmp_path_factory.mktemp("containerd")
    configure(work)
    with (
        cri.running(work, MOUNT, work / "plugins", work / "networks") as running,
        chain.daemon(running.enter),
    ):
        try:
            yield running
        finally:
            running.clear()


def configure(work: Path) -> None:
    """Write the configuration of the pods' network, and manifests of guests."""
    for name in ("plugins", "networks", "guests/shop"):
        (work / name).mkdir(parents=True)
    for program in chain.programs():
        (work / "plugins" / program.name).symlink_to(program)
    capabilities = ("cgroupPath", "dns", "io.kubernetes.cri.pod-annotations")
    own = {
        "type": "testbed-cni",
        "guests": str(work / "guests"),
        "capabilities": dict.fromkeys(capabilities, True),
    }
    network = {"cniVersion": "1.0.0", "name": "net", "plugins": [chain.bridge(work / "ipam"), own]}
    (work / "networks" / "net.conflist").write_text(json.dumps(network))
    for runtime in ("standin", "gvisor", "linux"):
        (work / f"guests/shop/{runtime}.yaml").write_text(json.dumps(guest(runtime)))


def sandbox(containerd: Containerd, name: str, guests: str, attempt: int = 0) -> Sandbox:
    """A pod as kubelet describes it. It is not started."""
    uid = str(uuid.uuid4())
    cgroup = containerd.cgroup / f"pod{uid}"
    cgroup.mkdir()
    config = {
        "metadata": {"name": name, "uid": uid, "namespace": "shop", "attempt": attempt},
        "hostname": name[:63],
        "dns_config": DNS,
        "labels": {
            "io.kubernetes.pod.name": name,
            "io.kubernetes.pod.namespace": "shop",
            "io.kubernetes.pod.uid": uid,
        },
        "annotations": {"kubernetes.io/config.source": "api", "testbed/guests": guests},
        "linux": {"cgroup_parent": f"/{cgroup.relative_to(cgroups.mount_point())}"},
    }
    return Sandbox(containerd, config, cgroup)


@pytest.fixture(scope="module", params=["standin", "gvisor", "linux"])
def pod(containerd: Containerd, request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    before = containerd.state()
    pod = sandbox(containerd, "web", request.param)
    pod.start()
    yield pod
    pod.remove()
    assert containerd.state() - before == set()
    assert not there(pod.id)


def test_a_container_and_a_guest_dial_each_other_at_localhost(pod: Sandbox) -> None:
    for address in ("localhost", "127.0.0.1", "::1"):
        assert pod.asks_guest(address) == "hello\n"
    assert pod.command_guest(f"echo hello | busybox nc localhost {NATIVE}") == "hello\n"


def test_a_container_goes_past_lo(pod: Sandbox) -> None:
    version = pod.containerd.runtime.Version(PROTOCOL.Empty(), CALL_S).runtime_version.lstrip("v")
    if version.startswith("1.6."):
        pytest.skip(f"containerd {version} does not pass on the pod's cgroup")

    def steered() -> int:
        described = json.loads(pod.containerd.testbed("describe", pod.id, "--json"))
        return int(described["counters"]["steered"]["packets"])

    before = steered()
    assert pod.asks_guest("localhost") == "hello\n"
    assert steered() == before + 1


def test_a_guest_has_the_addresses_of_its_pod(pod: Sandbox) -> None:
    assert len(pod.addresses) == 2
    for address, host in zip(pod.addresses, ("10.99.0.1", "fd99::1"), strict=True):
        with pod.containerd.dial(address, PORT) as connection:
            assert transfer(connection, connection, b"hello") == b"hello"
        with pod.containerd.serve(host) as server:
            pod.command_guest(f"echo hello | busybox nc {host} {OUTSIDE} >/dev/null 2>&1 &")
            connection, (seen, *_) = server.accept()
            with connection:
                assert connection.recv(5) == b"hello"
        assert seen == address


def test_a_guest_has_the_name_servers_of_its_pod(pod: Sandbox) -> None:
    for text in (pod.command_guest("cat /etc/resolv.conf"), pod.execute("cat", "/etc/resolv.conf")):
        assert set(text.splitlines()) == {
            "nameserver 10.99.0.1",
            "search shop.example",
            "options ndots:2",
        }


@pytest.mark.parametrize("port", [NATIVE, PORT])
def test_a_port_is_forwarded_until_both_sides_have_sent_all(pod: Sandbox, port: int) -> None:
    data = random.Random(port).randbytes(100_000)
    with pod.forward(port) as forward:
        forward.send(data)
        assert forward.receive(len(data)) == data
        forward.send(b"the rest", last=True)
        assert forward.receive() == b"the rest"


def test_a_port_that_nobody_serves_is_an_error_of_forwarding(pod: Sandbox) -> None:
    with pod.forward(1) as forward, pytest.raises(ConnectionError, match="connection refused"):
        forward.receive()


def test_guests_serve_while_their_supervisor_is_replaced(pod: Sandbox) -> None:
    with pod.forward(PORT) as forward:
        killed = pod.guests["supervisor"]
        os.kill(killed, signal.SIGKILL)
        forward.send(b"hello")
        assert forward.receive(5) == b"hello"
        wait_until(lambda: pod.guests["supervisor"] not in (None, killed), "another is there", 10)
        forward.send(b"again", last=True)
        assert forward.receive() == b"again"
    assert pod.asks_guest("localhost") == "hello\n"


def test_a_pod_whose_guests_are_missing_does_not_start_and_leaves_nothing(
    containerd: Containerd,
) -> None:
    before = containerd.state()
    pod = sandbox(containerd, "web", "none")
    with pytest.raises(grpc.RpcError, match=r"there is no .*/guests/shop/none\.yaml"):
        pod.start()
    pod.cgroup.rmdir()
    assert containerd.state() - before == set()


def test_a_second_sandbox_of_a_pod_with_the_longest_name_takes_the_place_of_the_first(
    containerd: Containerd,
) -> None:
    before = containerd.state()
    pods = [sandbox(containerd, 126 * "w." + "w", "standin", attempt) for attempt in range(2)]
    for pod in pods:
        pod.start()
    for pod in pods:
        assert pod.asks_guest("localhost") == "hello\n"
        pod.remove()
        assert not there(pod.id)
    assert containerd.state() - before == set()
