"""Builds the paper from a campaign: writes its numbers, tables and figures, and runs LaTeX.

`paper/main.tex` asks for numbers by macros (`paper/macros.tex`) that name a cell, a glob of cells,
or a fact. Their values are written to `paper/generated/`, with the tables and figures of the text.
If the campaign has no answer, that is an error with the line and the cell. Every generated file
names the digest of its data. The text always names a cell's guests, as in `…/64x1,guest=osv`, also
where the campaign's own id leaves them out. Claims, their verdicts and ratios of their cells may
come from another campaign, the `proof`, with fewer cells and more blocks. Its figures are
`proof/NAME`; figures, cells and facts of other kept campaigns are `CAMPAIGN/NAME`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from testbed import paths
from testbed.model.errors import Error
from testbed.reports.figures import draw
from testbed.reports.paper.answers import Answers
from testbed.reports.paper.tables import TABLES
from testbed.results.results import Results

CALL = re.compile(
    r"\\(mean|interval|ratio|low|high|verdict|of|ratios|tally|fact)(?:\[(\w+)\])?\{([^{}]+)\}"
)
"""A macro call in the text: \\kind[quantity]{cell, glob of cells, or fact}."""
MADE = re.compile(r"\\(?:resultfigure\{|input\{generated/)([\w/-]+)\}")
"""A figure or table in the text."""


def build(campaign: Results, folder: Path = paths.PAPER, proof: Results | None = None) -> Path:
    """Build `main.pdf` in `folder`. Raises `Error` if the campaign lacks data, or LaTeX fails."""
    if not shutil.which("latexmk"):
        raise Error("no latexmk here, which runs LaTeX", "./bootstrap --tex nox -s paper")
    generate(campaign, folder, proof)
    return typeset(campaign, folder)


def typeset(campaign: Results, folder: Path) -> Path:
    """Run LaTeX. The PDF has the campaign's date, so that it is reproducible."""
    command = [
        "latexmk",
        "-pdf",
        "-interaction=nonstopmode",
        "-halt-on-error",
        "-file-line-error",
        "-silent",
        "-auxdir=generated/build",
        "main.tex",
    ]
    began = datetime.fromisoformat(campaign.campaign.started).timestamp()
    dated = {"SOURCE_DATE_EPOCH": f"{began:.0f}", "FORCE_SOURCE_DATE": "1"}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | dated, capture_output=True, text=True, check=False
    )
    if done.returncode:
        log = folder / "generated/build/main.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        fault = next((line for line in lines if re.match(r"\S+:\d+: ", line)), done.stderr.strip())
        raise Error(f"{folder}: {fault}", f"see {log}")
    return folder / "main.pdf"


def generate(
    campaign: Results, folder: Path = paths.PAPER, proof: Results | None = None
) -> list[Path]:
    """Rewrite `generated/`: numbers.tex, tables, figures. Returns the files of this campaign."""
    made, digest = folder / "generated", campaign.digest
    answers, tables_and_figures = Answers(campaign, proof), wanted(folder)
    others = {str(Path(name).parent) for name in tables_and_figures} - {"."}
    kept = {
        other: answers.proof if other == "proof" else answers.kept(other).results
        for other in sorted(others)
    }
    lines = [
        rf"\answer{{{kind}[{quantity}]}}{{{asked}}}{{{answer}}}"
        for (kind, quantity, asked), answer in numbers(answers, folder).items()
    ]
    written = {"numbers": lines} | {
        name: table(answers) for name, table in TABLES.items() if name in tables_and_figures
    }
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    for name, content in written.items():
        (made / f"{name}.tex").write_text("\n".join([f"% {digest}", *content]) + "\n")
    for other, of in kept.items():
        names = {Path(name).name for name in tables_and_figures if Path(name).parent == Path(other)}
        draw.draw(of, made / other, kinds=("pdf",), bare=True, only=names)
    drawn = draw.draw(campaign, made, kinds=("pdf",), bare=True)
    own = f"-{campaign.campaign.guest}"
    for name in tables_and_figures:  # the text names guests, also where the figure's name does not
        if (unnamed := made / f"{name.replace(own, '')}.pdf") in drawn:
            drawn[drawn.index(unnamed)] = unnamed.rename(made / f"{name}.pdf")
    there = {str(path.relative_to(made).with_suffix("")) for path in made.rglob("*.*")}
    missing = tables_and_figures - there - {"numbers"}
    if missing:
        raise Error(f"{folder}: the text has {min(missing)}, and {campaign.path} has not", PLAN)
    return [*(made / f"{name}.tex" for name in written), *drawn]


PLAN = "give a campaign of the plan paper"


def wanted(folder: Path) -> set[str]:
    """Names of the figures and tables in the text."""
    return {name for _, line in _lines(folder) for name in MADE.findall(line)}


def numbers(answers: Answers, folder: Path) -> dict[tuple[str, str, str], str]:
    """(kind, quantity, argument) of a macro call → LaTeX, for all macro calls of the text.

    Raises `Error` with the first call that has no answer, and the number of others.
    """
    found: dict[tuple[str, str, str], str] = {}
    faults = []
    for where, line in _lines(folder):
        for kind, quantity, asked in CALL.findall(line):
            try:
                found[kind, quantity, asked] = answers(kind, quantity, asked)
            except KeyError as e:
                faults.append(f"{where}: \\{kind}{{{asked}}}: {e.args[0]}")
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise Error(f"{faults[0]}{more}", PLAN)
    return found


def _lines(folder: Path) -> Iterator[tuple[str, str]]:
    """(place, line) for each line of the text, without comments."""
    for file in (folder / "macros.tex", folder / "main.tex"):
        try:
            lines = file.read_text().splitlines()
        except OSError as e:
            raise Error(f"{file}: {e.strerror}") from e
        for n, line in enumerate(lines, 1):
            yield f"{file} line {n}", re.sub(r"(?<!\\)%.*", "", line)
