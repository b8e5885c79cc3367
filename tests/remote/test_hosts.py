"""Who is let in, who is there, and what a host's doctor says."""

from __future__ import annotations

import json

import pytest

from .lan import Lan

pytestmark = pytest.mark.root


def test_hosts_tells_who_is_there(lan: Lan) -> None:
    inventory = lan.inventory(lan.add("alpha"), lan.add("beta"))
    asked = lan.testbed("hosts", "--hosts", inventory, "--json")
    seen = json.loads(asked.communicate(timeout=30)[0])
    assert asked.returncode == 0
    assert set(seen) == {"alpha", "beta"}
    assert all(host["cpus"] >= 1 and host["kernel"] for host in seen.values())
