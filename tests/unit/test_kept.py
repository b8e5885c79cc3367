"""Conformance results that are kept, and the pages made of them."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from testbed import paths
from testbed.conformance import archive, checks
from testbed.conformance.check import Result, Status
from testbed.model.cells import Pair
from testbed.model.errors import Error
from testbed.model.terms import Family, Runtime, Transport
from testbed.runtimes.interface import Description

STEER = ("steer", "osv", "ipv6 v0.57.0")


def result(
    check: str,
    status: Status = Status.PASS,
    reason: str = "",
    family: Family = Family.IPV4,
    run: tuple[str, str, str] = STEER,
    pair: Pair = Pair.NATIVE_GUEST,
) -> Result:
    return Result(check, *run, pair, family, Transport.TCP, status, reason, 0.1)


def test_a_run_counts_passes_and_keeps_whatever_did_not_pass_with_its_reason() -> None:
    (run,) = archive.runs_of(
        [
            result("connect"),
            result("connect", Status.FAIL, "refused", Family.IPV6),
            result("idle", Status.UNSUPPORTED, "no"),
        ]
    )
    assert run.checks["connect"] == archive.Outcome(1, {}, {"refused": ["native-guest ipv6 tcp"]})
    assert [run.total(status) for status in Status] == [1, 1, 1]


def test_what_is_kept_is_read_as_it_was_in_the_order_of_datapaths_and_guests(
    tmp_path: Path,
) -> None:
    names = [("proxy", "standin", ""), STEER, ("steer", "standin", ""), ("loopback", "", "")]
    runs = archive.runs_of([result("connect", Status.FAIL, "refused", run=run) for run in names])
    files = {archive.keep(run, tmp_path).name for run in runs}
    assert files == {
        "proxy-standin.json",
        "steer-osv-ipv6.json",
        "steer-standin.json",
        "loopback.json",
    }
    assert archive.read(tmp_path) == [runs[3], runs[2], runs[1], runs[0]]
    assert "| check | loopback<br>processes | steer<br>stand-ins |" in archive.page(runs[::-1], [])
    with pytest.raises(Error, match="no results"):
        archive.read(tmp_path / "nothing")


def test_the_digest_of_programs_is_of_their_code_and_not_of_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "PROGRAMS", (tmp_path,))
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    digests = []
    for c, python in (
        ("/* one */\nint one;\n", '"""One."""\n\n# one\none = "#"\n'),
        ("int one; /* two\n*/", '"""One,\n\ntwo."""\n\none = "#"\n'),
        ("int two;", '"""One."""\none = "#"\n'),
        ("int one;", '"""One."""\none = "##"\n'),
    ):
        (tmp_path / "a.c").write_text(c)
        (tmp_path / "a.py").write_text(python)
        digests.append(archive.programs("steer"))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_files_of_another_datapath_are_not_in_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "PROGRAMS", (tmp_path,))
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    before = archive.programs("steer")
    (tmp_path / "capture.c").write_text("int one;")
    assert archive.programs("steer") == before != archive.programs("capture")
    (tmp_path / "pod.h").write_text("int one;")
    assert archive.programs("steer") != before


def test_guests_with_the_shim_are_a_run_of_their_own(tmp_path: Path) -> None:
    with_shim, without = (
        archive.runs_of([result("connect")], shim=shim)[0] for shim in (True, False)
    )
    archive.keep(with_shim, tmp_path)
    archive.keep(without, tmp_path)
    assert archive.read(tmp_path) == [without, with_shim]
    heads = "| check | steer<br>OSv ipv6 | steer<br>OSv ipv6, shim |"
    assert heads in archive.page([without, with_shim], [])


def test_circumstances_are_kept_and_those_of_guests_only_where_there_were_some(
    tmp_path: Path,
) -> None:
    known, guest = (
        archive.circumstances(),
        Description(Runtime.OSV, "", "tcg", {"kernel": "0" * 64}),
    )
    results = [result("connect"), result("connect", run=("loopback", "", ""))]
    for run in archive.runs_of(results, guest, **known):
        archive.keep(run, tmp_path)
    loopback, steer = archive.read(tmp_path)
    assert steer.revision == loopback.revision != ""
    assert (steer.programs, loopback.programs) == (
        archive.programs("steer"),
        archive.programs("loopback"),
    )
    assert steer.host_kernel == platform.release()
    assert steer.versions["python"] == platform.python_version()
    assert (steer.accelerator, steer.digests) == ("tcg", {"kernel": "0" * 64})
    assert (loopback.accelerator, loopback.digests) == ("", {})


def test_checks_with_components_are_a_run_of_their_own() -> None:
    standins = ("steer", "standin", "")
    runs = archive.runs_of(
        [
            result("connect", run=standins),
            result("connect", run=standins, pair=Pair.WASM_CONTAINER),
            result("connect", run=standins, pair=Pair.WASM_GUEST),
        ]
    )
    totals = {run.name: run.total(Status.PASS) for run in runs}
    assert totals == {"steer-standin": 1, "steer-wasm-standin": 2}
    assert "| check | steer<br>stand-ins | steer<br>WASM, stand-ins |" in archive.page(runs, [])


def test_a_cell_says_what_passed_what_failed_and_why_the_rest_is_unsupported() -> None:
    runs = archive.runs_of(
        [
            result("connect"),
            result("connect", Status.FAIL, "guest1: refused"),
            result("idle", Status.UNSUPPORTED, "guest1 has no such thing"),
            result("idle", Status.UNSUPPORTED, "guest2 has no such thing"),
        ]
    )
    page = archive.page(runs, checks.matching(["connect", "idle"]))
    lines = page.splitlines()
    assert any(line.endswith("| 1 **✗1** |") for line in lines)
    assert any(line.endswith("| (2)<sup>1</sup> |") for line in lines)
    assert "1. the guest has no such thing" in lines
    assert "- connect (1): guest1: refused" in lines


def test_a_readme_without_the_place_for_the_sums_is_refused() -> None:
    with pytest.raises(Error, match="lacks the place"):
        archive.with_sums("nothing", [])


def test_the_pages_of_this_project_say_what_is_kept() -> None:
    runs = archive.read()
    assert archive.PAGE.read_text() == archive.page(runs, checks.matching())
    readme = archive.README.read_text()
    assert readme == archive.with_sums(readme, runs)


def test_what_is_kept_is_of_checks_that_there_are_and_of_all_of_them() -> None:
    """Else: testbed conformance --keep --datapath steer --guest standin, then --pages."""
    names = {check.name for check in checks.matching()}
    runs = {run.name: run.checks.keys() for run in archive.read()}
    assert all(checked <= names for checked in runs.values())
    assert runs["steer-standin"] == names


def test_what_is_kept_is_of_the_programs_that_there_are() -> None:
    """Else: testbed conformance --keep for these, then --pages."""
    stale = [run.name for run in archive.read() if run.programs != archive.programs(run.datapath)]
    assert stale == []
