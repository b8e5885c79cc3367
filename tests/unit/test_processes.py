"""Tests in several processes: their locks, what other runs have, the list of long files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from testbed import paths
from testbed.host.process import started_at
from tests import processes


@pytest.mark.parametrize("file", processes.LONG)
def test_a_file_that_takes_long_exists(file: str) -> None:
    assert Path(processes.__file__).parent.joinpath(file).is_file()


def test_locks_are_where_nobody_else_can_put_a_link(tmp_path: Path) -> None:
    """Whoever guesses their folder may not have a file of root's emptied."""
    precious, guessed = tmp_path / "precious", tmp_path / "tmp/tests-4711"
    precious.write_text("precious")
    guessed.mkdir(parents=True)
    for name in ("running", "next"):
        (guessed / name).symlink_to(precious)
    (tmp_path / "test_none.py").write_text("def test_nothing():\n    pass\n")
    subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.processes", "-n1", tmp_path / "test_none.py"],
        env={**os.environ, processes.RUN: "4711", "TMPDIR": str(guessed.parent)},
        cwd=paths.ROOT,
        check=True,
    )
    assert precious.read_text() == "precious"
    assert list(guessed.parent.glob("tests-*")) == [guessed]


@contextmanager
def process_with(run: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of a run of tests, that has its environment already."""
    environment = {processes.RUN: run}
    pipe = subprocess.PIPE
    with subprocess.Popen(["cat"], env=environment, stdin=pipe, stdout=pipe) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"a")
        process.stdin.flush()
        assert process.stdout.read(1) == b"a"
        yield process
        process.kill()


def test_only_a_run_of_tests_that_goes_on_is_another_run() -> None:
    """What an ended run left behind hides nothing of this one."""

    def is_of_another_run(run: str) -> bool:
        with process_with(run) as stray:
            return processes.is_of_another_run(Path(f"/proc/{stray.pid}"))

    own = os.environ[processes.RUN]
    with process_with(own) as first:
        start = started_at(first.pid)
        assert is_of_another_run(f"{first.pid}.{start}")
        assert is_of_another_run(str(first.pid))
        assert not is_of_another_run(f"{first.pid}.{start + 1}")
        assert not is_of_another_run(own)
    assert not is_of_another_run(f"{first.pid}.{start}")
