"""What the command line prints: commands that can be pasted, notes that stay, tables of several."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from testbed import cli, paths
from testbed.cli import common
from testbed.model.progress import Progress

PROOF = paths.REFERENCE / "proof"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A campaign without trials, whose plan claims nothing."""
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(PROOF / "campaign.json", folder)
    text = (folder / "campaign.json").read_text()
    start = text.index('"claims": [') + len('"claims": [')
    (folder / "campaign.json").write_text(text[:start] + text[text.index("\n  ]", start) :])
    (folder / "trials.jsonl").write_text("")
    return folder


def test_commands_in_hints_are_those_that_a_clone_understands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copy(PROOF / "campaign.json", tmp_path)
    again = ["run", "--plan", "quick", "--out", str(tmp_path)]
    monkeypatch.setattr("testbed.doctor.preflight", lambda: None)
    for bootstrap, command in (("", "testbed"), ("./bootstrap", "./bootstrap testbed")):
        monkeypatch.setenv("TESTBED_BOOTSTRAP", bootstrap)
        assert cli.main(again) == 3
        assert capsys.readouterr().err == (
            f"testbed: {tmp_path}: there is a campaign already; "
            f"continue it: {command} run --resume {tmp_path}\n"
        )


def test_a_file_that_cannot_be_written_is_named_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "nosuch/agent.img"
    assert cli.main(["image", "build", "agent", "--output", str(file)]) == 3
    assert capsys.readouterr().err == f"testbed: {file}: No such file or directory\n"
    with pytest.raises(FileNotFoundError):
        cli.main(["--debug", "image", "build", "agent", "--output", str(file)])


@pytest.mark.parametrize("option", ["--junit", "--tap"])
def test_conformance_looks_for_the_folder_of_its_files_before_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    file = tmp_path / "nosuch/results"
    command = ["conformance", "--datapath", "loopback", "--check", "connect", option, str(file)]
    assert cli.main(command) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"testbed: {file}: there is no folder {file.parent}\n"


def test_a_kernel_that_is_none_is_said_once_and_leaves_no_campaign(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel, out = str(tmp_path / "nosuch"), tmp_path / "campaign"
    assert cli.main(["run", "--plan", "quick", "--osv-kernel", kernel, "--out", str(out)]) == 3
    [line] = capsys.readouterr().err.splitlines()
    assert kernel in line
    assert not out.exists()


def test_only_commands_are_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESTBED_BOOTSTRAP", "../clone/bootstrap")
    assert common.called("see 'testbed doctor'") == "see '../clone/bootstrap testbed doctor'"
    for text in ("add it to testbed/host/facts.py", "pip install testbed", "testbed-cni is there"):
        assert common.called(text) == text


def test_a_note_stays_on_a_terminal_above_the_line_that_changes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with common.progress() as report:
        report(Progress("guests are linux: no OSv here", 0, 2, stays=True))
        report(Progress("block 0", 1, 2, 60.0))
    printed = capsys.readouterr().err
    _, note, after = printed.partition("guests are linux: no OSv here\n")
    assert note
    assert "\x1b[1A" not in after  # the cursor does not go up to it again
    assert "1:00 left block 0" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", after)


def test_without_a_terminal_notes_are_lines_and_nothing_is_said_twice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with common.progress() as report:
        report(Progress("preparing", 0, 2))
        report(Progress("guests are standin", 0, 2, stays=True))
        report(Progress("preparing", 0, 2))
        report(Progress("block 0", 0, 2))
    assert capsys.readouterr().err.splitlines() == [
        "[0/2] preparing",
        "[0/2] guests are standin",
        "[0/2] block 0",
    ]


def test_tables_of_several_campaigns_are_printed_and_what_is_none_is_said(
    bare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(bare, bare.with_name("other"))
    assert cli.main(["table", str(bare), str(other)]) == 0
    assert capsys.readouterr().out.count("proof: ") == 2
    assert cli.main(["table", str(bare.parent), str(bare)]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("proof: ") == 1
    assert f"testbed: {bare.parent}: no campaign there" in printed.err
    assert cli.main(["table", str(bare.parent)]) == 3


def test_a_plan_without_claims_is_said_to_have_none(
    bare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["claims", str(bare)]) == 3
    assert capsys.readouterr().out == "the plan proof claims nothing: there is nothing to judge\n"


def test_a_table_has_one_form(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["table", "--json", "--bencher", str(PROOF)])
    assert ended.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_campaign_is_not_compared_with_itself(capsys: pytest.CaptureFixture[str]) -> None:
    again = PROOF.parent / "paper/../proof"
    assert cli.main(["compare", str(PROOF), str(again)]) == 3
    assert f"{PROOF} and {again} are the same campaign" in capsys.readouterr().err


def test_claims_fit_80_columns_with_two_lines_for_each_cell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    cli.main(["claims", str(PROOF)])
    lines = capsys.readouterr().out.splitlines()
    head = re.compile(r"  (steer|capture), .* : \w+ +(holds|can't tell) *$")
    at = [n for n, line in enumerate(lines) if head.match(line)]
    assert len(at) == 46
    for n in at:
        assert re.match(r"    [≥≤] [\d.]+: .* 75 blocks; t: .*\]", lines[n + 1])
    assert max(map(len, lines)) <= 80
