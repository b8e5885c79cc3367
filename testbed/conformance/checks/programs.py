"""Checks with unmodified programs such as curl, nginx and PostgreSQL, natively and in stand-ins.

Other guests run only the traffic agent, so these checks are unsupported there. If this host
lacks a program, the reason says how to install it.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from testbed.conformance.bed import Bed
from testbed.conformance.check import BOTH, EVERY, NATIVE_SERVER, Unsupported, check, expect
from testbed.host import namespaces, process
from testbed.images import compose
from testbed.model.addresses import authority, guest_link
from testbed.model.terms import Runtime

PACKAGES = {
    "curl": "curl",
    "dig": "bind9-dnsutils",
    "dnsmasq": "dnsmasq-base",
    "initdb": "postgresql",
    "iperf3": "iperf3",
    "nginx": "nginx-light",
    "postgres": "postgresql",
    "psql": "postgresql-client",
    "python3": "python3",
    "redis-benchmark": "redis-tools",
    "redis-server": "redis-server",
    "wrk": "wrk",
}
"""Program → package of Debian 12."""
FOLDERS = os.pathsep.join(
    (
        os.defpath,
        "/usr/sbin",
        "/usr/local/bin",
        *map(str, Path("/usr/lib/postgresql").glob("*/bin")),
    )
)
RUN_S = 30.0


def find(name: str) -> str:
    """Path of a program. Raises `Unsupported`, with the command that installs it."""
    found = shutil.which(name, path=FOLDERS)
    if found is None:
        raise Unsupported(f"no {name} on this host: apt install {PACKAGES[name]}")
    return found


def spawn(bed: Bed, name: str, argv: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
    """Start a program in a workload's namespace and cgroup."""
    stage = bed.own_pod
    pod = stage.pod
    if bed.case.pair is not bed.pair:
        raise Unsupported("a component of WASI runs nothing but itself")
    is_guest = pod.number_of(name) is not None
    if is_guest and stage.runtime is not Runtime.STANDIN:
        raise Unsupported(f"a guest of {stage.guest} runs the traffic agent alone")
    return process.spawn(
        argv,
        cgroup=pod.cgroup.parent / "guests" if is_guest else pod.cgroup,
        netns=stage.guest_netns(name) if is_guest else pod.netns,
        binds={compose.hosts_file(patched=is_guest): "/etc/hosts"},
        output=output,
    )


@contextmanager
def serving(
    bed: Bed, argv: Sequence[str], folder: Path, port: int = 0, says: str = ""
) -> Iterator[None]:
    """Run a server program in the server's place. It is ended at the end.

    It is ready when one more socket is bound to its port, and its output contains `says`.
    """
    output, port = folder / "server.log", port or bed.port
    before = _bound(bed, port)  # the datapath may serve the port at another address
    running = spawn(bed, bed.server_name, argv, output)
    try:
        deadline = time.monotonic() + RUN_S
        while not (_bound(bed, port) > before and says in output.read_text()):
            if running.poll() is not None or time.monotonic() > deadline:
                raise Unsupported(f"{Path(argv[0]).name} does not serve: {_last(output)}")
            time.sleep(0.02)
        yield
    finally:
        process.end(running)


def _bound(bed: Bed, port: int) -> int:
    """Number of sockets bound to a port, by /proc/net. A connection would disturb the server."""
    is_guest = bed.own_pod.pod.number_of(bed.server_name) is not None
    netns = bed.stage.guest_netns(bed.server_name) if is_guest else bed.stage.netns
    kinds = (f"{bed.transport}", f"{bed.transport}6")

    def read() -> list[str]:
        tables = (Path("/proc/thread-self/net", kind).read_text() for kind in kinds)
        return [line for table in tables for line in table.splitlines()[1:]]

    wanted = (f"{port:04X}", "0A" if bed.transport == "tcp" else "07")
    rows = (line.split() for line in namespaces.inside(netns, read))
    bound = [(local.rpartition(":")[2], state) for _, local, _, state, *_ in rows]
    return bound.count(wanted)


def run(bed: Bed, argv: Sequence[str], folder: Path) -> str:
    """Run a client program as the client. Returns its output; fails if its status is not 0."""
    output = folder / "client.log"
    output.write_bytes(b"")
    running = spawn(bed, bed.client_name, argv, output)
    try:
        code = running.wait(RUN_S)
    except subprocess.TimeoutExpired:
        code = -1
    finally:
        process.end(running)
    name = Path(argv[0]).name
    expect(code == 0, f"{name} ended with status {code}: {_last(output)}")
    return output.read_text(errors="replace")


def _last(output: Path) -> str:
    lines = output.read_text(errors="replace").splitlines() if output.exists() else []
    return " | ".join(lines[-3:]) or "nothing printed"


@contextmanager
def folder_of(user: str = "root") -> Iterator[Path]:
    """A temporary folder that belongs to `user`."""
    with tempfile.TemporaryDirectory(prefix="testbed-") as name:
        entry = pwd.getpwnam(user)
        os.chown(name, entry.pw_uid, entry.pw_gid)
        yield Path(name)


def url(bed: Bed) -> str:
    """URL of the server. It has an address, because curl maps the name `localhost` by itself."""
    return f"http://{authority(bed.target, bed.port)}/"


@check("HTTP: http.server and curl")
def http_server_and_curl(bed: Bed) -> None:
    """Python's http.server serves curl a file."""
    python, curl = find("python3"), find("curl")
    with folder_of() as folder:
        (folder / "index.html").write_text("hello from the pod" * 1000)
        at = bed.server.bind_address(bed.family)
        serve = [
            python,
            "-m",
            "http.server",
            str(bed.port),
            "--bind",
            at,
            "--directory",
            str(folder),
        ]
        with serving(bed, serve, folder):
            out = run(bed, [curl, "--silent", "--show-error", "--max-time", "10", url(bed)], folder)
        expect(out == "hello from the pod" * 1000, f"curl got {len(out)} characters")


@check("HTTP: nginx and wrk")
def nginx_and_wrk(bed: Bed) -> None:
    """nginx serves 20 connections of wrk for a second without one error."""
    nginx, wrk = find("nginx"), find("wrk")
    at = bed.server.bind_address(bed.family)
    listen = authority(at, bed.port)
    with folder_of() as folder:
        temporary = "".join(
            f"{kind}_temp_path {folder}/{kind};"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (folder / "nginx.conf").write_text(
            f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;"
            "events { worker_connections 256; }"
            f"http {{ access_log off; {temporary} server {{ listen {listen};"
            ' location / { return 200 "hello"; } } }'
        )
        with serving(bed, [nginx, "-c", str(folder / "nginx.conf")], folder):
            out = run(bed, [wrk, "-t1", "-c20", "-d1s", url(bed)], folder)
        expect("Socket errors" not in out and "Non-2xx" not in out, " | ".join(out.splitlines()))
        expect("requests in" in out, " | ".join(out.splitlines()))


@check("Redis' protected mode: only 127.0.0.1 and ::1 are trusted", pairs=NATIVE_SERVER)
def redis_in_protected_mode(bed: Bed) -> None:
    """redis-server bound to loopback, its protected mode on, serves redis-benchmark."""
    _redis(bed, "yes")


@check("Redis and its benchmark", pairs=EVERY - NATIVE_SERVER)
def redis(bed: Bed) -> None:
    """redis-server in a guest serves redis-benchmark."""
    _redis(bed, "no")


def _redis(bed: Bed, protected: str) -> None:
    server, benchmark = find("redis-server"), find("redis-benchmark")
    with folder_of() as folder:
        argv = [server, "--port", str(bed.port), "--bind", bed.server.bind_address(bed.family)]
        argv += ["--save", "", "--appendonly", "no", "--dir", str(folder)]
        argv += ["--protected-mode", protected]
        with serving(bed, argv, folder):
            ask = [
                benchmark,
                "-h",
                str(bed.target),
                "-p",
                str(bed.port),
                "-n",
                "2000",
                "-c",
                "20",
                "-t",
                "set,get",
                "--csv",
            ]
            out = run(bed, ask, folder)
        expect("DENIED" not in out, "DENIED: the client is not seen as loopback")
        expect('"GET"' in out, f"no result: {' | '.join(out.splitlines()[-3:])}")


@check("pg_hba.conf as initdb writes it: only 127.0.0.1/32 and ::1/128 may in", pairs=NATIVE_SERVER)
def postgresql_as_installed(bed: Bed) -> None:
    """PostgreSQL with its default pg_hba.conf lets psql in at localhost."""
    initdb, postgres, psql = find("initdb"), find("postgres"), find("psql")
    user = "postgres"
    try:
        ids = [f"--reuid={user}", f"--regid={grp.getgrgid(pwd.getpwnam(user).pw_gid).gr_name}"]
    except KeyError as e:
        raise Unsupported("no user postgres on this host: apt install postgresql") from e
    as_user = ["setpriv", *ids, "--clear-groups"]
    with folder_of(user) as folder:
        data = folder / "data"
        made = subprocess.run(
            [*as_user, initdb, "--pgdata", str(data), "--no-sync", "--locale=C", "--encoding=UTF8"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode:
            raise Unsupported(f"initdb: {made.stderr.strip().splitlines()[-1]}")
        argv = [
            *as_user,
            postgres,
            "-D",
            str(data),
            "-p",
            str(bed.port),
            "-c",
            "fsync=off",
            "-h",
            bed.server.bind_address(bed.family),
            "-k",
            str(folder),
        ]
        with serving(bed, argv, folder, says="ready to accept connections"):
            ask = [psql, "-h", str(bed.target), "-p", str(bed.port), "-U", user, "-Atc"]
            out = run(bed, [*ask, "select count(*) from generate_series(1, 100000) x"], folder)
        expect(out.strip() == "100000", f"psql printed {out.strip()!r}")


@check("iperf3, up and down")
def iperf3(bed: Bed) -> None:
    """iperf3 moves bytes both ways."""
    program = find("iperf3")
    with folder_of() as folder:
        at = bed.server.bind_address(bed.family)
        for way in ([], ["--reverse"]):
            with serving(bed, [program, "-s", "-1", "-B", at, "-p", str(bed.port)], folder):
                argv = [program, "-c", str(bed.target), "-p", str(bed.port), "-t", "1", "-J", *way]
                out = json.loads(run(bed, argv, folder))
            expect("error" not in out, f"iperf3 {' '.join(way)}: {out.get('error')}")
            received = out["end"]["sum_received"]["bytes"]
            expect(received > 1_000_000, f"{' '.join(way)} only {received} bytes")


@check("DNS (RFC 1035) over UDP and TCP", transports=BOTH)
def dns_server_and_dig(bed: Bed) -> None:
    """A DNS server answers dig."""
    dnsmasq, dig = find("dnsmasq"), find("dig")
    n = bed.own_pod.pod.number_of(bed.server_name)
    at = guest_link(bed.family, n) if n else bed.loopback  # dnsmasq does not answer at a wildcard
    with folder_of() as folder:
        argv = [
            dnsmasq,
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
            f"--port={bed.port}",
            "--bind-interfaces",
            "--address=/pod.test/192.0.2.7",
            "--user=root",
            f"--pid-file={folder}/pid",
            f"--listen-address={at}",
        ]
        with serving(bed, argv, folder):
            ask = [dig, f"@{bed.target}", "-p", str(bed.port), "+short", "+tries=1", "pod.test"]
            out = run(bed, [*ask, *(["+tcp"] if bed.transport == "tcp" else [])], folder)
        expect(out.strip() == "192.0.2.7", f"dig printed {out.strip()!r}")
