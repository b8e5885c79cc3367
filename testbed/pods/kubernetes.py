"""Reads Pod manifests of Kubernetes (v1, YAML, several to a file), and converts them to `Spec`.

The runtime of a container is given by the annotation `testbed/runtime.NAME`, else by
`testbed/runtime`, else by `runtimeClassName`; the default is `container`. `best` is the best
available runtime of guests, which the caller's function chooses when a manifest asks for it. The
ports that a container lists are those that it owns at `localhost`.

A field that concerns a cluster only causes a warning. Any other unknown field is an error, since
the pod would not be what was asked for. Images are not looked up here, but by their runtimes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    IPvAnyAddress,
    ValidationError,
    model_validator,
)
from pydantic.alias_generators import to_camel

from testbed.model import manifest
from testbed.model.errors import Error
from testbed.model.manifest import HostPort, Manifest, Program, Restart, Spec, Workload
from testbed.model.terms import Runtime, Transport

ANNOTATION = "testbed/runtime"
BEST = "best"
RUNTIMES = (*Runtime, BEST)
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
"""Names in Kubernetes: labels of RFC 1123."""
SUFFIXES = {
    "": 1,
    "m": 1e-3,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "P": 1e15,
    "E": 1e18,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
    "Pi": 2**50,
    "Ei": 2**60,
}
"""Suffixes of quantities → factor (apimachinery, resource.Quantity)."""


def read(path: Path, best: Callable[[], Runtime], resolv_conf: str | None = None) -> list[Spec]:
    """Read all pods of a file. Raises `Error` with file, document, path and what was expected.

    `best` finds the runtime of guests that name none. `resolv_conf`: text of the resolv.conf that
    pods have unless they say otherwise; None: this host's.
    """
    try:
        documents = list(yaml.load_all(path.read_text(), _Loader))
    except OSError as e:
        raise Error(f"cannot read {path}: {e.strerror}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise Error(f"{path} is not YAML: {' '.join(str(e).split())}") from e
    specs = [
        spec(document, f"{path}, document {number}", path.parent, best, resolv_conf)
        for number, document in enumerate(documents, start=1)
        if document is not None
    ]
    if not specs:
        raise Error(f"{path} holds no pod", hint="a pod has 'apiVersion: v1' and 'kind: Pod'")
    names = [spec.name for spec in specs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise Error(f"{path}: two pods are named {twice.pop()!r}", hint="rename one")
    return specs


class _Loader(yaml.SafeLoader):
    """Loader that rejects duplicate keys, of which yaml would use the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice.pop()!r} stands there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


# --- schema of manifests --------------------------------------------------------------------


class _Model(BaseModel):
    """Fields with their names in Kubernetes. Unknown ones are stored, and judged by `_extras`."""

    model_config = ConfigDict(extra="allow", alias_generator=to_camel, frozen=True)
    harmless: ClassVar[frozenset[str]] = frozenset()
    """Fields of Kubernetes that have no effect on the pod here."""


def _label(text: str) -> str:
    if not LABEL.fullmatch(text):
        raise ValueError("a name of a-z, 0-9 and '-' (at most 63) was expected")
    return text


def _runtime(text: str) -> str:
    if text not in RUNTIMES:
        raise ValueError(f"one of {', '.join(RUNTIMES)} was expected")
    return text


def _quantity(value: object) -> float:
    """Value of a quantity such as 128Mi, 500m or 2."""
    found = re.fullmatch(r"([0-9.]+(?:[eE][0-9]+)?)([A-Za-z]*)", str(value))
    try:
        if found and found[2] in SUFFIXES and (number := float(found[1]) * SUFFIXES[found[2]]) > 0:
            return number
    except ValueError:
        pass
    raise ValueError("a quantity like 500m, 2 or 128Mi was expected")


Label = Annotated[str, AfterValidator(_label)]
RuntimeName = Annotated[str, AfterValidator(_runtime)]
Quantity = Annotated[float, BeforeValidator(_quantity)]
PortNumber = Annotated[int, Field(ge=1, le=65535)]


class _Env(_Model):
    name: str
    value: str = ""


class _Port(_Model):
    container_port: PortNumber
    protocol: Literal["TCP", "UDP"] = "TCP"
    name: str = ""
    host_port: PortNumber | None = None


class _Limits(_Model):
    memory: Quantity | None = None
    cpu: Quantity | None = None


class _Resources(_Model):
    harmless = frozenset({"requests"})
    limits: _Limits = _Limits()


class _TcpSocket(_Model):
    port: PortNumber | str


class _HttpGet(_Model):
    port: PortNumber | str
    path: str = "/"
    scheme: Literal["HTTP"] = "HTTP"


class _Exec(_Model):
    command: tuple[str, ...]


class _Probe(_Model):
    harmless = frozenset({"terminationGracePeriodSeconds"})
    tcp_socket: _TcpSocket | None = None
    http_get: _HttpGet | None = None
    exec: _Exec | None = None
    initial_delay_seconds: Annotated[int, Field(ge=0)] = 0
    period_seconds: Annotated[int, Field(ge=1)] = 10
    timeout_seconds: Annotated[int, Field(ge=1)] = 1
    failure_threshold: Annotated[int, Field(ge=1)] = 3
    success_threshold: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _asks_one_thing(self) -> _Probe:
        if sum(way is not None for way in (self.tcp_socket, self.http_get, self.exec)) != 1:
            raise ValueError("one of tcpSocket, httpGet and exec was expected")
        return self


class _Container(_Model):
    harmless = frozenset(
        {"imagePullPolicy", "terminationMessagePath", "terminationMessagePolicy", "resizePolicy"}
    )
    name: Label
    image: str
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    env: tuple[_Env, ...] = ()
    working_dir: str = ""
    ports: tuple[_Port, ...] = ()
    resources: _Resources = _Resources()
    readiness_probe: _Probe | None = None
    liveness_probe: _Probe | None = None


class _HostAlias(_Model):
    ip: IPvAnyAddress
    hostnames: tuple[str, ...]


class _DnsOption(_Model):
    name: str
    value: str | None = None


class _DnsConfig(_Model):
    nameservers: tuple[IPvAnyAddress, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[_DnsOption, ...] = ()


class _PodSpec(_Model):
    harmless = frozenset(
        {
            "affinity",
            "automountServiceAccountToken",
            "enableServiceLinks",
            "imagePullSecrets",
            "nodeName",
            "nodeSelector",
            "preemptionPolicy",
            "priority",
            "priorityClassName",
            "schedulerName",
            "schedulingGates",
            "serviceAccount",
            "serviceAccountName",
            "terminationGracePeriodSeconds",
            "tolerations",
            "topologySpreadConstraints",
        }
    )
    containers: Annotated[tuple[_Container, ...], Field(min_length=1)]
    init_containers: tuple[_Container, ...] = ()
    restart_policy: Restart = Restart.ALWAYS
    runtime_class_name: RuntimeName | None = None
    hostname: Label | None = None
    host_aliases: tuple[_HostAlias, ...] = ()
    dns_policy: Literal["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"] = "Default"
    dns_config: _DnsConfig = _DnsConfig()


class _Metadata(_Model):
    harmless = frozenset({"namespace"})
    name: Label
    annotations: dict[str, str] = {}
    labels: dict[str, str] = {}


class _Pod(_Model):
    harmless = frozenset({"status"})
    api_version: Literal["v1"]
    kind: Literal["Pod"]
    metadata: _Metadata
    spec: _PodSpec


# --- conversion -----------------------------------------------------------------------------


def spec(
    document: object,
    where: str,
    folder: Path,
    best: Callable[[], Runtime],
    resolv_conf: str | None = None,
) -> Spec:
    """Convert one pod. Paths in it are relative to `folder`; errors begin with `where`.

    Raises `Error` as `read` does.
    """
    try:
        pod = _Pod.model_validate(document)
    except ValidationError as e:
        raise Error("; ".join(_fault(fault, where) for fault in e.errors())) from e
    warnings = []
    for path, name, harmless in _extras(pod, ""):
        if not harmless:
            raise Error(f"{where}, {path}: {name} is not supported", hint="leave it out")
        warnings.append(f"{where}, {path} is not used")
    runtimes = _runtimes(pod, where, best)
    try:
        return Spec(
            name=pod.metadata.name,
            manifest=Manifest(
                tuple(_workload(c, runtimes[c.name], folder) for c in pod.spec.containers)
            ),
            init=tuple(_workload(c, runtimes[c.name], folder) for c in pod.spec.init_containers),
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
    path = ".".join(map(str, fault["loc"])) or "the document"
    expected = fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    given = fault["input"]
    shown = f", not {given!r}" if isinstance(given, str | int | float) else ""
    return f"{where}, {path}: {expected}{shown}"


def _extras(model: _Model, path: str) -> Iterator[tuple[str, str, bool]]:
    """All unknown fields: (path, name, whether it is harmless)."""
    for name in model.model_extra or ():
        yield f"{path}{name}", name, name in model.harmless
    for name, value in model:
        if name in (model.model_extra or ()):
            continue
        alias = f"{path}{to_camel(name)}"
        if isinstance(value, _Model):
            yield from _extras(value, f"{alias}.")
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                if isinstance(item, _Model):
                    yield from _extras(item, f"{alias}.{i}.")


def _runtimes(pod: _Pod, where: str, best: Callable[[], Runtime]) -> dict[str, Runtime]:
    """Runtimes of containers by name. Raises `Error` if one cannot run what it is asked to."""
    names = [c.name for c in (*pod.spec.init_containers, *pod.spec.containers)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise Error(f"{where}: two containers are named {twice.pop()!r}", hint="rename one")
    annotated: dict[str, str] = {}
    for key, value in pod.metadata.annotations.items():
        if not key.startswith("testbed/"):
            continue
        at = f"{where}, metadata.annotations.{key}"
        name = key.removeprefix(ANNOTATION).removeprefix(".")
        if key != ANNOTATION and (not key.startswith(f"{ANNOTATION}.") or name not in names):
            raise Error(
                f"{at}: no such container", hint=f"{ANNOTATION}.NAME, of {', '.join(names)}"
            )
        if value not in RUNTIMES:
            raise Error(f"{at}: no runtime {value!r}", hint=f"choose from {', '.join(RUNTIMES)}")
        annotated[name] = value
    default = annotated.get("", pod.spec.runtime_class_name or Runtime.CONTAINER)
    wanted = {name: annotated.get(name, default) for name in names}
    chosen = {name: best() if r == BEST else Runtime(r) for name, r in wanted.items()}
    for container in pod.spec.containers:
        _check_runtime(container, chosen[container.name], pod.spec, where)
    for container in pod.spec.init_containers:
        if chosen[container.name].is_guest:
            raise Error(
                f"{where}: init container {container.name!r} cannot be a guest",
                hint=f"annotate it {ANNOTATION}.{container.name}: container",
            )
        if container.ports or container.readiness_probe or container.liveness_probe:
            raise Error(
                f"{where}: init container {container.name!r} has ports or probes",
                hint="it runs to its end before anybody serves",
            )
    return chosen


def _check_runtime(container: _Container, runtime: Runtime, spec: _PodSpec, where: str) -> None:
    """Raises `Error` if a container asks for something that its runtime cannot do."""
    who = f"{where}: {container.name!r} ({runtime})"
    probes = (container.readiness_probe, container.liveness_probe)
    is_virtual = runtime in (Runtime.OSV, Runtime.LINUX)
    if (is_virtual or runtime is Runtime.WASM) and any(p and p.exec for p in probes):
        raise Error(
            f"{who} has an exec probe, and nothing can be started in it",
            hint="ask it by tcpSocket or httpGet",
        )


def _workload(container: _Container, runtime: Runtime, folder: Path) -> Workload:
    env = _environment(container.env)
    program = Program(
        image=_image(container.image, folder),
        command=tuple(_expanded(word, env) for word in container.command),
        args=tuple(_expanded(word, env) for word in container.args),
        env=tuple(env.items()),
        working_dir=container.working_dir,
        memory_bytes=int(container.resources.limits.memory or 0) or None,
        cpus=container.resources.limits.cpu,
        readiness=_probe(container.readiness_probe, container),
        liveness=_probe(container.liveness_probe, container),
    )
    ports = tuple((Transport(p.protocol.lower()), p.container_port) for p in container.ports)
    return Workload(container.name, runtime, ports, program=program)


def _host_ports(spec: _PodSpec) -> tuple[HostPort, ...]:
    ports = [
        HostPort(Transport(p.protocol.lower()), p.host_port, p.container_port)
        for container in spec.containers
        for p in container.ports
        if p.host_port
    ]
    taken = [(p.transport, p.host_port) for p in ports]
    if twice := {port for port in taken if taken.count(port) > 1}:
        raise Error("{} hostPort {} is claimed twice".format(*twice.pop()), hint="choose another")
    return tuple(ports)


def _image(image: str, folder: Path) -> str:
    """Resolve an image that is a path, relative to the manifest's folder.

    A word without `/` and `.` is not a path.
    """
    kind, colon, rest = image.partition(":")
    if colon and kind in ("oci", "oci-archive"):
        return f"{kind}:{folder.absolute() / rest}"
    path = folder.absolute() / image
    return str(path) if re.search(r"[/.]", image) and path.exists() else image


def _environment(variables: Iterable[_Env]) -> dict[str, str]:
    env: dict[str, str] = {}
    for variable in variables:
        env[variable.name] = _expanded(variable.value, env)
    return env


def _expanded(text: str, env: dict[str, str]) -> str:
    """Expand $(NAME) of defined variables, and $$ to a dollar sign, as Kubernetes does."""

    def replace(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else env.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([A-Za-z_.-][\w.-]*)\)", replace, text)


def _probe(probe: _Probe | None, container: _Container) -> manifest.Probe | None:
    if probe is None:
        return None

    def number(port: int | str) -> int:
        named = {p.name: p.container_port for p in container.ports if p.name}
        if isinstance(port, str) and port not in named:
            raise Error(
                f"container {container.name!r} probes port {port!r}, which it does not list"
            )
        return named[port] if isinstance(port, str) else port

    tcp, http, exec_ = probe.tcp_socket, probe.http_get, probe.exec
    asked = tcp or http
    return manifest.Probe(
        port=number(asked.port) if asked else 0,
        path=http.path if http else "",
        command=exec_.command if exec_ else (),
        delay_s=probe.initial_delay_seconds,
        period_s=probe.period_seconds,
        timeout_s=probe.timeout_seconds,
        failures=probe.failure_threshold,
        successes=probe.success_threshold,
    )


def _resolv_conf(spec: _PodSpec, given: str | None) -> str:
    """resolv.conf of the pod: the given text, unless dnsPolicy is None, then dnsConfig's lines."""
    config = spec.dns_config
    lines = [f"nameserver {address}" for address in config.nameservers]
    if config.searches:
        lines.append(f"search {' '.join(config.searches)}")
    if config.options:
        words = (o.name if o.value is None else f"{o.name}:{o.value}" for o in config.options)
        lines.append(f"options {' '.join(words)}")
    if spec.dns_policy != "None":
        if given is None:
            own = Path("/etc/resolv.conf")
            given = own.read_text() if own.exists() else ""
        lines[:0] = given.splitlines()
    return "".join(f"{line}\n" for line in lines)
