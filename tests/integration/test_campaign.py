"""`testbed run` as a user meets it: whole, killed, interrupted, resumed, in each other's way."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest

from testbed import agent, bpf
from testbed.host import cgroups
from testbed.host.facts import slowness
from testbed.host.ledger import ROOT
from testbed.host.namespaces import NETNS
from testbed.model import addresses
from testbed.model.terms import Family
from testbed.model.trials import Status
from testbed.results import store
from tests.campaigns import trials

from .conftest import Build
from .sockets import wait_until

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("programs")]

TESTBED = [sys.executable, "-P", "-m", "testbed.cli"]
LIMIT_S = 60

PLAN = """
name = "tiny"
blocks = 2
warmup_s = 0
duration_s = 0.2

[[cells]]
datapath = "capture"
pair = "native-guest"
family = ["ipv4", "ipv6"]
transport = "tcp"
metric = "latency"
size_bytes = 64
"""
CELLS = [f"capture/native-guest/{family}/tcp/latency/64x1" for family in Family]
EACH_ONCE = Counter((cell, block) for cell in CELLS for block in range(2))


@pytest.fixture(scope="module")
def programs(build: Build) -> None:
    """Pins that all campaigns here use: none of them has to compile."""
    build("campaign")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "tiny.toml"
    path.write_text(PLAN)
    return path


def command(
    *arguments: str | Path, environment: Mapping[str, str] = os.environ, before: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, *TESTBED, *map(str, arguments)],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S * slowness(),
    )


def run(plan: Path, out: Path, *arguments: str) -> list[str]:
    return ["run", "--plan", str(plan), "--guest", "standin", "--out", str(out), *arguments]


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.strip().rpartition("\n")[2]


def stored(out: Path) -> Counter[tuple[str, int]]:
    """What was run, from the log as it stands."""
    return Counter((trial["cell"], trial["block"]) for trial in trials(out))


# --- processes, and what they leave ---------------------------------------------------------


class Running:
    """A campaign at work, in a process group of its own, as a shell makes one."""

    def __init__(self, plan: Path, out: Path, *arguments: str) -> None:
        self.out = out
        self.process = subprocess.Popen(
            [*TESTBED, *run(plan, out, *arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    def wait_for_trials(self, count: int) -> None:
        log = self.out / "trials.jsonl"
        wait_until(
            lambda: (log.exists() and len(stored(self.out)) >= count) or self.ended,
            f"{count} trials",
            LIMIT_S,
        )
        assert not self.ended

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def worker(self) -> int:
        """Pid of the worker."""
        threads = Path(f"/proc/{self.process.pid}/task")
        (child,) = "".join(p.read_text() for p in threads.glob("*/children")).split()
        return int(child)

    def mark(self) -> str:
        """The id of what the worker builds, from its locked ledger."""
        locks = (line.split() for line in Path("/proc/locks").read_text().splitlines())
        inodes = {
            fields[-3].rpartition(":")[2] for fields in locks if fields[-4] == f"{self.worker}"
        }
        (ledger,) = (p for p in ROOT.glob("*.ledger") if str(p.stat().st_ino) in inodes)
        return ledger.stem

    def finish(self) -> str:
        """Wait for its end; returns what it had to say last."""
        _, errors = self.process.communicate(timeout=LIMIT_S * slowness())
        return errors.strip().rpartition("\n")[2]


@contextmanager
def running(plan: Path, out: Path, *arguments: str) -> Iterator[Running]:
    campaign = Running(plan, out, *arguments)
    try:
        yield campaign
    finally:
        campaign.process.kill()
        campaign.process.communicate()


def left_by(mark: str) -> list[str]:
    """Namespaces, cgroups, pins, ledgers that bear an owner's mark."""
    # Unlike Path.rglob, os.walk goes on when a folder that others made vanishes.
    pins = (
        Path(at, name) for at, folders, files in os.walk(bpf.PINS) for name in (*folders, *files)
    )
    return [
        path.name
        for paths in (NETNS.iterdir(), cgroups.mount_point().iterdir(), pins, ROOT.iterdir())
        for path in paths
        if mark in path.name
    ]


def clean() -> str:
    done = command("clean")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# --- a campaign that nothing happens to -----------------------------------------------------


@pytest.fixture(scope="module")
def finished(plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("campaign") / "out"
    done = command(*run(plan, out, "--json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    return out


def test_every_cell_is_stored_once_in_every_block(finished: Path) -> None:
    assert stored(finished) == EACH_ONCE
    for trial in store.open(finished).trials():
        assert trial.status is Status.OK, trial.reason
        assert trial.value
        assert trial.value > 0
        assert sum(count for _, count in trial.histogram_us) == trial.transactions
        assert trial.carried["packets"] >= 2 * trial.transactions
        assert trial.dialed == "localhost"


def test_tables_and_figures_are_there(finished: Path) -> None:
    parquet = pd.read_parquet(finished / "trials.parquet")
    assert Counter(zip(parquet["cell"], parquet["block"], strict=True)) == EACH_ONCE
    assert len(pd.read_csv(finished / "trials.csv")) == len(parquet)
    assert len(pd.read_parquet(finished / "histogram.parquet")) > len(parquet)
    figures = {path.suffix for path in (finished / "figures").iterdir()}
    assert figures == {".png", ".pdf"}
    consoles = {path.name for path in (finished / "consoles").iterdir()}
    assert {f"block{b}-capture-guest1.log" for b in range(2)} <= consoles


def test_the_table_is_printed_anew_from_what_is_stored(finished: Path) -> None:
    done = command("table", finished)
    assert done.returncode == 0
    for family in ("IPv4", "IPv6"):
        assert re.search(rf"process→standin\s+capture.*\n{family} TCP", done.stdout)
    assert json.loads(command("table", finished, "--json").stdout)


def test_figures_are_drawn_by_anybody_from_what_is_stored(finished: Path) -> None:
    """As the user nobody, from a copy that is nobody's."""
    with tempfile.TemporaryDirectory(prefix="testbed-") as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(finished, copy)
        shutil.rmtree(copy / "figures")
        subprocess.run(["chown", "-R", "nobody", folder], check=True)
        nobody = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
        # who may read the code, too, where root alone may
        nobody += [f"--{kind}-caps=+dac_read_search" for kind in ("inh", "ambient")]
        done = command("figures", copy, before=nobody, environment={"HOME": folder})
        assert done.returncode == 0, done.stderr
        assert {p.name for p in (copy / "figures").iterdir()} == {
            p.name for p in (finished / "figures").iterdir()
        }


def test_a_finished_campaign_is_resumed_without_running_anything(finished: Path) -> None:
    done = command("run", "--resume", finished)
    assert done.returncode == 0, done.stderr
    assert stored(finished) == EACH_ONCE


def test_a_new_campaign_is_not_written_over_another(finished: Path, plan: Path) -> None:
    done = command(*run(plan, finished))
    assert done.returncode == 3
    assert last_line(done) == (
        f"testbed: {finished}: there is a campaign already; "
        f"continue it: testbed run --resume {finished}"
    )


# --- killed and interrupted -----------------------------------------------------------------


def test_a_campaign_that_was_killed_leaves_nothing_and_is_resumed(
    plan: Path, tmp_path: Path
) -> None:
    with running(plan, tmp_path / "out") as campaign:
        campaign.wait_for_trials(2)
        mark = campaign.mark()
        assert left_by(mark)
        campaign.process.kill()
        campaign.finish()
    wait_until(lambda: not left_by(mark), "the worker takes all down by itself", LIMIT_S)
    before = stored(tmp_path / "out")
    assert len(before) >= 2
    done = command("run", "--resume", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert stored(tmp_path / "out") == EACH_ONCE


def test_what_a_killed_worker_left_is_cleaned_and_the_campaign_is_resumed(
    plan: Path, tmp_path: Path
) -> None:
    with running(plan, tmp_path / "out") as campaign:
        campaign.wait_for_trials(1)  # of two in a pod: it stands
        mark = campaign.mark()
        os.kill(campaign.worker, signal.SIGKILL)
        said = campaign.finish()
        assert campaign.process.returncode == 3
    assert said.startswith("testbed: the worker ended with status -9")
    assert said.endswith(f"then go on with testbed run --resume {tmp_path / 'out'}")
    assert left_by(mark)
    assert f"removed netns tb-{mark}-block" in clean()
    assert left_by(mark) == []
    done = command("run", "--resume", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert stored(tmp_path / "out") == EACH_ONCE


@pytest.mark.parametrize("whom", ["the group, as a terminal does", "the campaign alone"])
def test_an_interrupted_campaign_leaves_nothing(plan: Path, tmp_path: Path, whom: str) -> None:
    with running(plan, tmp_path / "out") as campaign:
        campaign.wait_for_trials(1)
        mark = campaign.mark()
        if whom.startswith("the group"):
            os.killpg(campaign.process.pid, signal.SIGINT)
        else:
            os.kill(campaign.process.pid, signal.SIGINT)
        said = campaign.finish()
        assert campaign.process.returncode == 130
    assert said.endswith(f"go on with testbed run --resume {tmp_path / 'out'}")
    assert left_by(mark) == []
    assert (tmp_path / "out" / "worker.log").read_text() == ""


def test_a_second_process_on_the_same_campaign_is_refused(plan: Path, tmp_path: Path) -> None:
    with running(plan, tmp_path / "out", "--blocks", "50") as campaign:
        campaign.wait_for_trials(1)
        done = command("run", "--resume", tmp_path / "out")
        assert done.returncode == 3
        assert last_line(done).endswith("another process is writing this campaign; wait for it")
        before = stored(tmp_path / "out")
        wait_until(lambda: stored(tmp_path / "out") > before, "the first one goes on")
        campaign.process.send_signal(signal.SIGINT)
        campaign.finish()
    assert set(stored(tmp_path / "out").values()) == {1}


# --- guests that do not come up -------------------------------------------------------------


@pytest.fixture
def broken_guests(tmp_path: Path) -> dict[str, str]:
    """An environment whose agent complains and ends where `localhost` is the alias."""
    cache = tmp_path / "cache"
    real = agent.build()
    broken = cache / "testbed" / real.relative_to(real.parents[2])
    broken.parent.mkdir(parents=True)
    broken.touch(mode=0o755)
    broken.write_text(
        f'#!/bin/sh\ngrep -q {addresses.alias(Family.IPV4)} /etc/hosts || exec {real} "$@"\n'
        "echo this guest has no luck; exit 7\n"
    )
    return {"XDG_CACHE_HOME": str(cache)}


def test_a_guest_that_does_not_come_up_fails_its_cells_and_not_the_campaign(
    plan: Path, tmp_path: Path, broken_guests: dict[str, str]
) -> None:
    text = PLAN + (
        '[[cells]]\ndatapath = "loopback"\npair = "native-native"\nfamily = "ipv4"\n'
        'transport = "tcp"\nmetric = "latency"\nsize_bytes = 64\n'
    )
    (tmp_path / "plan.toml").write_text(text)
    done = command(*run(tmp_path / "plan.toml", tmp_path / "out"), environment=broken_guests)
    assert done.returncode == 1, done.stderr
    trials = store.open(tmp_path / "out").trials()
    assert len(trials) == 6
    for trial in trials:
        if trial.cell.startswith("loopback"):
            assert trial.status is Status.OK
        else:
            assert trial.status is Status.FAILED
            assert trial.reason
            assert "guest1 of block" in trial.reason
            assert "ended with status 7" in trial.reason
            assert "this guest has no luck" in trial.reason


def test_a_failed_pod_is_kept_on_request_until_it_is_cleaned(
    plan: Path, tmp_path: Path, broken_guests: dict[str, str]
) -> None:
    out = tmp_path / "out"
    done = command(*run(plan, out, "--keep"), environment=broken_guests)
    assert done.returncode == 1, done.stderr
    kept = re.search(r"left standing: tb-(\w+)-block0-capture\b", done.stderr, re.MULTILINE)
    assert kept, done.stderr
    mark = kept[1]
    try:
        assert f"tb-{mark}-block0-capture" in left_by(mark)
    finally:
        clean()
    assert left_by(mark) == []


# --- usage ----------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_one_line(plan: Path, tmp_path: Path) -> None:
    script = 'mount -t tmpfs -o ro none "$0" && exec "$@"'
    read_only = ["unshare", "--mount", "sh", "-c", script, str(tmp_path)]
    done = command(*run(plan, tmp_path / "out"), before=read_only)
    assert done.returncode == 3
    assert re.fullmatch(
        r"testbed: cannot write \S+: Read-only file system; choose a directory with --out",
        last_line(done),
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["run", "--guest", "cray"], 2, "invalid choice: 'cray'"),
        (["run", "--blocks", "0"], 2, "0 is less than 1"),
        (["run", "--plan", "nonesuch"], 3, "nonesuch.toml: No such file or directory"),
        (["run", "--plan", "quick", "--cells", "tcp/*"], 3, "no cell of plan quick matches"),
        (
            ["run", "--plan", "quick", "--guest", "osv", "--osv-kernel", "/bin/true", "--out", "@"],
            3,
            "/bin/true is no OSv kernel",
        ),
        (["run", "--resume", "@"], 3, "no campaign there"),
        (["table", "@"], 3, "no campaign there"),
        (["figures", "@"], 3, "no campaign there"),
    ],
)
def test_usage_is_told_in_one_line(
    tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    done = command(*(a.replace("@", str(tmp_path / "out")) for a in arguments))
    assert done.returncode == code
    assert says in last_line(done)
    assert "Traceback" not in done.stderr
