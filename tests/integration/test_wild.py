"""Pods as people write them start as they are, if their images are well-known ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from testbed.pods import control
from tests.wild import MANIFESTS, STARTS, verdict

from .commands import run
from .sockets import wait_until

pytestmark = pytest.mark.root


@pytest.mark.parametrize(
    "file", [file for file in MANIFESTS if verdict(file) == STARTS], ids=lambda file: file.stem
)
def test_it_starts_as_it_is(file: Path, name: str, tmp_path: Path) -> None:
    """But for its name: that of an example may be taken."""
    own = tmp_path / file.name
    own.write_text(re.sub(r"(metadata:\s*\{?name: )[\w-]+", rf"\g<1>{name}", file.read_text()))
    run("up", own)
    wait_until(lambda: bool(control.status(name)["ready"]), "it is ready, or has done its work")
    assert [w["name"] for w in control.status(name)["workloads"] if w["restarts"]] == []
    run("down", name)
