"""Converts a Pod of Kubernetes to a `Spec`.

The runtime of a container is given by the annotation `testbed/runtime.NAME`, else by
`testbed/runtime`, else by `runtimeClassName`; the default is `container`. A container with the
annotation `testbed/tap.NAME` is a guest that somebody else boots, on that tap. `best` is the best
available runtime of guests, which the caller's function chooses when a manifest asks for it. The
ports that a container lists are those that it owns at `localhost`. Images are not looked up here,
but by their runtimes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from testbed.model import manifest
from testbed.model.errors import Error
from testbed.model.manifest import (
    Action,
    HostPort,
    Manifest,
    Mount,
    Program,
    Security,
    Spec,
    Tap,
    Volume,
    Workload,
)
from testbed.model.terms import Runtime, Transport
from testbed.pods.kubernetes.environment import expanded, variables
from testbed.pods.kubernetes.images import WELL_KNOWN_ONLY, Images
from testbed.pods.kubernetes.schema import (
    BEST,
    RUNTIMES,
    Container,
    Hook,
    InitContainer,
    Pod,
    PodSpec,
    Probe,
    extras,
)
from testbed.pods.network.resolv_conf import text as resolv_conf_text

ANNOTATION, TAP = "testbed/runtime", "testbed/tap"
EXPECTED = {
    "dict_type": "a mapping was expected",
    "model_type": "a mapping was expected",
    "string_type": "text (in quotes, if it looks like something else) was expected",
    "tuple_type": "a list was expected",
}
"""Types of pydantic's errors → words of YAML."""
PAUSE = Workload(
    "pause",
    Runtime.CONTAINER,
    program=Program("host:", ("sh", "-c", "trap exit TERM; while :; do sleep 1000 & wait; done")),
)
"""Sidecar that holds the PID namespace of containers that share one, and reaps their orphans."""


def spec(
    document: object,
    where: str,
    folder: Path,
    best: Callable[[], Runtime],
    resolv_conf: str | None = None,
    images: Images = WELL_KNOWN_ONLY,
) -> Spec:
    """Convert one pod. Paths in it are relative to `folder`; errors begin with `where`.

    Raises `Error` as `kubernetes.read` does.
    """
    try:
        pod = Pod.model_validate(document)
    except ValidationError as e:
        raise Error("; ".join(_fault(fault, where) for fault in e.errors())) from e
    except RecursionError as e:
        raise Error(f"{where} is nested too deeply to be a manifest") from e
    warnings = []
    for path, why in extras(pod):
        if why:
            raise Error(f"{where}, {path}: {why}")
        warnings.append(f"{where}, {path} is not used")
    taps = _taps(pod, where)
    runtimes = _runtimes(pod, where, best, taps)

    def workload(container: Container) -> Workload:
        runtime = runtimes[container.name]
        image, told = images.find(container.image, runtime, folder)
        if told:
            warnings.append(f"{where}, container {container.name}: {told}")
        return replace(_workload(pod, container, runtime, image), tap=taps.get(container.name))

    try:
        sidecars = {c.name: workload(c) for c in pod.spec.init_containers if c.is_sidecar}
        init = [sidecars.get(c.name) or workload(c) for c in pod.spec.init_containers]
        if pod.spec.share_process_namespace:
            sidecars = {PAUSE.name: PAUSE} | sidecars
            init.insert(0, PAUSE)
        mains = [workload(c) for c in pod.spec.containers]
        return Spec(
            name=pod.metadata.name,
            manifest=Manifest((*sidecars.values(), *mains)),
            init=tuple(init),
            volumes=tuple(_volumes(pod.spec)),
            restart=pod.spec.restart_policy,
            hostname=pod.spec.hostname or pod.metadata.name,
            host_aliases=tuple((str(a.ip), a.hostnames) for a in pod.spec.host_aliases),
            resolv_conf=_resolv_conf(pod.spec, resolv_conf),
            host_ports=_host_ports(pod.spec),
            warnings=tuple(warnings),
        )
    except Error as e:
        raise Error(f"{where}: {e.message}", hint=e.hint) from e


def _fault(fault: Any, where: str) -> str:
    """Text of an error of pydantic: FILE, document N, spec.containers.0.name: what was expected."""
    path = f", {'.'.join(map(str, fault['loc']))}" if fault["loc"] else ""
    expected = EXPECTED.get(fault["type"]) or fault["msg"].removeprefix("Value error, ")
    given = fault["input"]
    shown = f", not {given!r}" if isinstance(given, str | int | float) else ""
    return f"{where}{path}: {expected}{shown}"


# --- runtimes -------------------------------------------------------------------------------


def _runtimes(
    pod: Pod, where: str, best: Callable[[], Runtime], taps: Collection[str]
) -> dict[str, Runtime]:
    """Runtimes of containers by name. Raises `Error` if one cannot run what it is asked to.

    `taps`: names of those that somebody else boots.
    """
    names = [c.name for c in (*pod.spec.init_containers, *pod.spec.containers)]
    if pod.spec.share_process_namespace and PAUSE.name in names:
        raise Error(
            f"{where}: {PAUSE.name!r} is the container that shareProcessNamespace adds",
            hint="rename yours",
        )
    if twice := {name for name in names if names.count(name) > 1}:
        raise Error(f"{where}: two containers are named {twice.pop()!r}", hint="rename one")
    annotated = _annotated(pod, ANNOTATION, where)
    for name, value in annotated.items():
        if value not in RUNTIMES:
            at = f"{where}, metadata.annotations.{ANNOTATION}{name and f'.{name}'}"
            raise Error(f"{at}: no runtime {value!r}", hint=f"choose from {', '.join(RUNTIMES)}")
    default = annotated.get("", pod.spec.runtime_class_name or Runtime.CONTAINER)
    wanted = {name: annotated.get(name, default) for name in names}
    wanted |= dict.fromkeys(taps, Runtime.FOREIGN)
    chosen = {name: best() if r == BEST else Runtime(r) for name, r in wanted.items()}
    for container in (*pod.spec.init_containers, *pod.spec.containers):
        _check_runtime(container, chosen[container.name], where)
    for init in pod.spec.init_containers:
        if not init.is_sidecar:
            _check_init(init, chosen[init.name], where)
    return chosen


def _annotated(pod: Pod, annotation: str, where: str) -> dict[str, str]:
    """Name of a container → value of the annotation. The empty name is for all, of a runtime.

    Raises `Error` for an annotation of ours that is none of those, or about no container.
    """
    names = [c.name for c in (*pod.spec.init_containers, *pod.spec.containers)]
    annotated: dict[str, str] = {}
    for key, value in pod.metadata.annotations.items():
        if not key.startswith("testbed/"):
            continue
        asked, _, name = key.partition(".")
        if key != ANNOTATION and (asked not in (ANNOTATION, TAP) or name not in names):
            raise Error(
                f"{where}, metadata.annotations.{key}: no such container",
                hint=f"{annotation}.NAME, of {', '.join(names)}",
            )
        if asked == annotation:
            annotated[name] = value
    return annotated


def _taps(pod: Pod, where: str) -> dict[str, Tap]:
    """Taps of guests that somebody else boots, by the names of their containers."""
    taps = {}
    for name, text in _annotated(pod, TAP, where).items():
        try:
            taps[name] = Tap.parse(text)
        except Error as e:
            at = f"{where}, metadata.annotations.{TAP}.{name}"
            raise Error(f"{at}: {e.message}", hint=e.hint) from e
    return taps


def _check_runtime(container: Container, runtime: Runtime, where: str) -> None:
    """Raises `Error` if a container asks for something that its runtime cannot do."""
    hooks = (container.lifecycle.post_start, container.lifecycle.pre_stop)
    is_closed = runtime.is_machine or runtime is Runtime.WASM
    asked = (*_probes(container), *hooks)
    if is_closed and any(each and each.exec for each in asked):
        raise Error(
            f"{where}: {container.name!r} ({runtime}) has an exec probe or hook, and nothing can "
            "be started in it",
            hint="ask it by tcpSocket or httpGet",
        )


def _check_init(container: InitContainer, runtime: Runtime, where: str) -> None:
    """Raises `Error` if a container that runs to its end is one that serves."""
    who = f"{where}: init container {container.name!r}"
    if runtime.is_guest:
        raise Error(
            f"{who} cannot be a guest", hint=f"annotate it {ANNOTATION}.{container.name}: container"
        )
    hooks = (container.lifecycle.post_start, container.lifecycle.pre_stop)
    if container.ports or any(_probes(container)) or any(hooks):
        raise Error(
            f"{who} has ports, probes or hooks",
            hint="it runs to its end before anybody serves; a sidecar has restartPolicy: Always",
        )


def _probes(container: Container) -> tuple[Probe | None, ...]:
    return (container.startup_probe, container.readiness_probe, container.liveness_probe)


# --- containers -----------------------------------------------------------------------------


def _workload(pod: Pod, container: Container, runtime: Runtime, image: str) -> Workload:
    env = variables(pod, container)
    program = Program(
        image=image,
        command=tuple(expanded(word, env) for word in container.command),
        args=tuple(expanded(word, env) for word in container.args),
        env=tuple(env.items()),
        working_dir=container.working_dir,
        memory_bytes=int(container.resources.limits.memory or 0) or None,
        cpus=container.resources.limits.cpu or None,
        mounts=tuple(_mounts(pod, container)),
        pids_of=PAUSE.name if pod.spec.share_process_namespace else "",
        security=_security(pod, container),
        startup=_probe(container.startup_probe, container),
        readiness=_probe(container.readiness_probe, container),
        liveness=_probe(container.liveness_probe, container),
        post_start=_action(container.lifecycle.post_start, container),
        pre_stop=_action(container.lifecycle.pre_stop, container),
    )
    ports = tuple((Transport(p.protocol.lower()), p.container_port) for p in container.ports)
    return Workload(container.name, runtime, ports, program=program)


def _mounts(pod: Pod, container: Container) -> Iterator[Mount]:
    volumes = {volume.name for volume in pod.spec.volumes}
    for mount in container.volume_mounts:
        if mount.name not in volumes:
            raise Error(f"container {container.name!r} mounts {mount.name!r}, which is no volume")
        yield Mount(mount.name, mount.mount_path, mount.read_only)


def _security(pod: Pod, container: Container) -> Security:
    """Security of a container: what it says itself, else what its pod says."""
    own, of_pod = container.security_context, pod.spec.security_context

    def first(name: str) -> Any:
        value = getattr(own, name)
        return getattr(of_pod, name) if value is None else value

    groups = of_pod.supplemental_groups
    return Security(
        user=first("run_as_user"),
        group=first("run_as_group"),
        groups=groups if of_pod.fs_group is None else (*groups, of_pod.fs_group),
        non_root=first("run_as_non_root") or False,
        read_only_root=own.read_only_root_filesystem,
        escalation=own.allow_privilege_escalation,
        add=own.capabilities.add,
        drop=own.capabilities.drop,
    )


def _action(asked: Hook | Probe | None, container: Container) -> Action | None:
    if asked is None:
        return None

    def number(port: int | str) -> int:
        named = {p.name: p.container_port for p in container.ports if p.name}
        if isinstance(port, str) and port not in named:
            raise Error(
                f"container {container.name!r} probes port {port!r}, which it does not list"
            )
        return named[port] if isinstance(port, str) else port

    tcp, http = asked.tcp_socket, asked.http_get
    socket = tcp or http
    sleep = asked.sleep if isinstance(asked, Hook) else None
    return Action(
        port=number(socket.port) if socket else 0,
        path=http.path if http else "",
        headers=tuple((h.name, h.value) for h in http.http_headers) if http else (),
        command=asked.exec.command if asked.exec else (),
        sleep_s=sleep.seconds if sleep else 0,
    )


def _probe(probe: Probe | None, container: Container) -> manifest.Probe | None:
    action = _action(probe, container)
    if probe is None or action is None:
        return None
    return manifest.Probe(
        action,
        delay_s=probe.initial_delay_seconds,
        period_s=probe.period_seconds,
        timeout_s=probe.timeout_seconds,
        failures=probe.failure_threshold,
        successes=probe.success_threshold,
    )


# --- the pod --------------------------------------------------------------------------------


def _volumes(spec: PodSpec) -> Iterator[Volume]:
    names = [volume.name for volume in spec.volumes]
    if twice := {name for name in names if names.count(name) > 1}:
        raise Error(f"two volumes are named {twice.pop()!r}", hint="rename one")
    for volume in spec.volumes:
        if volume.empty_dir:
            yield Volume(volume.name, volume.empty_dir.mode, spec.security_context.fs_group)


def _host_ports(spec: PodSpec) -> tuple[HostPort, ...]:
    ports = [
        HostPort(Transport(p.protocol.lower()), p.host_port, p.container_port)
        for container in (*spec.init_containers, *spec.containers)
        for p in container.ports
        if p.host_port
    ]
    taken = [(p.transport, p.host_port) for p in ports]
    if twice := {port for port in taken if taken.count(port) > 1}:
        raise Error("{} hostPort {} is claimed twice".format(*twice.pop()), hint="choose another")
    return tuple(ports)


def _resolv_conf(spec: PodSpec, given: str | None) -> str:
    """resolv.conf of the pod: the given text, unless dnsPolicy is None, then dnsConfig's lines."""
    config = spec.dns_config
    options = [o.name if o.value is None else f"{o.name}:{o.value}" for o in config.options]
    text = resolv_conf_text(map(str, config.nameservers), config.searches, options)
    if spec.dns_policy == "None":
        return text
    if given is None:
        own = Path("/etc/resolv.conf")
        given = own.read_text() if own.exists() else ""
    return "".join(f"{line}\n" for line in given.splitlines()) + text
