"""Composing an image of 10 MB, and reading one: against writing a file of that size."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from testbed.images import rofs
from testbed.images.compose import Definition, compose_osv

from .gate import Ratio
from .references import file_write

pytestmark = pytest.mark.bench

FILES, FILE_BYTES = 100, 100_000
GOAL_S = 0.2


def test_composing_an_image(ratio: Ratio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = random.Random(1)
    files = {}
    for i in range(FILES):
        file = tmp_path / f"{i}"
        file.write_bytes(noise.randbytes(FILE_BYTES))
        files[f"/data/{i % 7}/{i}"] = file
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    definition = Definition(Path("/usr/bin/env"), files=files)
    image = compose_osv(definition)  # compiles the shim, and binds the program to it
    ratio(
        "compose an image of 10 MB",
        lambda: compose_osv(definition),
        file_write(tmp_path / "plain", image.size_bytes),
        setup=image.path.unlink,
        goal_s=GOAL_S,
    )
    assert image.size_bytes > FILES * FILE_BYTES


def test_reading_an_image(ratio: Ratio, tmp_path: Path) -> None:
    disk = rofs.pack({f"/{i}": bytes(FILE_BYTES) for i in range(FILES)})
    ratio(
        "read an image of 10 MB",
        lambda: rofs.unpack(disk),
        file_write(tmp_path / "plain", len(disk)),
        goal_s=GOAL_S,
    )
    assert len(rofs.unpack(disk)) == FILES
