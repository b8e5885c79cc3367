"""The paper, built from a campaign: its numbers, tables and figures are made, none is typed.

`paper/main.tex` asks by macros (`paper/macros.tex`) that name a cell, several, or a fact; what they
stand for is written to `paper/generated/`, with the tables and figures that the text has. Whatever
the campaign cannot answer is an error that names the line and the cell. All that is made says the
digest of the data. A cell's guests are always named here, `…/64x1,guest=osv`, also where the
campaign's own id leaves them out. What is claimed, and what came of it, may be another campaign's,
the `proof`, of fewer cells and more blocks. LaTeX is run, but nothing is measured here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from string import ascii_lowercase
from typing import Any, NamedTuple

from testbed import paths
from testbed.model import addresses
from testbed.model.cells import SLOW_US, Cell, Pair
from testbed.model.errors import Error
from testbed.model.terms import Family
from testbed.model.trials import Status
from testbed.plan import CPU_QUANTITY
from testbed.reports import claims
from testbed.reports.figures import draw
from testbed.reports.table import UNITS, Unit, absence, grouped, names, number, rank, summaries
from testbed.results.analysis import (
    CONFIDENCE,
    Estimate,
    Summary,
    block_values,
    controls,
    cost_values,
    estimate,
)
from testbed.results.store import Store, frame

CALL = re.compile(
    r"\\(mean|interval|ratio|low|high|verdict|of|ratios|tally|fact)(?:\[(\w+)\])?\{([^{}]+)\}"
)
"""A macro of the text: \\kind[quantity]{cell, glob of cells, or fact}."""
MADE = re.compile(r"\\(?:resultfigure\{|input\{generated/)([\w-]+)\}")
"""A figure or table of the text."""


def build(campaign: Store, folder: Path = paths.PAPER, proof: Store | None = None) -> Path:
    """The paper as `main.pdf` in `folder`. Raises `Error` for what the campaign or LaTeX lacks."""
    if not shutil.which("latexmk"):
        raise Error("no latexmk here, which runs LaTeX", "./bootstrap --tex nox -s paper")
    generate(campaign, folder, proof)
    return typeset(campaign, folder)


def typeset(campaign: Store, folder: Path) -> Path:
    """Run LaTeX over what there is; the PDF has the campaign's date, not today's."""
    command = ["latexmk", "-pdf", "-interaction=nonstopmode", "-halt-on-error", "-file-line-error",
               "-silent", "-auxdir=generated/build", "main.tex"]  # fmt: skip
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


def generate(campaign: Store, folder: Path = paths.PAPER, proof: Store | None = None) -> list[Path]:
    """Write `generated/` anew: numbers.tex, tables, figures. Says which files they are."""
    made, digest = folder / "generated", campaign.digest()
    answers, tables_and_figures = Answers(campaign, proof), wanted(folder)
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
    drawn = draw.draw(campaign, made, bare=True)
    own = f"-{campaign.campaign.guest}"
    for name in tables_and_figures:  # whose guests the text names, also if the campaign need not
        if (unnamed := made / f"{name.replace(own, '')}.pdf") in drawn:
            drawn[drawn.index(unnamed)] = unnamed.rename(made / f"{name}.pdf")
    missing = tables_and_figures - {path.stem for path in made.iterdir()} - {"numbers"}
    if missing:
        raise Error(f"{folder}: the text has {min(missing)}, and {campaign.path} has not", PLAN)
    return [*(made / f"{name}.tex" for name in written), *drawn]


PLAN = "give a campaign of the plan paper"


def wanted(folder: Path) -> set[str]:
    """Names of figures and tables that the text has."""
    return {name for _, line in _lines(folder) for name in MADE.findall(line)}


def numbers(answers: Answers, folder: Path) -> dict[tuple[str, str, str], str]:
    """(kind, quantity, what) → LaTeX, of everything that the text asks for.

    Raises `Error` with the first line that has no answer, and how many others have none.
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
    """Where it stands → each line of the text, without its comment."""
    for file in (folder / "macros.tex", folder / "main.tex"):
        try:
            lines = file.read_text().splitlines()
        except OSError as e:
            raise Error(f"{file}: {e.strerror}") from e
        for n, line in enumerate(lines, 1):
            yield f"{file} line {n}", re.sub(r"(?<!\\)%.*", "", line)


# --- numbers --------------------------------------------------------------------------------


class Answers:
    """What a campaign says, as LaTeX. A KeyError has the reason why it says nothing."""

    def __init__(self, store: Store, proof: Store | None = None) -> None:
        self.store, self.proof = store, proof or store
        self.rows = list(summaries(store))
        self.cells: dict[str, list[Summary]] = {}
        for row in self.rows:
            self.cells.setdefault(self.id_of(row.cell), []).append(row)
        self._tables = {
            self.id_of(Cell.parse(str(id))): table
            for id, table in frame(store.trials()).groupby("cell")
        }
        self.claims = claims.judge(self.proof)
        self.conformance = _conformance(store)
        self.facts = dict(_facts(self))

    def id_of(self, cell: Cell) -> str:
        """Its id with its guests named."""
        guest = (cell.guest or self.store.campaign.guest) if cell.pair.guests else ""
        return replace(cell, guest=guest).id

    def __call__(self, kind: str, quantity: str, asked: str) -> str:
        if kind == "fact":
            if asked not in self.facts:
                raise KeyError("no such fact")
            return self.facts[asked]
        if kind in ("ratios", "tally"):
            return self._of_many(kind, asked)
        id, _, other = asked.partition(" to ")
        row = self._known(id, "" if kind == "of" else quantity)
        if kind == "of":
            return _parameter(row.cell, quantity)
        if kind in _OF_CELL:
            return _OF_CELL[kind](row)
        if other:
            row = self._divided(row, self._known(other, quantity).cell)
        elif row.no_ratio:
            raise KeyError(row.no_ratio)
        return _OF_RATIO[kind](row.ratio)

    def _known(self, id: str, quantity: str) -> Summary:
        row = self.row(id, quantity)
        if row is None:
            raise KeyError("no such cell in this campaign")
        if row.status is not Status.OK:
            raise KeyError(f"{row.status}: {row.reason}")
        return row

    def row(self, id: str, quantity: str = "") -> Summary | None:
        """The first quantity of a cell, the one that is so called (`p99`), or what it costs."""
        rows = self.cells.get(id, ())
        if quantity == CPU_QUANTITY:
            return self._cost(rows[0]) if rows else None
        return next((row for row in rows if row.quantity.startswith(quantity)), None)

    def _cost(self, row: Summary) -> Summary:
        """The same cell, of what its traffic costs the host."""
        row = replace(row, quantity=CPU_QUANTITY)
        row = replace(row, estimate=estimate(self._values(row.cell, CPU_QUANTITY).values()))
        return self._divided(row, replace(row.cell, datapath=row.reference or row.cell.datapath))

    def _divided(self, row: Summary, to: Cell) -> Summary:
        """The same, with the ratio to another cell in those blocks that have both."""
        mine, others = (self._values(cell, row.quantity) for cell in (row.cell, to))
        both = sorted(mine.keys() & others.keys())
        return replace(row, ratio=estimate(mine[block] / others[block] for block in both))

    def _values(self, cell: Cell, quantity: str) -> dict[int, float]:
        table = self._tables.get(self.id_of(cell))
        if table is None:
            return {}
        return cost_values(table) if quantity == CPU_QUANTITY else block_values(table, quantity)

    def _of_many(self, kind: str, glob: str) -> str:
        """Of all ratios like `glob`: their range; or how many are below, at and above one."""
        found = [
            row.ratio
            for id, rows in self.cells.items()
            if fnmatchcase(id, glob)
            for row in rows[:1]
            if row.ratio.blocks > 1 and row.reference != row.cell.datapath
        ]
        if not found:
            raise KeyError("no such ratios in this campaign")
        if kind == "ratios":
            means = sorted(ratio.mean for ratio in found)
            return f"{number(means[0], 1)} to {number(means[-1], 1)}"
        below, above = (sum(r.high < 1 for r in found), sum(r.low > 1 for r in found))
        return f"{below} of {len(found)} below one, {above} above"


def _unit(row: Summary) -> Unit:
    return COST if row.quantity == CPU_QUANTITY else UNITS[row.cell.metric]


COST = Unit(1, "CPU s")
"""Per gigabyte (throughput) or million transactions (other metrics)."""


def _interval(of: Estimate, unit: Unit) -> str:
    mean, low, high = (
        number(x / unit.scale, of.mean / unit.scale) for x in (of.mean, of.low, of.high)
    )
    shown = mean if of.blocks < 2 else f"{mean} [{low}, {high}]"
    return shown + (rf"\,{escape(unit.name)}" if unit.name else "")


def _parameter(cell: Cell, name: str) -> str:
    """The size of a cell's messages, or how many streams, guests, pods it has."""
    if name != "size":
        return str(getattr(cell, name))
    kib, rest = divmod(cell.size_bytes, 1024)
    return rf"{cell.size_bytes}\,bytes" if rest else rf"{kib}\,KiB"


def _verdict(ratio: Estimate) -> str:
    if ratio.low > 1:
        return "above"
    return "below" if ratio.high < 1 else "not distinguishable from"


_OF_CELL: Mapping[str, Callable[[Summary], str]] = {
    "mean": lambda row: _interval(replace(row.estimate, blocks=1), _unit(row)),
    "interval": lambda row: _interval(row.estimate, _unit(row)),
}
_OF_RATIO: Mapping[str, Callable[[Estimate], str]] = {
    "ratio": lambda ratio: _interval(ratio, Unit(1, "")),
    "low": lambda ratio: number(ratio.low, ratio.mean),
    "high": lambda ratio: number(ratio.high, ratio.mean),
    "verdict": _verdict,
}


# --- facts ----------------------------------------------------------------------------------


def _facts(answers: Answers) -> Iterator[tuple[str, str]]:
    """Everything else that the text may ask for."""
    store, campaign = answers.store, answers.store.campaign
    trials, log = store.trials(), store.log()
    yield "digest", store.digest()
    yield "digest/short", store.digest()[: len("sha256:") + 16]
    for name in ("revision", "kernel", "cpu", "governor", "congestion_control"):
        yield name, escape(str(getattr(campaign, name)))
    if campaign.started:
        began = datetime.fromisoformat(campaign.started)
        yield "date", f"{began.day}~{began:%B %Y}"
    times = sorted(datetime.fromisoformat(trial.started) for trial in log if trial.started)
    if times:
        yield "duration", f"{(times[-1] - times[0]).total_seconds() / 60:.0f}~minutes"
    yield "cells", str(len(campaign.cells))
    yield "blocks", str(len({trial.block for trial in trials}))
    yield "trials", str(len(log))
    yield "trials/disturbed", str(sum(trial.disturbed is not None for trial in log))
    ended = Counter(trial.status for trial in trials)
    for status in Status:
        yield f"trials/{status}", str(ended[status])
    for name in ("duration", "warmup"):
        yield f"plan/{name}", rf"{campaign.plan.get(f'{name}_s', 0):g}\,s"
    yield "confidence", rf"{CONFIDENCE:.0%}".replace("%", r"\,\%")
    yield "slow", rf"{SLOW_US:g}\,\textmu{{}}s"
    guests = {
        campaign.guest: {"kernel": campaign.guest_kernel, "accelerator": campaign.accelerator}
    }
    for name, guest in (guests | dict(campaign.guests)).items():
        for key, value in guest.items():
            yield f"guest/{name}/{key}", escape(value)
    for name, version in campaign.versions.items():
        yield f"version/{name}", escape(version)
    for row in answers.claims:
        if row.ratio.blocks:
            yield f"claims/{row.claim.quantity}/{row.cell.id}", _interval(row.ratio, Unit(1, ""))
    judged = Counter(row.verdict for row in answers.claims)
    yield "claims", str(judged.total())
    yield "claims/blocks", str(len({trial.block for trial in answers.proof.trials()}))
    yield "claims/congestion_control", escape(answers.proof.campaign.congestion_control)
    for verdict in claims.Verdict:
        yield f"claims/{verdict}", str(judged[verdict])
    if found := controls(answers.rows):
        yield from (("aa/ratios", str(found.same)), ("aa/differing", str(found.differing)),
                    ("aa/bound", str(found.bound)), ("slow/cells", str(found.slow)),
                    ("slow/found", str(found.found)))  # fmt: skip
    if answers.conformance:
        yield "checks", str(len({r["check"] for r in answers.conformance}))
        for head, counts in _columns(answers.conformance).items():
            name = "/".join(part for part in head if part)
            for key, count in counts.items():
                yield f"conformance/{name}/{key}", str(count)


def _conformance(store: Store) -> list[dict[str, str]]:
    """Results of checks: the campaign's, where it has them, else those that are kept."""
    file = store.path / "conformance.json"
    try:
        if file.exists():
            found: list[dict[str, str]] = json.loads(file.read_text())
        else:
            found = []
            for file in sorted(KEPT.glob("*.json")):
                found += _kept(json.loads(file.read_text()), file.stem)
        _columns(found)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise Error(f"{file}: not results of checks ({e})") from e
    return found


KEPT = paths.REFERENCE / "conformance"
"""What `testbed conformance --keep` writes, `DATAPATH-GUEST.json`."""


def _kept(results: Mapping[str, Any], name: str) -> Iterator[dict[str, str]]:
    """Each case of a file of `KEPT`; OSv's kernels are told apart by the file's name."""
    head = {"datapath": results["datapath"], "guest": name.partition("-")[2]}
    for check, came in results["checks"].items():
        counts = {"pass": came["passed"]} | {
            status: sum(map(len, came[key].values()))
            for status, key in (("fail", "failed"), ("unsupported", "unsupported"))
        }
        for status, count in counts.items():
            yield from [{**head, "check": check, "status": status}] * count


def _columns(results: Iterable[Mapping[str, str]]) -> dict[tuple[str, str], dict[str, int]]:
    """(datapath, guest) → how many cases passed, failed, were tried (both), or could not be."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for r in results:
        counts.setdefault((r["datapath"], r["guest"]), Counter())[r["status"]] += 1
    return {
        head: {"passed": c["pass"], "failed": c["fail"], "tried": c["pass"] + c["fail"],
               "unsupported": c["unsupported"], "cases": c.total()}
        for head, c in counts.items()
    }  # fmt: skip


# --- tables ---------------------------------------------------------------------------------


class Column(NamedTuple):
    """A quantity for which each datapath has a value."""

    head: str
    pair: Pair
    cell: str
    """Transport, metric and parameters of an id."""
    quantity: str = ""


COLUMNS = (
    Column("Gbit/s", Pair.NATIVE_GUEST, "tcp/throughput/65536x1"),
    Column("Gbit/s", Pair.GUEST_NATIVE, "tcp/throughput/65536x1"),
    Column("CPU\\,s per GB", Pair.NATIVE_GUEST, "tcp/throughput/65536x1", CPU_QUANTITY),
    Column(r"TCP, \textmu{}s", Pair.NATIVE_GUEST, "tcp/latency/64x1"),
    Column(r"UDP, \textmu{}s", Pair.NATIVE_GUEST, "udp/latency/64x1"),
    Column("10\\textsuperscript{3}/s", Pair.NATIVE_GUEST, "tcp/connections/64x1"),
)


def _results(answers: Answers, guest: str) -> list[str]:
    """Datapaths by family (down) and quantities (across), each with its ratio."""
    notes: dict[str, str] = {}
    datapaths = sorted({r.cell.datapath for r in answers.rows if not r.cell.variant}, key=rank)
    lines = [
        r"\begin{tabular*}{\textwidth}{@{\extracolsep{\fill}}l*{6}{r@{\hspace{0.4em}}l}@{}}",
        r"\toprule",
        " & ".join(["", *(rf"\multicolumn{{2}}{{c}}{{{c.head}}}" for c in COLUMNS)]) + r" \\",
        " & ".join(["", *(rf"\multicolumn{{2}}{{c}}{{{_WAYS[c.pair]}}}" for c in COLUMNS)])
        + r" \\",
    ]
    for family in Family:
        here = []
        for datapath in datapaths:
            ids = [f"{datapath}/{c.pair}/{family}/{c.cell},guest={guest}" for c in COLUMNS]
            rows = [answers.row(id, c.quantity) for id, c in zip(ids, COLUMNS, strict=True)]
            if any(rows):
                entries = [rf"\dpath{{{datapath}}}", *(_entry(row, notes) for row in rows)]
                here.append(" & ".join(entries) + r" \\")
        if here:
            heading = rf"\multicolumn{{13}}{{@{{}}l}}{{\emph{{{names(family)}}}}} \\"
            lines += [r"\midrule", heading, *here]
    lines += [r"\bottomrule", r"\end{tabular*}"]
    said = "; ".join(f"$^{letter}$ {escape(why)}" for why, letter in notes.items())
    return [*lines, rf"\\[2pt]\parbox{{\textwidth}}{{\footnotesize {said}.}}" if said else "%"]


_WAYS = {Pair.NATIVE_GUEST: r"native$\to$guest", Pair.GUEST_NATIVE: r"guest$\to$native"}


def _entry(row: Summary | None, notes: dict[str, str]) -> str:
    """Mean, and ratio with the wider side of its interval; bold if that excludes 1."""
    if row is None:
        return "&"
    if row.status is not Status.OK:
        letter = notes.setdefault(row.reason or str(row.status), ascii_lowercase[len(notes)])
        return rf"\multicolumn{{2}}{{c}}{{{absence(row.status)}$^{letter}$}}"
    scale = _unit(row).scale
    mean = number(row.estimate.mean / scale, row.estimate.mean / scale)
    if row.no_ratio or row.reference == row.cell.datapath:
        return f"{mean} &"
    side = 100 * (row.ratio.high / row.ratio.mean - 1)
    ratio = rf"$\times${number(row.ratio.mean, row.ratio.mean)}"
    if row.ratio.low > 1 or row.ratio.high < 1:
        ratio = rf"\textbf{{{ratio}}}"
    if row.ratio.blocks > 1:
        ratio += (
            r"{\scriptsize$\,\pm\,$" + (f"{side:.0f}" if side < 999.5 else r"$>$999") + r"\,\%}"
        )
    return f"{mean} & {ratio}"


def _conformance_table(answers: Answers) -> list[str]:
    """A row per datapath and guest: how many cases, and which checks failed."""
    if not answers.conformance:
        raise Error(f"{KEPT}: no results of checks, of which the paper has a table",
                    "testbed conformance --keep")  # fmt: skip
    lines = [r"\begin{tabular}{@{}llrrrr>{\raggedright\arraybackslash}p{0.5\textwidth}@{}}",
             r"\toprule",
             r"datapath & guest & cases & passed & failed & impossible & checks with failures \\",
             r"\midrule"]  # fmt: skip
    for (datapath, guest), counts in _columns(answers.conformance).items():
        here = [r for r in answers.conformance if (r["datapath"], r["guest"]) == (datapath, guest)]
        failed = dict.fromkeys(r["check"] for r in here if r["status"] == "fail")
        shown = [str(counts[key]) for key in ("cases", "passed", "failed", "unsupported")]
        which = ", ".join(rf"\texttt{{{escape(name)}}}" for name in failed) or "none"
        lines.append(" & ".join([rf"\dpath{{{datapath}}}", guest, *shown, which]) + r" \\")
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def _claims_table(answers: Answers) -> list[str]:
    """What the plan claims, and what came of it, a row per cell."""
    lines = [r"\begin{tabular*}{\columnwidth}{@{\extracolsep{\fill}}lll@{}}", r"\toprule",
             r"claim & ratio & verdict \\"]  # fmt: skip
    for claim, rows in grouped(answers.claims, lambda row: row.claim.text).items():
        lines += [r"\midrule", rf"\multicolumn{{3}}{{@{{}}l}}{{\emph{{{escape(claim)}}}}} \\"]
        for row in rows:
            what = f"{row.cell.label(answers.proof.campaign.guest)}, {names(row.cell.family)}"
            ratio = _interval(row.ratio, Unit(1, "")) if row.ratio.blocks else "not measured"
            lines.append(rf"{escape(what)} & {ratio} & {escape(row.verdict)} \\")
    return [*lines, r"\bottomrule", r"\end{tabular*}"]


def _addresses(answers: Answers) -> list[str]:
    """The address plan, from the code."""
    plan: dict[str, Callable[[Family], Any]] = {
        "alias": addresses.alias,
        "native source": addresses.native_source,
        "\\quad of unusual flows": addresses.native_source_odd,
        "pod on the link": addresses.pod_link,
        "guest on the link": lambda family: addresses.guest_link(family, 0),
        "guest, to guests": lambda family: addresses.guest_view(family, 0),
        "guest, to natives": lambda family: addresses.native_view(family, 0),
    }
    lines = [r"\begin{tabular}{@{}lll@{}}", r"\toprule", r"use & IPv4 & IPv6 \\", r"\midrule"]
    for use, address in plan.items():
        if use == "guest on the link":
            lines.append(r"\midrule")
        shown = [rf"\addr{{{address(family)}}}" for family in Family]
        lines.append(" & ".join([use, *shown]) + r" \\")
    return [*lines, r"\bottomrule", r"\end{tabular}"]


TABLES: Mapping[str, Callable[[Answers], list[str]]] = {
    "table-addresses": _addresses,
    "table-claims": _claims_table,
    "table-conformance": _conformance_table,
    "table-standin": lambda answers: _results(answers, "standin"),
    "table-osv": lambda answers: _results(answers, "osv"),
}


def escape(text: str) -> str:
    """The same text in LaTeX."""
    text = re.sub(r"([#$%&_{}])", r"\\\1", text.replace("\\", "/"))
    return (
        text.replace("~", r"\textasciitilde{}")
        .replace("^", r"\textasciicircum{}")
        .replace("→", r"$\to$")
        .replace("µ", r"\textmu{}")
    )
