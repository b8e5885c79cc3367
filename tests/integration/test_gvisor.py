"""gVisor as a guest of a pod: a container with a network stack of its own."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testbed.pods import control

from .commands import TESTBED, run
from .sockets import wait_until

pytestmark = pytest.mark.root

WEB = """
- name: web
  image: "host:"
  command: [sh, -c, "echo $WHO > index.html; id -u; grep CapEff /proc/self/status;
            exec httpd -f -p 8080"]
  workingDir: /files
  env: [{name: WHO, value: Ada}]
  securityContext: {runAsUser: 7}
  ports: [{containerPort: 8080}]
  volumeMounts: [{name: files, mountPath: /files}]
  readinessProbe: {exec: {command: [test, -s, /files/index.html]}, periodSeconds: 1}
"""
CLIENT = """
- name: client
  image: "host:"
  command: [httpd, -f, -p, "8081", -h, /etc]
  ports: [{containerPort: 8081}]
"""
VOLUMES = "volumes: [{name: files, emptyDir: {}}]"

Get = Callable[[str, str], str]


@pytest.fixture
def get(manifest: Callable[..., Path], name: str, tmp_path: Path) -> Get:
    """Answers to HTTP requests of a workload of a pod with both."""
    file = manifest(WEB + CLIENT, VOLUMES, runtime="container")
    annotation = "  annotations: {testbed/runtime.web: gvisor}\nspec:"
    file.write_text(file.read_text().replace("spec:", annotation, 1))
    run("up", file)
    return lambda who, url: run("exec", name, "-c", who, "--", "wget", "-qO-", url).stdout


def test_it_is_a_container_of_the_pod(get: Get, name: str) -> None:
    for host in ("127.0.0.1", "[::1]"):
        assert get("client", f"http://{host}:8080/") == "Ada\n"
    for host in ("localhost", "ip6-localhost"):
        assert "127.0.0.1" in get("web", f"http://{host}:8081/hosts")
    harmless = "7\nCapEff:\t0000000000000000\n"
    assert run("logs", name, "-c", "web").stdout == harmless
    ask = ["sh", "-c", "id -u; grep CapEff /proc/self/status"]
    assert run("exec", name, "-c", "web", "--", *ask).stdout == harmless
    assert web(name)["ready"]
    assert not web(name)["unserved"]


def test_it_comes_again_when_it_ends(get: Get, name: str) -> None:
    """It takes the addresses of its link from the kernel: they are there again."""
    run("exec", name, "-c", "web", "--", "sh", "-c", "(sleep 1; kill 1) > /dev/null 2>&1 &")
    wait_until(lambda: web(name)["restarts"] == 1 and web(name)["ready"], "it is ready again", 15)
    assert get("client", "http://localhost:8080/") == "Ada\n"


def test_its_memory_and_cpus_are_limited(manifest: Callable[..., Path], name: str) -> None:
    limits = "  resources: {limits: {memory: 256Mi, cpu: 500m}}\n"
    run("up", manifest(WEB + limits, VOLUMES, runtime="gvisor"))
    said = run("exec", name, "-c", "web", "--", "grep", "MemTotal", "/proc/meminfo").stdout
    assert said.split() == ["MemTotal:", str(256 << 10), "kB"]
    group = f"*-{name}/guests/web/container"
    found = [
        file.read_text().split()[0]
        for limit in ("cpu.max", "cpu.cfs_quota_us")  # of cgroups of version 2, and of 1
        for file in Path("/sys/fs/cgroup").glob(f"**/{group}/{limit}")
    ]
    assert set(found) == {"50000"}
    hog = "x=0123456789abcdef; while :; do x=$x$x; done"
    subprocess.run([*TESTBED, "exec", name, "-c", "web", "--", "sh", "-c", hog], check=False)

    def killed() -> bool:
        """The kernel takes the sandbox, with all of it, or the process in it alone."""
        told = [
            file.read_text()
            for count in ("memory.events", "memory.oom_control")  # version 2, and 1
            for file in Path("/sys/fs/cgroup").glob(f"**/{group}/{count}")
        ]
        return web(name)["restarts"] == 1 or any(
            re.search(r"^oom_kill [1-9]", lines, re.MULTILINE) for lines in told
        )

    wait_until(killed, "the kernel killed a process", 15)


def web(name: str) -> dict[str, Any]:
    workloads: list[dict[str, Any]] = control.status(name)["workloads"]
    return next(each for each in workloads if each["name"] == "web")
