"""A chain of CNI plugins: Debian's `bridge`, with addresses by `host-local`, and our own with its
node daemon.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from testbed.host import cache as caches
from testbed.pods import noded
from tests.children import ending

FOLDERS = ["/usr/lib/cni", "/opt/cni/bin"]
NODED = (sys.executable, "-m", "testbed.cli", "noded")


@cache
def own() -> Path:
    """Our plugin."""
    folder = caches.cache_folder() / "plugins"
    folder.mkdir(parents=True, exist_ok=True)
    return noded.plugin(folder)


@contextmanager
def daemon(
    enter: Sequence[str], *arguments: str | Path, first: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    """The node daemon, started by a prefix of a command line that enters a host.

    `first`: the lines that it prints before it answers calls.
    """
    starting = subprocess.Popen([*enter, *NODED, *arguments], stdout=subprocess.PIPE, text=True)
    with ending(starting):
        assert starting.stdout
        for line in (*first, "calls are answered"):
            assert starting.stdout.readline() == f"{line}\n"
        yield starting


def begin(
    enter: Sequence[str],
    command: str,
    plugin: Mapping[str, Any],
    *,
    container: str,
    netns: str,
    through: Sequence[str] = (),
    **environment: str,
) -> subprocess.Popen[str]:
    """Execute a plugin, as libcni does, for a container in a namespace.

    `enter`: prefix of a command line that runs a command on the host. `plugin`: its configuration,
    with `cniVersion` and `name`. `through`: command that executes our plugin in its place.
    `environment` changes the variables of the specification.
    """
    is_own = plugin["type"] == "testbed-cni"
    program = own() if is_own else shutil.which(plugin["type"], path=":".join(FOLDERS))
    variables = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": container,
        "CNI_NETNS": netns,
        "CNI_IFNAME": "eth0",
        "CNI_PATH": ":".join(FOLDERS),
        "PATH": os.environ["PATH"],
    }
    begun = subprocess.Popen(
        [*enter, *((is_own and through) or [str(program)])],
        env=variables | environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert begun.stdin
    begun.stdin.write(json.dumps(plugin))
    begun.stdin.close()
    begun.stdin = None  # for communicate()
    return begun


def guest(port: int = 9000) -> dict[str, Any]:
    """A Pod with a guest that echoes."""
    container = {
        "name": "guest",
        "image": "host:busybox",
        "ports": [{"containerPort": port}],
        "args": ["nc", "-ll", "-p", str(port), "-e", "cat"],
    }
    spec = {"runtimeClassName": "standin", "containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "guests"}, "spec": spec}


def programs() -> list[Path]:
    """The plugins. Skips the test if one is not installed."""
    needed = ("bridge", "host-local", "loopback")
    found = {name: shutil.which(name, path=":".join(FOLDERS)) for name in needed}
    if missing := [name for name, path in found.items() if path is None]:
        pytest.skip(f"no {', '.join(missing)}")
    return [own(), *(Path(path) for path in found.values() if path)]


def bridge(data: Path) -> dict[str, Any]:
    """Configuration of `bridge`. `host-local` stores there which addresses are taken."""
    ranges = [[{"subnet": "10.99.0.0/24"}], [{"subnet": "fd99::/64"}]]
    ipam = {"type": "host-local", "dataDir": str(data), "ranges": ranges}
    return {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipam": ipam}
