"""bootstrap in a clone of its own, where nothing is ever installed: what it would do, and says."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENTRIES = [
    line.partition("#")
    for line in (ROOT / "packages.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone that was bootstrapped, as far as can be told: all but what goes into .venv."""
    for name in ("bootstrap", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "packages.txt").write_text("python3  /usr/bin/python3  # the language\n")
    venv = tmp_path / ".venv"
    python = "/usr/bin/python3"
    subprocess.run(
        [python, "-m", "venv", "--without-pip", "--system-site-packages", venv], check=True
    )
    # bootstrap compares with what venv writes when it brings pip along
    config = venv / "pyvenv.cfg"
    config.write_text(config.read_text().replace(" --without-pip", ""))
    pip = venv / "bin/pip"
    pip.write_text('#!/bin/sh\necho "pip $*" | tee "$0.asked"\necho chatter >&2\n')
    pip.chmod(0o755)
    return tmp_path


def bootstrap(clone: Path, *args: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": path or os.environ["PATH"]}
    return subprocess.run(
        [shutil.which("bash") or "bash", clone / "bootstrap", *args],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def tools(directory: Path, *names: str) -> str:
    """A PATH that holds these commands of the system and no others."""
    directory.mkdir()
    for name in (*names, "dirname", "flock", "bash"):
        (directory / name).symlink_to(shutil.which(name) or f"/usr/bin/{name}")
    return str(directory)


def test_the_second_run_does_nothing_in_under_a_second(clone: Path) -> None:
    assert "installing the project" in bootstrap(clone).stderr
    start = time.monotonic()
    again = bootstrap(clone)
    assert time.monotonic() - start < 1
    assert again.returncode == 0
    assert again.stderr.splitlines() == [
        "bootstrap: ready: ./bootstrap nox -l shows what there is to run"
    ]


@pytest.mark.root
def test_a_venv_that_sudo_left_is_one_line_with_what_to_type(clone: Path) -> None:
    assert bootstrap(clone).returncode == 0
    (clone / "pyproject.toml").write_text("# changed")  # so that there is something to do
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        users = shutil.copytree(clone, Path(folder) / "clone", symlinks=True)
        users.chmod(0o755)
        config = users / ".venv/pyvenv.cfg"
        config.write_text(config.read_text().replace(str(clone), str(users)))
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        done = subprocess.run(
            [*nobody, "bash", users / "bootstrap"], capture_output=True, text=True, check=False
        )
    assert done.returncode == 1
    venv = users / ".venv"
    assert done.stderr.splitlines() == [
        f"bootstrap: {venv} is root's, and has to be changed; type: sudo rm -r {venv}"
    ]


def test_the_command_runs_where_the_caller_is_with_venv_first(clone: Path) -> None:
    bootstrap(clone)
    ran = bootstrap(clone, "sh", "-c", 'command -v python; pwd; echo "$1"; exit 7', "-", "a b")
    assert ran.stdout.splitlines() == [f"{clone}/.venv/bin/python", str(Path.cwd()), "a b"]
    assert ran.returncode == 7
    assert ran.stderr == ""


def test_a_first_run_says_a_line_for_each_step_and_not_what_pip_says(clone: Path) -> None:
    said = bootstrap(clone, "true").stderr
    assert said.splitlines()[:2] == [
        "bootstrap: installing the project and its dependencies into .venv",
        "bootstrap: fetching guests' kernels",
    ]
    assert "chatter" not in said


def test_commands_are_told_how_bootstrap_was_called(clone: Path) -> None:
    bootstrap(clone)
    told = bootstrap(clone, "sh", "-c", 'echo "$TESTBED_BOOTSTRAP"').stdout
    assert told == f"{clone}/bootstrap\n"


def test_changed_dependencies_are_installed(clone: Path) -> None:
    bootstrap(clone)
    with (clone / "pyproject.toml").open("a") as file:
        file.write("\n")
    asked = clone / ".venv/bin/pip.asked"
    asked.unlink()
    assert bootstrap(clone).stderr.count("installing") == 1
    assert f"--editable {clone}[dev]" in asked.read_text()
    assert "installing" not in bootstrap(clone).stderr


def test_a_failed_installation_is_tried_again(clone: Path) -> None:
    (clone / ".venv/bin/pip").write_text("#!/bin/sh\necho no such thing >&2\nexit 1\n")
    failed = bootstrap(clone, "true")
    assert failed.returncode == 1
    assert failed.stderr.endswith("no such thing\n")
    assert "installing the project" in bootstrap(clone, "true").stderr


def test_kernels_that_cannot_be_downloaded_are_said_in_a_line_and_the_command_runs(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (packages,) = (clone / ".venv").glob("lib/python*/site-packages")
    (packages / "project.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
    kernel = tmp_path / "cache/testbed/kernels/linux/some/boot/vmlinuz-6.1.0"
    kernel.parent.mkdir(parents=True)
    kernel.write_bytes(b"kernel")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TESTBED_OSV_KERNEL", raising=False)
    ran = bootstrap(clone, "true")
    assert ran.returncode == 0
    [line] = [line for line in ran.stderr.splitlines() if "tried again when needed" in line]
    assert line.startswith("bootstrap: cannot download https://")
    assert bootstrap(clone, "true").stderr == ""


def test_without_apt_the_missing_packages_are_named(clone: Path, tmp_path: Path) -> None:
    (clone / "packages.txt").write_text("there  bash  # why\naway  /nowhere/*,no-such  # why\n")
    ran = bootstrap(clone, "true", path=tools(tmp_path / "bin"))
    assert ran.returncode == 1
    assert ran.stderr == ("bootstrap: no apt here; install what these Debian packages hold: away\n")


def test_packages_of_a_group_are_for_those_who_name_it(clone: Path, tmp_path: Path) -> None:
    with (clone / "packages.txt").open("a") as file:
        file.write("tex:away  /nowhere/*  # why\n")
    bootstrap(clone)
    path = tools(tmp_path / "bin", "sha256sum", "readlink", "grep", "cat", "true")
    assert bootstrap(clone, "true", path=path).returncode == 0
    ran = bootstrap(clone, "--tex", "true", path=path)
    assert ran.returncode == 1
    assert ran.stderr == "bootstrap: no apt here; install what these Debian packages hold: away\n"
    ran = bootstrap(clone, "--text", "true")
    assert ran.stderr == "bootstrap: no packages of a group text in packages.txt\n"


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_tells_usage_and_groups_and_does_nothing(clone: Path, option: str) -> None:
    with (clone / "packages.txt").open("a") as file:
        file.write("away  /nowhere/*  # why\ntex:away  /nowhere/*  # why\ntex:a  b  # why\n")
    ran = bootstrap(clone, option)
    assert ran.returncode == 0
    assert ran.stderr == ""
    assert ran.stdout.startswith("Makes a clone ready to run, then runs a command in it: ./boot")
    assert "set -euo" not in ran.stdout
    assert ran.stdout.splitlines()[-1].split() == ["Groups:", "--tex"]
    assert not (clone / ".venv/bin/pip.asked").exists()


@pytest.mark.root
def test_of_several_names_the_first_that_apt_knows_is_installed(clone: Path) -> None:
    running = f"linux-headers-{os.uname().release}"
    names = "linux-headers-amd64,linux-headers-RUNNING"
    (clone / "packages.txt").write_text(f"{names}  /nowhere/*  # why\nother  /nowhere/*  # why\n")
    ubuntu = clone / "bin"
    ubuntu.mkdir()
    scripts = {
        "apt-cache": f'test "$2" = {running}',
        "apt-get": f'echo "$*" | tee -a {clone}/asked; echo "debconf: chatter" >&2',
    }
    for name, script in scripts.items():
        (ubuntu / name).write_text(f"#!/bin/sh\n{script}\n")
        (ubuntu / name).chmod(0o755)
    ran = bootstrap(clone, "true", path=f"{ubuntu}:{os.environ['PATH']}")
    assert f"bootstrap: installing system packages: {running} other\n" in ran.stderr
    assert f"--no-install-recommends {running} other\n" in (clone / "asked").read_text()
    assert "chatter" not in ran.stderr


def test_packages_of_another_machine_are_left_out(clone: Path, tmp_path: Path) -> None:
    here = os.uname().machine
    (clone / "packages.txt").write_text(
        f"there[{here}]  no-such  # why\naway[pdp11]  no-such  # why\n"
    )
    ran = bootstrap(clone, "true", path=tools(tmp_path / "bin"))
    assert ran.stderr == "bootstrap: no apt here; install what these Debian packages hold: there\n"


def test_without_root_the_command_to_type_is_said(clone: Path, tmp_path: Path) -> None:
    (clone / "packages.txt").write_text("away  no-such-command  # why\n")
    path = tools(tmp_path / "bin", "sha256sum", "readlink", "grep", "cat", "true")
    (tmp_path / "bin/apt-get").symlink_to("/bin/false")
    nobody = ["unshare", "--user"]  # a user namespace without a mapping: nobody is root in it
    if subprocess.run([*nobody, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    ran = subprocess.run(
        [*nobody, "env", f"PATH={path}", "bash", clone / "bootstrap"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert "sudo apt-get install --no-install-recommends away" in ran.stderr
    (clone / "packages.txt").write_text("tex:away  no-such-command  # why\n")
    ran = subprocess.run(
        [*nobody, "env", f"PATH={path}", "bash", clone / "bootstrap", "--tex", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == (
        "bootstrap: not root, and packages are missing (away); type: sudo ./bootstrap --tex"
    )


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e[0].split()[0])
def test_every_system_package_has_a_sign_and_a_reason(entry: tuple[str, str, str]) -> None:
    words, _, reason = entry
    assert len(words.split()) == 2
    assert reason.strip()
