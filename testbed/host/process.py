"""Child processes in namespaces and cgroups, and their end.

Processes are taken back by their cgroup, which is in the ledger before the first of them starts: a
pid could be written down only after the fact, and would miss grandchildren.
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
    output: Path | None = None,
    env: Mapping[str, str] | None = None,
    working_dir: str | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a program in a cgroup and a network namespace, on some CPUs.

    `binds` maps files of the host to paths that they stand at for this program alone. `output`
    receives what it prints. `env` is its environment; None: this process's. `pass_fds` stay open in
    it. The command is a shell line that can be pasted (`shlex.join(p.args)`). It joins its cgroup
    before it becomes the program, so that sockets belong to it from the start.
    """
    line = f"echo $$ > {shlex.quote(str(cgroup / 'cgroup.procs'))} && exec"
    enter = ["nsenter", f"--net=/run/netns/{netns}"] if netns else []
    if cpus:
        enter += ["taskset", "--cpu-list", ",".join(map(str, cpus))]
    if binds:
        mounts = " && ".join(shlex.join(["mount", "--bind", str(f), at]) for f, at in binds.items())
        enter += ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh"]
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


def run(
    command: Sequence[str | Path],
    failure: str,
    hint: str | None = None,
    *,
    cwd: Path | None = None,
) -> str:
    """What a command prints, in the C locale.

    Raises `Error` where it fails: `failure`, the last line of its complaints, and `hint`, by
    default the command itself.
    """
    words = [str(word) for word in command]
    env = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(
        words, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise Error(f"{failure}: {why}", hint=hint or shlex.join(words))
    return done.stdout


_WRAPPERS = {"sh", "dash", "bash", "busybox", "nsenter", "taskset", "unshare"}


def launched(process: Running) -> bool:
    """Whether what `spawn` started has become the program, or has ended."""
    try:
        return Path(f"/proc/{process.pid}/exe").readlink().name not in _WRAPPERS
    except OSError:
        return True


class Running(Protocol):
    """A process that was started: a child (`subprocess.Popen`), or an `Orphan`."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class Orphan:
    """A process whose parent died: whoever takes over its end, does so without being its parent.

    Raises `ProcessLookupError` if the process of that pid is gone, or is another than the one that
    `started` then (`started_at`).
    """

    UNKNOWN = 137
    """Its exit status, which only a parent is told (Kubernetes' ContainerStatusUnknown)."""

    def __init__(self, pid: int, started: int) -> None:
        self.pid, self._fd = pid, os.pidfd_open(pid)
        weakref.finalize(self, os.close, self._fd)
        if started_at(pid) != started:  # asked when the descriptor holds it
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
    """When a process started, in clock ticks since boot: with its pid, it is no other's.

    0 for one that is gone or a zombie (proc_pid_stat(5)).
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])


GRACE_S = 1.0
"""Between asking a process to end and insisting."""


def end(process: Running, grace_s: float = GRACE_S) -> None:
    """Ask a process to end (SIGTERM), insist after `grace_s`, and collect it."""
    process.terminate()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
