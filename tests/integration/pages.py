"""Blocks of commands in the pages of docs/, and whether a command prints what its page says.

In a block, lines that begin with `# ` are commands. Those that follow are what must be printed, in
that order; … stands for anything. A word after `console` says who runs the block:

- ```console run: `test_docs.py`, page by page, on this machine
- ```console node: `test_cluster.py`, on a node with containerd
- ```console: nobody. Commands of `testbed` are parsed
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```console(?: (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROMPT = "# "


def commands(page: Path, who: str) -> Iterator[tuple[str, list[str]]]:
    """(command, what it must print) of the blocks of a page that `who` runs."""
    for marked, block in BLOCK.findall(page.read_text()):
        if marked == who:
            yield from _commands(block)


def _commands(block: str) -> Iterator[tuple[str, list[str]]]:
    """Those of a block. A here-document belongs to its command."""
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


def check(command: str, printed: list[str], output: str) -> None:
    """Assert that the output has the printed lines."""
    expected = r"\n".join(re.escape(p).replace("…", ".*") for p in printed)
    said = "\n".join(line.rstrip() for line in output.splitlines())
    assert re.search(expected, said, re.DOTALL), f"{command} printed {said}"


def make_clone(folder: Path) -> None:
    """Make a folder look like a clone in which commands of the pages work."""
    for name in ("deploy", "examples", "experiments", "osv"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "results").mkdir()
    (folder / "results/reference").symlink_to(ROOT / "results/reference")
    bootstrap = folder / "bootstrap"
    bootstrap.write_text(f'#!/bin/sh\nexec {ROOT}/bootstrap "$@"\n')
    bootstrap.chmod(0o755)
