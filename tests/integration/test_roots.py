"""Commands in Debian roots: as on a machine of their own, and nothing of them stays."""

from __future__ import annotations

import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.host.cache import cache_folder
from tests.children import ending
from tests.machines import roots

pytestmark = pytest.mark.root
ROOT = Path(__file__).parents[2]
KILL_PATIENCE_S = 10
"""The kernel kills a chain of processes: each once its parent is gone."""


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    made = sorted((cache_folder() / "debian").glob(f"*-{roots.architecture()}-????-W??"))
    if not made:
        pytest.skip("no Debian root in the cache")
    with roots.copy(made[-1]) as copy:
        yield copy
    assert not copy.exists()


def output(root: Path, *command: str) -> list[str]:
    lines: list[str] = []
    assert roots.run(root, command, cwd="/", on_line=lines.append) == 0
    return lines


def test_a_command_is_root_on_a_machine_of_its_own(root: Path) -> None:
    assert output(root, "id", "-u") == ["0"]
    assert output(root, "sh", "-c", "echo $PPID; ls /mnt /tmp") == ["1", "/mnt:", "", "/tmp:"]
    assert Path("/etc/hosts").read_text().splitlines() == output(root, "cat", "/etc/hosts")
    own = {
        name
        for name in ("mnt", "pid", "ipc", "uts", "net", "cgroup")
        if output(root, "readlink", f"/proc/self/ns/{name}")
        != [str(Path(f"/proc/self/ns/{name}").readlink())]
    }
    assert own == {"mnt", "pid", "ipc", "uts"}


def test_its_exit_status_is_told(root: Path) -> None:
    assert roots.run(root, ["sh", "-c", "exit 7"]) == 7
    assert roots.run(root, ["no-such-command"], on_line=lambda _: None) == 127


def test_nothing_of_this_machine_is_in_its_environment_or_open(root: Path) -> None:
    names = {line.partition("=")[0] for line in output(root, "env")}
    assert names <= {*roots.environment(root), "PWD", "OLDPWD", "SHLVL", "_"}
    assert str(root) not in "".join(output(root, "cat", "/proc/self/mounts"))


def test_nothing_stays_mounted_or_running(root: Path) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    script = "mount -t tmpfs tmpfs /home && (sleep 1000 & echo $! >/var/sleeper; exec true)"
    output(root, "sh", "-c", script)
    assert Path("/proc/self/mountinfo").read_text() == before
    assert running_in(root) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_when_this_process_ends_all_in_the_root_does(root: Path, number: int) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.machines import roots
command = ["sh", "-c", "trap 'echo down; exit' INT; echo up; sleep 1000"]
roots.run(Path({str(root)!r}), command, on_line=lambda line: print(line, flush=True))
"""
    started = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with ending(started) as process:
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        rest, _ = process.communicate(timeout=30)
    assert rest == ("down\n" if number == signal.SIGINT else "")
    deadline = time.monotonic() + KILL_PATIENCE_S
    while running_in(root):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def running_in(root: Path) -> list[str]:
    """Processes whose root is that folder, by pid."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "root").stat().st_ino == root.stat().st_ino:
                found.append(process.name)
        except OSError:
            continue  # it just ended
    return found


def test_a_copy_that_a_killed_process_left_is_removed_by_the_next(root: Path) -> None:
    left = root.parent / "left-by-nobody"
    (left / "etc").mkdir(parents=True)
    with roots.copy(root) as other:
        assert not left.exists()
        assert root.exists()
        assert other != root


def test_programs_of_another_architecture_run_as_long_as_asked(tmp_path: Path) -> None:
    arch, machine, code = {
        "amd64": ("arm64", 183, "a80b8052 e0008052 010000d4"),  # mov w8, 93; mov w0, 7; svc 0
        "arm64": ("amd64", 62, "b83c000000 bf07000000 0f05"),  # mov eax, 60; mov edi, 7; syscall
    }[roots.architecture()]
    if not Path(f"/usr/lib/binfmt.d/qemu-{roots.MACHINES[arch]}.conf").exists():
        pytest.skip("no QEMU in user mode")
    program = tmp_path / "exit7"
    text = bytes.fromhex(code)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, machine, 1, 0x10078, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )  # elf(5): Ehdr, then the one Phdr
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, 0x10000, 0, 120 + len(text), 120 + len(text), 4096)
    program.write_bytes(header + segment + text)
    program.chmod(0o755)
    with roots.foreign(arch), roots.foreign(arch):
        assert subprocess.run([program], check=False).returncode == 7
    rules = Path("/proc/sys/fs/binfmt_misc")
    assert not list(rules.glob(f"testbed-{arch}-*"))
