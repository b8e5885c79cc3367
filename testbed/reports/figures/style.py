"""Style of figures: what all figures share, and title, key and footer around their panels.

Figures are made for the full width of a two-column paper. They can be read in black and white
(hatches, line styles, markers) and by color-blind people (palette of Okabe and Ito). A datapath
has the same look in all figures.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from testbed.model.cells import Cell
from testbed.model.errors import Error
from testbed.model.looks import Look
from testbed.model.metrics import Metric
from testbed.model.terms import Transport
from testbed.model.trials import Status
from testbed.reports.words import (
    FUNCTIONAL,
    Row,
    absence,
    blocks_of,
    disturbed_of,
    guest_of,
    guests_of,
    names,
    pacing_warning,
    size_of,
)
from testbed.results.analysis import Breakdown, Summary
from testbed.results.order import grouped
from testbed.results.results import Results
from testbed.results.statistics import Estimate

RC: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "hatch.linewidth": 0.4,
    "patch.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,  # TrueType: what publishers' checks accept
    "savefig.dpi": 200,
}


WIDTH_IN = 7.1
"""Text width of a two-column page."""
FOOTER_PT = 6
LABEL_PT = 6
SMALL_PT = 5.5
"""Size of labels in panels."""
CHARACTER_EM = 0.6
"""Mean width of a character, as a share of the size of the font; digits have 0.64, a point 0.32."""


WHISKERS = "whiskers: 95 % t-intervals; an arrow: it goes on"
NO_INTERVAL = "no interval from one"


def whiskers_of(results: Results) -> str:
    """What whiskers mean, for a footer after "over blocks"; one block has none."""
    return WHISKERS if results.campaign.blocks > 1 else NO_INTERVAL


def text_in(text: str, size_pt: float) -> float:
    """About how wide a line of text is, in inches."""
    return len(text) * CHARACTER_EM * size_pt / 72


class Drawing(NamedTuple):
    """Panels of a figure, and the text that is put around them."""

    panels: Figure
    title: str
    keys: Sequence[tuple[Any, str]]
    """Entries of the key: (mark, name); none if the panels say it themselves."""
    paragraphs: Sequence[str]
    """The footer: circumstances, how to read the figure, what is missing and why."""
    functional: bool
    """Whether guests were emulated, which the figure then says."""


def save(
    drawing: Drawing,
    folder: Path,
    name: str,
    digest: str,
    kinds: Collection[str] = ("png", "pdf"),
    bare: bool = False,
) -> list[Path]:
    """Save a figure as files of these `kinds`, with the digest of its data in their metadata.

    Files have no dates and versions, so that the same trials give the same bytes. With `bare`,
    figures have no title and footer, for a paper that has its own captions.
    """
    files = {kind: folder / f"{name}.{kind}" for kind in kinds}
    surround(drawing, bare)
    if layout := drawing.panels.get_layout_engine():
        layout.execute(drawing.panels)  # once, or a file would depend on those before it
        drawing.panels.set_layout_engine(None)
    try:
        folder.mkdir(exist_ok=True)
        if pdf := files.get("pdf"):
            drawing.panels.savefig(pdf, metadata={"CreationDate": None, "Keywords": digest})
        if png := files.get("png"):
            drawn = io.BytesIO()
            drawing.panels.savefig(drawn, format="png")
            said = PngInfo()
            said.add_text("Source", digest)
            palette = Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE)
            palette.save(png, optimize=True, pnginfo=said)  # a third of the bytes
    except OSError as e:
        raise Error(f"{e.filename or folder}: {e.strerror}", "figures go into the campaign") from e
    return list(files.values())


def surround(drawing: Drawing, bare: bool = False) -> None:
    """Add title, key and footer; the figure grows by their height."""
    figure, title, keys, paragraphs, functional = drawing
    whole = [paragraph.replace(" %", "\N{NO-BREAK SPACE}%") for paragraph in paragraphs]
    footer = [line for paragraph in whole for line in textwrap.wrap(paragraph, 152)]
    key_lines = math.ceil(len(keys) / 8)
    title_in, key_in = 0.0 if bare else 0.17, 0.03 + 0.17 * key_lines
    foot_in = 0.0 if bare else (len(footer) + 0.8) * FOOTER_PT * 1.25 / 72
    width, panels_in = figure.get_size_inches()
    height = panels_in + title_in + key_in + foot_in
    figure.set_size_inches(width, height)
    figure.set_layout_engine("constrained", rect=(0, foot_in / height, 1, panels_in / height))
    if keys:
        figure.legend(
            [mark for mark, _ in keys],
            [name for _, name in keys],
            loc="upper left",
            bbox_to_anchor=(0.0, 1 - title_in / height),
            ncols=math.ceil(len(keys) / key_lines),
            frameon=False,
            handlelength=2.8,
            columnspacing=1.2,
            borderpad=0.3,
            labelspacing=0.3,
        )
    if bare:
        return
    top = 1 - 0.05 / height
    figure.text(0.01, top, title, fontsize=8, fontweight="bold", va="top")
    if functional:
        figure.text(0.99, top, FUNCTIONAL, fontsize=8, fontweight="bold", va="top", ha="right")
    figure.text(
        0.01,
        foot_in / height - 0.02 / height,
        "\n".join(footer),
        fontsize=FOOTER_PT,
        color="#333333",
        va="top",
        linespacing=1.25,
    )


def whisker(
    axes: Axes, at: float, mean: float, low: float, high: float, color: str = "black", **line: Any
) -> None:
    """Draw an upright interval. An arrow stands where it, or its mean, leaves the panel.

    The limits of the y axis must be set before. `line` are arguments of matplotlib's `plot`.
    """
    bottom, top = axes.get_ylim()
    marks = [(top, "^")] if max(mean, high) > top else [(high, "_")]
    marks += [(bottom, "v")] if low < bottom else [(low, "_")]
    marks = [(end, mark) for end, mark in marks if end <= top]  # not NaN, and not above the panel
    axes.plot([at] * len(marks), [end for end, _ in marks], color=color, lw=0.8, **line)
    for end, mark in marks:
        axes.plot(at, end, mark, color=color, ms=3, mew=0.8, clip_on=False, **line)


def keys_of(
    rows: Iterable[Row], key: Callable[[Look], Any], results: Results
) -> list[tuple[Any, str]]:
    """Entries of the key: (mark, datapath), for all datapaths of the rows."""
    datapaths = sorted({row.cell.datapath for row in rows}, key=results.rank)
    return [(key(results.look(datapath)), datapath) for datapath in datapaths]


def captioned(
    figure: Figure,
    title: str,
    rows: Sequence[Summary],
    keys: Sequence[tuple[Any, str]],
    results: Results,
    how: str,
) -> Drawing:
    """A figure of rows with title, key, and footer; `how` says how to read it."""
    cell = rows[0].cell
    footer = [
        f"{circumstances(results, cell.guest)} {how}",
        *disturbances(((row.cell, row.estimate) for row in rows), results),
        *absences(rows),
        *limits(rows),
    ]
    streams = any(row.cell.metric is Metric.THROUGHPUT for row in rows)
    if cell.transport is Transport.TCP and streams:
        paced = pacing_warning(results.campaign.congestion_control)
        footer += [f"{paced}."] if paced else []
    return Drawing(
        figure,
        title,
        keys,
        footer,
        functional(results, rows),
    )


def line_key(look: Look) -> Line2D:
    """Mark of a datapath in the key of a figure with lines."""
    return Line2D([], [], color=look.color, ls=line_of(look), **mark_of(look))


def patch_key(look: Look) -> Patch:
    """Mark of a datapath in the key of a figure with bars."""
    return Patch(fc=look.color, hatch=look.hatch * 2, ec="black")


def line_of(look: Look) -> Any:
    """Line style of a look, in the form that matplotlib expects."""
    return look.line if isinstance(look.line, str) else (0, look.line)


def mark_of(look: Look) -> dict[str, Any]:
    """Marker of a look, as arguments of matplotlib."""
    return {"marker": look.marker, "ms": 3.5, "mec": "black", "mew": 0.4}


def absences(rows: Sequence[Summary]) -> list[str]:
    """Reasons why cells are missing in a figure, each once."""
    absent = {
        f"{absence(row.status)}: {row.reason}": None for row in rows if row.status is not Status.OK
    }
    return [textwrap.shorten(reason, 280, placeholder=" …") for reason in absent]


def disturbances(values: Iterable[tuple[Cell, Estimate]], results: Results) -> list[str]:
    """Which cells of a figure have values of disturbed trials: one line, or none."""
    guest = results.campaign.guest
    found = {
        f"{cell.datapath} {cell.label(guest)} {names(cell.family)} {cell.metric} {size_of(cell)} "
        f"({said})": None
        for cell, of in values
        if (said := disturbed_of(of))
    }
    text = f"Of disturbed trials: {'; '.join(found)}."
    return [textwrap.shorten(text, 280, placeholder=" …")] if found else []


def limits(rows: Sequence[Summary]) -> list[str]:
    """What limits values in a figure, other than the datapath: a line each, with the cells."""
    limited = [row for row in rows if row.limited]
    of = grouped(limited, lambda r: (r.limited or "").partition(": ")[2])
    total = len({row.cell for row in rows})
    return [
        f"Hollow, or with *: {limit} ({len({row.cell for row in some})} of {total} cells)."
        for limit, some in of.items()
    ]


def title_of(cell: Cell) -> str:
    """Title of a figure with one metric, transport and message size."""
    return f"{cell.metric.capitalize()}, {names(cell.transport)}, {size_of(cell)} messages"


def functional(results: Results, rows: Iterable[Summary | Breakdown]) -> bool:
    """Whether any of the rows has emulated guests."""
    return any(results.campaign.is_functional(row.cell) for row in rows)


def circumstances(results: Results, guest: str | None = None) -> str:
    """Footer text about the campaign and a guest of its cells; without `guest`, about all."""
    campaign = results.campaign
    guests = guests_of(campaign) if guest is None else f"guest {guest_of(campaign, guest)}"
    return (
        f"{guests[0].upper()}{guests[1:]}. Host {campaign.host}: kernel {campaign.kernel}, "
        f"{campaign.cpu}. Campaign {results.path.name}, {blocks_of(campaign)}."
    )
