"""A network of SSH hosts; none are up at first."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from testbed import netlink, remote
from testbed.ledger import Owner

from .lan import CLIENT, Lan


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all hosts work, with a Python environment that `bootstrap` finds complete.

    It uses the packages that are installed here: to install them anew takes minutes and a network.
    """
    work = tmp_path_factory.mktemp("hosts")
    bundle = remote.package()
    environment = work / "environments" / bundle.environment
    for name, path in bundle.files.items():
        (environment / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, environment / name)
    venv = environment / ".venv"
    python = ["/usr/bin/python3", "-m", "venv", "--system-site-packages", str(venv)]
    subprocess.run([*python, "--without-pip"], check=True)
    (config := venv / "pyvenv.cfg").write_text(config.read_text().replace(" --without-pip", ""))
    (packages,) = venv.glob("lib/python*/site-packages")
    (ours,) = (p for p in map(Path, sys.path) if p.name == "site-packages" and sys.prefix in str(p))
    (packages / "testbed-tests.pth").write_text(f"{ours}\n")
    pyproject = (environment / "pyproject.toml").read_bytes()
    (venv / "installed").write_text(f"{sha256(pyproject).hexdigest()}  -\n")
    return work


@pytest.fixture(scope="module")
def lan(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lan]:
    with Owner() as owner:
        lan = Lan(owner, tmp_path_factory.mktemp("lan"), work)
        with netlink.create_netns(owner, lan.netns):
            pass
        lan.run("ip", "link", "add", "br0", "type", "bridge")
        lan.run("ip", "address", "add", f"{CLIENT}/24", "dev", "br0")
        lan.run("ip", "link", "set", "br0", "up")
        key = lan.path / "client"
        subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", str(key)], check=True)
        yield lan
        lan.down()
