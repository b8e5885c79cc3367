"""Pods by hand, as the command line makes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from testbed.pods import control

TESTBED = (sys.executable, "-m", "testbed.cli")


def run(*words: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*TESTBED, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr + done.stdout
    return done


def workload(pod: str, name: str) -> dict[str, Any]:
    [found] = control.workloads(pod, name)
    return found


def there(pod: str) -> set[str]:
    """Namespaces and cgroups of a pod, and mounts below."""
    places = ("/run/netns", "/sys/fs/cgroup/unified", "/sys/fs/cgroup", "/sys/fs/cgroup/memory")
    return {
        str(p) for place in places if Path(place).is_dir() for p in Path(place).glob(f"tb-*-{pod}*")
    }
