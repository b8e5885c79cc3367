"""How figures look: what is the same in all of them, so that they stand side by side in a paper.

Made for a two-column paper at full width: they read in black and white (hatches, line styles,
markers) and to the colour-blind (Okabe and Ito's palette), and a datapath looks the same in every
one. Title, key and footer are put around the panels here; what is in the panels is not known here.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from testbed.model.cells import Cell
from testbed.model.errors import Error
from testbed.model.trials import Status
from testbed.reports.words import FUNCTIONAL, absence, blocks_of, guest_of, names, size_of
from testbed.results.analysis import Breakdown, Summary
from testbed.results.order import rank
from testbed.results.statistics import Estimate
from testbed.results.store import Store


class Style(NamedTuple):
    """How a datapath looks, the same in every figure."""

    color: str
    hatch: str
    line: Any
    marker: str


STYLES = {
    "loopback": Style("#999999", "", "-", "o"),
    "direct": Style("#56B4E9", "..", (0, (1, 1)), "s"),
    "bridge": Style("#E69F00", "////", "--", "^"),
    "tcredirect": Style("#882255", "xxxx", (0, (3, 1, 1, 1, 1, 1)), "<"),
    "capture": Style("#D55E00", "\\\\\\\\", "-", "D"),
    "steer": Style("#0072B2", "----", "-", "v"),
    "dnat": Style("#009E73", "++++", "-.", "P"),
    "proxy": Style("#F0E442", "o", (0, (5, 1)), "X"),
    "passt": Style("#CC79A7", "||||", (0, (3, 1, 1, 1)), ">"),
    "tun": Style("#555555", "", (0, (1, 3)), "*"),
    "broadcast": Style("#000000", "", (0, (8, 2)), "h"),
    "routed": Style("#AAAA00", "**", (0, (6, 1, 1, 1)), "p"),
}
"""In the order of bars and rows. Okabe and Ito's eight colours, two greys, a wine and an olive."""


NOVEL = Style("#CCCCCC", "OO", (0, (2, 2)), "d")
"""A datapath that has no style yet."""


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


SMALL_PT = 5.5


def style_of(datapath: str) -> Style:
    """Of the datapath, whichever variant."""
    return STYLES.get(datapath.partition("~")[0], NOVEL)


class Ratio(Protocol):
    """What a forest plot has a row for: a summary, or a comparison of campaigns."""

    @property
    def cell(self) -> Cell: ...
    @property
    def quantity(self) -> str: ...
    @property
    def ratio(self) -> Estimate: ...


class Drawing(NamedTuple):
    """A figure's panels, and what is to be put around them."""

    panels: Figure
    title: str
    keys: Sequence[tuple[Any, str]]
    paragraphs: Sequence[str]
    """The footer: circumstances, how to read it, what is missing and why."""
    functional: bool


def save(drawing: Drawing, folder: Path, name: str, digest: str, bare: bool = False) -> list[Path]:
    """As PNG and PDF, which say the digest of the data that they were drawn from.

    Without dates and versions, so that the same trials give the same bytes. `bare`: as PDF, without
    title and footer, for a page that says these itself.
    """
    png, pdf = folder / f"{name}.png", folder / f"{name}.pdf"
    _surround(drawing, bare)
    try:
        folder.mkdir(exist_ok=True)
        drawing.panels.savefig(pdf, metadata={"CreationDate": None, "Keywords": digest})
        if not bare:
            drawn = io.BytesIO()
            drawing.panels.savefig(drawn, format="png")
            said = PngInfo()
            said.add_text("Source", digest)
            palette = Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE)
            palette.save(png, optimize=True, pnginfo=said)  # a third of the bytes
    except OSError as e:
        raise Error(f"{e.filename or folder}: {e.strerror}", "figures go into the campaign") from e
    return [pdf] if bare else [png, pdf]


def _surround(drawing: Drawing, bare: bool) -> None:
    """Title, key and footer, for which the figure grows beyond its panels."""
    figure, title, keys, paragraphs, functional = drawing
    footer = [line for paragraph in paragraphs for line in textwrap.wrap(paragraph, 152)]
    key_lines = math.ceil(len(keys) / 8)
    title_in, key_in = 0.0 if bare else 0.17, 0.03 + 0.17 * key_lines
    foot_in = 0.0 if bare else (len(footer) + 0.8) * FOOTER_PT * 1.25 / 72
    width, panels_in = figure.get_size_inches()
    height = panels_in + title_in + key_in + foot_in
    figure.set_size_inches(width, height)
    figure.set_layout_engine("constrained", rect=(0, foot_in / height, 1, panels_in / height))
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


def keys_of(rows: Iterable[Ratio], key: Callable[[Style], Any]) -> list[tuple[Any, str]]:
    """The key of the datapaths that rows have, each with its mark."""
    datapaths = sorted({row.cell.datapath for row in rows}, key=rank)
    return [(key(style_of(datapath)), datapath) for datapath in datapaths]


def point_key(style: Style) -> Line2D:
    return Line2D([], [], ls="none", color=style.color, **mark_of(style))


def line_key(style: Style) -> Line2D:
    return Line2D([], [], color=style.color, ls=style.line, **mark_of(style))


def patch_key(style: Style) -> Patch:
    return Patch(fc=style.color, hatch=style.hatch * 2, ec="black")


def mark_of(style: Style) -> dict[str, Any]:
    return {"marker": style.marker, "ms": 3.5, "mec": "black", "mew": 0.4}


def absences(rows: Sequence[Summary]) -> list[str]:
    """Why cells are missing in a figure, each reason once."""
    absent = {
        f"{absence(row.status)}: {row.reason}": None for row in rows if row.status is not Status.OK
    }
    return [textwrap.shorten(reason, 280, placeholder=" …") for reason in absent]


def title_of(cell: Cell) -> str:
    return f"{cell.metric.capitalize()}, {names(cell.transport)}, {size_of(cell)} messages"


def functional(store: Store, rows: Iterable[Summary | Breakdown]) -> bool:
    """Whether any of the rows is of an emulated guest."""
    return any(store.campaign.is_functional(row.cell) for row in rows)


def circumstances(store: Store, guest: str = "") -> str:
    """What a figure's footer says of its campaign, and of the guest that its cells name."""
    campaign = store.campaign
    return (
        f"Guest {guest_of(campaign, guest)}. Host {campaign.host}: kernel {campaign.kernel}, "
        f"{campaign.cpu}. Campaign {store.path.name}, {blocks_of(campaign)}."
    )
