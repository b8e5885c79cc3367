"""Headless Chromium: what becomes of a page when its scripts, and one more, have run, offline."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
VIRTUAL_MS = 20_000
"""Time that a page has for what it does later. It passes as fast as the page lets it."""


def rendered(page: Path, script: str = "") -> str:
    """The document after its scripts and one more have run."""
    return _dumped(_with(page, script))


def answered(page: Path, script: str, width: int = 1280) -> Any:
    """What the body of an async function returns, in a page of this width with drawn figures.

    Chromium's window is never narrow, so the page stands in a frame.
    """
    asking = _with(page, _ASK.replace("BODY", script))
    frame = page.with_name("frame.html")
    frame.write_text(_FRAME.format(width=width, page=asking.name))
    found = re.search(r'data-answer="([^"]*)"', _dumped(frame))
    assert found, "no answer: the figures were not drawn"
    return json.loads(unescape(found[1]))


def _with(page: Path, script: str) -> Path:
    """A copy of the page with one more script at its end."""
    before, end, after = page.read_text().rpartition("</body>")
    copy = page.with_name("copy.html")
    copy.write_text(f"{before}<script>{script}</script>{end}{after}")
    return copy


def _dumped(file: Path) -> str:
    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not chromium:
        pytest.skip("no chromium")
    done = subprocess.run(
        [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={file.parent / 'browser'}",
            f"--virtual-time-budget={VIRTUAL_MS}",
            "--window-size=1300,1000",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_FRAME = """<!doctype html>
<script>onmessage = event => {{ document.documentElement.dataset.answer = event.data; }};</script>
<iframe src="{page}" style="width: {width}px; height: 900px; border: 0"></iframe>
"""

_ASK = """
const drawn = new Promise(resolve => {
  const waiting = setInterval(() => {
    if (window.Bokeh?.documents[0]?.is_idle) { clearInterval(waiting); resolve(); }
  }, 50);
});
drawn.then(async () => { BODY })
  .catch(error => `${error}`)
  .then(answer => parent.postMessage(JSON.stringify(answer), "*"));
"""
