"""What tests on other machines ask for exists, and what came of it is said as it was."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from testbed.conformance import checks
from tests.machines import kernels, linux, vm


def test_checks_that_kernels_run_exist_and_are_of_every_kind() -> None:
    chosen = [check for check in checks.matching(("*",)) if check.name in kernels.CHECKS]
    assert len(chosen) == len(kernels.CHECKS) == 15
    modules = {check.body.__module__.rpartition(".")[2] for check in chosen}
    assert modules >= {"connections", "datagrams", "names", "isolation", "changes"}


def test_rows_have_names_of_their_own_that_are_folders() -> None:
    names = [row.name for row in kernels.ROWS]
    assert len(set(names)) == len(names)
    assert not any("/" in name or " " in name for name in names)
    assert {(row.kernel, row.compiler) for row in kernels.ROWS} == {
        *((kernel, compiler) for kernel in linux.SUITES for compiler in kernels.COMPILERS),
        ("newest", kernels.NEWEST),
    }


def test_the_page_shows_the_kept_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "RESULTS", tmp_path)  # what this machine ran last is not kept yet
    assert "\n".join(kernels.table()) in kernels.PAGE.read_text()
    assert json.loads(kernels.KEPT.read_text()).keys() <= {row.name for row in kernels.ROWS}


def test_a_row_is_green_at_the_commit_where_all_its_steps_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "RESULTS", tmp_path)
    monkeypatch.setattr(kernels, "KEPT", tmp_path / "kept.json")
    (tmp_path / "kept.json").write_text("{}")
    row = kernels.ROWS[0]
    steps = {step.name: {"passed": True, "text": "all of it", "took_s": 60.0} for step in row.steps}
    stored = {
        "commit": "0123456789",
        "date": "2026-01-02",
        "release": "5.10.0-32-amd64",
        "compiler": "Debian 12, LLVM 14",
        "steps": steps,
    }
    (tmp_path / row.name).mkdir()
    (tmp_path / row.name / "row.json").write_text(json.dumps(stored))
    assert kernels.green(row, "0123456789")
    assert not kernels.green(row, "another")
    assert "| Debian 12, LLVM 14 | all of it | all of it |" in kernels.line(row)
    assert kernels.line(row).endswith("| 4 min | 0123456, 2026-01-02 |")

    steps["doctor"] |= {"passed": False, "text": "exit status 1"}
    del steps["cells"]
    (tmp_path / row.name / "row.json").write_text(json.dumps(stored))
    assert not kernels.green(row, "0123456789")
    assert "| **exit status 1** | all of it | **not reached** |" in kernels.line(row)


@pytest.mark.parametrize(
    ("own", "newest"),
    [
        ({"date": "2026-01-01"}, "kept"),
        ({"date": "2026-01-03"}, "own"),
        ({"date": "2026-01-02", "time": "2026-01-02T09:00:00+00:00"}, "kept"),
        ({"date": "2026-01-02", "time": "2026-01-02T11:00:00+00:00"}, "own"),
    ],
)
def test_results_of_this_machine_do_not_replace_newer_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: dict[str, str], newest: str
) -> None:
    row = kernels.ROWS[0]
    rest = {"release": "5.10", "compiler": "Debian 12, LLVM 14", "steps": {}}
    at = {"date": "2026-01-02", "time": "2026-01-02T10:00:00+00:00"}
    kept = {row.name: {"commit": "kept", **at, **rest}}
    (tmp_path / "kept.json").write_text(json.dumps(kept))
    (tmp_path / row.name).mkdir()
    (tmp_path / row.name / "row.json").write_text(json.dumps({"commit": "own", **own, **rest}))
    (tmp_path / "page.md").write_text(f"{kernels.BEGIN}\n{kernels.END}")
    for name, file in (("RESULTS", ""), ("KEPT", "kept.json"), ("PAGE", "page.md")):
        monkeypatch.setattr(kernels, name, tmp_path / file)
    kernels.write_page()
    assert json.loads((tmp_path / "kept.json").read_text())[row.name]["commit"] == newest


def test_modules_are_loaded_after_those_that_they_depend_on(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text(
        "a/x-y.ko.xz: b/second.ko c/first.ko\nb/second.ko: c/first.ko\nc/first.ko:\n"
    )
    for folder in "abc":
        (tmp_path / folder).mkdir()
    (tmp_path / "a/x-y.ko.xz").write_bytes(lzma.compress(b"x"))
    (tmp_path / "b/second.ko").write_bytes(b"2")
    (tmp_path / "c/first.ko").write_bytes(b"1")
    found = vm.with_dependencies(tmp_path, ("x_y", "in_the_kernel"))
    assert list(found.items()) == [("first.ko", b"1"), ("second.ko", b"2"), ("x-y.ko", b"x")]
