"""CI's workflow: what GitHub would refuse is refused here, and what it runs is there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from testbed.cli import parser

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github/workflows/ci.yml"
JOBS = yaml.safe_load(WORKFLOW.read_text())["jobs"]
COMMANDS = [step["run"] for job in JOBS.values() for step in job["steps"] if "run" in step]


def lint(workflow: Path) -> str:
    """What the linters of session lint say; empty: nothing."""
    schema = ["check-jsonschema", "--builtin-schema", "vendor.github-workflows", str(workflow)]
    config = ["--config", str(ROOT / ".github/zizmor.yml")]
    said = ""
    for command in (schema, ["zizmor", "--quiet", "--offline", *config, str(workflow)]):
        tool = Path(sys.executable).with_name(command[0])
        done = subprocess.run([tool, *command[1:]], capture_output=True, text=True, check=False)
        if done.returncode:
            said += done.stdout + done.stderr
    return said


def test_linters_have_nothing_to_say() -> None:
    assert lint(WORKFLOW) == ""


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("runs-on: ubuntu-24.04", "run-on: ubuntu-24.04", "'runs-on' is a required property"),
        ("nox -s lint", "nox -s ${{ github.event.issue.title }}", "template-injection"),
    ],
)
def test_linters_find_what_is_wrong(tmp_path: Path, right: str, wrong: str, said: str) -> None:
    text = WORKFLOW.read_text()
    assert right in text
    workflow = tmp_path / ".github/workflows/ci.yml"
    workflow.parent.mkdir(parents=True)
    workflow.write_text(text.replace(right, wrong, 1))
    assert said in lint(workflow)


def test_jobs_are_those_that_the_project_promises() -> None:
    assert set(JOBS) == {"lint", "tests", "fresh", "bench", "nightly", "kernels", "kvm"}
    assert all(job["timeout-minutes"] <= 180 for job in JOBS.values())


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.splitlines()[0][:40])
def test_commands_of_the_testbed_are_such(command: str) -> None:
    for line in re.findall(r"bootstrap testbed (.*?)(?: [|>].*)?$", command, re.MULTILINE):
        parser().parse_args(shlex.split(line))
