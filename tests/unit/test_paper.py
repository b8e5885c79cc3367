"""The paper says what the campaign says: no number is typed, none is missing, none is old."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest

from testbed import paths
from testbed.model.errors import Error
from testbed.model.trials import Status, Trial
from testbed.reports import archive
from testbed.reports.paper import answers, build, tables
from testbed.results import results, store
from testbed.results.results import Results

WAY = "native-guest/ipv4/tcp/throughput/65536x1"
CAMPAIGN = store.Campaign(
    name="little",
    plan={"duration_s": 1.3, "claims": [{"text": "fast", "cells": "steer/*", "at_least": 0.97}]},
    cells=(f"direct/{WAY}", f"steer/{WAY}", f"passt/{WAY}", f"tun/{WAY}"),
    blocks=3,
    seed=1,
    references={"direct": "direct", "steer": "direct", "passt": "direct", "tun": "direct"},
    guest="standin",
    guest_kernel="",
    accelerator="none",
    kernel="6.18_x",
    cpu="a CPU",
    governor="none",
    host="here",
    revision="0" * 40,
    started="2026-11-25T03:45:05+00:00",
)


@pytest.fixture
def campaign(tmp_path: Path) -> store.Store:
    """`steer` makes 0.9 of `direct`, at twice the CPU time; `passt` cannot; `tun` varies."""
    with store.create(tmp_path / "little", CAMPAIGN) as made:
        for block in range(6):
            values = (20e9, 18e9, 0, 9e9 + 9e9 * (block % 3))
            for order, (cell, value) in enumerate(zip(CAMPAIGN.cells, values, strict=True)):
                trial = Trial(
                    cell,
                    block,
                    order,
                    Status.OK,
                    value=value * (1 + block / 1000),
                    duration_s=1.0,
                    payload_bytes=10**9,
                    machine={"cpu_s": 1.0 + order, "active_s": 1.0}
                    | dict.fromkeys(("softirq_s", "system_s", "user_s", "guest_s"), 0.25),
                )
                if not value:
                    trial = Trial(cell, block, order, Status.UNSUPPORTED, reason="no such guests")
                made.append(trial)
    (made.path / "conformance.json").write_text(
        json.dumps(
            [
                {"check": "refused", "datapath": "steer", "guest": "standin", "status": status}
                for status in ("pass", "pass", "fail", "unsupported")
            ]
        )
    )
    return store.open(made.path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A paper of one line, `text`, with the real one's macros."""
    made = tmp_path / "paper"
    made.mkdir()
    shutil.copy(paths.PAPER / "macros.tex", made)
    return made


def write(folder: Path, text: str) -> None:
    begin = "\\documentclass{article}\\input{macros}\\input{generated/numbers}\n\\begin{document}\n"
    (folder / "main.tex").write_text(begin + text + "\n\\end{document}\n")


# --- numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (rf"\mean{{direct/{WAY},guest=standin}}", r"20.0\,Gbit/s"),
        (rf"\ratio{{steer/{WAY},guest=standin}}", "0.900 [0.900, 0.900]"),
        (
            rf"\ratio{{direct/{WAY},guest=standin to steer/{WAY},guest=standin}}",
            "1.11 [1.11, 1.11]",
        ),
        (rf"\low{{steer/{WAY},guest=standin}}", "0.900"),
        (rf"\verdict{{steer/{WAY},guest=standin}}", "below"),
        (rf"\verdict{{tun/{WAY},guest=standin}}", "not distinguishable from"),
        (rf"\verdict[cpu]{{steer/{WAY},guest=standin}}", "above"),
        (rf"\of[size]{{steer/{WAY},guest=standin}}", r"64\,KiB"),
        (r"\tally{steer/*}", "1 of 1 below one, 0 above"),
        (r"\ratios{*/tcp/throughput/*}", "0.82 to 0.90"),
        (r"\fact{kernel}", r"6.18\_x"),
        (r"\fact{trials/unsupported}", "6"),
        (r"\fact{claims/does not hold}", "1"),
        (rf"\fact{{claims/value/steer/{WAY}}}", "0.900 [0.900, 0.900]"),
        (r"\fact{conformance/steer/standin/tried}", "3"),
        (r"\fact{plan/duration}", r"1.3\,s"),
    ],
)
def test_macros_are_answered_from_the_campaign(
    campaign: store.Store, folder: Path, asked: str, answer: str
) -> None:
    write(folder, asked)
    found = build.numbers(answers.Answers(Results(campaign)), folder)
    assert answer in found.values()


@pytest.mark.parametrize(
    ("asked", "fault"),
    [
        (r"\ratio{capture/x,guest=standin}", r"\ratio{capture/x,guest=standin}: no such cell"),
        (
            rf"\mean{{passt/{WAY},guest=standin}}",
            f"passt/{WAY},guest=standin}}: unsupported: no such guests",
        ),
        (rf"\mean[p99]{{steer/{WAY},guest=standin}}", "no such cell"),
        (r"\ratios{broadcast/*}", "no such ratios in this campaign"),
        (r"\fact{weather}", r"\fact{weather}: no such fact"),
        (
            r"% \fact{weather}" + "\n" + r"\fact{a}\fact{b}",
            "line 4: \\fact{a}: no such fact (and 1",
        ),
    ],
)
def test_what_the_campaign_lacks_is_one_line_that_names_it(
    campaign: store.Store, folder: Path, asked: str, fault: str
) -> None:
    write(folder, asked)
    with pytest.raises(Error) as e:
        build.generate(Results(campaign), folder)
    assert str(e.value).startswith(f"{folder / 'main.tex'} line ")
    assert fault in str(e.value)
    assert "\n" not in str(e.value)
    assert not (folder / "generated").exists()


def test_a_figure_that_the_campaign_has_not_is_named(campaign: store.Store, folder: Path) -> None:
    write(folder, r"\resultfigure{latency-tcp-standin}")
    with pytest.raises(Error, match="the text has latency-tcp-standin, and .*little has not"):
        build.generate(Results(campaign), folder)


def test_a_campaign_without_results_of_checks_has_those_that_are_kept(
    campaign: store.Store,
) -> None:
    (campaign.path / "conformance.json").unlink()
    facts = answers.Answers(Results(campaign)).facts
    counts = [
        int(facts[f"conformance/steer/standin/{key}"]) for key in ("passed", "failed", "tried")
    ]
    assert counts[0] > 500
    assert counts[0] + counts[1] == counts[2]


# --- what is made ---------------------------------------------------------------------------


def test_all_that_is_made_is_stale_when_the_data_changes(
    campaign: store.Store, folder: Path
) -> None:
    write(folder, r"\resultfigure{throughput-tcp-standin}\input{generated/table-standin}")
    made = build.generate(Results(campaign), folder)
    assert {"numbers.tex", "table-standin.tex", "throughput-tcp-standin.pdf"} <= {
        path.name for path in made
    }
    assert set(made) == set((folder / "generated").iterdir())
    assert archive.stale(campaign, made) == []
    (campaign.path / "conformance.json").write_text("[]")
    assert archive.stale(campaign, made) == made


def test_a_table_has_every_datapath_and_why_one_has_no_value(campaign: store.Store) -> None:
    table = "\n".join(tables.TABLES["table-standin"](answers.Answers(Results(campaign))))
    assert re.search(r"\\dpath\{direct\} & 20\.0 & & & & 1\.00 &", table)
    assert re.search(r"\\dpath\{steer\} & 18\.0 & \\textbf\{\$\\times\$0\.900\}", table)
    assert re.search(r"\\dpath\{passt\} & \\multicolumn\{2\}\{c\}\{n/a\$\^a\$\}", table)
    assert "$^a$ no such guests" in table


def test_the_pdf_says_of_which_data_it_is(campaign: store.Store, folder: Path) -> None:
    if not shutil.which("latexmk"):
        pytest.skip("no latexmk")
    made = "".join(rf"\input{{generated/{name}}}" for name in tables.TABLES)
    write(folder, rf"\ratio{{steer/{WAY},guest=standin}}{made}\resultfigure{{ratios-tcp-standin}}")
    assert archive.stale(campaign, [build.build(Results(campaign), folder)]) == []
    write(folder, r"\nonsense")
    with pytest.raises(Error, match=r"main.tex:3: Undefined control sequence"):
        build.typeset(Results(campaign), folder)


def test_the_paper_asks_nothing_that_its_campaigns_do_not_answer() -> None:
    kept, proof = (results.read(paths.REFERENCE / name) for name in ("paper", "proof"))
    assert build.numbers(answers.Answers(kept, proof), paths.PAPER)


def test_the_kept_pdf_is_of_the_kept_data() -> None:
    """Else: nox -s paper, and copy paper/main.pdf to results/reference/paper/paper.pdf."""
    pdf = (paths.REFERENCE / "paper/paper.pdf").read_bytes()
    for name in ("paper", "proof", "load", "applications"):
        assert results.read(paths.REFERENCE / name).digest.encode() in pdf


def test_ratios_that_the_campaign_of_the_claims_has_are_from_there() -> None:
    kept, proof = (results.read(paths.REFERENCE / name) for name in ("paper", "proof"))
    asked = ("ratio", "", f"steer/{WAY},guest=standin")
    both = answers.Answers(kept, proof)
    assert both(*asked) == answers.Answers(proof)(*asked) != answers.Answers(kept)(*asked)
    absolute = ("mean", *asked[1:])
    assert both(*absolute) == answers.Answers(kept)(*absolute)
    only_kept = ("ratio", "", f"proxy/{WAY},guest=standin")
    assert both(*only_kept) == answers.Answers(kept)(*only_kept)


# --- what is typed --------------------------------------------------------------------------

SILENT = re.compile(
    r"\\(?:cite|ref|label|input|resultfigure|bibliography)\{[^}]*\}|" + build.CALL.pattern
)
"""What has digits, and shows none of its own."""


def typed(text: str, constants: dict[str, str]) -> list[str]:
    """Lines of the text in which a digit is left that is no constant."""
    body = text.partition(r"\begin{document}")[2]
    for known in sorted(constants, key=len, reverse=True):
        body = re.sub(rf"(?<![\w.:]){re.escape(known)}(?![\w.:]*\d)", "", body)
    lines = (SILENT.sub("", re.sub(r"(?<!\\)%.*", "", line)) for line in body.splitlines())
    return [line for line in lines if re.search(r"\d", line)]


@pytest.fixture(scope="module")
def constants() -> dict[str, str]:
    found: dict[str, str] = tomllib.loads((paths.PAPER / "constants.toml").read_text())
    return found


def test_no_number_is_typed(constants: dict[str, str]) -> None:
    assert typed((paths.PAPER / "main.tex").read_text(), constants) == []


def test_every_constant_says_what_it_is_and_is_there(constants: dict[str, str]) -> None:
    text = (paths.PAPER / "main.tex").read_text()
    assert all(reason and known in text for known, reason in constants.items())


@pytest.mark.parametrize(
    "line",
    ["It takes 12 ms.", "by 3\\,\\%", "127.0.0.17", "\\textbf{0.97}", "IPv42", "a 2nd time", "x10"],
)
def test_a_number_that_is_typed_is_found(line: str, constants: dict[str, str]) -> None:
    assert typed(rf"\begin{{document}} {line}", constants)


def test_what_is_no_number_of_ours_is_none(constants: dict[str, str]) -> None:
    text = r"\begin{document} IPv4 127.0.0.1, \cite{rfc1122} \ratio{x/65536x1} % 12"
    assert typed(text, constants) == []
