"""A campaign over several hosts: its blocks are dealt out, and what fails stays with its host."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import pytest

from testbed.host import cache
from testbed.images import kernels
from tests.campaigns import trials

from .lan import Command, Lan, SshHost, wait_until

pytestmark = pytest.mark.root

PLAN = """
name = "tiny"
blocks = {blocks}
warmup_s = 0
duration_s = {duration_s}

[[cells]]
datapath = "{datapath}"
pair = "{pair}"
family = ["ipv4", "ipv6"]
transport = "tcp"
metric = "latency"
size_bytes = 64
"""
BRIDGE = ("bridge", "native-guest")
LOOPBACK = ("loopback", "native-native")
"""Nothing is compiled for either."""


def plan(folder: Path, cells: tuple[str, str], blocks: int, duration_s: float) -> Path:
    datapath, pair = cells
    path = folder / "tiny.toml"
    path.write_text(PLAN.format(blocks=blocks, duration_s=duration_s, datapath=datapath, pair=pair))
    return path


def start(lan: Lan, out: Path, plan: Path, *hosts: SshHost) -> Command:
    return lan.testbed(
        "run", "--plan", plan, "--guest", "standin", "--out", out, "--hosts", lan.inventory(*hosts)
    )


def resume(lan: Lan, out: Path, *hosts: SshHost) -> Command:
    return lan.testbed("run", "--resume", out, "--hosts", lan.inventory(*hosts))


def hosts_of_blocks(out: Path) -> dict[int, str]:
    found = {(trial["block"], trial["host"]) for trial in trials(out) if trial["status"] == "ok"}
    assert len({block for block, _ in found}) == len(found)  # a block stays on one host
    return dict(found)


def wait_for_trials(out: Path, host: SshHost, count: int = 1) -> None:
    wait_until(
        lambda: sum(trial["host"] == host.name for trial in trials(out)) >= count,
        f"{count} trials of {host.name}",
        120,
    )


@pytest.fixture(scope="module")
def out(lan: Lan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign on three hosts, during which a cable is out for a while."""
    folder = tmp_path_factory.mktemp("campaign")
    out, beta = folder / "out", lan.hosts["beta"]
    command = start(lan, out, plan(folder, BRIDGE, 3, 0.5), *lan.hosts.values())
    wait_for_trials(out, beta)
    beta.cable("down")
    wait_until(lambda: len(trials(out)) >= 5, "the others' trials", 30)
    beta.cable("up")
    status, output, errors = command.end()
    assert status == 0, errors
    assert "standin" in output
    return out


def test_blocks_are_dealt_out_and_a_link_that_returns_costs_nothing(out: Path) -> None:
    assert hosts_of_blocks(out) == {0: "alpha", 1: "beta", 2: "gamma"}
    assert Counter(trial["status"] for trial in trials(out)) == {"ok": 6}


def test_consoles_and_what_the_hosts_are_come_back(out: Path) -> None:
    consoles = {path.name for path in (out / "consoles").iterdir()}
    assert consoles >= {f"block{n}-bridge-guest1.log" for n in range(3)}
    assert {p.name for p in (out / "hosts").iterdir()} == {"alpha.json", "beta.json", "gamma.json"}


def test_nothing_is_left_on_the_hosts_and_nothing_was_carried_twice(lan: Lan, out: Path) -> None:
    assert out.exists()
    for host in lan.hosts.values():
        assert host.left == []
    assert len(list((lan.work / "environments").iterdir())) == 1
    assert not list((lan.work / "campaigns").iterdir())


def test_results_and_logs_do_not_tell_how_hosts_are_reached(lan: Lan, out: Path) -> None:
    secret = (lan.path / "client").read_bytes().splitlines()[1]
    for path in (p for p in out.rglob("*") if p.is_file()):
        content = path.read_bytes()
        assert secret not in content
        assert str(lan.path / "client").encode() not in content


def test_a_campaign_of_hosts_is_never_resumed_here(lan: Lan, out: Path) -> None:
    status, _, errors = lan.testbed("run", "--resume", out).end()
    assert status == 3
    assert "this campaign runs on alpha, beta, gamma" in errors
    assert "--hosts FILE" in errors


def test_more_hosts_than_blocks_are_refused(lan: Lan, tmp_path: Path) -> None:
    command = start(lan, tmp_path / "out", plan(tmp_path, LOOPBACK, 2, 0.2), *lan.hosts.values())
    status, _, errors = command.end()
    assert status == 3
    assert "2 blocks cannot be dealt out to 3 hosts" in errors


def test_hosts_that_die_in_mid_trial_fail_their_own_cells_and_the_campaign_is_resumed(
    lan: Lan, alpha: SshHost, beta: SshHost, gamma: SshHost, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = start(lan, out, plan(tmp_path, LOOPBACK, 3, 3), alpha, beta, gamma)
    for host in (beta, gamma):
        wait_for_trials(out, host)
    beta.cable("down")
    beta.kill()
    gamma.cable("down")
    assert gamma.left
    wait_until(lambda: not gamma.left, "gamma notices that its link is gone", 30)
    status, _, errors = command.end()
    assert status == 1, errors
    failed = [(trial["host"], trial["reason"]) for trial in trials(out) if "reason" in trial]
    assert sorted(failed) == [(name, f"lost the link to {name}") for name in ("beta", "gamma")]

    status, _, errors = resume(lan, out, alpha).end()
    assert status == 3
    assert "blocks were begun on beta, which is not among the hosts of this run" in errors

    beta.cable("up")
    beta.boot()
    gamma.cable("up")
    status, _, errors = resume(lan, out, alpha, beta, gamma).end()
    assert status == 0, errors
    ok = Counter((t["block"], t["cell"]) for t in trials(out) if t["status"] == "ok")
    assert len(ok) == 6
    assert set(ok.values()) == {1}
    assert hosts_of_blocks(out) == {0: "alpha", 1: "beta", 2: "gamma"}


def test_a_host_that_refuses_fails_its_own_cells_and_nothing_runs_in_its_place(
    lan: Lan, alpha: SshHost, beta: SshHost, tmp_path: Path
) -> None:
    inventory = lan.inventory(alpha, beta)
    inventory.write_text(inventory.read_text().replace(f'"{beta.address}"', '"10.77.0.1"'))
    out = tmp_path / "out"
    command = lan.testbed(
        "run",
        "--plan",
        plan(tmp_path, LOOPBACK, 2, 0.2),
        "--guest",
        "standin",
        "--out",
        out,
        "--hosts",
        inventory,
    )
    status, _, errors = command.end()
    assert status == 1, errors
    assert hosts_of_blocks(out) == {0: "alpha"}
    failed = [trial for trial in trials(out) if trial["status"] == "failed"]
    assert {trial["block"] for trial in failed} == {1}
    assert all("beta: 10.77.0.1 port 22 cannot be reached" in trial["reason"] for trial in failed)


def test_what_a_killed_worker_left_is_taken_down_at_the_next_contact(
    lan: Lan, alpha: SshHost, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = start(lan, out, plan(tmp_path, LOOPBACK, 1, 2), alpha)
    wait_for_trials(out, alpha)
    alpha.shell("kill -KILL $(pgrep -f '^python -P -m testbed.campaigns.worker')")
    status, _, errors = command.end()
    assert status == 3
    assert "the worker on alpha ended with status 137" in errors
    stale = alpha.left
    assert any(name.endswith(".ledger") for name in stale)

    status, _, errors = resume(lan, out, alpha).end()
    assert status == 0, errors
    assert alpha.left == []
    assert len(trials(out)) == 2


def test_a_campaign_that_is_killed_leaves_nothing_on_its_host(
    lan: Lan, alpha: SshHost, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = start(lan, out, plan(tmp_path, LOOPBACK, 1, 2), alpha)
    wait_for_trials(out, alpha)
    assert alpha.left
    command.kill()
    wait_until(lambda: not alpha.left, "alpha notices that nobody listens", 30)


def test_a_campaign_that_is_interrupted_takes_all_down_before_it_ends(
    lan: Lan, alpha: SshHost, beta: SshHost, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = start(lan, out, plan(tmp_path, LOOPBACK, 2, 2), alpha, beta)
    wait_for_trials(out, alpha)
    command.send_signal(signal.SIGINT)
    status, _, errors = command.end()
    assert status == 130
    assert f"--resume {out}" in errors
    assert alpha.left == beta.left == []


# --- OSv ------------------------------------------------------------------------------------


def start_osv(lan: Lan, out: Path, plan: Path, host: SshHost, cache: Path) -> Command:
    return lan.testbed(
        "run",
        "--plan",
        plan,
        "--guest",
        "osv",
        "--out",
        out,
        "--hosts",
        lan.inventory(host),
        environment={"XDG_CACHE_HOME": str(cache)},
    )


def test_a_host_without_an_osv_kernel_says_so(lan: Lan, alpha: SshHost, tmp_path: Path) -> None:
    command = start_osv(lan, tmp_path / "out", plan(tmp_path, BRIDGE, 1, 0.2), alpha, tmp_path)
    status, _, errors = command.end()
    assert status == 3
    assert "alpha: no OSv kernel, and none can be downloaded" in errors
    assert alpha.left == []


def test_a_host_is_given_the_osv_kernel_that_is_here(
    lan: Lan, alpha: SshHost, tmp_path: Path
) -> None:
    if not (kernel := kernels.find_osv(download=False)):
        pytest.skip("no OSv kernel here")
    out = tmp_path / "out"
    folder = cache.cache_folder().parent
    command = start_osv(lan, out, plan(tmp_path, BRIDGE, 1, 0.2), alpha, folder)
    status, _, errors = command.end()
    assert status == 0, errors
    assert (lan.work / "kernels" / f"{kernel.sha256}.elf").read_bytes() == kernel.path.read_bytes()
    assert {trial["host"] for trial in trials(out)} == {"alpha"}
    assert not list(alpha.cache.rglob("kernel.elf"))


# --- between two hosts ----------------------------------------------------------------------


BETWEEN = """
name = "between"
blocks = 1
warmup_s = 0
duration_s = 0.3

[[cells]]
datapath = ["loopback", "routed"]
pair = "native-native"
family = ["ipv4", "ipv6"]
transport = ["tcp", "udp"]
metric = "latency"
size_bytes = 64

[[cells]]
datapath = "routed"
pair = "native-native"
family = ["ipv4", "ipv6"]
transport = "tcp"
metric = "throughput"
size_bytes = 65536
"""


def start_between(lan: Lan, folder: Path, *hosts: SshHost) -> Command:
    plan = folder / "between.toml"
    plan.write_text(BETWEEN)
    return start(lan, folder / "out", plan, *hosts)


def test_a_client_on_one_host_dials_a_server_on_another_by_plain_routing(
    lan: Lan, alpha: SshHost, beta: SshHost, tmp_path: Path
) -> None:
    routes = [host.shell("ip route; ip -6 route") for host in (alpha, beta)]
    for host in (alpha, beta):
        host.shell("sysctl -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
    before = beta.received_bytes
    status, _, errors = start_between(lan, tmp_path, alpha, beta).end()
    assert status == 0, errors
    found = trials(tmp_path / "out")
    assert Counter((t["cell"].partition("/")[0], t["status"]) for t in found) == {
        ("loopback", "ok"): 4,
        ("routed", "ok"): 6,
    }
    assert {t["host"] for t in found} == {"alpha"}
    assert {t["dialed"] for t in found} == {"localhost", "10.78.0.1", "fd77:2::1"}
    sent = sum(t["payload_bytes"] for t in found if t["cell"].startswith("routed/"))
    assert beta.received_bytes - before >= sent / 2  # it went over their link; half are answers
    assert alpha.left == beta.left == []
    assert [host.shell("ip route; ip -6 route") for host in (alpha, beta)] == routes


def test_hosts_that_do_not_forward_lack_what_goes_between_them(
    lan: Lan, alpha: SshHost, beta: SshHost, tmp_path: Path
) -> None:
    alpha.shell("sysctl -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=0")
    beta.shell("sysctl -w net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=1")
    status, _, errors = start_between(lan, tmp_path, alpha, beta).end()
    assert status == 0, errors
    reasons = {t.get("reason") for t in trials(tmp_path / "out")}
    assert reasons == {
        None,
        "alpha does not forward IPv6; sysctl -w net.ipv6.conf.all.forwarding=1 there",
        "beta does not forward IPv4; sysctl -w net.ipv4.ip_forward=1 there",
    }


def test_hosts_are_taken_by_twos_where_cells_go_between_them(
    lan: Lan, alpha: SshHost, beta: SshHost, gamma: SshHost, tmp_path: Path
) -> None:
    status, _, errors = start_between(lan, tmp_path, alpha, beta, gamma).end()
    assert status == 3
    assert "take hosts by twos, and 3 are chosen; choose by --on NAME" in errors
