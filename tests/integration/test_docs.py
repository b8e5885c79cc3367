"""What the pages of docs/ tell a newcomer to type does what they say.

Blocks marked ```console run are run, page by page, in a folder of the page's own that looks like a
clone (`pages`).
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

from .pages import ROOT, check, commands, make_clone

TEXTS = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
]
PAGES = [text for text in TEXTS if "```console run" in text.read_text()]
RUN_ELSEWHERE = {"docs/cluster.md": "test_cluster.py"}
"""Page whose commands another file of tests runs."""
PATH = re.compile(
    r"`((?:testbed|bpf|osv|agent|deploy|tests|experiments|examples)/[\w./-]*(?:/|\.(?:py|c|toml|yaml|md|conflist|service)))`"
)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Path]:
    """A folder in which commands of the pages work."""
    make_clone(tmp_path)
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
    for command, printed in commands(page, "run"):
        done = subprocess.run(
            ["bash", "-euc", command],
            cwd=clone,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        check(command, printed, done.stdout)


def test_every_page_for_newcomers_has_commands_that_are_run() -> None:
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", (ROOT / "README.md").read_text()))
    assert linked == {str(page.relative_to(ROOT)) for page in PAGES} | RUN_ELSEWHERE.keys()
    for page, test in RUN_ELSEWHERE.items():
        assert page in (Path(__file__).parent / test).read_text()


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
