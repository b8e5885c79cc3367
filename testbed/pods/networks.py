"""Puts the plugin `testbed-cni` into the list of plugins of a node's pods, and takes it out again.

A container runtime reads one configuration of its folder (`/etc/cni/net.d`), the first by name. The
network of a cluster writes it. The plugin's own entry is the last one of the list that is shipped,
`deploy/10-testbed.conflist`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from testbed import paths
from testbed.model.errors import Error

SHIPPED = paths.DEPLOY / "10-testbed.conflist"
ENDINGS = {".conf", ".conflist", ".json"}
"""Of files that runtimes read as configurations (libcni, `ConfFiles`)."""


def entry() -> dict[str, Any]:
    """What the plugin's part of a list is."""
    found: dict[str, Any] = _read(SHIPPED)["plugins"][-1]
    return found


def add(folder: Path) -> Path | None:
    """Append the plugin to the list that the runtime reads. Returns the file if it has changed.

    Raises `Error` if there is no list.
    """
    files = _files(folder)
    if not files:
        raise Error(
            f"{folder} has no network for pods",
            hint=f"start the cluster's network, or copy deploy/{SHIPPED.name} there",
        )
    file = files[0]
    network = _read(file)
    if "plugins" not in network:
        raise Error(f"{file} is one plugin, not a list", hint='a .conflist, with "plugins": […]')
    if any(_is_ours(plugin) for plugin in network["plugins"]):
        return None
    _write(file, network | {"plugins": [*network["plugins"], entry()]})
    return file


def remove(folder: Path) -> list[Path]:
    """Take the plugin out of all lists. Returns the files that have changed.

    Files that no runtime could read are left alone.
    """
    changed = []
    for file in _files(folder):
        try:
            network = _read(file)
        except Error:
            continue
        plugins = network.get("plugins", [])
        left = [plugin for plugin in plugins if not _is_ours(plugin)]
        if left != plugins:
            _write(file, network | {"plugins": left})
            changed.append(file)
    return changed


def _files(folder: Path) -> list[Path]:
    """The configurations of a folder, in the order in which a runtime looks at them."""
    try:
        return sorted(file for file in folder.iterdir() if file.suffix in ENDINGS)
    except OSError as e:
        raise Error(f"{folder}: {e.strerror}", hint="the folder of networks, which is there") from e


def _is_ours(plugin: object) -> bool:
    return isinstance(plugin, dict) and plugin.get("type") == "testbed-cni"


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as e:
        raise Error(f"cannot read {file}: {e}") from e
    if not isinstance(found, dict) or not isinstance(found.get("plugins", []), list):
        raise Error(f"{file} is no network configuration")
    return found


def _write(file: Path, network: dict[str, Any]) -> None:
    """Replace a file as a whole, since the runtime may read it at any time."""
    new = file.with_name(f".{file.name}.new")  # an ending that runtimes do not read
    try:
        new.write_text(json.dumps(network, indent=2) + "\n")
        shutil.copymode(file, new)
        new.replace(file)
    except OSError as e:
        raise Error(f"cannot write {file}: {e.strerror}") from e
