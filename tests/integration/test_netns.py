"""Namespaces where others have namespaces, too."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.root

SCRIPT = """
import subprocess
from testbed.host.ledger import Owner
from testbed.host.namespaces import NETNS, create

with Owner() as owner:
    create(owner, "ours").close()
    subprocess.run(["ip", "netns", "add", "theirs"], check=True)
assert [p.name for p in NETNS.iterdir()] == ["theirs"]
"""


def test_a_namespace_goes_though_somebody_began_to_use_ip_netns_after_it_was_made() -> None:
    fresh = 'mount -t tmpfs none /run && exec "$@"'  # a host on which nobody ever made one
    command = ["unshare", "--mount", "sh", "-c", fresh, "sh", sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
