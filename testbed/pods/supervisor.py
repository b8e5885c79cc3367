"""The supervisor process of a pod: it builds the pod of a manifest, and takes it down at its end.

It listens at the pod's control socket (`control`). Only one process can have that name, so there
are no two pods of one name. `Workloads` runs the workloads, `Reconciler` mends links.

If it is killed, the pod stands: links and programs are in the kernel, and workloads go on. Another
supervisor process can take the pod over. It builds the same pod again, and leaves what is there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
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
from testbed.runtimes.interface import VOLUMES, Options, Prepared

ORDER = "order"
"""Name of the file with the order, in a pod's folder."""


@dataclass(frozen=True)
class Order:
    """An order to a supervisor process: which pod to build."""

    spec: Spec
    datapath: str
    options: Options
    sandbox: Sandbox | None = None
    """Foreign namespace that the guests join; None: the supervisor process makes one."""


def of_orphan(pod: str) -> Order:
    """The order of an orphan's supervisor process. Raises `Error` if there is no such pod."""
    found = pickle.loads((control.orphan(pod).folder / ORDER).read_bytes())
    assert isinstance(found, Order)
    return found


def detach(order: Order, *, adopts: bool = False) -> tuple[int, int]:
    """Start the supervisor process of a pod, which outlives this process: (pid, descriptor).

    `adopts`: only if there is an orphan to take over (`supervise`).
    Lines of JSON come from the descriptor: `{"say": …}` while images are made, and when the pod is
    built `{}`, or `{"error": …}`. If the process gets SIGTERM before, nothing is left when the
    descriptor is at its end.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2, reading):
            os.dup2(null, fd)
        output = os.fdopen(writing, "w", buffering=1)

        def tell(**answer: object) -> None:
            output.write(json.dumps(answer) + "\n")
            output.close()

        def say(line: str) -> None:
            if not output.closed:  # nobody listens after the pod is built
                output.write(json.dumps({"say": line}) + "\n")

        try:
            supervise(order, tell, say, adopts=adopts)
        except Error as e:
            tell(error=e.message, hint=e.hint)
        except Exception as e:
            tell(error=f"the supervisor process of {order.spec.name}: {e!r}")
    finally:
        os._exit(0)


class Starting:
    """Pods that supervisor processes are building, as a context manager.

    An exception within the context (Ctrl-C, a pod that cannot be built) takes down all of them, but
    for orphans, which stood before.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        """`say` is called with a line of text about progress, or about what a pod will lack."""
        self._say = say
        self._supervisors: dict[str, tuple[int, int]] = {}
        """Pod → pid and descriptor (`detach`)."""
        self._adopts = False

    def start(self, order: Order, *, adopts: bool = False) -> None:
        """Start building a pod, or taking over an orphan."""
        self._supervisors[order.spec.name] = detach(order, adopts=adopts)
        self._adopts |= adopts

    def wait_built(self) -> None:
        """Wait until all are built. Raises `Error` if one cannot be built."""
        for _, reading in self._supervisors.values():
            answer = {"error": "a supervisor process was killed"}
            with os.fdopen(reading) as lines:
                for line in map(json.loads, lines):
                    if "say" in line:
                        self._say(line["say"])
                    else:
                        answer = line
            if "error" in answer:
                raise Error(answer["error"], answer.get("hint"))

    def wait(self, limit_s: float) -> list[str]:
        """Wait until all workloads are ready, but no longer than `limit_s`.

        Returns a line of text for each workload that is not ready.
        """
        deadline = time.monotonic() + limit_s
        unready = set(self._supervisors)
        while unready and time.monotonic() < deadline:
            unready = {name for name in unready if not control.status(name)["settled"]}
            time.sleep(0.01 if unready else 0)
        return [
            f"{name}: {w['name']} is not ready ({_state(w)}{_last_words(w)}); see "
            f"'testbed logs {name} -c {w['name']}'"
            for name in self._supervisors
            if not control.status(name)["ready"]
            for w in control.describe(name)["workloads"]
            if not w["ready"] and w["state"] != "completed"
        ]

    def unserved(self) -> list[str]:
        """A line of text for each port that a workload lists, and nobody serves."""
        return [
            f"{name}: {w['name']} lists port {port}, and nobody serves it"
            for name in self._supervisors
            for w in control.status(name)["workloads"]
            for port in w["unserved"]
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        if e is None or self._adopts:
            return
        for pid, _ in self._supervisors.values():
            os.kill(pid, signal.SIGTERM)
        for pid, _ in self._supervisors.values():
            os.waitpid(pid, 0)


def _state(workload: Mapping[str, Any]) -> str:
    status, unanswered = workload["exit_status"], workload["unanswered"]
    exit_status = f", exit status {status}" if status else ""
    silence = f", no answer at {unanswered} yet" if unanswered else ""
    return f"{workload['state']}{exit_status}{silence}"


def _last_words(workload: Mapping[str, Any]) -> str:
    return f", last said: {workload['last_words']}" if workload["last_words"] else ""


def supervise(
    order: Order, built: Callable[[], None], say: Callable[[str], None], *, adopts: bool = False
) -> None:
    """Build a pod, call `built`, and supervise it until it is asked to end, or until SIGTERM.

    `say`: see `Starting`.

    Everything is taken down at the end, also after an error. An orphan of that name is taken over;
    with `adopts`, nothing is built without one: it may have been taken down meanwhile. Raises
    `Error` if the pod cannot be built, or the orphan is not what was ordered; then the orphan stays
    as it was.
    """
    asker, spec, datapath = None, order.spec, datapaths.get(order.datapath)
    try:
        with _listen(spec.name) as server:
            left = _left_of(order, datapath, adopts)
            prepared = _prepare(spec, replace(order.options, say=say))
            with _ending() as ending, Owner(left.ledger if left else None) as owner:
                scratch = ledger.create_folder(owner, control.folder_name(owner.id))
                (scratch / ORDER).write_bytes(pickle.dumps(order))
                _write_etc(spec, scratch)
                _make_volumes(spec, scratch)
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
        with contextlib.suppress(OSError), asker:  # the asker may be gone
            asker.sendall(json.dumps(answer).encode() + b"\n")


def _left_of(order: Order, datapath: Datapath, adopts: bool) -> control.Orphan | None:
    """The orphan that the pod takes over; None if there is none. Raises `Error` as `supervise`."""
    spec = order.spec
    if order.sandbox:
        order.sandbox.check(spec, datapath)
    elif taps := spec.manifest.taps.values():
        raise Error(
            f"pod {spec.name!r} is made here, and has no tap {next(iter(taps)).name!r}",
            hint="testbed attach",
        )
    left = control.orphans().get(spec.name)
    if adopts and not left:
        raise Error(f"no pod {spec.name!r} is left to take over")
    if left:
        _check_left(left, order, datapath)
    return left


def _check_left(left: control.Orphan, order: Order, datapath: Datapath) -> None:
    """Raises `Error` if an orphan cannot be taken over by this order."""
    name = order.spec.name
    if of_orphan(name) != order:
        raise Error(
            f"a different pod {name!r} stands already, and its supervisor process was killed",
            hint=f"testbed adopt {name}, or testbed down {name}",
        )
    if not datapath.in_kernel:
        raise Error(
            f"the supervisor process of pod {name!r} was killed, and {datapath.name} "
            "does not work without it",
            hint=f"testbed down {name}",
        )


@contextlib.contextmanager
def _ending() -> Iterator[int]:
    """A descriptor that becomes readable at SIGTERM.

    The signal does not interrupt building and taking down: they are short, and libraries hold
    locks.
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
    """Prepare all runtimes and compose all images, in parallel, before anything is built."""
    etc = {path: text.encode() for path, text in _etc(spec, guest=True).items()}
    etc["/etc/hostname"] = f"{spec.hostname}\n".encode()
    options = replace(options, etc=etc)
    kinds = dict.fromkeys(w.runtime for w in spec.workloads)
    with ThreadPoolExecutor() as pool:
        prepared = dict(
            zip(kinds, pool.map(lambda r: runtimes.prepare(r, options), kinds), strict=True)
        )
        list(pool.map(lambda w: prepared[w.runtime].compose(w), spec.workloads))
    return prepared


def _etc(spec: Spec, *, guest: bool) -> dict[str, str]:
    """Path → text of the files that Kubernetes puts into /etc (`runtimes.interface.ETC`)."""
    known = compose.hosts_file(patched=guest).read_text()
    own = (alias if guest else loopback)(Family.IPV4)
    aliases = "".join(f"{address} {' '.join(names)}\n" for address, names in spec.host_aliases)
    resolv_conf = dns_relay.of_guests(spec.resolv_conf) if guest else spec.resolv_conf
    return {
        "/etc/hosts": f"{known}{own} {spec.hostname}\n{aliases}",
        "/etc/resolv.conf": resolv_conf,
    }


def _write_etc(spec: Spec, scratch: Path) -> None:
    """Write the files that replace workloads' own (`Placement.etc`)."""
    for kind, guest in (("native", False), ("guest", True)):
        (scratch / kind).mkdir(exist_ok=True)
        for path, text in _etc(spec, guest=guest).items():
            (scratch / kind / Path(path).name).write_text(text)
    (scratch / "hostname").write_text(f"{spec.hostname}\n")


def _make_volumes(spec: Spec, scratch: Path) -> None:
    """Make the folders of volumes, unless a killed supervisor process made them."""
    for volume in spec.volumes:
        folder = scratch / VOLUMES / volume.name
        if folder.exists():
            continue
        folder.mkdir(parents=True)
        mode = volume.mode
        if volume.group is not None:
            os.chown(folder, -1, volume.group)
            mode |= stat.S_ISGID
        folder.chmod(mode)


@contextlib.contextmanager
def _connected(spec: Spec, pod: Pod) -> Iterator[None]:
    """Connect the pod's guests with what is outside, if possible, and with its name server.

    Raises `Error` if the pod has ports of the node, or a program that asks for its address, but is
    not on the node's network.
    """
    why = "its namespace is somebody else's" if pod.sandbox else nft.unsupported()
    if why and spec.host_ports:
        raise Error(f"pod {spec.name!r} cannot have a hostPort: {why}")
    if pod.sandbox or not why:
        pod.connect(spec.host_ports)
    for workload in spec.workloads:
        pod.place(workload)  # finds the fields that variables ask for
    server = dns_relay.to_relay(spec.resolv_conf)
    dns = (Transport.UDP, dns_relay.PORT)
    if server is None or not spec.manifest.guests or dns in spec.manifest.owners:
        yield
        return
    waits = any(dns in workload.ports for workload in spec.manifest.natives)
    with dns_relay.Relay(pod.netns, server, waits=waits):
        yield
