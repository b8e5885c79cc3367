"""Report of a campaign as one HTML file, which needs no network, no other files and no server.

It opens with what was compared, where, and the verdicts. Then come figures (`interactive`; pictures
of what they do not show), tables that sort and filter, results of conformance checks if the
campaign has them (`conformance.json`, the output of `testbed conformance --json`), the environment,
and the command that repeats the campaign. It is made from the campaign's directory alone. This
module only formats numbers.
"""

from __future__ import annotations

import base64
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from testbed import plan
from testbed.model.errors import Error
from testbed.model.metrics import Metric
from testbed.model.trials import Status
from testbed.reports import claims, interactive
from testbed.reports.figures import draw
from testbed.reports.words import (
    UNSHAKEN,
    blocks_of,
    conclusive,
    controls_of,
    end,
    guests_of,
    meanings_of,
    names,
    notes_of,
    shown_columns,
    size_of,
    unit_of,
    warnings_of,
)
from testbed.results.analysis import CPU, Summary
from testbed.results.order import grouped
from testbed.results.results import Results
from testbed.results.statistics import Estimate
from testbed.results.store import Campaign


class Entry(NamedTuple):
    """One cell of an HTML table."""

    text: str
    order: float | None = None
    """Sort key, if it is not the text. NaN is sorted last."""
    title: str = ""
    """Tooltip."""
    css: str = ""
    """CSS classes."""


def write(results: Results, file: Path) -> None:
    """Draw figures that are not interactive as PNG, and write the HTML report to `file`."""
    drawn = draw.draw(results, kinds=("png",), without=interactive.REPLACES)
    pictures = drawn + sorted((results.path / "figures").glob("against-*.png"))
    try:
        file.write_text(_page(results, pictures), encoding="utf-8")
    except OSError as e:
        raise Error(f"{file}: {e.strerror}", "choose another file with -o") from e


def command(campaign: Campaign) -> str:
    """The shell command that runs the same campaign again, in a clone of the same revision."""
    words = [
        "./bootstrap",
        "testbed",
        "run",
        "--plan",
        campaign.name,
        "--guest",
        campaign.guest,
        "--seed",
        str(campaign.seed),
    ]
    if not campaign.plan.get("target_width"):
        words += ["--blocks", str(campaign.blocks)]
    if kernel := campaign.environment.get("osv_kernel"):
        words += ["--osv-kernel", kernel]
    try:
        whole = {cell.id for cell in plan.load(campaign.name).cells}
    except Error:  # a plan that is not in experiments/
        whole = set(campaign.cells)
    if whole != set(campaign.cells):
        words += [word for cell in campaign.cells for word in ("--cells", cell)]
    return shlex.join(words)


def _page(results: Results, pictures: Sequence[Path]) -> str:
    campaign, rows, judged = results.campaign, results.summaries, claims.judge(results)
    of_claims = [path for path in pictures if path.stem.startswith("claims-")]
    parts = [
        f"<h1>{escape(campaign.name)}</h1>",
        *(f"<p>{escape(line)}</p>" for line in (_compared(rows, campaign), _where(campaign))),
        *(f'<p class="warning">{escape(warning)}</p>' for warning in warnings_of(results)),
        *_section("Verdicts", "", _verdicts(results, judged)),
        *_figures(results),
        *_claims(results, judged, of_claims),
        *_section(
            "Results",
            _legend(campaign),
            *(f"<p>{escape(line)}</p>" for line in meanings_of(rows)),
            _results(rows, campaign),
        ),
        *_pictures([path for path in pictures if path not in of_claims]),
        *_costs(results),
        *_searches(results),
        *_missing(results),
        *_disturbed(results),
        *_conformance(results.path / "conformance.json"),
        *_section("Environment", "", _environment(campaign)),
        *_section(
            "How to repeat it",
            f"In a clone of this project at revision {campaign.revision.removesuffix('-dirty')}"
            + (", which had been changed," if campaign.revision.endswith("-dirty") else "")
            + " as root:",
            f"<pre>{escape(command(campaign))}</pre>",
        ),
    ]
    title = escape(f"{campaign.name}, {results.path.resolve().name}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="data" content="{results.digest}">\n'
        f"<style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<script>{_SCRIPT}</script>\n</body></html>\n"
    )


_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline' 'unsafe-eval'"
)
"""The page fetches nothing: all that it shows and runs stands in it (bokeh's callbacks: eval)."""


def _compared(rows: Sequence[Summary], campaign: Campaign) -> str:
    """What was compared with what."""
    rows = [row for row in rows if not row.cell.variant]  # without controls
    cells = [row.cell for row in rows]
    divisors = dict.fromkeys((row.cell.datapath, row.reference) for row in rows)
    divided = [f"{one} to {other}" for one, other in divisors if other not in (None, one)]
    kinds: tuple[Iterable[str], ...] = (
        (cell.metric for cell in cells),
        (names(cell.family, cell.transport) for cell in cells),
        (cell.label(campaign.guest) for cell in cells),
    )
    said = "; ".join(", ".join(dict.fromkeys(kind)) for kind in kinds)
    return f"Compared: {', '.join(divided) or 'nothing'}. Measured: {said}."


def _where(campaign: Campaign) -> str:
    return (
        f"{blocks_of(campaign).capitalize()} of {len(campaign.cells)} cells, "
        f"{guests_of(campaign)}, started {campaign.started or 'at an unknown time'} on "
        f"{campaign.host}: {campaign.cpu}, kernel {campaign.kernel}."
    )


def _verdicts(results: Results, judged: Sequence[claims.Found]) -> str:
    """The verdict on each claim over its cells, and the outcome of the controls, as a list."""
    lines = []
    for text, found in grouped(judged, lambda row: row.claim.text).items():
        counts = Counter(row.verdict for row in found)
        said = ", ".join(f"{verdict} in {counts[verdict]}" for verdict in counts)
        lines.append(f"{text}: {said} of {len(found)} cells.")
    if not lines:
        ratios = [row for row in results.summaries if row.is_divided]
        sound = sum(conclusive(row, results.campaign) for row in ratios)
        lines.append(f"The plan claims nothing. {sound} of {len(ratios)} ratios differ from 1.")
    lines += controls_of(results.summaries)
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _figures(results: Results) -> list[str]:
    """The section of interactive figures."""
    found = interactive.section(results)
    lead = (
        "Means over blocks with 95 % intervals, and ratios to the reference datapath within a "
        "block. Filled: a mean that nothing but the datapath limits, a ratio whose interval "
        f"excludes 1; where no guest is emulated and {UNSHAKEN}. Point at a mark for its numbers. "
        "A click on it shows the blocks and the distribution of its cell; a click on a name in "
        "the key hides a datapath."
    )
    return _section("Figures", lead, found) if found else []


def _pictures(paths: Sequence[Path]) -> list[str]:
    """The section of pictures of what interactive figures do not show."""
    return _section("Parts, sweeps, comparisons", "", *map(_picture, paths)) if paths else []


def _legend(campaign: Campaign) -> str:
    interval = "95 % t-interval on logarithms" if campaign.blocks > 1 else "no interval from one"
    return (
        f"Geometric means over blocks ({interval}). A ratio is to the reference datapath within a "
        f"block; bold where its interval excludes 1, no guest is emulated and {UNSHAKEN}. A click "
        "on a heading sorts; the box filters by words."
    )


def _section(title: str, lead: str, *parts: str) -> list[str]:
    return [f"<h2>{title}</h2>", f"<p>{escape(lead)}</p>" if lead else "", *parts]


def _table(name: str, heads: Sequence[str], rows: Iterable[Sequence[Entry]]) -> str:
    """An HTML table that sorts by its headings, with a box that filters its rows."""
    lines = ["".join(_entry(entry) for entry in row) for row in rows]
    head = "".join(
        f'<th scope="col"><button type="button">{escape(h)}</button></th>' for h in heads
    )
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="table" id="{name}"><label>Filter <input type="search"></label> '
        f"<output>{len(lines)} of {len(lines)}</output>\n"
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _entry(entry: Entry) -> str:
    attributes = {"title": entry.title, "class": entry.css}
    shown = "".join(f' {key}="{escape(value)}"' for key, value in attributes.items() if value)
    if entry.order is not None:
        order = "" if math.isnan(entry.order) else f"{entry.order:.9g}"
        shown += f' data-order="{order}"'
    return f"<td{shown}>{escape(entry.text)}</td>"


def _results(rows: Sequence[Summary], campaign: Campaign) -> str:
    titles = {(metric, quantity): title for metric, quantity, title in shown_columns()}
    heads = (
        "pair",
        "family",
        "transport",
        "datapath",
        "quantity",
        "message",
        "mean",
        "low",
        "high",
        "unit",
        "ratio",
        "low",
        "high",
        "to",
        "blocks",
        "note",
    )
    return _table("results", heads, (_result(row, campaign, titles) for row in rows))


def _result(row: Summary, campaign: Campaign, titles: Mapping[Any, str]) -> list[Entry]:
    cell, unit = row.cell, unit_of(row.cell.metric, row.quantity)
    own = row.reference == cell.datapath
    bold = conclusive(row, campaign) and not own
    return [
        Entry(cell.label(campaign.guest)),
        Entry(names(cell.family)),
        Entry(names(cell.transport)),
        Entry(cell.datapath),
        Entry(titles[cell.metric, row.quantity]),
        Entry(size_of(cell), cell.size_bytes),
        *_estimate(row.estimate, unit.scale, str(row.status)),
        Entry(unit.name),
        *_estimate(row.ratio, 1, "reference" if own else "", "bold" if bold else ""),
        Entry(row.reference or ""),
        Entry(str(row.estimate.blocks), row.estimate.blocks),
        Entry(notes_of(row)),
    ]


def _estimate(of: Estimate, scale: float, otherwise: str, css: str = "") -> list[Entry]:
    """Mean, low and high of an estimate, all three with the mean's number of decimals."""
    if math.isnan(of.mean) or otherwise == "reference":
        return [Entry(otherwise, math.nan, css="absent"), Entry(""), Entry("")]
    return [
        Entry("" if math.isnan(x) else end(x, of.mean, scale), x, css=f"number {css}")
        for x in (of.mean, of.low, of.high)
    ]


def _missing(results: Results) -> list[str]:
    """The section of trials without a value."""
    trials = [trial for trial in results.trials if trial.status is not Status.OK]
    if not trials:
        return []
    rows = [
        [Entry(t.cell), Entry(str(t.block), t.block), Entry(str(t.status)), Entry(t.reason or "")]
        for t in trials
    ]
    table = _table("missing", ("cell", "block", "status", "reason"), rows)
    return _section("Trials without a value", "", table)


def _disturbed(results: Results) -> list[str]:
    """The section of disturbed trials, and whether each counts."""
    trials = [trial for trial in results.log if trial.disturbed]
    if not trials:
        return []
    kept = results.trials
    rows = [
        [
            Entry(t.cell),
            Entry(str(t.block), t.block),
            Entry(t.disturbed or ""),
            Entry("" if t.value is None else f"{t.value:.4g}", t.value),
            Entry("yes" if t in kept else "no, another run does"),
        ]
        for t in trials
    ]
    heads = ("cell", "block", "disturbed by", "value", "counts")
    return _section(
        "Disturbed trials", "Run once more, in the same block.", _table("disturbed", heads, rows)
    )


def _claims(results: Results, found: Sequence[claims.Found], pictures: Sequence[Path]) -> list[str]:
    """The section of the plan's claims and their verdicts, cell by cell."""
    if not found:
        return []
    heads = ("claim", "cell", "bound", "ratio", "low", "high", "verdict")
    rows = (
        [
            Entry(row.claim.text),
            Entry(claims.what(row, results.campaign.guest)),
            Entry(claims.bound(row.claim)),
            *_estimate(row.ratio, 1, ""),
            Entry(row.verdict, css="" if row.verdict in _BORNE_OUT else "bold"),
        ]
        for row in found
    )
    decides = claims.estimator_of(results.campaign)
    lead = (
        f"Ratios within a block: {claims.WORDS[decides]} (95 %). "
        "A claim holds if the whole interval keeps to the bound. "
        + " ".join(claims.preregistration_lines(results))
    )
    return _section("Claims", lead, _table("claims", heads, rows), *map(_picture, pictures))


_BORNE_OUT = (claims.Verdict.HOLDS, claims.Verdict.STATED)


def _costs(results: Results) -> list[str]:
    """The section of host CPU time per unit of traffic."""
    found = results.costs
    if not found:
        return []
    rows = [
        [
            Entry(cost.cell.id),
            Entry("GB" if cost.cell.metric is Metric.THROUGHPUT else "10⁶ transactions"),
            *_estimate(cost.total, 1, ""),
            *(Entry(f"{share:.0%}", share, css="number") for share in cost.shares.values()),
        ]
        for cost in found
    ]
    lead = "Seconds of all CPUs together, during traffic, per gigabyte or million transactions."
    heads = ("cell", "CPU s per", "mean", "low", "high", *CPU)
    return _section("Host CPU", lead, _table("costs", heads, rows))


def _searches(results: Results) -> list[str]:
    """The section of rate searches, with every attempt."""
    found = [trial for trial in results.trials if trial.searched]
    if not found:
        return []
    rows = [
        [
            Entry(t.cell),
            Entry(str(t.block), t.block),
            Entry(str(n), n),
            *(Entry(f"{bps / 1e6:.1f}", bps, css="number") for bps in (sent_bps, arrived_bps)),
            Entry(f"{loss:.3%}", loss, css="number"),
        ]
        for t in found
        for n, (sent_bps, arrived_bps, loss) in enumerate(t.searched, 1)
    ]
    heads = ("cell", "block", "attempt", "sent, Mbit/s", "arrived, Mbit/s", "lost")
    return _section(
        "Searches for a rate",
        "The last attempt of each is the trial.",
        _table("searches", heads, rows),
    )


def _picture(path: Path) -> str:
    try:
        text = base64.b64encode(path.read_bytes()).decode()
    except OSError as e:
        raise Error(f"{path}: {e.strerror}", "draw it again: testbed figures DIR") from e
    name = escape(path.stem)
    return (
        f'<figure id="{name}"><img alt="{name}" src="data:image/png;base64,{text}">'
        f"<figcaption>{name}</figcaption></figure>"
    )


def _conformance(file: Path) -> list[str]:
    """The section of conformance: a matrix of checks and datapaths, and cases that did not pass."""
    if not file.exists():
        return []
    heads = ("check", "datapath", "guest", "pair", "family", "transport", "status", "reason")
    try:
        results = json.loads(file.read_text())
        checks = grouped(results, lambda r: str(r["check"]))
        columns = grouped(results, _tried)
        rows = [
            [Entry(check), *(_verdict([r for r in group if _tried(r) == c]) for c in columns)]
            for check, group in checks.items()
        ]
        others = [[Entry(str(r[key])) for key in heads] for r in results if r["status"] != "pass"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        hint = "it is what testbed conformance --json prints"
        raise Error(f"{file}: not results of checks ({e})", hint) from e
    return _section(
        "Conformance",
        "Cases passed of those that the datapath claims, over pairs, families and transports.",
        _table("conformance", ("check", *columns), rows),
        _table("cases", heads, others) if others else "",
    )


def _tried(result: Mapping[str, Any]) -> str:
    """Datapath and guests that a check was run with."""
    guest = f" ({result['guest']})" if result["guest"] else ""
    return f"{result['datapath']}{guest}"


def _verdict(results: Sequence[Mapping[str, Any]]) -> Entry:
    """Results of a check with a datapath: how many cases passed, and why others did not."""
    counts = Counter(str(r["status"]) for r in results)
    reasons = "\n".join(dict.fromkeys(str(r["reason"]) for r in results if r["reason"]))
    tried = len(results) - counts["unsupported"]
    if not tried:
        return Entry("n/a" if results else "", math.nan, reasons, "absent")
    css = "bad" if counts["fail"] else "good"
    return Entry(f"{counts['pass']} of {tried}", counts["pass"] / tried, reasons, css)


def _environment(campaign: Campaign) -> str:
    facts = {k: v for k, v in vars(campaign).items() if k not in ("cells", "name")}
    lines = "\n".join(
        f"<tr><th scope='row'>{escape(name.replace('_', ' '))}</th>"
        f"<td>{escape(_readable(value))}</td></tr>"
        for name, value in facts.items()
        if value not in ("", {}, None)
    )
    return f'<table class="facts">{lines}</table>'


def _readable(value: Any) -> str:
    if isinstance(value, Mapping):
        return "\n".join(f"{k}: {_readable(v)}" for k, v in value.items())
    return str(value)


_STYLE = """
:root { color-scheme: light }
body { font: 14px/1.45 system-ui, "DejaVu Sans", sans-serif; max-width: 96rem; margin: 2rem auto;
  padding: 0 1rem; color: #222; overflow-wrap: anywhere }
h2 { margin-top: 2.2rem; border-bottom: 1px solid #ccc }
.warning { font-weight: bold; background: #fff3cd; padding: .4rem .8rem }
.table { overflow: auto; max-height: 44rem; margin-bottom: 1rem; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; margin-top: .4rem; font-variant-numeric: tabular-nums }
th, td { padding: .15rem .5rem; text-align: left; vertical-align: top; white-space: nowrap }
td:last-child { white-space: normal }
tbody tr:nth-child(even), .facts tr:nth-child(even) { background: #f5f5f5 }
thead th { position: sticky; top: 0; background: white; box-shadow: 0 1px #888; padding: 0 }
thead button { all: unset; cursor: pointer; padding: .3rem .5rem; font-weight: bold }
thead button:focus-visible { outline: 2px solid #0072b2 }
th[aria-sort=ascending] button::after { content: " \\25b4" }
th[aria-sort=descending] button::after { content: " \\25be" }
.number { text-align: right }
.bold { font-weight: bold }
.absent { color: #777 }
.good { background: #d9f0e6 }
.bad { background: #f7d4c4; font-weight: bold }
.facts td { white-space: pre-wrap }
.panels { display: flex; flex-wrap: wrap; gap: 1rem }
.panel { flex: 1 1 22rem; min-width: 0; max-height: 40rem; overflow-y: auto }
.bk-Tooltip { max-width: 20rem; overflow-wrap: normal }
@media (max-width: 40rem) { .bk-Tooltip { left: 1rem !important; max-width: calc(100% - 3rem) } }
figure { margin: 1.5rem 0 }
img { max-width: min(100%, 70rem) }
figcaption { color: #777 }
pre { background: #f5f5f5; padding: .8rem; white-space: pre-wrap; user-select: all }
"""

_SCRIPT = """
for (const part of document.querySelectorAll(".table")) {
  const body = part.querySelector("tbody"), rows = [...body.rows];
  const heads = [...part.querySelectorAll("thead th")], box = part.querySelector("input");
  const value = (row, column) => row.cells[column].dataset.order ?? row.cells[column].textContent;
  const compare = (a, b) => a !== "" && b !== "" && !isNaN(a) && !isNaN(b) ? a - b
    : a.localeCompare(b);
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    rows.sort((a, b) => {
      const x = value(a, column), y = value(b, column);
      if ((x === "") !== (y === "")) return x === "" ? 1 : -1;
      return up ? compare(x, y) : compare(y, x);
    });
    body.append(...rows);
  }));
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\\s+/);
    let shown = 0;
    for (const row of rows) {
      const text = [...row.cells].map(cell => cell.textContent).join(" ").toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
      shown += !row.hidden;
    }
    part.querySelector("output").textContent = `${shown} of ${rows.length}`;
  });
}
"""
