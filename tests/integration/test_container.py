"""Containers by runc: what they see, may and have, and where their files come from."""

from __future__ import annotations

import re
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path

import pytest

from testbed import runtimes
from testbed.datapaths import get
from testbed.host import ledger, process
from testbed.host.ledger import Owner
from testbed.images import rootfs
from testbed.model.errors import Error
from testbed.model.manifest import Manifest, Program, Workload
from testbed.model.terms import Runtime
from testbed.pods.pod import Pod
from testbed.runtimes.interface import Options, Prepared
from tests.children import ending

from . import oci

pytestmark = pytest.mark.root

Run = Callable[..., str]


@pytest.fixture(scope="module")
def runtime() -> Prepared:
    return runtimes.prepare(Runtime.CONTAINER, Options())


@pytest.fixture(scope="module")
def pod(owner: Owner, runtime: Prepared) -> Iterator[Pod]:
    scratch = ledger.create_folder(owner, f"{owner.id}-containers")
    (scratch / "native").mkdir()
    (scratch / "native/hosts").write_text("127.0.0.1 localhost\n10.1.2.3 db\n")
    (scratch / "native/resolv.conf").write_text("nameserver 127.0.0.11\n")
    (scratch / "hostname").write_text("shop\n")
    kinds = {Runtime.CONTAINER: runtime}
    with Pod(owner, "containers", Manifest(()), get("loopback"), kinds, scratch, scratch) as p:
        yield p


@pytest.fixture
def run(pod: Pod, runtime: Prepared) -> Run:
    """What a container prints, run to its end."""

    def run(program: Program, status: int = 0) -> str:
        place = pod.place(Workload("box", Runtime.CONTAINER, program=program))
        place.console.unlink(missing_ok=True)
        with ending(runtime.start(place)) as running:
            running.wait(10)
        text = place.console.read_text()
        assert running.returncode == status, text
        return text

    return run


def shell(script: str, image: str = "host:", **more: object) -> Program:
    return Program(image, command=("/bin/sh", "-c", script), **more)  # type: ignore[arg-type]


def test_it_is_alone_but_in_the_pods_network(run: Run, pod: Pod) -> None:
    text = run(
        shell("echo $$; hostname; cat /etc/hosts /etc/resolv.conf /etc/hostname; ls /sys/class/net")
    )
    assert text.split() == [
        "1",
        "shop",
        "127.0.0.1",
        "localhost",
        "10.1.2.3",
        "db",
        "nameserver",
        "127.0.0.11",
        "shop",
        "lo",
    ]


def test_it_may_what_docker_lets_it(run: Run) -> None:
    assert "CapEff:\t00000000a80425fb" in run(shell("cat /proc/self/status"))
    assert "Operation not permitted" in run(shell("unshare -m true"), status=1)
    assert "Read-only" in run(shell("echo 1 > /proc/sys/vm/drop_caches"), status=1)
    assert run(shell("test ! -e /dev/kvm && echo x > /dev/null && test -s /etc/hosts")) == ""


def test_status_environment_and_folder_are_the_programs(run: Run) -> None:
    program = shell("echo $WHO; pwd; exit 7", env=(("WHO", "Ada"),), working_dir="/tmp")
    assert run(program, status=7) == "Ada\n/tmp\n"


def test_its_files_are_new_at_every_start(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    subprocess.run(["cp", "/bin/busybox", tmp_path / "bin/sh"], check=True)
    for folder in ("proc", "dev", "sys", "etc"):
        (tmp_path / folder).mkdir()
    for _ in range(2):
        assert run(shell("test ! -e /made && echo x > /made", image=str(tmp_path))) == ""
    assert not (tmp_path / "made").exists()


def test_its_memory_is_limited(run: Run) -> None:
    hog = "x=0123456789abcdef; while :; do x=$x$x; done"
    run(shell(hog, memory_bytes=32 << 20), status=137)


def test_its_sockets_belong_to_the_pods_natives(run: Run) -> None:
    groups = run(shell("cat /proc/self/cgroup", cpus=0.5)).split()
    path = next(line.rpartition(":")[2] for line in groups if line.startswith("0::"))
    assert path.endswith("/natives/box/container")


@pytest.mark.parametrize("kind", ["oci", "oci-archive", "docker-archive"])
def test_an_image_says_what_runs(run: Run, tmp_path: Path, kind: str) -> None:
    layout = tmp_path / "layout"
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    subprocess.run(["cp", "/bin/busybox", root / "bin/sh"], check=True)
    name = oci.image(
        layout,
        root,
        *("entrypoint=/bin/sh", "entrypoint=-c", "cmd=echo $GREETING from $(pwd)"),
        *("env=GREETING=hello", "workingdir=/srv"),
    )
    if kind == "oci-archive":
        with tarfile.open(tmp_path / "image.tar", "w") as tar:
            tar.add(layout, ".")
        name = f"oci-archive:{tmp_path}/image.tar:v1"
    if kind == "docker-archive":
        archive = f"docker-archive:{tmp_path}/image.tar:example/greeter:v1"
        copy = ["skopeo", "--insecure-policy", "copy", name, archive]
        subprocess.run(copy, check=True, capture_output=True)
        name = archive
    assert run(Program(name)) == "hello from /srv\n"
    assert run(Program(name, args=("echo $0 $GREETING",))) == "/bin/sh hello\n"
    with pytest.raises(Error, match=f"skopeo cannot read {name.removesuffix('v1')}v2"):
        run(Program(name.removesuffix("v1") + "v2"))


def test_how_an_image_is_named_is_said(tmp_path: Path) -> None:
    layout, root = tmp_path / "layout", tmp_path / "root"
    root.mkdir()
    of_containers = oci.image(layout, root)
    subprocess.run(["umoci", "tag", "--image", f"{layout}:v1", "osv"], check=True)
    for kind in ("oci-archive", "docker-archive"):
        archive = f"{kind}:{tmp_path}/{kind}.tar:x:v1"
        copy = ["skopeo", "--insecure-policy", "copy", of_containers, archive]
        subprocess.run(copy, check=True, capture_output=True)
    choice = f"it has v1, osv: name one, as oci:{layout}:v1"
    for name, message, hint in (
        (f"{layout}", f"{layout} is a folder of OCI images", f"name it oci:{layout}[:TAG]"),
        (f"oci:{root}", f"{root} is no OCI layout: it has no index.json", f"folder alone: {root}"),
        (f"oci:{layout}", f"cannot read oci:{layout}: initializing source", choice),
        (f"oci:{layout}:no", 'no descriptor found for reference "no"', choice),
        *(
            (f"{kind}:{tmp_path}/{other}.tar", "cannot read", f"name it {other}:{tmp_path}/{other}")
            for kind, other in permutations(rootfs.ARCHIVES)
        ),
    ):
        with pytest.raises(Error, match=re.escape(message)) as refused:
            rootfs.unpack(name)
        assert hint in str(refused.value.hint)
        assert "level=fatal" not in str(refused.value)


def test_a_tar_is_a_root(run: Run, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "root.tar.gz", "w:gz") as tar:
        tar.add("/bin/busybox", "bin/sh")
    assert run(shell("echo well", image=str(tmp_path / "root.tar.gz"))) == "well\n"
    with tarfile.open(tmp_path / "saved.tar", "w") as tar:
        tar.add("/bin/busybox", "manifest.json")
    with pytest.raises(Error, match=r"archive of images; name it docker-archive:.*saved\.tar"):
        run(shell("", image=str(tmp_path / "saved.tar")))
    (tmp_path / "bad.tar").write_text("no tar")
    with pytest.raises(Error, match="is no tar that can be unpacked"):
        run(shell("", image=str(tmp_path / "bad.tar")))


def test_programs_of_this_host_bring_their_libraries(run: Run) -> None:
    assert "Redis server v=" in run(Program("host:redis-server,redis-cli", args=("--version",)))
    assert "redis-cli " in run(Program("host:redis-server,redis-cli", command=("redis-cli", "-v")))


def test_what_it_left_running_ends_with_it(pod: Pod, runtime: Prepared) -> None:
    place = pod.place(Workload("box", Runtime.CONTAINER, program=shell("sleep 1000 & wait")))
    running = runtime.start(place)
    while not (place.cgroup / "container").exists():
        running.poll()
    process.end(running)
    true = pod.place(Workload("box", Runtime.CONTAINER, program=shell("true")))
    with ending(runtime.start(true)) as again:
        again.wait(10)
    assert again.returncode == 0


FORBIDDEN_CALLS = """
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static void tell(const char *call, long result)
{
    printf("%s %ld %s\\n", call, result, strerror(result < 0 ? errno : 0));
}

int main(void)
{
    static char empty[256];
    tell("clone", syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0));
    tell("clone3", syscall(SYS_clone3, empty, 88));
    tell("unshare", unshare(CLONE_NEWUSER));
    tell("io_uring_setup", syscall(SYS_io_uring_setup, 8, empty));
    tell("AF_VSOCK", socket(AF_VSOCK, SOCK_STREAM, 0));
    tell("AF_VSOCK+", syscall(SYS_socket, 1L << 32 | AF_VSOCK, SOCK_STREAM, 0));
    return 0;
}
"""


def test_it_makes_no_namespaces_and_reaches_no_virtual_machines(run: Run, tmp_path: Path) -> None:
    """In a user namespace of its own it would have all capabilities."""
    for folder in ("proc", "dev", "sys", "etc"):
        (tmp_path / folder).mkdir()
    command = ["cc", "-D_GNU_SOURCE", "-static", "-x", "c", "-", "-o", str(tmp_path / "try")]
    subprocess.run(command, input=FORBIDDEN_CALLS, text=True, check=True)
    assert run(Program(str(tmp_path), command=("/try",))).splitlines() == [
        "clone -1 Operation not permitted",
        "clone3 -1 Function not implemented",
        "unshare -1 Operation not permitted",
        "io_uring_setup -1 Operation not permitted",
        "AF_VSOCK -1 Operation not permitted",
        "AF_VSOCK+ -1 Operation not permitted",
    ]


def test_it_changes_no_name_of_the_pod(run: Run) -> None:
    assert "Read-only" in run(shell("echo other > /etc/hostname"), status=1)
    assert run(shell("cat /etc/hostname")) == "shop\n"


def test_a_tree_too_deep_for_names_is_removed(run: Run) -> None:
    """Before, the next start failed, and so did the pod's end."""
    dig = "i=0; while [ $i -lt 1500 ]; do mkdir d && cd d || exit 1; i=$((i+1)); done"
    assert run(shell(dig)) == ""
    assert run(shell("test ! -e /d")) == ""
