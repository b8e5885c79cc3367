"""The doctor on this very machine, and on it with something taken away."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from testbed import doctor
from testbed.doctor import Finding, State
from testbed.host import nft
from testbed.images import kernels
from testbed.model.errors import Error
from testbed.runtimes.vm import accelerator


def by_name(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.fixture
def empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No command of the system is there."""
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel of a guest is there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TESTBED_OSV_KERNEL", raising=False)


@pytest.fixture
def guest_kernel() -> Path:
    osv = kernels.find_osv(download=False)
    return osv.path if osv else kernels.linux_kernel(download=False).path


@pytest.mark.root
def test_a_machine_that_runs_these_tests_runs_the_main_job() -> None:
    findings = list(doctor.host())
    assert doctor.ready(findings), [str(f) for f in findings if f.state is not State.FINE]
    assert set(by_name(findings)) >= {"kernel", "veth", "bridge", "tap", "cgroup2", "eBPF"}
    doctor.preflight()


@pytest.mark.root
def test_whatever_is_not_fine_says_what_to_do_or_what_it_costs() -> None:
    findings = list(doctor.probe())
    assert len(by_name(findings)) == len(findings)
    for finding in findings:
        assert finding.detail
        assert bool(finding.hint) == (finding.state is not State.FINE)
        assert "\n" not in str(finding)


def test_where_guests_are_emulated_stand_ins_are_next() -> None:
    fine = Finding(doctor.ACCELERATOR, State.FINE, "KVM")
    emulated = Finding(doctor.ACCELERATOR, State.DEGRADED, "TCG", "slow")
    assert doctor.next_command([fine]) == "testbed run --plan quick"
    assert doctor.next_command([emulated]) == "testbed run --plan quick --guest standin"


def test_without_root_nothing_is_tried_and_the_main_job_cannot_run() -> None:
    script = """if True:
        from testbed import doctor
        findings = list(doctor.host())
        print([f.name for f in findings if f.state == "missing"], doctor.ready(findings))
    """
    nobody = ["unshare", "--user"]  # a user namespace without a mapping: nobody is root in it
    if subprocess.run([*nobody, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    ran = subprocess.run(
        [*nobody, sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "['root'] False\n"


@pytest.mark.root
@pytest.mark.usefixtures("empty_path")
def test_without_a_compiler_the_main_job_is_refused_with_what_to_type() -> None:
    with pytest.raises(Error, match="C compiler.*apt-get install gcc"):
        doctor.preflight()


@pytest.mark.usefixtures("empty_path")
def test_without_qemu_there_are_only_standins() -> None:
    gvisor, qemu = doctor.guests()
    assert [gvisor.state, qemu.state] == [State.DEGRADED] * 2
    assert "apt-get install runsc" in gvisor.hint
    assert "stand-ins only" in qemu.hint
    assert doctor.ready([gvisor, qemu])


def test_a_datapath_that_lacks_two_programs_is_one_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nft.unsupported()  # its answer is kept: not to be asked without nft
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = list(doctor.others())
    assert len(by_name(findings)) == len(findings)
    proxy = by_name(findings)["proxy"]
    assert proxy.detail == "no haproxy, no nginx with streams"
    assert "apt-get install haproxy; apt-get install nginx-light" in proxy.hint


@pytest.mark.usefixtures("empty_cache")
def test_without_kernels_of_guests_it_says_where_they_come_from() -> None:
    findings = by_name(doctor.guests())
    assert findings["OSv kernel"].state is State.DEGRADED
    assert "--osv-kernel" in findings["OSv kernel"].hint
    assert findings["Linux kernel"].state is State.DEGRADED
    assert "accelerator" not in findings


def test_a_guests_kernel_boots_and_comes_to_its_end(guest_kernel: Path) -> None:
    assert accelerator.boot(accelerator.probe(guest_kernel, "tcg")) is None


def test_what_does_not_boot_is_found_out(guest_kernel: Path, tmp_path: Path) -> None:
    broken = tmp_path / "kernel"
    broken.write_bytes(guest_kernel.read_bytes()[:4096])
    assert accelerator.boot(accelerator.probe(broken, "tcg"))


def test_a_guest_that_hangs_is_given_up_as_soon_as_emulation_has_come_to_its_end(
    guest_kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "HEAD_START_S", 0.1)
    emulated = accelerator.probe(guest_kernel, "tcg")
    frozen = [*emulated, "-S"]  # its CPU never runs
    assert "when emulation was" in str(accelerator.boot(frozen, rival=emulated))


def test_a_slow_guest_is_waited_for_where_emulation_is_slower(
    guest_kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "HEAD_START_S", 0.1)
    emulated = accelerator.probe(guest_kernel, "tcg")
    assert accelerator.boot(emulated, rival=[*emulated, "-S"]) is None


def test_a_guest_is_not_waited_for_for_ever(
    guest_kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "PROBE_LIMIT_S", 0.1)
    monkeypatch.setenv("TESTBED_SLOWNESS", "3")
    began = time.monotonic()
    frozen = [*accelerator.probe(guest_kernel, "tcg"), "-S"]
    assert accelerator.boot(frozen) == "not through after 0 s"
    assert time.monotonic() - began >= 0.3


def test_the_accelerator_is_tried_once(guest_kernel: Path) -> None:
    first = accelerator.accelerator(guest_kernel)
    start = time.monotonic()
    assert accelerator.accelerator(guest_kernel) == first
    assert time.monotonic() - start < 1
    assert first.name in ("kvm", "tcg")
    assert first.why
