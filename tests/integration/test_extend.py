"""What docs/extend.md shows is a distribution that adds a datapath, a runtime, a metric and more.

Its files are written as they stand on the page, and used by the commands of a user.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from testbed import paths

pytestmark = pytest.mark.root

FILE = re.compile(r"^```\w+ (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The distribution, as `pip install` leaves it: its modules, and what says of them."""
    made = tmp_path_factory.mktemp("elsewhere")
    for name, text in FILE.findall((paths.ROOT / "docs/extend.md").read_text()):
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_text(text)
    project = tomllib.loads((made / "toy/pyproject.toml").read_text())["project"]
    entries = configparser.ConfigParser()
    entries.read_dict(project["entry-points"])
    info = made / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    with (info / "entry_points.txt").open("w") as file:
        entries.write(file)
    return made


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command where the distribution is found."""
    found = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", "testbed.cli", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": found},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_datapath_a_runtime_a_metric_and_a_figure_of_elsewhere_make_a_campaign(
    folder: Path,
) -> None:
    done = command(
        folder, "run", "--plan", "toy.toml", "--guest", "toybox", "--out", "out", "--json"
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["campaign"]["guest"] == "toybox"
    assert told["campaign"]["looks"]["via"]["color"] == "#7B3294"
    rows = {cell["id"]: cell for cell in told["cells"]}
    spread = rows["via/native-guest/ipv4/tcp/spread/64x1"]
    assert spread["estimate"]["mean"] > 0
    assert spread["reference"] == "direct"
    assert spread["ratio"]["blocks"] == 2
    asked = rows["steer/native-guest/ipv4/tcp/requests/0x1,application=hello"]
    assert asked["status"] == "ok", asked
    drawn = {path.name for path in (folder / "out/figures").glob("*.png")}
    assert {"throughput-tcp.png", "spread-tcp.png", "drift.png", "requests.png"} <= drawn
    shown = command(folder, "table", "out")
    assert "spread" in shown.stdout, shown.stderr
    assert command(folder, "report", "out").returncode == 0


def test_a_check_of_elsewhere_is_one_of_the_suite(folder: Path) -> None:
    done = command(
        folder,
        "conformance",
        "--datapath",
        "steer",
        "--guest",
        "toybox",
        "--family",
        "ipv4",
        "--check",
        "few-bytes",
        "--json",
    )
    assert done.returncode == 0, done.stderr + done.stdout
    results = json.loads(done.stdout)
    assert {r["status"] for r in results} == {"pass"}
    assert {r["guest"] for r in results} >= {"toybox"}


def test_without_it_none_of_them_is_known(tmp_path: Path) -> None:
    done = command(tmp_path, "conformance", "--check", "few-bytes", "--list")
    assert "no check is named 'few-bytes'" in done.stderr
