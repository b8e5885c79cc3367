"""A chain of CNI plugins: Debian's `bridge`, with addresses by `host-local`, and our own."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDERS = ["/usr/lib/cni", "/opt/cni/bin"]
OWN = Path(sys.executable).with_name("testbed-cni")


def programs() -> list[Path]:
    """The plugins. Skips the test if one is not installed."""
    needed = ("bridge", "host-local", "loopback")
    found = {name: shutil.which(name, path=":".join(FOLDERS)) for name in needed}
    if missing := [name for name, path in found.items() if path is None]:
        pytest.skip(f"no {', '.join(missing)}")
    return [OWN, *(Path(path) for path in found.values() if path)]


def bridge(data: Path) -> dict[str, Any]:
    """Configuration of `bridge`. `host-local` stores there which addresses are taken."""
    ranges = [[{"subnet": "10.99.0.0/24"}], [{"subnet": "fd99::/64"}]]
    ipam = {"type": "host-local", "dataDir": str(data), "ranges": ranges}
    return {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipam": ipam}
