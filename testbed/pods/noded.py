"""The node daemon: carries out the calls of the CNI plugin `testbed-cni`.

The plugin (`deploy/testbed-cni.c`) connects for each call, and the daemon forks. So each call has a
process of its own, as if it were a program, but one that has imported everything. Supervisors of
pods are forked from these, and go on when the daemon ends. When one is killed, the daemon starts
another, which takes its pod over.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import IO, NoReturn

from testbed import bpf, datapaths, paths
from testbed.host import cgroups, compiler, ledger, namespaces, nft
from testbed.host.ledger import Owner
from testbed.model.errors import Error
from testbed.model.terms import Runtime
from testbed.pods import cni, control, networks, supervisor

CHECK_S = 2.0
"""Time between looks for pods whose supervisor was killed."""
ADOPTION_S = 30.0
"""Time between attempts to adopt such a pod."""
ASK_LIMIT_S = 5.0
"""Time in which the plugin has to send all of a call."""


def plugin(folder: Path) -> Path:
    """Put the plugin into a folder, compiled. Raises `Error` if there is no compiler."""
    flags = ("-std=gnu17", "-O2", "-static")
    built = compiler.build("the CNI plugin", "testbed-cni", paths.DEPLOY, flags)
    new = folder / ".testbed-cni"
    try:
        shutil.copy(built, new)
    except OSError as e:
        raise Error(f"{folder}: {e.strerror}", hint="a folder for plugins, which is there") from e
    return new.rename(folder / "testbed-cni")  # what is executed now cannot be written


def remove(folder: Path | None, network: Path | None) -> list[Path]:
    """Take the plugin out of the lists of a folder, then out of its own. Returns what changed."""
    changed = networks.remove(network) if network else []
    if folder and (program := folder / "testbed-cni").exists():
        program.unlink()
        changed.append(program)
    return changed


def serve(datapath: str, ready: Callable[[], None], network: Path | None = None) -> None:
    """Call `ready` when calls are answered; go on until SIGTERM or an interrupt.

    `datapath` is that whose programs are held ready. `network` is the folder of the pods' network,
    whose list gets the plugin again if somebody writes it anew. Raises `Error` if a daemon runs
    already.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    ledger.ROOT.mkdir(mode=0o700, exist_ok=True)
    ledger.ROOT.chmod(0o700)  # whoever made it: nobody else connects, or listens there
    path = ledger.ROOT / f"noded-{namespaces.own()}.sock"
    locked = path.with_suffix(".lock")
    with _lock(locked) as lock, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        path.unlink(missing_ok=True)
        server.bind(str(path))
        try:
            _serve(server, lock.fileno(), datapath, ready, network)
        finally:
            path.unlink(missing_ok=True)
            locked.unlink(missing_ok=True)


def _lock(path: Path) -> IO[str]:
    """Lock a file, which the last holder may be removing. Raises `Error` if another has it."""
    while True:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            file.close()
            raise Error("a node daemon runs already") from e
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def _serve(
    server: socket.socket,
    lock: int,
    datapath: str,
    ready: Callable[[], None],
    network: Path | None,
) -> None:
    datapaths.names()  # imports all
    for runtime in Runtime:
        importlib.import_module(f"testbed.runtimes.{runtime}")
    for fact in (nft.unsupported, cgroups.mount_point, bpf.has_tcx):
        fact()  # it is remembered
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
    ending, alive = os.pipe()
    inherited = (server.fileno(), lock, alive)
    holder = _fork(inherited, partial(_hold, datapath, ending))
    os.close(ending)
    try:
        server.listen(128)
        ready()
        _answer_calls(server, inherited, network)
    finally:  # where the daemon is a container, all its processes are killed when it has ended
        os.close(alive)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(holder, 0)


def _answer_calls(
    server: socket.socket, inherited: Iterable[int], network: Path | None
) -> NoReturn:
    """Fork a child for each call, and look after the network's list and orphans in between."""
    next_check = 0.0
    again: dict[Path, float] = {}
    """Ledger of an orphan → when it may be adopted again."""
    chained = ""
    while True:
        try:
            if select.select([server], [], [], max(0, next_check - time.monotonic()))[0]:
                asking, _ = server.accept()
                with asking:
                    _fork(inherited, partial(_answer, asking))
            if (now := time.monotonic()) < next_check:
                continue
            next_check = now + CHECK_S
            if network and (failure := _chain(network)) != chained:
                chained = failure
                _log(failure or f"{network} is in order again")
            for orphan in _orphans():
                if now > again.get(orphan.ledger, 0):
                    again[orphan.ledger] = now + ADOPTION_S
                    _fork(inherited, partial(_adopt, orphan))
        except Exception as e:  # whatever it is, other calls are answered
            _log(repr(e))
            time.sleep(0.1)


def _fork(inherited: Iterable[int], work: Callable[[], None]) -> int:
    """Do something in a child process, which has none of the daemon's descriptors. Its pid."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        for fd in inherited:
            os.close(fd)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        work()
        status = 0
    except Error as e:
        _log(str(e))
    except Exception as e:
        _log(repr(e))
    finally:
        os._exit(status)


def _hold(datapath: str, ending: int) -> None:
    """Keep a datapath's programs loaded until the daemon ends, so that no call has to load them."""
    with Owner() as owner:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which may be for all of the unit
        for programs in datapaths.get(datapath).programs:
            bpf.load(programs, owner)
        os.read(ending, 1)


def _answer(asking: socket.socket) -> None:
    """Carry out one call, and send what the plugin prints.

    If the plugin was killed, its runtime may have asked for DEL in vain, before there was a pod. So
    an ADD is taken back then.
    """
    os.register_at_fork(after_in_child=asking.close)  # supervisors live longer than the call
    asking.settimeout(ASK_LIMIT_S)
    with asking.makefile("rb") as file:
        asked = file.read().decode(errors="replace")
    variables, _, configuration = asked.partition("\0\0")
    environment = dict(v.split("=", 1) for v in variables.split("\0") if "=" in v)
    answer, status = cni.answer(environment, configuration)
    if environment.get("CNI_COMMAND") == "ADD" and status == 0 and _hung_up(asking):
        answer, status = cni.answer(environment | {"CNI_COMMAND": "DEL"}, configuration)
        if status:
            _log(f"an ADD cannot be taken back: {json.dumps(answer)}")
        return
    printed = "" if answer is None else json.dumps(answer) + "\n"
    asking.settimeout(None)
    with contextlib.suppress(BrokenPipeError):
        asking.sendall(f"{status}{printed}".encode())


def _hung_up(asking: socket.socket) -> bool:
    poll = select.poll()
    poll.register(asking, 0)  # POLLHUP and POLLERR are told in any case
    return bool(poll.poll(0))


def _chain(network: Path) -> str:
    """Put the plugin into the list of the pods' network, if it is not there; why that failed."""
    try:
        if changed := networks.add(network):
            _log(f"{changed} was written anew; it lists testbed-cni again")
    except Error as e:
        return str(e)
    return ""


def _orphans() -> list[control.Orphan]:
    """Pods that the plugin joined on this host, and whose supervisor was killed."""
    here = namespaces.own()
    return [
        orphan
        for orphan in control.orphans().values()
        if orphan.status.get("host_netns") == here
        and (orphan.status.get("sandbox") or {}).get("id")
    ]


def _adopt(orphan: control.Orphan) -> None:
    """Start another supervisor for a pod, or take it down if its namespace is gone."""
    name = orphan.status["name"]
    if not namespaces.is_namespace(Path(orphan.status["sandbox"]["netns"])):
        control.down(name)
        _log(f"{name} and its supervisor were gone; what was left of its guests is removed")
        return
    with supervisor.Starting(_log) as starting:
        starting.start(supervisor.of_orphan(name), adopts=True)
        starting.wait_built()
    _log(f"the supervisor of {name} was killed; another has the pod")


def _log(text: str) -> None:
    print(f"noded: {text}", file=sys.stderr, flush=True)
