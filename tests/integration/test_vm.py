"""Guests in virtual machines: they run OCI images, and end with the status of their program."""

from __future__ import annotations

import gc
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from testbed import runtimes
from testbed.host import cache
from testbed.images import kernels, rootfs
from testbed.model.addresses import loopback
from testbed.model.manifest import Program, Workload
from testbed.model.terms import Family, Runtime
from testbed.pods import control
from testbed.runtimes import osv
from testbed.runtimes.interface import Options, Placement

from . import oci
from .commands import TESTBED, run, workload
from .sockets import wait_until

pytestmark = pytest.mark.root

Write = Callable[..., Path]

CLIENT = {"client": "container"}

SERVER = r"""
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

int own(void);

int main(int argc, char **argv)
{
    struct sockaddr_in name = { .sin_family = AF_INET, .sin_port = htons(atoi(argv[argc - 1])) };
    int listener = socket(AF_INET, SOCK_STREAM, 0), n = own();

    if (bind(listener, (struct sockaddr *)&name, sizeof(name)) || listen(listener, 9))
        return 1;
    for (;;) {
        int fd = accept(listener, NULL, NULL);

        dprintf(fd, "%d %s %s %s %d:%d\n", n, getenv("WHO"), getenv("WHERE"), getcwd(NULL, 0),
                getuid(), getgid());
        close(fd);
    }
}
"""
ENDS = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    if (!strcmp(argv[1], "silent"))
        return 6;
    if (!strcmp(argv[1], "buffers") || !strcmp(argv[1], "buffers-and-exits")) {
        setvbuf(stdout, malloc(1 << 16), _IOFBF, 1 << 16);
        for (int i = 1; i <= 300; i++)
            printf("line %d\n", i);
        if (argv[1][strlen("buffers")])
            exit(0);
        return 0;
    }
    printf("no newline");
    fflush(stdout);
    if (!strcmp(argv[1], "exit"))
        exit(3);
    if (!strcmp(argv[1], "quick"))
        _exit(4);
    if (!strcmp(argv[1], "abort"))
        abort();
    if (!strcmp(argv[1], "crash"))
        *(volatile int *)NULL = 0;
    return atoi(argv[1]);
}
"""

NAMES_C = r"""
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <netinet/in.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct addrinfo *list, wanted = { .ai_family = AF_INET, .ai_socktype = SOCK_STREAM };
    struct sockaddr_in name = { .sin_family = AF_INET, .sin_port = htons(atoi(argv[2])) };
    int listener = socket(AF_INET, SOCK_STREAM, 0), client = socket(AF_INET, SOCK_STREAM, 0);
    char got[9] = "";

    if (bind(listener, (struct sockaddr *)&name, sizeof(name)) || listen(listener, 9) ||
        getaddrinfo("localhost", argv[1], &wanted, &list) ||
        connect(client, list->ai_addr, list->ai_addrlen) || read(client, got, 8) < 0)
        return 1;
    for (;;) {
        int fd = accept(listener, NULL, NULL);

        dprintf(fd, "got %s\n", got);
        close(fd);
    }
}
"""
NAMES_GO = r"""
package main

import ("fmt"; "io"; "net"; "os")

func main() {
    listener, _ := net.Listen("tcp4", ":" + os.Args[2])
    client, err := net.Dial("tcp", "localhost:" + os.Args[1])
    if err != nil { os.Exit(1) }
    got, _ := io.ReadAll(client)
    for {
        connection, _ := listener.Accept()
        fmt.Fprintf(connection, "got %s\n", got)
        connection.Close()
    }
}
"""
OF_GO = r"""
__asm__(".section .note.go.buildid,\"a\",@note\n.balign 4\n"
        ".long 4,4,4\n.asciz \"Go\\0\"\n.ascii \"abcd\"\n.text");

int main(void)
{
    return 0;
}
"""


@dataclass(frozen=True)
class Kind:
    """A runtime of virtual machines."""

    runtime: str
    has_users: bool
    families: int = 2


@pytest.fixture(params=["linux", "ipv6", "master"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kind:
    """Linux, or OSv with a kernel of a flavor."""
    if request.param == "linux":
        return Kind("linux", has_users=True)
    kernel = kernels.find_osv(flavor=request.param, download=False)
    if kernel is None or kernel.path.parent.name != f"osv-{request.param}":
        pytest.skip(f"no OSv kernel of flavor {request.param} in the cache")
    monkeypatch.setenv("TESTBED_OSV_KERNEL", str(kernel.path))
    return Kind("osv", has_users=False, families=2 if request.param == "ipv6" else 1)


def compiled(source: str, program: Path, *options: str | Path) -> Path:
    command = ["cc", "-xc", "-", "-xnone", "-o", program, *options]
    subprocess.run(command, input=source, text=True, check=True)
    return program


@pytest.fixture
def image(tmp_path: Path) -> str:
    """An image with folders as Debian has them, that runs a server in /data as another user."""
    shared = ("-shared", "-fPIC", "-Wl,-soname,libown.so")
    library = compiled("int own(void) { return 7; }", tmp_path / "libown.so", *shared)
    found = f"-Wl,-rpath,{tmp_path}"
    program = compiled(SERVER, tmp_path / "server", "-pie", "-fPIE", library, found)
    root = tmp_path / "root"
    shutil.copytree(rootfs.of_programs([program], {}, ()).path, root, symlinks=True)
    shutil.rmtree(root / "bin")
    (root / "bin").symlink_to("usr/bin")
    folder = root / f"usr/lib/{platform.machine()}-linux-gnu"
    folder.mkdir()
    (root / "usr/lib/libown.so").rename(folder / "libown.so")
    (root / "data").mkdir()
    (root / "init").write_text("not for guests\n")
    return oci.image(
        tmp_path / "layout",
        root,
        *("entrypoint=server", "cmd=8080", "env=WHO=Ada", "env=WHERE=image"),
        *("workingdir=/data", "user=7:8"),
    )


def test_an_oci_image_is_a_guest_of_the_pod(
    manifest: Write, name: str, image: str, kind: Kind
) -> None:
    file = manifest(
        f"""
        - {{name: plain, image: '{image}', ports: [{{containerPort: 8080}}]}}
        - name: changed
          image: '{image}'
          args: [one, two, '8082']
          env: [{{name: WHERE, value: "the man'ifest"}}]
          workingDir: /srv/a/b
          ports: [{{containerPort: 8082}}]
          {"securityContext: {runAsUser: 9}" if kind.has_users else ""}
        - {{name: client, image: 'host:', command: [sleep, '999']}}
        """,
        runtime=kind.runtime,
        runtimes=CLIENT,
    )
    run("up", file)
    assert len(workload(name, "plain")["addresses"]) == kind.families
    users = ("7:8", "9:0") if kind.has_users else ("0:0", "0:0")
    for port, told in (
        (8080, f"7 Ada image /data {users[0]}"),
        (8082, f"7 Ada the man'ifest /srv/a/b {users[1]}"),
    ):
        ask = ("nc", "-w", "5", str(loopback(Family.IPV4)), str(port))
        assert run("exec", name, "-c", "client", "--", *ask).stdout == f"{told}\n"


def test_a_guest_ends_with_the_status_of_its_program(
    manifest: Write, name: str, kind: Kind, tmp_path: Path
) -> None:
    program = compiled(ENDS, tmp_path / "ends", "-pie", "-fPIE")
    statuses = {"0": 0, "5": 5, "exit": 3, "quick": 4, "abort": 134, "crash": 139}
    containers = of_words(program, statuses)
    if kind.runtime == "osv":  # which calls a `main` that is exported
        exported = compiled(ENDS, tmp_path / "exported", "-pie", "-fPIE", "-rdynamic")
        containers += f"\n- {{name: of-exported, image: 'host:{exported}', args: ['0']}}"
        statuses["exported"] = 0
    run("up", manifest(containers, "restartPolicy: OnFailure", runtime=kind.runtime))
    for word, status in statuses.items():
        wait_until(partial(ended, name, f"of-{word}"), f"{word} ends", 90)
        assert workload(name, f"of-{word}")["exit_status"] == status
    wait_until(lambda: workload(name, "of-5")["restarts"], "it is started again", 60)
    assert workload(name, "of-0")["state"] == "completed"
    assert "of-5: ended with status 5" in " ".join(control.describe(name)["events"])


def test_what_a_program_wrote_is_logged_and_its_last_line_is_told(
    manifest: Write, name: str, kind: Kind, tmp_path: Path
) -> None:
    """Not what its kernel wrote."""
    program = compiled(ENDS, tmp_path / "ends", "-pie", "-fPIE")
    never_ready = "readinessProbe: {tcpSocket: {port: 1}}"
    words = ("silent", "5", "buffers", "buffers-and-exits")
    containers = of_words(program, words, never_ready)
    file = manifest(containers, "restartPolicy: Never", runtime=kind.runtime)
    told = run("up", file, "--wait", "200", status=1).stderr
    assert f"{name}: of-silent is not ready (failed, exit status 6); see" in told
    assert f"{name}: of-5 is not ready (failed, exit status 5, last said: no newline); see" in told
    for word in ("buffers", "buffers-and-exits"):
        lines = run("logs", name, "-c", f"of-{word}").stdout.splitlines()
        assert [line for line in lines if line.startswith("line")] == [
            f"line {i}" for i in range(1, 301)
        ]


@pytest.fixture
def guest_of_own_cache(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Workload]:
    """A program, and a guest that runs it. The cache, where its image will be, is new.

    `kind` comes first: its kernel is in the usual cache.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    program = compiled(ENDS, tmp_path / "ends", "-pie", "-fPIE")
    return program, Workload("guest", Runtime.OSV, program=Program(f"host:{program}"))


@pytest.mark.parametrize("kind", ["ipv6"], indirect=True)
def test_the_status_of_a_guest_is_told_without_its_program_and_image(
    kind: Kind, tmp_path: Path, guest_of_own_cache: tuple[Path, Workload]
) -> None:
    """They may be gone by the time the guest ends."""
    assert kind.runtime == "osv"
    program, guest = guest_of_own_cache
    osv = runtimes.prepare(Runtime.OSV, Options())
    osv.compose(guest)
    program.unlink()
    shutil.rmtree(cache.cache_folder() / "images")
    console = tmp_path / "console"
    place = Placement(guest, 1, "", "tap", tmp_path, console, tmp_path)
    for told, status in (
        ("", 137),
        ("guest ends: status 3\r\n", 3),
        ("Aborted\r\n\r\n[backtrace]\r\n", 134),
    ):
        console.write_text(told)
        assert osv.exit_status(place, 0) == status
        assert osv.exit_status(place, 9) == 9


@pytest.mark.parametrize("kind", ["ipv6"], indirect=True)
@pytest.mark.parametrize("has_shim", [True, False])
def test_what_osv_does_to_a_program_is_told(kind: Kind, has_shim: bool, tmp_path: Path) -> None:
    assert kind.runtime == "osv"
    compiled(OF_GO, tmp_path / "go-with-libc")
    compiled(OF_GO, tmp_path / "go-static", "-static")
    told: list[str] = []
    osv = runtimes.prepare(Runtime.OSV, Options(say=told.append))
    for program in ("go-with-libc", "go-static"):
        definition = tmp_path / f"{program}.toml"
        definition.write_text(f'program = "{program}"\nshim = {str(has_shim).lower()}\n')
        osv.compose(Workload(program, Runtime.OSV, program=Program(str(definition))))
    assert [line.partition(",")[0] for line in told if "crash" in line] == [
        "go-with-libc: Go programs that need libc"
    ]
    unreached = [line for line in told if line.startswith("go-static: the shim does not reach")]
    assert len(unreached) == has_shim


@pytest.mark.parametrize("kind", ["ipv6"], indirect=True)
def test_the_image_of_a_pod_stays_in_the_cache_however_old_it_is(
    kind: Kind, guest_of_own_cache: tuple[Path, Workload]
) -> None:
    """A guest that is started again needs it, and what it was made of may be gone."""
    assert kind.runtime == "osv"
    _, guest = guest_of_own_cache

    def compose_others() -> list[Path]:
        """What another process does, a week later."""
        code = """if True:
            from testbed.images import compose
            compose.compose_osv(compose.load(compose.AGENT))"""
        for image in (cache.cache_folder() / "images").iterdir():
            os.utime(image, (0, 0))
        subprocess.run([sys.executable, "-c", code], check=True)
        return list((cache.cache_folder() / "images").iterdir())

    prepared = runtimes.prepare(Runtime.OSV, Options())
    prepared.compose(guest)
    assert len(compose_others()) == 2
    del prepared
    gc.collect()
    assert len(compose_others()) == 1


@pytest.fixture(params=["c-static", "c-static-pie", "go"])
def static_program(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A program that calls no libc by a library."""
    program: Path = tmp_path / request.param
    if request.param != "go":
        return compiled(NAMES_C, program, f"-{request.param.removeprefix('c-')}")
    go = shutil.which("go")
    if go is None:
        pytest.skip("no Go compiler")
    (tmp_path / "go.go").write_text(NAMES_GO)
    env = {**os.environ, "HOME": str(tmp_path), "CGO_ENABLED": "0"}
    subprocess.run([go, "build", "-o", program, tmp_path / "go.go"], env=env, check=True)
    return program


DEEP = r"""
#include <stdio.h>
#include <stdlib.h>

static int fall(int depth)
{
    return depth ? fall(depth - 1) + 1 : *(volatile int *)NULL;
}

int main(int argc, char **argv)
{
    puts("up");
    fflush(stdout);
    return argc > 1 ? fall(atoi(argv[1])) : 0;
}
"""


@pytest.mark.parametrize("kind", ["ipv6", "master"], indirect=True)
def test_a_static_program_that_crashes_deep_in_its_stack_has_failed(
    manifest: Write, name: str, kind: Kind, tmp_path: Path
) -> None:
    """OSv prints more than 4 KiB of stack frames at the end of the console."""
    program = compiled(DEEP, tmp_path / "deep", "-static", "-O0")
    file = manifest(
        f"""
        - {{name: deep, image: 'host:{program}', args: ['500']}}
        - {{name: well, image: 'host:{program}'}}
        """,
        "restartPolicy: Never",
        runtime=kind.runtime,
    )
    run("up", file)
    for guest, status in (("deep", 139), ("well", 0)):
        wait_until(partial(ended, name, guest), f"{guest} ends", 60)
        assert workload(name, guest)["exit_status"] == status


BOOT = "OSv v0.57.0\neth0: 169.254.78.1\nBooted up in 0.00 ms\n"
UPS = "up\n" * 99_999


@pytest.mark.parametrize("kind", ["ipv6", "master"], indirect=True)
@pytest.mark.parametrize(
    ("console", "status"),
    [
        ("", 137),
        (f"{BOOT}Cmdline: \nThis image has an empty command line. Nothing to run.\n", 137),
        (f'{BOOT}Cmdline: "/deep"\nFailed to load object: /deep. Powering off.\n', 137),
        (f'{BOOT}Cmdline: "/deep"\nup\n', 0),
        (f'{BOOT}Cmdline: "/deep"\n{UPS}', 0),
    ],
    ids=["silent", "no-command", "not-loaded", "well", "much"],
)
def test_a_static_program_ended_well_only_if_osv_started_it(
    kind: Kind, tmp_path: Path, console: str, status: int
) -> None:
    """Consoles as these kernels print them."""
    prepared = runtimes.prepare(Runtime.OSV, Options())
    program = compiled(DEEP, tmp_path / "deep", "-static")
    guest = Workload("deep", Runtime.OSV, program=Program(f"host:{program}"))
    prepared.compose(guest)
    (tmp_path / "console").write_text(console)
    place = Placement(guest, 1, "", "", tmp_path, tmp_path / "console", tmp_path)
    assert prepared.exit_status(place, 0) == status


@pytest.mark.parametrize("kind", ["ipv6", "master"], indirect=True)
def test_a_command_line_that_osv_does_not_take_is_refused_and_the_longest_arrives(
    manifest: Write, name: str, kind: Kind, tmp_path: Path
) -> None:
    program = compiled("int main(int n, char **v) { return n; }", tmp_path / "count", "-pie")

    def with_variable(size: int) -> Path:
        text = f"""
        - name: count
          image: 'host:{program}'
          args: [one, two]
          env: [{{name: BIG, value: {"x" * size}}}]
        """
        return manifest(text, "restartPolicy: Never", runtime=kind.runtime)

    longest = osv.MAX_PROGRAM_BYTES - len('--env=BIG= "/count" "one" "two"')
    refused = subprocess.run(
        [*TESTBED, "up", with_variable(longest + 1)], capture_output=True, text=True, check=False
    )
    assert refused.returncode
    assert "command and variables of /count have 3001 bytes, more than the 3000" in refused.stderr
    run("up", with_variable(longest))
    wait_until(partial(ended, name, "count"), "it ends", 60)
    assert workload(name, "count")["exit_status"] == 3


def test_a_static_program_dials_localhost_by_name_and_is_dialed(
    manifest: Write, name: str, kind: Kind, static_program: Path
) -> None:
    file = manifest(
        f"""
        - {{name: client, image: 'host:', command: [sh, -c, 'nc -ll -p 8000 -e echo -n native']}}
        - name: static
          image: 'host:{static_program}'
          args: ['8000', '8001']
          ports: [{{containerPort: 8001}}]
        """,
        runtime=kind.runtime,
        runtimes=CLIENT,
    )
    told = run("up", file).stderr
    ask = ("nc", "-w", "5", str(loopback(Family.IPV4)), "8001")
    assert run("exec", name, "-c", "client", "--", *ask).stdout == "got native\n"
    assert ("static: the shim does not reach" in told) is (kind.runtime == "osv")


@pytest.mark.parametrize("kind", ["ipv6", "master"], indirect=True)
def test_python_serves_with_its_library(manifest: Write, name: str, kind: Kind) -> None:
    """A program at a fixed address, in Debian 12, and modules that it opens."""
    file = manifest(
        """
        - {name: python, image: python, ports: [{containerPort: 8080}]}
        - {name: client, image: 'host:', command: [sleep, '999']}
        """,
        runtime=kind.runtime,
        runtimes=CLIENT,
    )
    run("up", file)
    command = [*TESTBED, "exec", name, "-c", "client", "--", "wget", "-qO-"]

    def answers() -> bool:
        asked = [*command, f"http://{loopback(Family.IPV4)}:8080/etc/hosts"]
        return "localhost" in subprocess.run(asked, capture_output=True, text=True).stdout

    wait_until(answers, "it serves", 90)


def test_what_is_wrong_with_a_linux_guest_is_said(manifest: Write, name: str) -> None:
    file = manifest("- {name: a, image: 'host:', command: [/app/nosuch]}", runtime="linux")
    assert "the image has no program /app/nosuch" in run("up", file, status=3).stderr
    deaf = "hostname; ip link set eth0 down; exec sleep 999"
    file = manifest(
        f"""
        - name: a
          image: 'host:'
          args: [sh, -c, '{deaf}']
          ports: [{{containerPort: 7000}}]
        """,
        "hostname: shop",
        runtime="linux",
    )
    assert (
        "a is not ready (running, no answer at 7000/tcp yet"
        in run("up", file, "--wait=3", status=1).stderr
    )
    log = Path(workload(name, "a")["log"])
    wait_until(lambda: "shop" in log.read_text().splitlines(), "it says its name", 60)
    refused = run("exec", name, "--", "ls", status=3).stderr
    assert refused.endswith(f"see what it prints: testbed logs {name} -c a\n")


@pytest.mark.parametrize("kind", ["ipv6", "master"], indirect=True)
def test_all_functions_that_osv_lacks_are_listed(
    manifest: Write, name: str, kind: Kind, tmp_path: Path
) -> None:
    source = "int main(void) { return mq_getattr(0, 0) + setns(0, 0); }"
    compiled(f"int mq_getattr(), setns(); {source}", tmp_path / "calls")
    (tmp_path / "calls.toml").write_text('program = "calls"\n')
    built = run("image", "build", tmp_path / "calls.toml", "-o", tmp_path / "calls.img").stdout
    assert re.search(r"^functions that OSv v\S+ lacks: mq_getattr setns$", built, re.MULTILINE)
    file = manifest(f"- {{name: a, image: {tmp_path}/calls.toml}}", runtime=kind.runtime)
    run("up", file)
    wait_until(partial(ended, name, "a"), "it ends", 60)
    assert workload(name, "a")["exit_status"] == 127


def test_a_guest_that_tells_no_status_has_failed(manifest: Write, name: str) -> None:
    file = manifest(
        """
        - {name: panics, image: 'host:', args: [sh, -c, echo c > /proc/sysrq-trigger]}
        - {name: writes, image: 'host:', args: [sh, -c, echo a > /dev/stdout && cat && exit 6]}
        """,
        "restartPolicy: Never",
        runtime="linux",
    )
    run("up", file)
    for guest, status in (("panics", 137), ("writes", 6)):
        wait_until(partial(ended, name, guest), f"{guest} ends", 60)
        assert workload(name, guest)["exit_status"] == status


def of_words(program: Path, words: Iterable[str], more: str = "") -> str:
    """Containers of the program, each with a word as its argument, and `more` fields."""
    return "\n".join(
        f"- {{name: of-{word}, image: 'host:{program}', args: ['{word}'], {more}}}"
        for word in words
    )


def ended(pod: str, guest: str) -> bool:
    return workload(pod, guest)["exit_status"] is not None
