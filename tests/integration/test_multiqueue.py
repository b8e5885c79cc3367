"""A Linux guest with two CPUs has two pairs of queues, and packets of a pod go through both."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from testbed import agent, runtimes
from testbed.campaigns import roles, trial
from testbed.model.addresses import CONTROL_PORT
from testbed.model.cells import Cell, Pair
from testbed.model.errors import Error
from testbed.model.manifest import Manifest, Program
from testbed.model.metrics import Metric
from testbed.model.terms import Family, Runtime, Transport
from testbed.model.trials import Status
from testbed.pods.pod import Pod
from testbed.pods.reconciler import Reconciler
from testbed.runtimes.interface import Options, Prepared

from .conftest import Build
from .sockets import wait_until

pytestmark = pytest.mark.root

CPUS = 2
WATCHED = "while sleep 1; do ls /sys/class/net/eth0/queues; grep virtio /proc/interrupts; done"


@pytest.fixture(scope="module")
def linux() -> Prepared:
    try:
        return runtimes.prepare(Runtime.LINUX, Options())
    except Error as e:
        pytest.skip(e.message)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The pod of a trial, whose guest tells on its console what its queues do."""
    image = tmp_path_factory.mktemp("image") / "image.toml"
    image.write_text(f'program = "/bin/dash"\n[files]\n"/agent" = "{agent.build()}"\n')
    told = f"{WATCHED} & exec /agent --control-port {CONTROL_PORT}"
    program = Program(str(image), args=("-c", told), cpus=CPUS)
    usual = roles.manifest({Pair.NATIVE_GUEST, Pair.GUEST_NATIVE}, Runtime.LINUX)
    return Manifest(
        tuple(
            replace(w, program=program, cpus=(), control_port=CONTROL_PORT)
            if w.runtime is Runtime.LINUX
            else w
            for w in usual.workloads
        )
    )


@pytest.mark.parametrize("datapath", ["steer", "capture"])
def test_packets_of_a_guest_with_two_cpus_go_through_two_queues(
    datapath: str,
    build: Build,
    linux: Prepared,
    prepared: dict[Runtime, Prepared],
    manifest: Manifest,
) -> None:
    kinds = {**prepared, Runtime.LINUX: linux}
    for workload in manifest.guests.values():
        linux.compose(workload)
    pod = build(f"queues-{datapath}", manifest, datapath, kinds)
    pod.start()
    with Reconciler(pod):
        assert opened(pod) == CPUS
        console = pod.console("guest1")
        named = {f"{way}-{n}" for way in ("rx", "tx") for n in range(CPUS)}
        wait_until(lambda: named <= set(console.read_text().split()), "its queues", 10)
        assert set(re.findall(r"\b[rt]x-\d+", console.read_text())) == named
        busy = {f"{way}.{n}" for way in ("input", "output") for n in range(CPUS)}

        def is_used() -> bool:
            """After more traffic; on a busy machine little passes in a trial, or nothing."""
            for pair in (Pair.NATIVE_GUEST, Pair.GUEST_NATIVE):
                cell = Cell(datapath, pair, Family.IPV4, Transport.TCP, Metric.THROUGHPUT, 16384, 8)
                result = trial.run(cell, [pod], linux, 0.2, 2)
                if result.status is not Status.OK:
                    return False
            return interrupted(console.read_text()) == busy

        wait_until(is_used, "packets in all of them", 30)
        # The tap that comes in the place of one that went is of the same kind.
        pid = pod.processes["guest1"].pid
        pod.links.link_ip.link("del", ifname="g1")
        wait_until(
            lambda: "guest1" in pod.processes and pod.processes["guest1"].pid != pid, "another"
        )
        pod.wait_ready("guest1")
        assert opened(pod) == CPUS


def opened(pod: Pod) -> int:
    """How many queues of the tap QEMU has opened (tun_chr_show_fdinfo of drivers/net/tun.c)."""
    files = Path(f"/proc/{pod.processes['guest1'].pid}/fdinfo").iterdir()
    return sum("iff:\tg1\n" in file.read_text() for file in files)


def interrupted(console: str) -> set[str]:
    """Queues of the device that had more than some interrupts, as `input.0`.

    A line of /proc/interrupts: number, counts of each CPU, chip, number there, `virtio0-input.0`.
    """
    rows = re.findall(r"^ *\d+:((?: +\d+)+) .* virtio0-(\w+\.\d)\r?$", console, re.MULTILINE)
    return {name for counts, name in rows if sum(map(int, counts.split())) > 20}
