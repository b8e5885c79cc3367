"""The CNI plugin in a chain, called as libcni does, with Debian's plugins before it.

a host of the test's own                    ┊  a pod
  cni0, a bridge ── veth, by `bridge` ──────┊─ eth0, addresses by `host-local`
                                            ┊  lo, up by `loopback`
                               guest ─ g1 ──┊─ by `testbed-cni`
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from testbed.host import cgroups, ledger, namespaces, netlink
from testbed.host.ledger import Owner
from testbed.model.addresses import guest_link, loopback
from testbed.model.terms import Family
from testbed.pods import cni, control
from testbed.runtimes import container
from tests.children import ending

from . import chain
from .chain import FOLDERS, guest
from .commands import there
from .sockets import dial, echoes, wait_until

pytestmark = pytest.mark.root

PORT = 9000
T = TypeVar("T")


@dataclass
class Runtime:
    """A container runtime on a host, with a pod that it has made a namespace for."""

    host: str
    pod: str
    network: dict[str, Any]
    """A network configuration list."""
    container: str = field(default_factory=lambda: secrets.token_hex(16))
    cached: dict[str, Any] | None = None
    """The result of the last ADD."""
    through: list[str] = field(default_factory=list)
    """Command that executes our plugin in its place."""
    daemon: subprocess.Popen[str] = field(init=False)
    """The node daemon of our plugin."""

    @property
    def netns(self) -> str:
        return str(namespaces.NETNS / self.pod)

    @property
    def enter(self) -> list[str]:
        """Prefix of a command line that runs a command on the host."""
        return ["nsenter", f"--net={namespaces.NETNS / self.host}"]

    def on_host(self, call: Callable[[], T]) -> T:
        return namespaces.inside(self.host, call)

    def call(
        self, command: str, plugin: dict[str, Any], previous: Any = None, **environment: str
    ) -> tuple[int, Any]:
        """Execute one plugin: its exit status, and what it printed."""
        with ending(self.begin(command, plugin, previous, **environment)) as called:
            printed, errors = called.communicate()
        return called.returncode, json.loads(printed) if printed else errors

    def begin(
        self, command: str, plugin: dict[str, Any], previous: Any = None, **environment: str
    ) -> subprocess.Popen[str]:
        """Start one plugin."""
        given = {"cniVersion": self.network["cniVersion"], "name": self.network["name"], **plugin}
        if previous is not None:
            given["prevResult"] = previous
        return chain.begin(
            self.enter,
            command,
            given,
            container=self.container,
            netns=self.netns,
            through=self.through,
            **environment,
        )

    def all(self, command: str, **environment: str) -> None:
        """Execute the list: ADD in its order, each with the result of the one before; CHECK with
        the last result; DEL with that, and backwards."""
        plugins = self.network["plugins"]
        result = None if command == "ADD" else self.cached
        for plugin in reversed(plugins) if command == "DEL" else plugins:
            status, answer = self.call(command, plugin, result, **environment)
            assert status == 0, answer
            if command == "ADD":
                result = answer
        self.cached = result


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    own = {"type": "testbed-cni", "guests": guest()}
    with Owner() as owner:
        host, pod = (f"tb-{owner.id}-{what}" for what in ("host", "sandbox"))
        for netns in (host, pod):
            namespaces.create(owner, netns).close()
        runtime = Runtime(host, pod, {"cniVersion": "1.0.0", "name": "net", "plugins": [own]})
        with chain.daemon(runtime.enter) as runtime.daemon:
            yield runtime
            runtime.call("DEL", own)


@pytest.fixture
def chained(runtime: Runtime, tmp_path: Path) -> Runtime:
    """The same, with main plugins."""
    chain.programs()
    runtime.network["plugins"][:0] = [chain.bridge(tmp_path), {"type": "loopback"}]
    return runtime


def answers(runtime: Runtime, family: Family) -> bool:
    """Whether the guest answers a process of the pod at `localhost`."""
    return echoes(dial(runtime.pod, str(loopback(family)), PORT))


def ready(runtime: Runtime, name: str) -> bool:
    return runtime.on_host(lambda: control.status(name))["ready"] is True


def test_guests_join_a_pod_of_other_plugins_and_leave_it(chained: Runtime) -> None:
    arguments = {"CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web"}
    chained.all("ADD", **arguments)
    assert chained.cached
    assert {a["address"].partition("/")[0] for a in chained.cached["ips"]} == {
        "10.99.0.2",
        "fd99::2",
    }
    names = [i["name"] for i in chained.cached["interfaces"]]
    assert (names[0], names[-2:]) == ("cni0", ["eth0", "g1"])
    chained.all("CHECK", **arguments)
    wait_until(lambda: ready(chained, chained.container), "the guest serves")
    for family, address in ((Family.IPV4, "10.99.0.2"), (Family.IPV6, "fd99::2")):
        assert answers(chained, family)
        dial(chained.host, address, PORT, 1).close()
    chained.all("DEL", **arguments)
    assert not there(chained.container)
    assert set(netlink.links(chained.pod)) == {"lo"}
    chained.all("DEL", **arguments)


def test_nobody_on_the_pods_network_reaches_an_address_inside_it(chained: Runtime) -> None:
    """Not by a route through the pod either, which forwards as on every node of Kubernetes."""
    chained.all("ADD")
    wait_until(lambda: ready(chained, chained.container), "the guest serves")
    forwarding = ("net/ipv4/conf/all/forwarding", "net/ipv6/conf/all/forwarding")
    namespaces.set_sysctls(chained.pod, dict.fromkeys(forwarding, 1))
    for family, pod in ((Family.IPV4, "10.99.0.2"), (Family.IPV6, "fd99::2")):
        inside = guest_link(family, 1)
        with namespaces.open_socket(chained.host) as ip:
            ip.route("add", dst=f"{inside}/{inside.max_prefixlen}", gateway=pod)
        assert answers(chained, family)
        with pytest.raises(TimeoutError):
            dial(chained.host, str(inside), PORT, 1)


def test_what_the_plugin_before_made_goes_through_unchanged(runtime: Runtime) -> None:
    own = runtime.network["plugins"][0]
    before = {
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "eth0", "mac": "02:00:00:00:00:01"}],
        "ips": [{"address": "10.1.2.3/24", "interface": 0}],
        "dns": {
            "nameservers": ["10.1.2.1"],
            "search": ["shop.example"],
            "options": ["ndots:2"],
        },
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    status, after = runtime.call("ADD", own, before)
    assert status == 0, after
    wait_until(lambda: ready(runtime, runtime.container), "the guest serves")
    [served] = runtime.on_host(lambda: control.workloads(runtime.container, "guest"))
    resolv_conf = Path(f"/proc/{served['pid']}/root/etc/resolv.conf").read_text()
    assert resolv_conf == "nameserver 10.1.2.1\nsearch shop.example\noptions ndots:2\n"
    added = after["interfaces"].pop()
    assert after == before
    assert (added["name"], added["sandbox"]) == ("g1", runtime.netns)
    again, refused = runtime.call("ADD", own, before)
    assert (again, refused["code"]) == (1, 100)
    assert "stands already" in refused["msg"]


def test_a_pod_without_guests_passes(runtime: Runtime, tmp_path: Path) -> None:
    before = {"cniVersion": "1.0.0", "interfaces": []}
    own = {"type": "testbed-cni", "guests": str(tmp_path)}
    for command, answer in (("ADD", before), ("CHECK", ""), ("DEL", "")):
        assert runtime.call(command, own, before) == (0, answer)
    (tmp_path / f"{runtime.container}.yaml").write_text(json.dumps(guest()))
    status, after = runtime.call("ADD", own, before)
    assert (status, after["interfaces"][0]["name"]) == (0, "g1")
    assert runtime.call("DEL", own) == (0, "")
    assert not there(runtime.container)


@pytest.mark.parametrize(
    ("pod", "annotated", "chosen"),
    [
        ("web", None, "web"),
        ("web;K8S_POD_NAMESPACE=default", None, "web"),
        ("web;K8S_POD_NAMESPACE=shop", None, "shop/web"),
        ("web-1", "web", "web"),
        ("web-1;K8S_POD_NAMESPACE=shop", "web", "shop/web"),
        ("web", "shop/web", None),
        ("web", "db", None),
    ],
)
def test_manifests_are_chosen_by_namespace_and_annotation_or_name(
    runtime: Runtime, tmp_path: Path, pod: str, annotated: str | None, chosen: str | None
) -> None:
    """Seen by the refusal of what was chosen, which is no manifest."""
    (tmp_path / "shop").mkdir()
    for name in ("web", "shop/web"):
        (tmp_path / f"{name}.yaml").write_text("kind: None")
    annotations = {"testbed/guests": annotated} if annotated else {}
    own = {
        "type": "testbed-cni",
        "guests": str(tmp_path),
        "runtimeConfig": {"io.kubernetes.cri.pod-annotations": annotations},
    }
    status, answer = runtime.call("ADD", own, {}, CNI_ARGS=f"K8S_POD_NAME={pod}")
    assert (status, answer["code"]) == (1, 7)
    expected = f"{tmp_path}/{chosen}.yaml" if chosen else f"there is no {tmp_path}/{annotated}.yaml"
    assert expected in answer["msg"]


@pytest.mark.parametrize("pod", ["other", 253 * "w", "web;K8S_POD_NAMESPACE=none"])
def test_pods_that_have_no_manifest_in_the_folder_pass(
    runtime: Runtime, tmp_path: Path, pod: str
) -> None:
    (tmp_path / "web.yaml").write_text(json.dumps(guest()))
    own = {"type": "testbed-cni", "guests": str(tmp_path)}
    assert runtime.call("ADD", own, {}, CNI_ARGS=f"K8S_POD_NAME={pod}") == (0, {})


def test_a_pod_whose_supervisor_is_killed_gets_another(runtime: Runtime) -> None:
    own = runtime.network["plugins"][0]
    _, result = runtime.call("ADD", own, {"cniVersion": "1.0.0"})

    def supervisor() -> int | None:
        pid: int | None = runtime.on_host(lambda: control.status(runtime.container))["supervisor"]
        return pid

    killed = supervisor()
    assert killed
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: supervisor() not in (None, killed), "another is there", 10)
    assert runtime.call("CHECK", own, result) == (0, "")
    assert runtime.call("DEL", own, CNI_IFNAME="eth1") == (0, "")
    assert there(runtime.container)
    assert runtime.call("DEL", own) == (0, "")
    assert not there(runtime.container)


def test_without_the_daemon_pods_without_guests_pass_and_others_are_refused(
    runtime: Runtime, tmp_path: Path
) -> None:
    """Also while their daemon is restarted: pods go on."""
    before = {"cniVersion": "1.0.0", "interfaces": [{"name": "eth0"}]}
    every = runtime.network["plugins"][0]
    (tmp_path / "shop").mkdir()
    for name in ("web", "shop/db"):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(guest()))
    some = {**every, "guests": str(tmp_path)}
    chosen = {"runtimeConfig": {"io.kubernetes.cri.pod-annotations": {"testbed/guests": "web"}}}
    status, result = runtime.call("ADD", every, before)
    assert status == 0, result
    runtime.daemon.terminate()
    runtime.daemon.wait()
    for command, answer in (("ADD", before), ("CHECK", "")):
        for pod in ("other", "db", "web;K8S_POD_NAMESPACE=shop"):
            arguments = f"K8S_POD_NAME={pod}"
            assert runtime.call(command, some, before, CNI_ARGS=arguments) == (0, answer)
        for plugin, pod in (
            (every, "other"),
            (some, "web"),
            (some, "web;K8S_POD_NAMESPACE=default"),
            (some, "db;K8S_POD_NAMESPACE=shop"),
            (some | chosen, "other"),
        ):
            arguments = f"K8S_POD_NAME={pod}"
            status, refused = runtime.call(command, plugin, before, CNI_ARGS=arguments)
            assert (status, refused["code"], refused["cniVersion"]) == (1, 11, "1.0.0")
            assert "systemctl start testbed-noded" in refused["msg"]
    for unsure in ("/none", str(tmp_path).replace("/", r"\/"), 7):
        assert runtime.call("ADD", {**every, "guests": unsure}, before)[0] == 1
    assert runtime.call("ADD", some, CNI_ARGS="K8S_POD_NAME=other")[1]["code"] == 7
    assert runtime.call("STATUS", some)[1]["code"] == 50
    assert runtime.call("GC", some)[1]["code"] == 11
    assert runtime.call("DEL", every)[1]["code"] == 11
    assert runtime.call("DEL", some, CNI_CONTAINERID="other") == (0, "")
    assert runtime.on_host(lambda: control.status(runtime.container))["supervisor"]
    with chain.daemon(runtime.enter):
        assert runtime.call("CHECK", every, result) == (0, "")
        assert runtime.call("DEL", every) == (0, "")


def test_guests_that_nobody_supervises_are_not_forgotten(runtime: Runtime) -> None:
    """Daemon and supervisor are killed, and then the namespace goes."""
    own = runtime.network["plugins"][0]
    assert runtime.call("ADD", own, {})[0] == 0
    supervisor = runtime.on_host(lambda: control.status(runtime.container))["supervisor"]
    for pid in (runtime.daemon.pid, supervisor):
        os.kill(pid, signal.SIGKILL)
    runtime.daemon.wait()
    wait_until(lambda: runtime.call("DEL", own)[0] == 1, "DEL sees the guests")
    namespaces.remove_netns(runtime.pod)
    with chain.daemon(runtime.enter):
        wait_until(lambda: not there(runtime.container), "the daemon removes them", 10)
        assert runtime.call("DEL", own) == (0, "")


def test_an_add_whose_plugin_was_killed_is_taken_back(runtime: Runtime, tmp_path: Path) -> None:
    """Its runtime asked for DEL while the manifest was being read."""
    slow = tmp_path / "slow.yaml"
    os.mkfifo(slow)
    own = {**runtime.network["plugins"][0], "guests": str(slow)}
    with ending(runtime.begin("ADD", own, {})) as plugin:
        with slow.open("w") as writing:  # opens when the call reads it
            plugin.kill()
            plugin.wait()
            assert runtime.call("DEL", own) == (0, "")
            writing.write(json.dumps(guest()))
    wait_until(lambda: bool(there(runtime.container)), "it is built")
    wait_until(lambda: not there(runtime.container), "it is taken back", 10)


def test_results_without_interfaces_get_some(runtime: Runtime) -> None:
    """As Go writes an empty list."""
    status, result = runtime.call("ADD", runtime.network["plugins"][0], {"interfaces": None})
    assert status == 0
    assert [each["name"] for each in result["interfaces"]] == ["g1"]


def test_garbage_is_collected(runtime: Runtime) -> None:
    runtime.network["cniVersion"] = "1.1.0"
    own = runtime.network["plugins"][0]
    assert runtime.call("STATUS", own) == (0, "")
    assert runtime.call("ADD", own, {"cniVersion": "1.1.0"})[0] == 0
    assert runtime.call("GC", own)[1]["code"] == 7
    valid = [{"containerID": runtime.container, "ifname": "eth0"}]
    for attachments, left in ((valid, True), (None, False)):
        assert runtime.call("GC", {**own, "cni.dev/valid-attachments": attachments}) == (0, "")
        assert bool(there(runtime.container)) == left


def test_who_shares_only_the_network_with_the_host_cannot_call_the_daemon(runtime: Runtime) -> None:
    """As a container of the host's network, be it root: a call runs programs of the host."""
    own = runtime.network["plugins"][0]
    hide = "mount -t tmpfs none /run/testbed && exec " + str(chain.own())
    runtime.through = ["unshare", "--mount", "sh", "-c", hide]
    status, refused = runtime.call("ADD", own, {})
    assert (status, refused["code"]) == (1, 11)
    runtime.through = []
    assert runtime.call("ADD", own, {})[0] == 0


def test_nobody_else_enters_the_daemons_folder_whoever_made_it(runtime: Runtime) -> None:
    """As kubelet makes it for the daemon's pod: open to all."""
    runtime.daemon.terminate()
    runtime.daemon.wait()
    ledger.ROOT.chmod(0o755)
    with chain.daemon(runtime.enter):
        assert ledger.ROOT.stat().st_mode & 0o777 == 0o700


def test_a_list_that_is_written_anew_gets_the_plugin_again(
    runtime: Runtime, tmp_path: Path
) -> None:
    """As a cluster's network does when it is restarted."""
    runtime.daemon.terminate()
    runtime.daemon.wait()
    programs, file = tmp_path / "bin", tmp_path / "net.d/10-net.conflist"
    for folder in (programs, file.parent):
        folder.mkdir()
    others = json.dumps({"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}]})

    def has_it() -> bool:
        return "testbed-cni" in file.read_text()

    file.write_text(others)
    folders = ("--plugin", programs, "--network", file.parent)
    said = [f"{programs}/testbed-cni is there", f"{file} lists testbed-cni"]
    with chain.daemon(runtime.enter, *folders, first=said):
        assert has_it()
        for _ in range(2):
            file.write_text(others)
            wait_until(has_it, "the plugin is in the list again", 10)
        assert runtime.call("STATUS", runtime.network["plugins"][0])[0] == 0
    done = subprocess.run(
        [*chain.NODED, *folders, "--remove"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        f"{file} lists testbed-cni no longer",
        f"{programs}/testbed-cni is gone",
    ]
    assert json.loads(file.read_text()) == json.loads(others)
    assert list(programs.iterdir()) == []


def test_a_second_daemon_is_refused(runtime: Runtime) -> None:
    done = subprocess.run(
        [*runtime.enter, *chain.NODED], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (3, "testbed: a node daemon runs already\n")


def test_a_delete_that_gets_no_answer_is_an_error(runtime: Runtime) -> None:
    """So the runtime asks again."""
    own = runtime.network["plugins"][0]
    runtime.call("ADD", own, {"cniVersion": "1.0.0"})
    supervisor = runtime.on_host(lambda: control.status(runtime.container))["supervisor"]
    os.kill(supervisor, signal.SIGSTOP)
    try:
        assert runtime.call("DEL", own)[0] == 1
    finally:
        os.kill(supervisor, signal.SIGCONT)
    assert runtime.call("DEL", own) == (0, "")
    assert not there(runtime.container)


@pytest.mark.parametrize(
    ("change", "environment", "code", "words"),
    [
        ({"cniVersion": "2.0.0"}, {}, 1, "cniVersion '2.0.0'"),
        ({"guest": 1}, {}, 2, "guest is 1"),
        ({}, {"CNI_COMMAND": "GET"}, 4, "CNI_COMMAND is 'GET'"),
        ({}, {"CNI_NETNS": ""}, 4, "CNI_NETNS is not set"),
        ({}, {"CNI_CONTAINERID": "../x"}, 4, "'../x' is no identifier"),
        ({}, {"CNI_ARGS": "K8S_POD_NAMESPACE=../x"}, 4, "'../x' is no identifier"),
        ({"prevResult": None}, {}, 7, "no prevResult"),
        ({"guests": "/none.yaml"}, {}, 7, "cannot read /none.yaml"),
        ({"guests": {"kind": "Pod"}}, {}, 7, "guests: 'kind: Pod'"),
        ({"datapath": "dnat"}, {}, 100, "dnat needs a pod that it has for itself"),
        ({}, {"CNI_NETNS": "/etc/passwd"}, 100, "/etc/passwd is no network namespace"),
        ({"runtimeConfig": {"cgroupPath": "/none"}}, {}, 100, "none is no cgroup"),
    ],
)
def test_errors_are_as_the_specification_has_them(
    runtime: Runtime, change: dict[str, Any], environment: dict[str, str], code: int, words: str
) -> None:
    own = {**runtime.network["plugins"][0], **change}
    status, error = runtime.call("ADD", own, change.get("prevResult", {}), **environment)
    assert status == 1
    assert error["cniVersion"] == own.get("cniVersion", "1.0.0")
    assert error["code"] == code
    assert words in error["msg"]


def test_what_is_no_json_is_refused(runtime: Runtime) -> None:
    for _ in range(2):  # by the daemon, and without
        done = subprocess.run(
            [*runtime.enter, chain.own()],
            input="{",
            env={"CNI_COMMAND": "ADD", "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, json.loads(done.stdout)["code"]) == (1, 6)
        runtime.daemon.terminate()
        runtime.daemon.wait()


def test_versions_are_told_without_input() -> None:
    variables = {"CNI_COMMAND": "VERSION"}
    told = subprocess.check_output([chain.own()], stdin=subprocess.DEVNULL, env=variables)
    assert json.loads(told)["supportedVersions"] == list(cni.VERSIONS)


PODMAN_CONF = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[network]
network_backend = "cni"
cni_plugin_dirs = {folders}
network_config_dir = "{work}/networks"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
"""


@dataclass
class Podman:
    """podman on a host of the test's own: with its network, mounts and files."""

    work: Path
    host: int
    """A process there."""
    cgroup: str

    def run(self, *command: str | Path, status: int = 0) -> str:
        settings = {"CONTAINERS_CONF": str(self.work / "containers.conf")}
        inside = ["nsenter", f"--target={self.host}", "--net", "--mount"]
        done = subprocess.run(
            [*inside, *map(str, command)],
            capture_output=True,
            text=True,
            env=os.environ | settings,
            check=False,
        )
        assert done.returncode == status, done.stderr
        return done.stdout

    def __call__(self, *command: str | Path) -> str:
        folders = [f"--{name}=/var/lib/{name}" for name in ("root", "runroot", "tmpdir")]
        return self.run("podman", *folders, "--storage-driver", "vfs", *command)


@pytest.fixture
def podman(owner: Owner, tmp_path: Path) -> Iterator[Podman]:
    if missing := [p for p in ("podman", "runc", "busybox") if shutil.which(p) is None]:
        pytest.skip(f"no {', '.join(missing)}")
    version = subprocess.check_output(["podman", "--version"], text=True).split()[-1]
    if (major := int(version.partition(".")[0])) > 4:
        pytest.skip(f"podman {major} calls no CNI plugins")
    folders = [str(chain.own().parent), *FOLDERS]
    (tmp_path / "containers.conf").write_text(
        PODMAN_CONF.format(folders=json.dumps(folders), work=tmp_path)
    )
    (tmp_path / "networks").mkdir()
    cgroup = cgroups.create(owner, f"tb-{owner.id}-podman").name
    container.own(owner, tmp_path, cgroup)
    script = "ip link set lo up && mount -t tmpfs none /var/lib && echo ready && exec sleep 1000"
    command = ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-c", script]
    with ending(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) as host:
        assert host.stdout
        assert host.stdout.readline() == "ready\n"
        podman = Podman(tmp_path, host.pid, cgroup)
        with chain.daemon(["nsenter", f"--target={host.pid}", "--net", "--mount"]):
            yield podman
            podman("rm", "--all", "--force", "--time", "0")


def test_a_container_of_podman_s_has_guests_at_its_localhost(
    podman: Podman, chained: Runtime, name: str
) -> None:
    network = {**chained.network, "cniVersion": "0.4.0", "name": "net"}
    (podman.work / "networks" / "net.conflist").write_text(json.dumps(network))
    root = podman.work / "rootfs"
    (root / "bin").mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "", root / "bin/busybox")
    where = ("--network", "net", "--cgroup-parent", f"/{podman.cgroup}", "--rootfs", root)
    podman("run", "--detach", "--name", name, *where, "busybox", "sleep", "1000")
    pod = [sys.executable, "-m", "testbed.cli"]
    [there_is] = json.loads(podman.run(*pod, "ps", "--json"))
    id = podman("inspect", "--format", "{{.Id}}", name).strip()
    assert there_is["name"] == id
    for address in ("127.0.0.1", "::1"):
        ask = f"while ! echo hello | busybox nc -w 1 {address} {PORT}; do :; done"
        assert podman("exec", name, "busybox", "sh", "-c", ask) == "hello\n"
    podman("rm", "--force", "--time", "0", name)
    assert json.loads(podman.run(*pod, "ps", "--json")) == []
    assert not there(id)
