"""`testbed conformance`: its output, its exit codes, and a pod that is not ours."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import yaml

from testbed import datapaths, paths, runtimes
from testbed.conformance.check import EVERY
from testbed.conformance.stage import manifest
from testbed.host import namespaces
from testbed.host.ledger import Owner
from testbed.images import kernels
from testbed.model.addresses import CONTROL_PORT, guest_link
from testbed.model.terms import Family, Runtime
from testbed.pods.pod import Pod
from testbed.runtimes.interface import Options
from tests.children import ending

EXAMPLE = paths.ROOT / "examples/rootless.sh"
ACTION = paths.ROOT / ".github/actions/conformance/action.yml"
COMMAND = [sys.executable, "-m", "testbed.cli", "conformance"]


def conformance(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command line as a user has it."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_list_shows_every_check_and_runs_none() -> None:
    done = conformance("--list", "--check", "datagram-*")
    assert done.returncode == 0
    assert "datagram-1472" in done.stdout
    assert "half-close" not in done.stdout
    plain = json.loads(conformance("--list", "--check", "datagram-*", "--json").stdout)
    assert "datagram-1472" in [row["check"] for row in plain]
    assert all(row["proves"] and row["stands_for"] for row in plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--check", "nonsense"), "no check is named 'nonsense'"),
        (("--datapath", "nonsense"), "no datapath 'nonsense'"),
        (("--datapath", "direct"), "direct does not make localhost work"),
        (("--netns", "/run/netns/nonsense"), "needs both --netns and --control"),
        (("--netns", "/nonsense", "--control", "::1"), "no network namespace /nonsense"),
        (("--netns", "/", "--control", "::1", "--native", "wasm"), "no wasm is brought to a pod"),
        (("--guest", "standin", "--shim"), "only OSv guests have a shim"),
        (("--bundle", "/nonsense/suite.tar.gz"), "/nonsense/suite.tar.gz: No such file"),
    ],
)
@pytest.mark.root
def test_what_cannot_run_is_status_3_and_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = conformance(*arguments)
    assert done.returncode == 3
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.root
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_shows_what_was_found_until_then(number: signal.Signals) -> None:
    command = [
        *COMMAND,
        "--datapath",
        "loopback",
        "--check",
        "connect",
        "--check",
        "sequential-connections",
        "--json",
    ]
    pipe = subprocess.PIPE
    with ending(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)) as running:
        assert running.stderr
        while "sequential" not in running.stderr.readline():
            assert running.poll() is None
        running.send_signal(number)
        found = json.loads(running.communicate(timeout=30)[0])
    assert running.returncode == 130
    assert "connect" in {result["check"] for result in found}


@pytest.mark.root
def test_every_form_holds_every_case_also_of_a_pod_that_cannot_be_built(tmp_path: Path) -> None:
    """passt carries frames of virtual machines only."""
    junit, tap = tmp_path / "junit.xml", tmp_path / "results.tap"
    done = conformance(
        "--datapath",
        "loopback",
        "passt",
        "--guest",
        "standin",
        "--check",
        "connect",
        "--json",
        "--junit",
        junit,
        "--tap",
        tap,
    )
    assert done.returncode == 0
    results = json.loads(done.stdout)
    assert {(r["datapath"], r["family"], r["status"]) for r in results} == {
        ("loopback", "ipv4", "pass"),
        ("loopback", "ipv6", "pass"),
        ("passt", "ipv4", "unsupported"),
        ("passt", "ipv6", "unsupported"),
    }
    assert all(r["reason"] for r in results if r["status"] == "unsupported")
    suites = {s.get("name"): s for s in ET.parse(junit).getroot()}
    assert suites["loopback ()"].get("skipped") == "0"
    assert suites["passt (standin)"].get("skipped") == suites["passt (standin)"].get("tests") == "8"
    points = tap.read_text().splitlines()
    assert points[:3] == [
        "TAP version 14",
        "1..10",
        "ok 1 - loopback connect native-native ipv4 tcp",
    ]
    assert sum("# SKIP passt carries frames" in point for point in points) == 8


@pytest.mark.root
def test_the_matrix_has_a_row_per_check(tmp_path: Path) -> None:
    done = conformance("--datapath", "loopback", "--check", "connect", "--family", "ipv6")
    assert done.returncode == 0
    assert "connect" in done.stdout
    assert "1 pass" in done.stdout
    assert "cases" in done.stdout


@pytest.mark.root
@pytest.mark.parametrize("flavor", ["ipv6", "master"])
def test_with_the_shim_the_loopback_addresses_of_an_osv_guest_are_the_pods(flavor: str) -> None:
    kernel = kernels.find_osv(flavor=flavor, download=False)
    if kernel is None or kernel.path.parent.name != f"osv-{flavor}":
        pytest.skip(f"no OSv kernel of flavor {flavor} in the cache")
    these = ("--check", "guest-listens-on-loopback", "--check", "guest-dials-loopback", "--json")
    guest = ("--guest", "osv", "--osv-kernel", kernel.path, "--datapath", "steer")
    with_shim = json.loads(conformance(*guest, *these, "--family", "ipv4", "--shim").stdout)
    assert {r["status"] for r in with_shim} == {"pass"}
    without = json.loads(conformance(*guest, *these, "--family", "ipv4").stdout)
    found = {(r["check"], r["pair"]): r["status"] for r in without}
    assert found.pop(("guest-dials-loopback", "guest-self")) == "pass"  # its own loopback
    assert set(found.values()) == {"unsupported"}


@pytest.fixture
def foreign_pod(tmp_path: Path) -> Iterator[Pod]:
    """A pod whose natives are not started, as somebody else might have built it."""
    runtime = {r: runtimes.prepare(r, Options()) for r in (Runtime.PROCESS, Runtime.STANDIN)}
    with Owner() as owner:
        workloads = manifest(EVERY, Runtime.STANDIN)
        with Pod(owner, "foreign", workloads, datapaths.get("capture"), runtime, tmp_path) as pod:
            pod.start_workload("guest1")
            pod.wait_ready("guest1")
            yield pod


@pytest.mark.root
def test_a_pod_that_is_there_already_is_checked(foreign_pod: Pod) -> None:
    netns, guest = f"/run/netns/{foreign_pod.netns}", foreign_pod.manifest.guests[1]
    address = guest_link(Family.IPV4, 1)
    done = conformance(
        "--netns",
        netns,
        "--control",
        f"{address}:{guest.control_port}",
        "--json",
        "--check",
        "connect",
        "--check",
        "datagram",
        "--check",
        "pod-rebuilt",
    )
    assert done.returncode == 0, done.stderr
    results = {(r["check"], r["pair"]): r["status"] for r in json.loads(done.stdout)}
    for pair in ("native-native", "native-guest", "guest-native", "guest-self"):
        assert results["connect", pair] == "pass"
        assert results["datagram", pair] == "pass"
    assert results["pod-rebuilt", "native-guest"] == "unsupported"
    done = conformance("--netns", netns, "--control", str(address))
    assert done.returncode == 3
    assert f"guest1: no agent answers at {address}, port {CONTROL_PORT}" in done.stderr


@pytest.mark.root
def test_an_archive_of_the_suite_checks_a_pod_without_anything_installed(
    foreign_pod: Pod, tmp_path: Path
) -> None:
    """The pod's namespace is that of a process, as most runtimes tell it."""
    archive, folder = tmp_path / "suite.tar.gz", tmp_path / "a:b c"
    folder.mkdir()
    assert conformance("--bundle", archive).returncode == 0
    subprocess.run(["tar", "--force-local", "-xf", archive, "-C", folder], check=True)
    (suite,) = folder.glob("testbed-conformance-*")
    assert not list(suite.rglob("*.so"))
    done = subprocess.run([suite / "conformance"], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "give --netns and --control" in done.stderr
    said = subprocess.run([suite / "conformance", "--help"], capture_output=True, text=True).stdout
    assert said.startswith("usage: conformance ")
    assert set(re.findall(r"^  (--[a-z-]+)", said, re.MULTILINE)) == {
        *("--family", "--check", "--list", "--json", "--junit", "--tap"),
        *("--netns", "--control", "--cgroup"),
    }
    guest = foreign_pod.manifest.guests[1]
    control = f"{guest_link(Family.IPV4, 1)}:{guest.control_port}"
    with ending(
        namespaces.inside(foreign_pod.netns, lambda: subprocess.Popen(["sleep", "1000"]))
    ) as process:
        netns = f"/proc/{process.pid}/ns/net"
        options = ("--netns", netns, "--control", control, "--check", "connect")
        done = subprocess.run(
            [suite / "conformance", *options, "--check", "resolves", "--json"],
            env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin"},  # the system's Python has no testbed
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    results = {(r["check"], r["pair"], r["family"]): r["status"] for r in json.loads(done.stdout)}
    assert len(results) == 16
    assert set(results.values()) == {"pass"}


@pytest.mark.root
@pytest.mark.parametrize("network", ["pasta", "slirp4netns"])
def test_networks_of_rootless_containers_are_held_to_the_suite(network: str) -> None:
    """They accept connections in place of a server that is not there."""
    checks = ("--check", "connect", "--check", "refused", "--check", "datagram")
    done = subprocess.run(
        [EXAMPLE, network, *checks, "--family", "ipv4", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    results = {(r["check"], r["pair"]): r["status"] for r in json.loads(done.stdout)}
    for check in ("connect", "datagram"):
        assert {s for (name, _), s in results.items() if name == check} == {"pass"}
    assert results["refused", "native-guest"] == "fail"
    left = subprocess.run(["pgrep", "-f", "agent/static"], capture_output=True, text=True)
    assert left.stdout == ""


@pytest.mark.root
def test_the_action_checks_a_pod(foreign_pod: Pod, tmp_path: Path) -> None:
    """Its script, as GitHub's runner starts it."""
    (step,) = yaml.safe_load(ACTION.read_text())["runs"]["steps"]
    junit = tmp_path / "results.xml"
    given = {
        "NETNS": f"/run/netns/{foreign_pod.netns}",
        "CONTROL": f"{guest_link(Family.IPV4, 1)}:{foreign_pod.manifest.guests[1].control_port}",
        "CGROUP": "",
        "CHECKS": "connect\ndatagram-e*",
        "JUNIT": str(junit),
    }
    assert given.keys() == step["env"].keys()
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        env={**os.environ, **given, "GITHUB_ACTION_PATH": str(ACTION.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    names = {case.get("name") for case in ET.parse(junit).iter("testcase")}
    assert {str(name).split()[0] for name in names} == {"connect", "datagram-empty"}
