"""The process that keeps one pod which somebody wrote: it builds it, and lives as long as the pod.

It listens at the pod's socket (`pods`), whose name is free only once: no two pods of one name. What
it made it takes down at its end. If it is killed, the pod stands: links and programs are the
kernel's, workloads go on. Another keeper then takes it over, by building the same again: whatever
is there already is left as it is. `kept` watches workloads, `supervisor` mends links.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from testbed import datapaths, runtimes
from testbed.datapaths.interface import Datapath
from testbed.host import ledger, nft
from testbed.host.ledger import Owner
from testbed.images import compose
from testbed.model.addresses import alias, loopback
from testbed.model.errors import Error
from testbed.model.manifest import Spec
from testbed.model.terms import Family, Runtime, Transport
from testbed.pods import control
from testbed.pods.network import dns_relay
from testbed.pods.pod import Pod
from testbed.pods.reconciler import Reconciler
from testbed.pods.sandbox import Sandbox
from testbed.pods.server import Server
from testbed.pods.workloads import Workloads
from testbed.runtimes.interface import Options, Prepared

ORDER = "order"
"""File of a pod's folder."""


@dataclass(frozen=True)
class Order:
    """What somebody asks of a keeper."""

    spec: Spec
    datapath: str
    options: Options
    sandbox: Sandbox | None = None
    """Whose guests they are to be; None: of a pod that the keeper makes."""


def of_orphan(pod: str) -> Order:
    """What the keeper of an orphan was asked. Raises `Error` if there is no such pod."""
    found = pickle.loads((control.orphan(pod).folder / ORDER).read_bytes())
    assert isinstance(found, Order)
    return found


def detach(order: Order) -> tuple[int, int]:
    """Start the keeper of a pod as a process that outlives this one: (pid, descriptor).

    From the descriptor comes one line of JSON when the pod is built, `{}` or `{"error": …}`.
    Whoever ends the process by SIGTERM before that finds nothing left when the descriptor ends.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2, reading):
            os.dup2(nothing, fd)
        told = os.fdopen(writing, "w")

        def tell(**what: object) -> None:
            told.write(json.dumps(what) + "\n")
            told.close()

        try:
            supervise(order, tell)
        except Error as e:
            tell(error=e.message, hint=e.hint)
        except Exception as e:
            tell(error=f"the keeper of {order.spec.name}: {e!r}")
    finally:
        os._exit(0)


class Starting:
    """Pods that are being built, each by its keeper, as a context manager.

    Until it is left, whatever goes wrong (Ctrl-C, one that cannot be built) takes down all of them.
    """

    def __init__(self) -> None:
        self._keepers: dict[str, tuple[int, int]] = {}

    def start(self, order: Order) -> None:
        """Start building one."""
        self._keepers[order.spec.name] = detach(order)

    def wait_built(self) -> None:
        """Raises `Error` if a pod cannot be built."""
        for _, reading in self._keepers.values():
            told = json.loads(_read_all(reading) or '{"error": "a keeper was killed"}')
            if "error" in told:
                raise Error(told["error"], told.get("hint"))

    def wait(self, limit_s: float) -> list[str]:
        """Until all are ready, but no longer. Says of each workload that is not what it is."""
        deadline = time.monotonic() + limit_s
        unready = set(self._keepers)
        while unready and time.monotonic() < deadline:
            unready = {name for name in unready if not control.status(name)["settled"]}
            time.sleep(0.01 if unready else 0)
        return [
            f"{name}: {w['name']} is not ready ({w['state']}{_last_words(Path(w['log']))}); see "
            f"'testbed logs {name} -c {w['name']}'"
            for name in self._keepers
            for w in control.status(name)["workloads"]
            if not w["ready"] and w["state"] != "completed"
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        if e is None:
            return
        for pid, _ in self._keepers.values():
            os.kill(pid, signal.SIGTERM)
        for pid, _ in self._keepers.values():
            os.waitpid(pid, 0)


def _last_words(log: Path) -> str:
    """The last line that a workload printed, after a colon; empty if it was silent."""
    try:
        lines = log.read_text(errors="replace").split("\n")
    except FileNotFoundError:
        return ""
    return next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")


def _read_all(fd: int) -> bytes:
    with open(fd, "rb") as file:
        return file.read()


def supervise(order: Order, built: Callable[[], None]) -> None:
    """Build a pod, call `built`, and keep it until somebody asks for its end, or SIGTERM.

    However it ends, everything is taken down. An orphan of that name is taken over. Raises `Error`
    if something cannot be built, or the orphan is not what was ordered; that one stays as it was.
    """
    asker, spec, datapath = None, order.spec, datapaths.get(order.datapath)
    try:
        with _listen(spec.name) as server:
            if order.sandbox:
                order.sandbox.check(spec, datapath)
            left = control.orphans().get(spec.name)
            if left:
                _check_left(left, order, datapath)
            prepared = _prepare(spec, order.options)
            with _ending() as ending, Owner(left.ledger if left else None) as owner:
                scratch = ledger.create_folder(owner, control.folder_name(owner.id))
                (scratch / ORDER).write_bytes(pickle.dumps(order))
                _write_etc(spec, scratch)
                try:
                    pod = Pod(
                        owner,
                        spec.name,
                        spec.manifest,
                        datapath,
                        prepared,
                        scratch,
                        scratch,
                        order.sandbox,
                    )
                except BaseException:
                    if left:
                        owner.leave_standing()
                    raise
                before = left.status if left else None
                with (
                    pod,
                    _connected(spec, pod),
                    Reconciler(pod),
                    Workloads(spec, pod, prepared, scratch, before) as workloads,
                ):
                    built()
                    asker = Server(workloads).serve(server, ending)
        answer: dict[str, Any] = {}
    except Error as e:
        if asker is None:
            raise
        answer = {"error": e.message, "hint": e.hint}
    if asker:
        with contextlib.suppress(OSError), asker:  # who asked may have gone
            asker.sendall(json.dumps(answer).encode() + b"\n")


def _check_left(left: control.Orphan, order: Order, datapath: Datapath) -> None:
    """Raises `Error` if the pod that a killed keeper left cannot be what was ordered."""
    name = order.spec.name
    if of_orphan(name) != order:
        raise Error(
            f"pod {name!r} stands already, otherwise, and its keeper was killed",
            hint=f"testbed adopt {name}, or testbed down {name}",
        )
    if not datapath.in_kernel:
        raise Error(
            f"the keeper of pod {name!r} was killed, and {datapath.name} does not go on without",
            hint=f"testbed down {name}",
        )


@contextlib.contextmanager
def _ending() -> Iterator[int]:
    """A descriptor that is readable once SIGTERM came.

    Neither building nor taking down is interrupted: they are short, and libraries hold locks.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    yield reading


def _listen(name: str) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        server.bind(control.socket_name(name))
    except OSError as e:
        server.close()
        if e.errno == errno.EADDRINUSE:
            raise Error(f"pod {name!r} stands already", hint=f"testbed down {name}") from e
        raise
    server.listen()
    return server


def _prepare(spec: Spec, options: Options) -> dict[Runtime, Prepared]:
    """All runtimes, and all images, at once: before anything is built."""
    etc = {path: text.encode() for path, text in _etc(spec, guest=True).items()}
    options = replace(options, etc=etc)
    workloads = (*spec.init, *spec.manifest.workloads)
    kinds = dict.fromkeys(w.runtime for w in workloads)
    with ThreadPoolExecutor() as pool:
        prepared = dict(
            zip(kinds, pool.map(lambda r: runtimes.prepare(r, options), kinds), strict=True)
        )
        list(pool.map(lambda w: prepared[w.runtime].compose(w), workloads))
    return prepared


def _etc(spec: Spec, *, guest: bool) -> dict[str, str]:
    """What Kubernetes puts into /etc of containers, by path (`runtimes.ETC`)."""
    known = compose.hosts_file(patched=guest).read_text()
    own = (alias if guest else loopback)(Family.IPV4)
    aliases = "".join(f"{address} {' '.join(names)}\n" for address, names in spec.host_aliases)
    resolv_conf = dns_relay.of_guests(spec.resolv_conf) if guest else spec.resolv_conf
    return {
        "/etc/hosts": f"{known}{own} {spec.hostname}\n{aliases}",
        "/etc/resolv.conf": resolv_conf,
    }


def _write_etc(spec: Spec, scratch: Path) -> None:
    """The files that workloads have in the place of their own (`Place.etc`)."""
    for kind, guest in (("native", False), ("guest", True)):
        (scratch / kind).mkdir(exist_ok=True)
        for path, text in _etc(spec, guest=guest).items():
            (scratch / kind / Path(path).name).write_text(text)
    (scratch / "hostname").write_text(f"{spec.hostname}\n")


@contextlib.contextmanager
def _connected(spec: Spec, pod: Pod) -> Iterator[None]:
    """The pod on the node's network, where there can be one, and its guests' way to its resolver.

    In somebody else's namespace, that is somebody else's. Raises `Error` if it has ports of the
    node, and there is no such network.
    """
    why = "whoever made its namespace connects it" if pod.sandbox else nft.unsupported()
    if why is None:
        pod.connect(spec.host_ports)
    elif spec.host_ports:
        raise Error(f"pod {spec.name!r} cannot have a hostPort: {why}")
    server = dns_relay.to_relay(spec.resolv_conf)
    dns = (Transport.UDP, dns_relay.PORT)
    if server is None or not spec.manifest.guests or dns in spec.manifest.owners:
        yield
        return
    waits = any(dns in workload.ports for workload in spec.manifest.natives)
    with dns_relay.Relay(pod.netns, server, waits=waits):
        yield
