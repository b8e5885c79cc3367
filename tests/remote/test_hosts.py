"""Who is let in, who is there, and what a host's doctor says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from .lan import Lan, SshHost

pytestmark = pytest.mark.root


def test_hosts_tells_who_is_there_and_carries_nothing(
    lan: Lan, alpha: SshHost, beta: SshHost, tmp_path: Path
) -> None:
    inventory = lan.inventory(alpha, beta, directory=tmp_path / "work")
    status, output, _ = lan.testbed("hosts", "--hosts", inventory, "--json").end()
    seen = json.loads(output)
    assert status == 0
    assert set(seen) == {"alpha", "beta"}
    assert all(host["cpus"] >= 1 and host["kernel"] for host in seen.values())
    assert not (tmp_path / "work").exists()


def test_a_doctor_is_asked_on_each_host(lan: Lan, alpha: SshHost, beta: SshHost) -> None:
    inventory = lan.inventory(alpha, beta)
    status, output, errors = lan.testbed("doctor", "--hosts", inventory, "--on", "beta").end()
    assert status == 0, output + errors
    lines = output.splitlines()
    assert all(line.startswith("beta ") for line in lines)
    assert any("eBPF" in line and "fine" in line for line in lines)


def test_another_host_key_than_the_one_on_file_is_refused(
    lan: Lan, alpha: SshHost, beta: SshHost
) -> None:
    inventory = lan.inventory(alpha, beta)
    keys = lan.path / "swapped"
    keys.write_text("".join(f"{h.address} ssh-ed25519 {beta.key}\n" for h in (alpha, beta)))
    inventory.write_text(inventory.read_text().replace('"known_hosts"', '"swapped"'))
    status, output, _ = lan.testbed("hosts", "--hosts", inventory).end()
    assert status == 1
    assert f"alpha: {alpha.address} port 22 shows another host key" in output
    assert "beta         Linux" in output


def test_a_host_whose_key_is_not_on_file_is_refused(lan: Lan, alpha: SshHost) -> None:
    inventory = lan.inventory(alpha)
    (lan.path / "empty").write_text("")
    inventory.write_text(inventory.read_text().replace('"known_hosts"', '"empty"'))
    status, output, _ = lan.testbed("hosts", "--hosts", inventory).end()
    assert status == 1
    assert "alpha: its host key is not on file" in output
    assert f"ssh-keyscan -p 22 {alpha.address} >>" in output


def test_a_user_who_is_not_let_in_is_told_so(lan: Lan, alpha: SshHost) -> None:
    inventory = lan.inventory(alpha)
    inventory.write_text(inventory.read_text().replace('"client"', '"beta.key"'))
    status, output, _ = lan.testbed("hosts", "--hosts", inventory).end()
    assert status == 1
    assert f"alpha: {alpha.address} port 22 does not let root in" in output


def test_a_full_disk_is_told_in_a_line(lan: Lan, alpha: SshHost) -> None:
    alpha.shell("mkdir -p /run/full && mount -t tmpfs -o size=64k tmpfs /run/full")
    inventory = lan.inventory(alpha, directory=Path("/run/full"))
    status, output, errors = lan.testbed("doctor", "--hosts", inventory).end()
    alpha.shell("umount /run/full")
    assert status == 1
    assert "alpha: tar: " in output, errors
    assert output.count("\n") == 1
    assert re.search(r"\(free: *0\)", output)
