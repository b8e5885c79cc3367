"""What a host may lack or have twice: one clear line, nothing lost, nothing left behind."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from testbed.model.trials import Status
from testbed.pods import control
from testbed.results import store
from tests.children import ending

pytestmark = pytest.mark.root

TESTBED = (sys.executable, "-m", "testbed.cli")


PLAN = """
name = "tiny"
blocks = 2
warmup_s = 0.05
duration_s = 0.1
[[cells]]
datapath = "steer"
pair = "native-guest"
family = "ipv4"
transport = "tcp"
metric = "latency"
size_bytes = 64
"""


def campaign(folder: Path, *more: str) -> list[str]:
    (folder / "plan.toml").write_text(PLAN)
    out = ("--out", str(folder / "out"))
    return [*TESTBED, "run", "--plan", str(folder / "plan.toml"), "--guest", "standin", *out, *more]


def test_two_campaigns_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    silent, pipe = subprocess.DEVNULL, subprocess.PIPE
    options: dict[str, Any] = {"stdout": silent, "stderr": pipe, "text": True}
    with ExitStack() as stack:
        both = [
            stack.enter_context(ending(subprocess.Popen(campaign(f), **options))) for f in folders
        ]
        for running, folder in zip(both, folders, strict=True):
            _, said = running.communicate()
            assert running.returncode == 0, said
            trials = store.open(folder / "out").trials()
            assert [trial.status for trial in trials] == [Status.OK] * 2


FULL = """
set -eu
mount -t tmpfs -o size=32k none "$1"
shift
"$@" 2>said && exit 100
last=$(tail -1 said)
mount -o remount,size=16m none out
"$1" -m testbed.cli run --resume out >&2
echo "$last"
cat out/trials.jsonl
"""


def test_a_campaign_that_fills_the_disk_ends_with_a_line_and_is_resumed_with_nothing_lost(
    tmp_path: Path,
) -> None:
    (tmp_path / "out").mkdir()
    command = campaign(tmp_path, "--blocks", "6")
    script = ["unshare", "--mount", "sh", "-c", FULL, "sh", "out", *command]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    last, *trials = done.stdout.splitlines()
    assert "No space left on device; then go on with testbed run --resume" in last
    assert {trial["block"] for trial in map(json.loads, trials)} == set(range(6))


def test_a_guest_for_which_there_is_no_memory_says_so(tmp_path: Path) -> None:
    name = f"t{secrets.token_hex(3)}"
    (tmp_path / "pod.yaml").write_text(f"""
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  runtimeClassName: linux
  restartPolicy: Never
  containers:
  - name: guest
    image: "host:sleep"
    args: ["1000"]
    ports: [{{containerPort: 8080}}]
    resources: {{limits: {{memory: 100Ti}}}}
""")
    up = [*TESTBED, "up", str(tmp_path / "pod.yaml")]
    try:
        done = subprocess.run(up, capture_output=True, text=True, check=False)
    finally:
        control.down(name)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "cannot set up guest memory 'pc.ram': Cannot allocate memory" in line
    assert f"see 'testbed logs {name} -c guest'" in line
