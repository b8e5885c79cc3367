"""Starts and ends processes in network namespaces and cgroups.

The ledger lists the cgroup of a process, not its pid: the cgroup is known before the process
starts, and has its descendants in it, too.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import shutil
import signal
import subprocess
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from testbed.model.errors import Error


def spawn(
    argv: Sequence[str | Path],
    *,
    cgroup: Path,
    netns: str | None = None,
    cpus: Sequence[int] = (),
    binds: Mapping[Path, str] | None = None,
    own_tmp: bool = False,
    output: Path | None = None,
    env: Mapping[str, str] | None = None,
    working_dir: str | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a program in a cgroup and a network namespace, on some CPUs.

    `binds` maps files of the host to paths at which only this program sees them. `own_tmp`: see
    `seeing`. `output` receives what it prints. `env` is its environment; None: this process's.
    `pass_fds` stay open in it. Raises `Error` if there is no such program.

    The command is a shell line that can be pasted (`shlex.join(p.args)`). The shell joins the
    cgroup before it executes the program, so all sockets of the program belong to the cgroup.
    """
    line = f"echo $$ > {shlex.quote(str(cgroup / 'cgroup.procs'))} && exec"
    enter = ["nsenter", f"--net=/run/netns/{netns}"] if netns else []
    if cpus:
        enter += ["taskset", "--cpu-list", ",".join(map(str, cpus))]
    if binds or own_tmp:
        enter += seeing(binds or {}, own_tmp=own_tmp)
    program = shutil.which(argv[0])
    if program is None:
        raise Error(f"no program {argv[0]}", hint="./bootstrap")
    command = ["sh", "-c", f'{line} "$@"', "sh", *enter, program, *map(str, argv[1:])]
    sink = output.open("ab") if output else subprocess.DEVNULL
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=working_dir,
            pass_fds=pass_fds,
        )
    finally:
        if output:
            sink.close()  # type: ignore[union-attr]


def seeing(binds: Mapping[Path, str], *, own_tmp: bool = False) -> list[str]:
    """Prefix of a command line whose command sees files of the host at other paths.

    `own_tmp`: it also has a new, empty /tmp, in memory, which goes with it.
    """
    mounts = [["mount", "--bind", str(file), at] for file, at in binds.items()]
    mounts += [["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/tmp"]] if own_tmp else []
    return [
        "unshare",
        "--mount",
        "sh",
        "-c",
        f'{" && ".join(map(shlex.join, mounts))} && exec "$@"',
        "sh",
    ]


def run(
    command: Sequence[str | Path],
    failure: str,
    hint: str | None = None,
    *,
    cwd: Path | None = None,
) -> str:
    """Run a command in the C locale, and return what it prints.

    Raises `Error` if it fails: `failure` with the last line of standard error, and `hint`, by
    default the command itself.
    """
    words = [str(word) for word in command]
    env = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(
        words,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        process_group=0,  # Ctrl-C is for this process, which ends it
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise Error(f"{failure}: {why}", hint=hint or shlex.join(words))
    return done.stdout


_WRAPPERS = {"sh", "dash", "bash", "busybox", "nsenter", "taskset", "unshare"}


def launched(process: Running) -> bool:
    """Whether a process of `spawn` executes its program by now, or has ended."""
    try:
        return Path(f"/proc/{process.pid}/exe").readlink().name not in _WRAPPERS
    except OSError:
        return True


class Running(Protocol):
    """A started process: a child (`subprocess.Popen`), or an `Orphan`."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class Orphan:
    """A process whose parent died, held by a pidfd. It is not a child of this process.

    Raises `ProcessLookupError` if there is no process with that pid, or if it did not start at
    `started` (`started_at`), and so is another one.
    """

    UNKNOWN = 137
    """Exit status: only a parent is told the real one (Kubernetes' ContainerStatusUnknown)."""

    def __init__(self, pid: int, started: int) -> None:
        self.pid, self._fd = pid, os.pidfd_open(pid)
        weakref.finalize(self, os.close, self._fd)
        if started_at(pid) != started:  # read after the pidfd was opened, so the pid is not reused
            raise ProcessLookupError(pid)

    def poll(self) -> int | None:
        return self.UNKNOWN if select.select([self._fd], [], [], 0)[0] else None

    def wait(self, timeout: float | None = None) -> int:
        if not select.select([self._fd], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return self.UNKNOWN

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, which: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fd, which)


def started_at(pid: int) -> int:
    """Start time of a process in clock ticks since boot (proc_pid_stat(5)).

    Pid and start time together identify a process. 0 if it is gone or a zombie.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])


GRACE_S = 1.0
"""Time between SIGTERM and SIGKILL."""


def end(process: Running, grace_s: float = GRACE_S) -> None:
    """End a process with SIGTERM, after `grace_s` with SIGKILL, and wait for its end."""
    process.terminate()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
