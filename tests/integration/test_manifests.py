"""What manifests ask for is there: volumes, security, variables, probes, hooks, sidecars."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.pods import control

from .commands import TESTBED, run, workload
from .sockets import wait_until

pytestmark = pytest.mark.root

Write = Callable[..., Path]


def log(pod: str, name: str) -> str:
    return Path(workload(pod, name)["log"]).read_text()


def states(pod: str) -> dict[str, str]:
    return {w["name"]: w["state"] for w in control.status(pod)["workloads"]}


def test_containers_share_volumes_in_the_users_and_groups_that_they_are_given(
    manifest: Write, name: str
) -> None:
    file = manifest(
        """
        - name: reader
          image: busybox
          command: [sh, -c, "cat /in/word; touch /in/x || stat -c '%u %g' /in/word; sleep 99"]
          volumeMounts: [{name: data, mountPath: /in, readOnly: true}]
        """,
        """
        securityContext: {runAsUser: 1000, runAsGroup: 3000, fsGroup: 2000}
        volumes: [{name: data, emptyDir: {}}]
        initContainers:
        - {name: writer, image: busybox, command: [sh, -c, "echo hello > /out/word; id"],
           volumeMounts: [{name: data, mountPath: /out}]}
        """,
        runtime="container",
    )
    run("up", file)
    assert log(name, "writer") == "uid=1000 gid=3000 groups=2000\n"
    wait_until(lambda: log(name, "reader").count("\n") == 3, "the reader has read")
    assert sorted(log(name, "reader").splitlines()) == [
        "1000 2000",
        "hello",
        "touch: /in/x: Read-only file system",
    ]


def test_a_container_may_what_its_security_context_says(manifest: Write, name: str) -> None:
    file = manifest(
        """
        - name: least
          image: busybox
          command: [sh, -c, "grep -E 'CapBnd|NoNew' /proc/self/status; touch /x; sleep 99"]
          securityContext: {readOnlyRootFilesystem: true, allowPrivilegeEscalation: false,
                            capabilities: {drop: [ALL], add: [NET_BIND_SERVICE]}}
        - name: more
          image: busybox
          command: [sh, -c, "grep CapEff /proc/self/status; sleep 99"]
          securityContext: {capabilities: {add: [NET_ADMIN], drop: [CHOWN]}}
        """,
        runtime="container",
    )
    run("up", file)
    wait_until(lambda: log(name, "least").count("\n") == 3, "it has looked")
    bound, no_new, touched = sorted(log(name, "least").splitlines())
    assert bound.split() == ["CapBnd:", f"{1 << 10:016x}"]
    assert no_new.split() == ["NoNewPrivs:", "1"]
    assert "Read-only file system" in touched
    wait_until(lambda: "CapEff" in log(name, "more"), "the other has looked")
    assert log(name, "more").split() == ["CapEff:", f"{0xA80425FB & ~1 | 1 << 12:016x}"]


def test_containers_of_a_pod_share_processes_if_it_says_so(manifest: Write, name: str) -> None:
    file = manifest(
        """
        - {name: server, image: busybox, command: [sleep, "1234"]}
        - {name: shell, image: busybox, command: [sh, -c, "sleep 0.1 & exec sleep 99"]}
        """,
        "shareProcessNamespace: true",
        runtime="container",
    )
    run("up", file)
    seen = run("exec", name, "-c", "shell", "--", "ps").stdout
    [pid] = [line.split()[0] for line in seen.splitlines() if line.endswith("sleep 1234")]
    run("exec", name, "-c", "shell", "--", "kill", "-KILL", pid)
    wait_until(lambda: workload(name, "server")["restarts"] == 1, "it is started again")
    os.kill(workload(name, "pause")["pid"], signal.SIGKILL)
    wait_until(lambda: workload(name, "shell")["restarts"] >= 1, "all ended with the namespace")
    wait_until(lambda: control.status(name)["ready"], "all are there again", 30)


@pytest.mark.parametrize(
    ("context", "fault"),
    [
        ("{runAsNonRoot: true}", "'a' is to run as another user than root"),
        ("{capabilities: {add: [SYS_ADMIN]}}", "'a' cannot get the capability SYS_ADMIN"),
    ],
)
def test_what_a_container_cannot_be_is_refused(
    manifest: Write, name: str, context: str, fault: str
) -> None:
    containers = f"- {{name: a, image: busybox, securityContext: {context}}}"
    refused = run("up", manifest(containers, runtime="container"), status=3)
    assert fault in refused.stderr
    assert name not in control.names()


@pytest.mark.parametrize("runtime", ["process", "standin", "wasm", "linux"])
def test_only_containers_have_volumes(manifest: Write, name: str, runtime: str) -> None:
    containers = "- {name: a, image: 'host:sh', volumeMounts: [{name: b, mountPath: /b}]}"
    file = manifest(containers, "volumes: [{name: b, emptyDir: {}}]", runtime=runtime)
    refused = run("up", file, status=3)
    assert f"'a' has volumeMounts, which {runtime} cannot give it" in refused.stderr


def test_a_program_is_told_its_pods_address(manifest: Write, name: str) -> None:
    file = manifest("""
        - name: a
          image: host:sh
          args: [-c, 'echo $IP $0; sleep 99', $(IP)]
          env: [{name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]
    """)
    run("up", file)
    address, *_ = control.status(name)["addresses"]
    wait_until(lambda: log(name, "a") == f"{address} {address}\n", "it says its address")


def test_a_pod_without_an_address_cannot_tell_it(
    manifest: Write, name: str, tmp_path: Path
) -> None:
    """On a machine without nftables."""
    for folder in map(Path, ("/usr/bin", "/usr/sbin")):
        for program in folder.iterdir():
            if program.name != "nft" and not (tmp_path / "bin" / program.name).is_symlink():
                (tmp_path / "bin").mkdir(exist_ok=True)
                (tmp_path / "bin" / program.name).symlink_to(program)
    file = manifest("""
        - name: a
          image: host:sleep
          args: ["99"]
          env: [{name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]
    """)
    env = {**os.environ, "PATH": str(tmp_path / "bin")}
    refused = subprocess.run([*TESTBED, "up", file], env=env, capture_output=True, text=True)
    assert refused.returncode == 3
    assert "the pod has no status.podIP, which a variable asks for" in refused.stderr
    assert name not in control.names()


def test_nothing_is_asked_before_the_startup_probe_succeeds(
    manifest: Write, name: str, tmp_path: Path
) -> None:
    """And who does not start in time is started again."""
    file = manifest(f"""
        - name: slow
          image: host:sh
          args: [-c, "echo run >> {tmp_path}/runs; exec sleep 1000"]
          startupProbe: {{exec: {{command: [test, -e, {tmp_path}/started]}}, periodSeconds: 1,
                         failureThreshold: 2}}
          readinessProbe: {{exec: {{command: [touch, {tmp_path}/asked]}}}}
    """)
    subprocess.run([*TESTBED, "up", file, "--wait=1"], check=False)
    wait_until(lambda: workload(name, "slow")["restarts"] >= 1, "it is started again")
    assert not (tmp_path / "asked").exists()
    assert any("startup probe failed" in e for e in control.describe(name)["events"])
    (tmp_path / "started").touch()
    wait_until(lambda: workload(name, "slow")["ready"], "it is ready")
    assert (tmp_path / "asked").exists()


def test_a_probe_sends_the_headers_that_it_is_given(
    manifest: Write, name: str, tmp_path: Path
) -> None:
    server = tmp_path / "server.py"
    server.write_text(
        "import http.server\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        given = self.headers.get_all('Host'), self.headers['X-Ask']\n"
        "        self.send_response(200 if given == (['shop'], 'are you well?') else 500)\n"
        "        self.end_headers()\n"
        "http.server.HTTPServer(('', 8080), Handler).serve_forever()\n"
    )
    file = manifest(f"""
        - name: web
          image: "host:"
          command: [{sys.executable}, {server}]
          readinessProbe: {{httpGet: {{port: 8080, httpHeaders: [
            {{name: Host, value: shop}}, {{name: X-Ask, value: "are you well?"}}]}}}}
    """)
    run("up", file)


def test_hooks_run_after_the_start_and_before_the_end(
    manifest: Write, name: str, tmp_path: Path
) -> None:
    file = manifest(f"""
        - name: a
          image: host:sleep
          args: ["1000"]
          lifecycle:
            postStart: {{exec: {{command: [mkdir, {tmp_path}/started]}}}}
            preStop: {{exec: {{command: [sh, -c, "pgrep sleep && mkdir {tmp_path}/ending"]}}}}
    """)
    run("up", file)
    assert (tmp_path / "started").exists()
    assert not (tmp_path / "ending").exists()
    run("down", name)
    assert (tmp_path / "ending").exists()


def test_a_workload_whose_hook_fails_is_ended(manifest: Write, name: str) -> None:
    file = manifest("""
        - {name: a, image: "host:sleep", args: ["1000"],
           lifecycle: {postStart: {exec: {command: ["false"]}}}}
    """)
    subprocess.run([*TESTBED, "up", file, "--wait=1"], check=False)
    wait_until(lambda: workload(name, "a")["restarts"] >= 1, "it is started again")
    assert any("postStart hook failed" in e for e in control.describe(name)["events"])


def test_a_sidecar_starts_before_the_next_and_ends_after_the_last(
    manifest: Write, name: str, tmp_path: Path
) -> None:
    file = manifest(
        f"""
        - name: main
          image: host:sh
          workingDir: {tmp_path}
          args: [-c, "test -e next && until test -e end; do sleep 0.1; done"]
        """,
        f"""
        restartPolicy: Never
        initContainers:
        - {{name: side, image: "host:sh", restartPolicy: Always,
           args: [-c, "sleep 0.5; touch {tmp_path}/up; exec sleep 1000"],
           startupProbe: {{exec: {{command: [test, -e, {tmp_path}/up]}}, periodSeconds: 1}}}}
        - {{name: next, image: "host:sh", workingDir: {tmp_path},
           args: [-c, "test -e up && touch next"]}}
        """,
    )
    run("up", file)
    assert states(name) == {"next": "completed", "side": "running", "main": "running"}
    (tmp_path / "end").touch()
    wait_until(lambda: set(states(name).values()) == {"completed"}, "all have ended")
    assert workload(name, "side")["restarts"] == 0


def test_a_sidecar_is_started_again_whatever_the_policy_is(manifest: Write, name: str) -> None:
    file = manifest(
        '- {name: main, image: "host:sleep", args: ["1000"]}',
        """
        restartPolicy: Never
        initContainers: [{name: side, image: "host:false", restartPolicy: Always}]
        """,
    )
    subprocess.run([*TESTBED, "up", file, "--wait=1"], check=False)
    wait_until(lambda: workload(name, "side")["restarts"] >= 1, "it is started again")


@pytest.mark.parametrize("runtime", ["process", "standin"])
def test_a_listed_port_that_nobody_serves_is_told_and_no_failure(
    manifest: Write, name: str, runtime: str
) -> None:
    containers = '- {name: a, image: "host:sleep", args: ["99"], ports: [{containerPort: 99}]}'
    told = run("up", manifest(containers, runtime=runtime)).stderr
    assert f"{name}: a lists port 99/tcp, and nobody serves it" in told


def test_an_image_is_what_the_user_says(manifest: Write, name: str) -> None:
    file = manifest("- {name: a, image: 'shop.example/a:1', args: [sleep, '99']}")
    unused = ("--image", "shop.example/b=host:busybox")
    told = run("up", file, "--image", "shop.example/a=host:busybox", *unused).stderr
    assert workload(name, "a")["ready"]
    assert told == "testbed: --image shop.example/b: no container has this image\n"


def test_files_and_standard_input_are_several_pods(manifest: Write, name: str) -> None:
    one = manifest('- {name: a, image: "host:sleep", args: ["99"]}')
    other = one.read_text().replace(name, f"{name}-two")
    command = [*TESTBED, "up", str(one), "-"]
    try:
        subprocess.run(command, input=other, text=True, check=True)
        assert {name, f"{name}-two"} <= set(control.names())
    finally:
        run("down", f"{name}-two")


def test_down_takes_all_pods_of_a_machine(manifest: Write, name: str) -> None:
    """In namespaces of its own, which are a machine without other pods."""
    file = manifest('- {name: a, image: "host:sleep", args: ["99"]}')
    testbed = " ".join(TESTBED)
    script = f"""
        mount -t tmpfs none /run/testbed && mount -t tmpfs none /run/netns
        {testbed} up {file} && {testbed} down --all && {testbed} down --all
    """
    command = ["unshare", "--net", "--mount", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = [f"pod {name} is up", f"pod {name} is down", "no pod is up"]
    assert done.stdout.splitlines() == told, done.stderr
    refused = run("down", "--all", name, status=3)
    assert "either names of pods or --all" in refused.stderr


def test_a_command_gets_a_terminal_of_its_own(manifest: Write, name: str) -> None:
    run("up", manifest("- {name: a, image: busybox, args: [sleep, '99']}", runtime="container"))
    ours, theirs = os.openpty()
    command = [*TESTBED, "exec", "-it", name, "--", "tty"]
    done = subprocess.run(command, stdin=theirs, stdout=theirs, check=True)
    assert done.returncode == 0
    assert os.read(ours, 100).split() == [b"/dev/pts/0"]
    os.close(ours)
    os.close(theirs)
    piped = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    assert "standard input is no terminal" in piped.stderr
