"""The node daemon: carries out the calls of the CNI plugin `testbed-cni`.

The plugin (`deploy/testbed-cni.c`) connects for each call, and the daemon forks. So each call has a
process of its own, as if it were a program, but one that has imported everything. Supervisors of
pods are forked from these, and go on when the daemon ends. When one is killed, the daemon starts
another, which takes its pod over.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable
from functools import partial
from pathlib import Path

from testbed import bpf, datapaths, paths
from testbed.host import compiler, namespaces
from testbed.host.ledger import Owner
from testbed.model.errors import Error
from testbed.model.terms import Runtime
from testbed.pods import cni, control, supervisor

SOCKET = "\0testbed/noded"
CHECK_S = 2.0
"""Time between looks for pods whose supervisor was killed."""
ADOPTION_S = 30.0
"""Time between attempts to adopt such a pod."""
ASK_LIMIT_S = 5.0
"""Time in which the plugin has to send all of a call."""
CALLS_NEED = (
    "pyroute2.netns",
    "testbed.pods.kubernetes.conversion",
    "testbed.pods.network.resolv_conf",
    *(f"testbed.runtimes.{runtime}" for runtime in Runtime),
    *(f"testbed.datapaths.{name}" for name in datapaths.names()),
)
"""Modules that calls import when they need them."""


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


def serve(datapath: str, ready: Callable[[], None]) -> None:
    """Call `ready` when calls are answered; go on until SIGTERM or an interrupt.

    `datapath` is that whose programs are held ready. Raises `Error` if a daemon runs already.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        try:
            server.bind(SOCKET)
        except OSError as e:
            raise Error("a node daemon runs already") from e
        for module in CALLS_NEED:
            importlib.import_module(module)
        gc.freeze()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
        ending, alive = os.pipe()
        inherited = [server.fileno(), alive]
        _fork(inherited, partial(_hold, datapath, ending))
        os.close(ending)
        server.listen(128)
        ready()
        again: dict[Path, float] = {}
        """Ledger of an orphan → when it may be adopted again."""
        while True:
            if select.select([server], [], [], CHECK_S)[0]:
                asking, _ = server.accept()
                with asking:
                    if control.trusted(asking):
                        _fork(inherited, partial(_answer, asking))
            for orphan in _orphans():
                if time.monotonic() > again.get(orphan.ledger, 0):
                    again[orphan.ledger] = time.monotonic() + ADOPTION_S
                    _fork(inherited, partial(_adopt, orphan))


def _fork(inherited: list[int], work: Callable[[], None]) -> None:
    """Do something in a child process, which has none of the daemon's descriptors."""
    if os.fork():
        return
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
    """Hold a datapath's programs loaded, so that no call has to, until the daemon ends."""
    with Owner() as owner:
        for programs in datapaths.get(datapath).programs:
            bpf.load(programs, owner)
        os.read(ending, 1)


def _answer(asking: socket.socket) -> None:
    """Carry out one call, and send what the plugin prints."""
    asking.settimeout(ASK_LIMIT_S)
    with asking.makefile("rb") as file:
        asked = file.read().decode(errors="replace")
    variables, _, configuration = asked.partition("\0\0")
    environment = dict(v.split("=", 1) for v in variables.split("\0") if "=" in v)
    answer, status = cni.answer(environment, configuration)
    printed = "" if answer is None else json.dumps(answer) + "\n"
    asking.settimeout(None)
    with contextlib.suppress(BrokenPipeError):  # the plugin was killed
        asking.sendall(f"{status}{printed}".encode())
        asking.shutdown(socket.SHUT_RDWR)  # a pod's supervisor, a child of this one, has it, too


def _orphans() -> list[control.Orphan]:
    """Pods that the plugin joined on this host, and whose supervisor was killed."""
    here = namespaces.own()
    return [
        orphan
        for orphan in control.orphans().values()
        if orphan.status["host_netns"] == here and (orphan.status["sandbox"] or {}).get("id")
    ]


def _adopt(orphan: control.Orphan) -> None:
    """Start another supervisor for a pod."""
    name = orphan.status["name"]
    with supervisor.Starting() as starting:
        starting.start(supervisor.of_orphan(name))
        starting.wait_built()
    _log(f"the supervisor of {name} was killed; another has the pod")


def _log(text: str) -> None:
    print(f"noded: {text}", file=sys.stderr, flush=True)
