"""Tests of the tests: what fails ends soon, and what is not tested is told or fails."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import skips

ROOT = Path(__file__).parents[2]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs pytest on a file of tests, with our limits and rules, all limits a hundredth."""

    def run(tests: str, *options: str, slowness: str = "0.01") -> subprocess.CompletedProcess[str]:
        (tmp_path / "test_it.py").write_text(tests)
        ours = ("tests.limits", "tests.skips", "no:cacheprovider", "no:randomly")
        plugins = [word for name in ours for word in ("-p", name)]
        command = [sys.executable, "-m", "pytest", *plugins, "-c", "/dev/null", "-q", "test_it.py"]
        return subprocess.run(
            [*command, *options],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TESTBED_SLOWNESS": slowness},
        )

    return run


def test_a_test_that_fails_beside_its_child_ends_at_once(run: Run) -> None:
    began = time.monotonic()
    done = run(
        """if True:
        import subprocess
        from tests.children import ending
        def test_it():
            with ending(subprocess.Popen(["sleep", "1000"])):
                assert 1 == 2
    """,
        slowness="1",
    )
    assert time.monotonic() - began < 20
    assert "assert 1 == 2" in done.stdout
    assert "1 failed" in done.stdout


@pytest.mark.parametrize("processes", [(), ("-n2",)], ids=["one process", "two processes"])
def test_a_test_has_a_limit_which_a_marker_changes(run: Run, processes: tuple[str, ...]) -> None:
    done = run(
        """if True:
        import time, pytest
        def test_slow():
            time.sleep(1000)
        @pytest.mark.timeout(1000)
        def test_that_may():
            time.sleep(4)
    """,
        *processes,
    )
    assert "1 failed, 1 passed" in done.stdout
    assert "Timeout (>3.0s)" in done.stdout


def test_what_does_not_end_even_then_is_ended_and_says_where_it_was(run: Run) -> None:
    done = run(
        """if True:
        import time
        def test_it():
            try:
                time.sleep(1000)
            finally:
                time.sleep(1000)
    """,
        "-n1",
    )
    assert done.returncode == 1
    assert "in test_it" in done.stderr
    assert "crashed while running 'test_it.py::test_it'" in done.stdout


def test_a_thread_that_outlives_all_tests_is_ended_too(run: Run) -> None:
    done = run("""if True:
        import threading
        def test_it():
            threading.Thread(target=threading.Event().wait).start()
    """)
    assert done.returncode == 1
    assert "Timeout (0:00:00.6" in done.stderr


@pytest.mark.parametrize("processes", [(), ("-n2",)], ids=["one process", "two processes"])
def test_skips_that_are_listed_are_told_and_others_fail(
    run: Run, processes: tuple[str, ...]
) -> None:
    done = run(
        """if True:
        import pytest
        @pytest.mark.parametrize("n", range(3))
        def test_for_root(n):
            pytest.skip("needs root")
        @pytest.mark.skipif(True, reason="no OSv kernel of flavor ipv6 in the cache")
        def test_of_osv():
            pass
        @pytest.fixture
        def browser():
            pytest.skip("no chromium")
        def test_of_a_page(browser):
            pass
    """,
        *processes,
    )
    assert done.returncode == 1
    assert "4 skipped, 1 error" in done.stdout
    assert f"    3 skipped: {skips.ALLOWED['needs root']}\n" in done.stdout
    assert f"    1 skipped: {skips.ALLOWED['no OSv kernel.*']}\n" in done.stdout
    assert "would be skipped: no chromium. tests/skips.toml does not allow that" in done.stdout
    assert "./bootstrap --tests --tex" in done.stdout


def test_every_reason_that_is_allowed_says_why() -> None:
    assert all(len(why) > 20 for why in skips.ALLOWED.values())
    assert skips.allowed("no OSv kernel here")
    assert not skips.allowed("no QEMU")
