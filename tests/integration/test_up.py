"""Pods by hand: commands, restarts, probes, and what is left when a pod or its supervisor ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.host import ledger, namespaces
from testbed.host.facts import slowness
from testbed.model.addresses import alias
from testbed.model.terms import Family
from testbed.pods import control
from tests.children import ending

from .commands import TESTBED, run, there, workload
from .sockets import wait_until

pytestmark = pytest.mark.root


def test_a_pod_stands_until_it_is_taken_down(manifest: Callable[..., Path], name: str) -> None:
    file = manifest("""
        - name: server
          image: "host:busybox"
          args: [httpd, -f, -p, "8080"]
          ports: [{containerPort: 8080}]
        - {name: sleeper, image: "host:sleep", args: ["1000"]}
    """)
    run("up", file)
    [pod] = [p for p in json.loads(run("ps", "--json").stdout) if p["name"] == name]
    assert pod["ready"]
    assert [(w["name"], w["state"], w["ready"]) for w in pod["workloads"]] == [
        ("server", "running", True),
        ("sleeper", "running", True),
    ]
    assert name in run("ps").stdout
    kept = run("detach", name, status=3).stderr
    assert kept == f"testbed: pod '{name}' was not attached; testbed down {name}\n"
    assert "lo_egress" in run("describe", name).stdout
    refused = run("up", file, status=3)
    assert f"pod '{name}' stands already; testbed down {name}" in refused.stderr
    assert there(name)
    run("down", name)
    assert not there(name)
    assert f"no pod '{name}'" in run("down", name, status=3).stderr


def test_top_tells_what_each_pair_carries(manifest: Callable[..., Path], name: str) -> None:
    file = manifest(
        """
        - name: guest
          image: "host:busybox"
          args: [nc, -ll, -p, "9000", -e, cat]
          ports: [{containerPort: 9000}]
    """,
        runtime="standin",
    )
    run("up", file)
    netns = control.status(name)["netns"]
    stop = threading.Event()

    def talk() -> None:
        with socket.create_connection(("127.0.0.1", 9000)) as connection:
            while not stop.wait(0.01):
                connection.sendall(b"x" * 1000)
                connection.recv(1000)

    talking = threading.Thread(target=lambda: namespaces.inside(netns, talk))
    talking.start()
    try:
        told = json.loads(run("top", name, "--json", "--interval=0.5").stdout)
        rates = {rate["what"]: rate for rate in told}
        assert rates["natives→guest"]["packets_per_s"] > 10
        assert rates["natives→guest"]["bps"] > 8 * 1000
        assert rates["guest→natives"]["packets"] == 0
        assert "natives→guest" in run("top", name, "--once", "--interval=0.1").stdout
    finally:
        stop.set()
        talking.join()
    assert f"no pod '{name}x'" in run("top", f"{name}x", "--once", status=3).stderr


def test_top_prints_once_if_its_output_is_no_terminal(
    manifest: Callable[..., Path], name: str
) -> None:
    file = manifest('- {name: guest, image: "host:sleep", args: ["1000"]}', runtime="standin")
    run("up", file)
    command = [*TESTBED, "top", name, "--interval=0.1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.count("natives→guest") == 1


def test_logs_and_exec(manifest: Callable[..., Path], name: str) -> None:
    file = manifest("""
        - name: talker
          image: "host:sh"
          args: [-c, 'echo "I am $WHO"; exec sleep 1000']
          env: [{name: WHO, value: Ada}]
    """)
    run("up", file)
    wait_until(lambda: run("logs", name).stdout == "I am Ada\n", "the log")
    namespace = Path("/run/netns", control.status(name)["netns"]).stat().st_ino
    entered = run("exec", name, "--", "readlink", "/proc/self/ns/net").stdout
    assert entered == f"net:[{namespace}]\n"
    assert run("exec", name, "-c", "talker", "--", "sh", "-c", "exit 7", status=7)
    assert "it has talker" in run("logs", name, "-c", "nobody", status=3).stderr


def test_what_is_executed_in_a_stand_in_sees_its_files(
    manifest: Callable[..., Path], name: str
) -> None:
    run("up", manifest('- {name: guest, image: "host:sleep", args: ["1000"]}', runtime="standin"))
    seen = run("exec", name, "--", "cat", "/etc/hosts").stdout
    assert f"{alias(Family.IPV4)} localhost" in seen
    assert f"{alias(Family.IPV4)} {name}" in seen


def test_what_ends_is_started_again_as_the_policy_says(
    manifest: Callable[..., Path], name: str
) -> None:
    file = manifest(
        """
        - {name: good, image: "host:true"}
        - {name: bad, image: "host:false"}
    """,
        "restartPolicy: OnFailure",
    )
    subprocess.run([*TESTBED, "up", file, "--wait=1"], check=False)
    wait_until(lambda: workload(name, "bad")["restarts"] >= 1, "a restart")
    good = workload(name, "good")
    assert (good["state"], good["restarts"], good["exit_status"]) == ("completed", 0, 0)
    assert any("bad: ended with status 1" in e for e in control.describe(name)["events"])


def test_a_guest_that_is_killed_comes_back(manifest: Callable[..., Path], name: str) -> None:
    file = manifest(
        """
        - name: guest
          image: "host:busybox"
          args: [nc, -ll, -p, "9000", -e, cat]
          ports: [{containerPort: 9000}]
    """,
        runtime="standin",
    )
    run("up", file)
    os.kill(workload(name, "guest")["pid"], signal.SIGKILL)
    wait_until(lambda: workload(name, "guest")["restarts"] == 1, "a restart")
    wait_until(lambda: workload(name, "guest")["ready"], "it is ready again")


def test_init_containers_run_first_and_probes_are_asked(
    manifest: Callable[..., Path], name: str, tmp_path: Path
) -> None:
    file = manifest(
        f"""
        - name: server
          image: "host:busybox"
          args: [httpd, -f, -p, "8080", -h, {tmp_path}]
          ports: [{{containerPort: 8080, name: web}}]
          readinessProbe: {{httpGet: {{port: web, path: /made}}, periodSeconds: 1}}
          livenessProbe: {{exec: {{command: [test, -e, {tmp_path}/made]}}, periodSeconds: 1,
                          failureThreshold: 1}}
    """,
        f"""
        initContainers:
        - {{name: first, image: "host:sh", args: [-c, "sleep 0.2; mkdir {tmp_path}/site"]}}
        - {{name: second, image: "host:sh",
            args: [-c, "echo yes > {tmp_path}/site/page && ln -s site/page {tmp_path}/made"]}}
    """,
    )
    run("up", file)
    assert [w["state"] for w in control.status(name)["workloads"]] == [
        "completed",
        "completed",
        "running",
    ]
    (tmp_path / "made").unlink()
    wait_until(lambda: workload(name, "server")["restarts"] >= 1, "it is found dead")


def test_what_cannot_be_built_leaves_nothing(manifest: Callable[..., Path], name: str) -> None:
    refused = run("up", manifest("- {name: a, image: docker.io/nginx}"), status=3)
    assert "the runtime process takes host:PROGRAM" in refused.stderr
    refused = run("up", manifest("- {name: a, image: shop:1}", runtime="container"), status=3)
    assert "no image 'shop:1'; nothing is pulled: skopeo copy docker://shop:1 " in refused.stderr
    assert "--image shop:1=docker-archive:image.tar" in refused.stderr
    assert name not in control.names()
    assert not there(name)


def test_a_last_line_is_told_without_what_controls_a_terminal(
    manifest: Callable[..., Path], name: str
) -> None:
    prints = r"printf '\033]0;owned\007\033[2Jwhy\033[8m\r\n'; exit 1"
    never = "readinessProbe: {tcpSocket: {port: 1}}"
    file = manifest(
        f"""
        - {{name: odd, image: 'host:sh', args: [-c, {json.dumps(prints)}], {never}}}
        - {{name: long, image: 'host:sh', args: [-c, 'yes | head -c 999 | tr -d "\\n"; exit 1'],
            {never}}}
        """,
        "restartPolicy: Never",
    )
    told = run("up", file, "--wait", "30", status=1).stderr
    assert f"{name}: odd is not ready (failed, exit status 1, last said: ]0;owned[2Jwhy[8m)" in told
    assert re.search(r"long is not ready \(failed, exit status 1, last said: y{200}…\)", told)
    assert "\033" not in told


def test_an_interrupted_up_leaves_nothing(manifest: Callable[..., Path], name: str) -> None:
    file = manifest('- {name: a, image: "host:sleep", args: ["99"], ports: [{containerPort: 99}]}')
    for built in (False, True):
        with ending(subprocess.Popen([*TESTBED, "up", file], stderr=subprocess.DEVNULL)) as up:
            wait_until(lambda: name in control.names(), "the supervisor listens")
            if built:
                wait_until(lambda: bool(control.status(name)), "the pod is built")
            up.send_signal(signal.SIGINT)
            assert up.wait() == 130
        assert name not in control.names()
        assert not there(name)


def test_clean_takes_down_what_a_killed_supervisor_left(
    manifest: Callable[..., Path], name: str
) -> None:
    file = manifest(
        """
        - {name: box, image: "host:", command: [sleep, "1000"],
           resources: {limits: {memory: 32Mi}}}
    """,
        runtime="container",
    )
    run("up", file)
    os.kill(control.status(name)["supervisor"], signal.SIGKILL)
    wait_until(lambda: control.status(name)["supervisor"] is None, "it is dead")
    assert there(name)
    run("clean")
    assert not there(name)
    assert name not in control.names()


def test_pods_are_listed_fast(manifest: Callable[..., Path], name: str) -> None:
    run("up", manifest('- {name: a, image: "host:sleep", args: ["1000"]}'))
    times_s = []
    for _ in range(5):
        began = time.monotonic()
        run("ps")
        times_s.append(time.monotonic() - began)
    assert min(times_s) < 0.4 * slowness()


@pytest.mark.parametrize(
    ("line", "offered"), [("testbed tr", "trace"), ("testbed trace ", ""), ("testbed logs ", "")]
)
def test_a_shell_is_told_commands_and_the_names_of_pods(
    manifest: Callable[..., Path], name: str, tmp_path: Path, line: str, offered: str
) -> None:
    run("up", manifest('- {name: a, image: "host:sleep", args: ["1000"]}'))
    told = tmp_path / "told"
    asked = {
        "_ARGCOMPLETE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_STDOUT_FILENAME": str(told),
        "_ARGCOMPLETE_IFS": "\n",
    }
    subprocess.run(TESTBED, env=os.environ | asked, check=False)
    assert (offered or name) in told.read_text().split()
    assert "complete" in run("completion", "bash").stdout
    assert "compdef" in run("completion", "zsh").stdout


def test_no_ledger_is_left(name: str) -> None:
    """Keepers are no children of this process: asked here, of the files."""
    assert not [p for p in ledger.ROOT.glob("*.pod") if not p.with_suffix(".ledger").exists()]
