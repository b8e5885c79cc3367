"""The gate of session bench, on a copy of the project in which a program is made slower."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from testbed.model.errors import Error
from tests.bench import history
from tests.bench.gate import CPU
from tests.bench.verdicts import (
    BANDS,
    Band,
    Measured,
    Verdict,
    bands,
    bands_of_run,
    judge,
    measured,
)

ROOT = Path(__file__).parents[2]
TEST = (
    "tests/bench/test_programs.py::"
    "test_a_packet_of_a_connection_that_steer_has_handed_over[native to guest-ipv4]"
)
WHAT = "steer: native to guest, ipv4"
SLOWER = """
	for (volatile int i = 0; i < 64; i++)
		;
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The project, as far as its benchmarks of programs need it."""
    for name in ("testbed", "bpf", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def bench(project: Path, *options: str) -> tuple[int, str]:
    """Exit status and output of one benchmark there."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "bench",
        TEST,
        "--benchmark-quiet",
        "--benchmark-json",
        "run.json",
        "-p",
        "no:cacheprovider",
        *options,
    ]
    env = os.environ | {"PYTHONPATH": str(project)}
    env.pop("PYTEST_XDIST_WORKER", None)  # it would measure nothing, as if it were one
    done = subprocess.run(
        command, cwd=project, env=env, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.alone
@pytest.mark.root
def test_a_program_that_was_made_slower_is_found_and_an_unchanged_one_is_not(copy: Path) -> None:
    bands = copy / "tests/bench/bands.toml"
    bands.write_text("")
    status, said = bench(copy)
    assert (status, "1 could not measure" in said) == (3, True), said

    ratio = json.loads((copy / "run.json").read_text())["benchmarks"][0]["extra_info"]["ratio"]
    told = said[said.index("To accept") :].splitlines()
    assert told[1] == f'"{WHAT}" = {{ ratio = {ratio:.3g}, band = 0.25 }}'
    bands.write_text(f'["{CPU}"]\n{told[1]}\n')
    status, said = bench(copy)
    assert (status, WHAT in said, "1 within" in said) == (0, True, True), said

    bands.write_text("")
    (copy / "run.json").rename(copy / "before.json")
    program = copy / "bpf/steer.c"
    start = "int port_egress(struct __sk_buff *skb)\n{\n\tstruct port port = port_of(skb);\n"
    text = program.read_text()
    assert start in text
    program.write_text(text.replace(start, start + SLOWER))
    status, said = bench(copy, "--against", "before.json")
    assert (status, "1 worse" in said) == (1, True), said
    history.draw(history.runs([copy / "run.json"]), copy / "history.png")
    assert (copy / "history.png").stat().st_size > 10_000


BAND = Band(2.0, 0.25)


@pytest.mark.parametrize(
    ("low", "median", "high", "verdict"),
    [
        (1.9, 2.0, 2.1, Verdict.WITHIN),
        (2.4, 2.45, 2.6, Verdict.WITHIN),
        (2.6, 2.7, 2.8, Verdict.WORSE),
        (1.4, 1.5, 1.55, Verdict.BETTER),
        (1.5, 1.55, 1.65, Verdict.WITHIN),
        (1.2, 2.0, 3.0, Verdict.UNKNOWN),
        (2.45, 2.6, 2.7, Verdict.UNKNOWN),
    ],
)
def test_a_verdict_needs_the_whole_interval(
    low: float, median: float, high: float, verdict: Verdict
) -> None:
    assert judge(Measured(median, low, high), BAND)[0] is verdict


def test_without_a_stored_value_nothing_is_said_of_a_ratio() -> None:
    assert judge(Measured(1, 1, 1), None) == (Verdict.UNKNOWN, "there is no band for it")


def test_a_few_disturbed_rounds_do_not_move_the_ratio() -> None:
    assert measured([1.0] * 12 + [9.0] * 3) == Measured(1.0, 1.0, 1.0)


def test_bands_are_of_one_cpu(tmp_path: Path) -> None:
    file = tmp_path / "bands.toml"
    file.write_text('["slow"]\n"x" = { ratio = 2.0, band = 0.1 }\n')
    assert bands(file, "slow") == {"x": Band(2.0, 0.1)}
    assert not bands(file, "fast")
    known = tomllib.loads(BANDS.read_text())
    assert known
    for cpu in known:
        assert all(band.ratio > 0 < band.share < 1 for band in bands(BANDS, cpu).values())


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (partial(bands, cpu="slow"), '["slow"]\n"x" = { ratio = "fast", band = 0.1 }\n'),
        (partial(bands, cpu="slow"), 'slow = "x"\n'),
        (bands_of_run, "{}"),
        (bands_of_run, "[]"),
    ],
)
def test_a_broken_file_of_bands_is_refused(
    read: Callable[[Path], object], text: str, tmp_path: Path
) -> None:
    file = tmp_path / "bands"
    file.write_text(text)
    with pytest.raises(Error, match=r"bands: not a (file of bands|run of benchmarks)"):
        read(file)
