"""What guests' kernels can do is found out by booting them, once, and then they are used for it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from testbed import doctor, runtimes
from testbed.host import cache, ledger
from testbed.images import compose, kernels, rootfs
from testbed.images.kernels import OsvKernel
from testbed.model.addresses import CONTROL_PORT
from testbed.model.errors import Error
from testbed.model.manifest import Program, Workload
from testbed.model.terms import Family, Runtime
from testbed.runtimes import linux, osv
from testbed.runtimes.interface import Options
from testbed.runtimes.vm import accelerator, capabilities
from testbed.runtimes.vm.capabilities import ALL, Capabilities
from testbed.runtimes.vm.qemu import Vm
from tests.children import ending
from tests.conftest import others, snapshot

from .sockets import wait_until

pytestmark = pytest.mark.root

IPV4 = frozenset({Family.IPV4})
EXPECTED = {
    "ipv6": Capabilities(frozenset(Family), IPV4, multiqueue=False, smp=True),
    "master": Capabilities(IPV4, IPV4, multiqueue=False, smp=True),
}
PROBE = """
import sys
from pathlib import Path
from testbed.images import kernels
from testbed.runtimes import osv
osv.capabilities(kernels.read_osv(Path(sys.argv[1]), "test"), print)
"""


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], OsvKernel]:
    """Copies the kernel of a flavor to where nothing tells what it is, and makes the cache new."""

    def copy(flavor: str = "master") -> OsvKernel:
        monkeypatch.delenv("TESTBED_OSV_KERNEL", raising=False)
        kernel = kernels.find_osv(flavor=flavor, download=False)
        if kernel is None:
            pytest.skip(f"no OSv kernel of flavor {flavor} in the cache")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return kernels.read_osv(Path(shutil.copy(kernel.path, tmp_path / "mine")), "test")

    return copy


@pytest.mark.parametrize("flavor", EXPECTED)
def test_a_kernel_is_probed_once_and_used_for_what_it_can_do(
    flavor: str, copied: Callable[[str], OsvKernel]
) -> None:
    kernel, said = copied(flavor), list[str]()
    assert osv.capabilities(kernel, said.append) == EXPECTED[flavor]
    assert len([line for line in said if line.startswith("probing what OSv kernel v")]) == 1
    guest = runtimes.prepare(Runtime.OSV, Options(osv_kernel=kernel.path, say=said.append))
    assert len(said) == 1
    assert guest.families == EXPECTED[flavor].families
    assert guest.description.offloads == osv.offloads(EXPECTED[flavor])
    assert guest.description.kernel == f"{flavor} {kernel.version}, unlisted"
    stored = json.loads(json.dumps(guest.description.capabilities))
    assert Capabilities.of(stored) == EXPECTED[flavor]


def test_the_doctor_shows_what_a_kernel_can_do(
    copied: Callable[[str], OsvKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESTBED_OSV_KERNEL", str(copied("ipv6").path))
    for _ in range(2):  # probed, and from the cache
        [finding] = [each for each in doctor.guests() if each.name == "OSv kernel"]
        assert finding.state is doctor.State.FINE
        assert "; IPv4 and IPv6; partial checksums of IPv4; one pair of queues" in finding.detail


def test_a_kernel_that_can_do_all_of_it_is_found_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux's, by the same probe."""
    kernel = kernels.linux_kernel(download=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    image = compose.compose_linux(compose.root_of_image(rootfs.AGENT), kernel)

    def boot(machine: Vm) -> Sequence[str]:
        return linux.command(machine, kernel, image, ("--control-port", str(CONTROL_PORT)))

    emulation = accelerator.accelerator(kernel.path).name
    assert capabilities.probe(kernel.sha256, boot, emulation) == ALL
    assert capabilities.cached(kernel.sha256) == ALL


def test_a_kernel_that_boots_with_one_cpu_alone_gets_no_more(
    copied: Callable[[str], OsvKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capabilities, "BOOT_LIMIT_S", 8.0)
    kernel, image = copied("master"), compose.compose_osv(compose.load(compose.AGENT))

    def boot(machine: Vm) -> Sequence[str]:
        arguments = ("--control-port", str(CONTROL_PORT))
        command = osv.command(machine, kernel.path, ALL, image, arguments)
        return [*command, "-S"] if machine.vcpus > 1 else command  # -S: its CPUs never run

    emulation = accelerator.accelerator(kernel.path).name
    expected = replace(EXPECTED["master"], smp=False)
    assert capabilities.probe(kernel.sha256, boot, emulation) == expected
    guest = runtimes.prepare(Runtime.OSV, Options(osv_kernel=kernel.path))
    program = Program("host:/bin/sleep", cpus=2)
    with pytest.raises(Error, match="cannot have 2 CPUs: its kernel .* boots with one only"):
        guest.compose(Workload("busy", Runtime.OSV, program=program))


def test_a_kernel_that_does_not_boot_is_refused_in_one_line_and_not_remembered(
    copied: Callable[[str], OsvKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capabilities, "BOOT_LIMIT_S", 2.0)
    path = copied("master").path
    data = path.read_bytes()
    path.write_bytes(data[:4096] + bytes(600_000) + data[604_096:])
    with pytest.raises(Error, match=f"OSv kernel {path} cannot be used: .*said nothing") as error:
        runtimes.prepare(Runtime.OSV, Options(osv_kernel=path))
    assert "\n" not in str(error.value)
    assert "--osv-kernel" in str(error.value.hint)
    assert not list((cache.cache_folder() / "kernels").rglob("*.json"))


@pytest.mark.alone
def test_what_a_killed_probe_leaves_is_cleaned(copied: Callable[[str], OsvKernel]) -> None:
    kernel, before = copied("ipv6"), snapshot()
    command = [sys.executable, "-P", "-c", PROBE, str(kernel.path)]
    with ending(subprocess.Popen(command, stdout=subprocess.DEVNULL)) as probing:

        def made() -> set[str]:
            own = f"process {probing.pid} "
            return {thing for thing in snapshot() - before if not thing.startswith(own)}

        def boots() -> bool:
            """Its guest, and not that which the accelerator is chosen by."""
            found = made()
            return all(any(word in thing for thing in found) for word in ("-probe", "qemu"))

        wait_until(boots, "a guest that boots", 60)
        os.kill(probing.pid, signal.SIGKILL)
        probing.wait()
    assert any("cgroup" in thing for thing in made())
    list(ledger.clean())
    wait_until(lambda: not made() - others(), "it to be gone")
