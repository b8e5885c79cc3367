"""The table of `nox -s kvm`, and its exit status, from reports of pytest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.machines.kvm import Steps

TESTS = """
import pytest

def test_passes(): pass
def test_is_skipped(): pytest.skip("no kernel")
def test_fails(): assert False
"""


@pytest.mark.parametrize(
    ("chosen", "status"),
    [("passes", 0), ("passes or skipped", 3), ("passes or skipped or fails", 1)],
)
def test_what_did_not_run_is_neither_passed_nor_failed(
    tmp_path: Path, chosen: str, status: int
) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "-p", "no:cacheprovider", "-k"]
    subprocess.run(
        [*command, chosen, "--junit-xml=report.xml"], cwd=tmp_path, check=False, capture_output=True
    )
    steps = Steps()
    steps.add_tests(tmp_path / "report.xml")
    assert steps.exit_status == status
    assert len(steps.rows) == chosen.count("or") + 1
    assert ("not run: no kernel" in str(steps)) is ("skipped" in chosen)
    assert ("failed" in str(steps)) is ("fails" in chosen)
