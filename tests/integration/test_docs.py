"""What the pages of docs/ tell a newcomer to type does what they say.

Blocks marked ```console run are run, page by page, in a folder of the page's own that looks like a
clone. Lines that are no commands are what must be printed, in that order; … stands for anything.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.cli import parser
from testbed.host.namespaces import NETNS
from testbed.pods import control

ROOT = Path(__file__).parents[2]
TEXTS = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
]
BLOCK = re.compile(r"^```console( run)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [text for text in TEXTS if "```console run" in text.read_text()]
PROMPT = "# "
PATH = re.compile(
    r"`((?:testbed|bpf|osv|agent|tests|experiments|examples)/[\w./-]*(?:/|\.(?:py|c|toml|yaml|md)))`"
)


def commands(block: str) -> Iterator[tuple[str, list[str]]]:
    """(command, what it must print) of a block. A here-document belongs to its command."""
    command, printed, end = "", list[str](), None
    for line in block.splitlines():
        if end is not None:
            command += f"\n{line}"
            end = None if line == end else end
        elif line.startswith(PROMPT):
            if command:
                yield command, printed
            command, printed = line.removeprefix(PROMPT), []
            here = re.search(r"<<'(\w+)'", command)
            end = here[1] if here else None
        else:
            printed.append(line)
    yield command, printed


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Path]:
    """A folder in which commands of the pages work."""
    for name in ("examples", "experiments", "osv"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/reference").symlink_to(ROOT / "results/reference")
    bootstrap = tmp_path / "bootstrap"
    bootstrap.write_text(f'#!/bin/sh\nexec {ROOT}/bootstrap "$@"\n')
    bootstrap.chmod(0o755)
    yield tmp_path
    for name in control.names():
        if name.startswith("docs-"):
            control.down(name)
    for left in NETNS.glob("docs-*"):
        subprocess.run(["ip", "netns", "del", left.name], check=True)


@pytest.mark.root
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_tells_to_type_does_what_it_says(clone: Path, page: Path) -> None:
    blocks = [block for marked, block in BLOCK.findall(page.read_text()) if marked]
    for command, printed in (c for block in blocks for c in commands(block)):
        done = subprocess.run(
            ["bash", "-euc", command],
            cwd=clone,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        expected = r"\n".join(re.escape(p).replace("…", ".*") for p in printed)
        said = "\n".join(line.rstrip() for line in done.stdout.splitlines())
        assert re.search(expected, said, re.DOTALL), f"{command} printed {said}"


def test_every_page_for_newcomers_has_commands_that_are_run() -> None:
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", (ROOT / "README.md").read_text()))
    assert linked == {str(page.relative_to(ROOT)) for page in PAGES}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.stem)
def test_commands_that_are_not_run_are_such(text: Path) -> None:
    for line in re.findall(r"bootstrap testbed ([^`#|>\n]+)", text.read_text()):
        words = [word.strip("'") for word in line.split()]
        try:
            parser().parse_args(words)
        except SystemExit as e:
            pytest.fail(f"testbed {line}: usage, exit status {e.code}")


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.stem)
def test_what_a_page_points_to_is_there(text: Path) -> None:
    body = text.read_text()
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", body):
        path = text.parent / target if target else text
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), f"{target}#{anchor}"
    for path in PATH.findall(body):
        assert (ROOT / path).exists(), path
