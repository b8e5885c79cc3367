"""The page on architecture says what the code is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed import paths
from testbed.datapaths.steer import HOOKS
from testbed.reports import archive
from testbed.results import store

PACKAGE = paths.ROOT / "testbed"
PAGE = (paths.ROOT / "docs/architecture.md").read_text()


def section(title: str) -> str:
    """A part of the page, up to the next of its level."""
    rest = PAGE.partition(f"\n{title}\n")[2]
    return re.split(rf"^{title.partition(' ')[0]} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """Rows of the tables in a text, without their heads."""
    lines = re.sub(r"^.*\n\| ---.*\n", "", text, flags=re.MULTILINE).splitlines()
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return [row for row in cells if row]


def parts() -> dict[str, list[Path]]:
    """Folders and modules of the package, each with its files."""
    found: dict[str, list[Path]] = {}
    for path in PACKAGE.iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            found[f"{path.name}/"] = list(path.rglob("*.py"))
        elif path.suffix == ".py" and path.stem != "__init__":
            found[path.stem] = [path]
    return found


def imported(file: Path) -> Iterator[str]:
    """Names of what a file imports of `testbed`, below it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("testbed."))
        elif isinstance(node, ast.ImportFrom) and node.module == "testbed":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("testbed."):
            yield (node.module or "").split(".")[1]


def test_the_tree_is_all_of_the_package_with_its_imports() -> None:
    tree = {row[0].strip("`"): row[2] for row in rows(section("## The tree"))}
    names = {name.rstrip("/") for name in parts()}
    found = {
        part: ", ".join(
            sorted({n for f in files for n in imported(f)} & names - {part.rstrip("/")})
        )
        for part, files in parts().items()
    }
    assert tree == found


@pytest.mark.parametrize("name", ["capture", "steer"])
def test_programs_are_those_that_the_datapath_has(name: str) -> None:
    told = {p for row in rows(section(f"### `{name}`")) for p in re.findall(r"`(\w+)`", row[0])}
    hooks = {hook for hook in told if hook in HOOKS}
    program = re.compile(r"^TC_PROGRAM\((\w+)\)$", re.MULTILINE)
    assert told - hooks == set(program.findall((paths.BPF / f"{name}.c").read_text()))
    assert hooks == {"capture": {"getpeername4", "getpeername6"}, "steer": set(HOOKS)}[name]


def test_words_of_the_glossary_are_there_once_and_in_order() -> None:
    words = [row[0] for row in rows(section("## Glossary"))]
    assert words == sorted(set(words), key=str.lower)


@pytest.mark.parametrize(
    ("campaign", "picture"),
    [
        ("proof", "claims.png"),
        ("applications", "applications.png"),
        ("paper", "throughput-all.png"),
        ("load", "load.png"),
    ],
)
def test_pictures_are_of_the_campaigns_that_are_kept(campaign: str, picture: str) -> None:
    """Else: nox -s figures -- results/reference/CAMPAIGN, and copy `claims-steer.png`,
    `requests.png`, `throughput-tcp-standin.png`, `latency-tcp-standin-by-rate.png`.
    """
    kept = store.open(paths.REFERENCE / campaign)
    assert archive.stale(kept, [paths.ROOT / "docs" / picture]) == []
