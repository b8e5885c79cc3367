"""Schema of Pod manifests: the fields that are understood, those that are ignored, and the others.

Names and meanings are those of Kubernetes' API (v1). `null` means that a field is absent. A field
that is not in a model is ignored with a warning if it is `harmless` (it concerns a cluster only);
anything else would make another pod than what was asked for, and is refused (`extras`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    IPvAnyAddress,
    model_validator,
)
from pydantic.alias_generators import to_camel

from testbed.model.manifest import Restart
from testbed.model.terms import Runtime

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


class Model(BaseModel):
    """Fields with their names in Kubernetes. Unknown ones are stored, and judged by `extras`."""

    model_config = ConfigDict(extra="allow", alias_generator=to_camel, frozen=True)
    harmless: ClassVar[frozenset[str]] = frozenset()
    """Fields of Kubernetes that have no effect on the pod here."""
    refused: ClassVar[Mapping[str, str]] = {}
    """Fields of Kubernetes that are not supported → why, or what to write instead."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


def extras(model: Model, path: str = "") -> Iterator[tuple[str, str | None]]:
    """Fields that no model has: (path, why it is refused; None if it is harmless).

    A field that is false or empty asks for nothing, as if it were absent.
    """
    unknown = model.model_extra or {}
    for name, value in unknown.items():
        if name in model.harmless:
            yield f"{path}{name}", None
        elif value not in (False, "", [], {}):
            yield f"{path}{name}", model.refused.get(name, f"{name} is not supported; leave it out")
    for name, value in model:
        if name in unknown:
            continue
        alias = f"{path}{to_camel(name)}"
        for item, at in (
            [(v, f"{alias}.{i}.") for i, v in enumerate(value)]
            if isinstance(value, tuple)
            else [(value, f"{alias}.")]
        ):
            if isinstance(item, Model):
                yield from extras(item, at)


def _label(text: str) -> str:
    if not LABEL.fullmatch(text):
        raise ValueError("a name of a-z, 0-9 and '-' (at most 63) was expected")
    return text


def _word(text: str) -> str:
    if "\0" in text:
        raise ValueError("text without a NUL was expected")
    return text


def _variable(text: str) -> str:
    if not re.fullmatch(r"[ -<>-~]+", text):
        raise ValueError("a name of printable ASCII without '=' was expected")
    return text


def _header(text: str) -> str:
    if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", text, re.ASCII):
        raise ValueError("the name of an HTTP header was expected")
    return text


def _line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("one line of text was expected")
    return text


def _absolute(text: str) -> str:
    if not text.startswith("/") or ":" in text or ".." in text.split("/"):
        raise ValueError("an absolute path without ':' and '..' was expected")
    return text


def _runtime(text: str) -> str:
    if text not in RUNTIMES:
        raise ValueError(f"one of {', '.join(RUNTIMES)} was expected")
    return text


def _quantity(value: object) -> float:
    """Value of a quantity such as 128Mi, 500m or 2."""
    found = re.fullmatch(r"([0-9.]+(?:[eE][0-9]+)?)([A-Za-z]*)", str(value))
    try:
        if found and found[2] in SUFFIXES:
            number = float(found[1]) * SUFFIXES[found[2]]
            if number < 2**63:
                return number
    except ValueError:
        pass
    raise ValueError("a quantity like 500m, 2 or 128Mi was expected")


def _some(value: object) -> object:
    """Checked before the items, so that a faulty item is not also one too few."""
    if value in ([], ()):
        raise ValueError("a list that is not empty was expected")
    return value


def _port(value: object) -> object:
    if isinstance(value, str) or (type(value) is int and 0 < value < 65536):
        return value
    raise ValueError("a port from 1 to 65535, or the name of one, was expected")


Label = Annotated[str, AfterValidator(_label)]
Word = Annotated[str, AfterValidator(_word)]
RuntimeName = Annotated[str, AfterValidator(_runtime)]
Quantity = Annotated[float, BeforeValidator(_quantity)]
PortNumber = Annotated[int, Field(ge=1, le=65535)]
Port = Annotated[int | str, BeforeValidator(_port)]
Path = Annotated[str, AfterValidator(_absolute)]
Count = Annotated[int, Field(ge=0)]
Id = Annotated[int, Field(ge=0, lt=2**31)]


# --- environment ----------------------------------------------------------------------------


class FieldRef(Model):
    harmless = frozenset({"apiVersion"})
    field_path: str


class ResourceFieldRef(Model):
    resource: Literal["limits.cpu", "limits.memory", "requests.cpu", "requests.memory"]
    container_name: str = ""
    divisor: Quantity = 1


class KeyRef(Model):
    """Reference to a ConfigMap or Secret, of which there are none."""

    harmless = frozenset({"name", "key"})
    optional: bool = False


class ValueFrom(Model):
    field_ref: FieldRef | None = None
    resource_field_ref: ResourceFieldRef | None = None
    config_map_key_ref: KeyRef | None = None
    secret_key_ref: KeyRef | None = None


class Env(Model):
    name: Annotated[str, AfterValidator(_variable)]
    value: Word = ""
    value_from: ValueFrom | None = None


# --- probes and hooks -----------------------------------------------------------------------


class TcpSocket(Model):
    port: Port


class HttpHeader(Model):
    name: Annotated[str, AfterValidator(_header)]
    value: Annotated[str, AfterValidator(_line)] = ""


class HttpGet(Model):
    refused: ClassVar[Mapping[str, str]] = {"host": "the container itself is asked; leave it out"}
    port: Port
    path: str = "/"
    scheme: Literal["HTTP"] = "HTTP"
    http_headers: tuple[HttpHeader, ...] = ()


class Exec(Model):
    command: Annotated[tuple[Word, ...], BeforeValidator(_some)]


class Sleep(Model):
    seconds: Count


def _one_of(model: Model, *names: str) -> None:
    """Raises `ValueError` unless one of the fields is given. Unknown ones are judged elsewhere."""
    given = [name for name in names if getattr(model, name) is not None]
    if len(given) != 1 and not model.model_extra:
        shown = [to_camel(name) for name in names]
        raise ValueError(f"one of {', '.join(shown[:-1])} and {shown[-1]} was expected")


class Probe(Model):
    harmless = frozenset({"terminationGracePeriodSeconds"})
    refused: ClassVar[Mapping[str, str]] = {
        "grpc": "gRPC probes are not supported; ask by tcpSocket or exec"
    }
    tcp_socket: TcpSocket | None = None
    http_get: HttpGet | None = None
    exec: Exec | None = None
    initial_delay_seconds: Count = 0
    period_seconds: Annotated[int, Field(ge=1)] = 10
    timeout_seconds: Annotated[int, Field(ge=1)] = 1
    failure_threshold: Annotated[int, Field(ge=1)] = 3
    success_threshold: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _asks_one_thing(self) -> Probe:
        _one_of(self, "tcp_socket", "http_get", "exec")
        return self


class Hook(Model):
    tcp_socket: TcpSocket | None = None
    http_get: HttpGet | None = None
    exec: Exec | None = None
    sleep: Sleep | None = None

    @model_validator(mode="after")
    def _does_one_thing(self) -> Hook:
        _one_of(self, "tcp_socket", "http_get", "exec", "sleep")
        return self


class Lifecycle(Model):
    refused: ClassVar[Mapping[str, str]] = {"stopSignal": "a container is ended by SIGTERM"}
    post_start: Hook | None = None
    pre_stop: Hook | None = None


# --- security -------------------------------------------------------------------------------


class Capabilities(Model):
    add: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()


class SeccompProfile(Model):
    type: Literal["RuntimeDefault"]


class AppArmorProfile(Model):
    harmless = frozenset({"type"})
    refused: ClassVar[Mapping[str, str]] = {
        "localhostProfile": "no AppArmor profile is applied to containers"
    }


class _Identity(Model):
    """What the security contexts of a pod and of a container have in common."""

    harmless = frozenset(
        {
            "fsGroupChangePolicy",
            "seLinuxChangePolicy",
            "seLinuxOptions",
            "supplementalGroupsPolicy",
            "windowsOptions",
        }
    )
    run_as_user: Id | None = None
    run_as_group: Id | None = None
    run_as_non_root: bool | None = None
    seccomp_profile: SeccompProfile | None = None
    app_armor_profile: AppArmorProfile | None = None


class PodSecurityContext(_Identity):
    refused: ClassVar[Mapping[str, str]] = {
        "sysctls": "settings of the pod's namespace are the datapath's; leave them out"
    }
    fs_group: Id | None = None
    supplemental_groups: tuple[Id, ...] = ()


class SecurityContext(_Identity):
    refused: ClassVar[Mapping[str, str]] = {
        "privileged": "no container is privileged; add the capabilities that it needs",
        "procMount": "/proc is masked as usual; leave it out",
    }
    read_only_root_filesystem: bool = False
    allow_privilege_escalation: bool = True
    capabilities: Capabilities = Capabilities()


# --- containers -----------------------------------------------------------------------------


class ContainerPort(Model):
    container_port: PortNumber
    protocol: Literal["TCP", "UDP"] = "TCP"
    name: str = ""
    host_port: PortNumber | None = None


class Amounts(Model):
    harmless = frozenset({"ephemeral-storage"})
    memory: Quantity | None = None
    cpu: Quantity | None = None


class Requests(Amounts):
    """What a scheduler is asked for. Here, only the downward API tells it."""


class Resources(Model):
    limits: Amounts = Amounts()
    requests: Requests = Requests()


class VolumeMount(Model):
    harmless = frozenset({"mountPropagation", "recursiveReadOnly"})
    refused: ClassVar[Mapping[str, str]] = {
        "subPath": "a volume is mounted as a whole; leave it out",
        "subPathExpr": "a volume is mounted as a whole; leave it out",
    }
    name: str
    mount_path: Path
    read_only: bool = False


class Container(Model):
    harmless = frozenset(
        {"imagePullPolicy", "terminationMessagePath", "terminationMessagePolicy", "resizePolicy"}
    )
    refused: ClassVar[Mapping[str, str]] = {
        "envFrom": "there are no ConfigMaps and Secrets here; write the variables into env",
        "stdin": "nobody is attached to a container; give it a command that needs no input",
        "stdinOnce": "nobody is attached to a container; leave it out",
        "tty": "a container has no terminal; leave it out",
        "volumeDevices": "only volumes of kind emptyDir are supported",
    }
    name: Label
    image: Word
    command: tuple[Word, ...] = ()
    args: tuple[Word, ...] = ()
    env: tuple[Env, ...] = ()
    working_dir: Word = ""
    ports: tuple[ContainerPort, ...] = ()
    resources: Resources = Resources()
    volume_mounts: tuple[VolumeMount, ...] = ()
    security_context: SecurityContext = SecurityContext()
    startup_probe: Probe | None = None
    readiness_probe: Probe | None = None
    liveness_probe: Probe | None = None
    lifecycle: Lifecycle = Lifecycle()


class InitContainer(Container):
    restart_policy: Literal["Always"] | None = None

    @property
    def is_sidecar(self) -> bool:
        """Whether it runs for as long as the pod does."""
        return self.restart_policy is not None


# --- pods -----------------------------------------------------------------------------------


class EmptyDir(Model):
    harmless = frozenset({"sizeLimit"})
    medium: Literal["", "Memory"] = ""
    mode: Annotated[int, Field(ge=0, le=0o7777)] = 0o777


class Volume(Model):
    name: Label
    empty_dir: EmptyDir | None = None

    @model_validator(mode="after")
    def _is_empty_at_first(self) -> Volume:
        if self.empty_dir is None:
            given = ", ".join(self.model_extra or ()) or "none"
            raise ValueError(f"only volumes of kind emptyDir are supported, not {given}")
        return self


class HostAlias(Model):
    ip: IPvAnyAddress
    hostnames: tuple[str, ...]


class DnsOption(Model):
    name: str
    value: str | None = None


class DnsConfig(Model):
    nameservers: tuple[IPvAnyAddress, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[DnsOption, ...] = ()


class PodResources(Model):
    harmless = frozenset({"requests"})
    refused: ClassVar[Mapping[str, str]] = {
        "limits": "a pod as a whole has no limits; give each container its own"
    }


class PodSpec(Model):
    harmless = frozenset(
        {
            "affinity",
            "automountServiceAccountToken",
            "enableServiceLinks",
            "imagePullSecrets",
            "nodeName",
            "nodeSelector",
            "os",
            "overhead",
            "preemptionPolicy",
            "priority",
            "priorityClassName",
            "schedulerName",
            "schedulingGates",
            "serviceAccount",
            "setHostnameAsFQDN",
            "subdomain",
            "terminationGracePeriodSeconds",
            "tolerations",
            "topologySpreadConstraints",
        }
    )
    refused: ClassVar[Mapping[str, str]] = {
        "hostIPC": "a pod shares nothing with this machine; leave it out",
        "hostNetwork": "a pod has a network of its own; leave it out",
        "hostPID": "a pod shares nothing with this machine; leave it out",
        "readinessGates": "nobody sets such conditions here; leave them out",
    }
    containers: Annotated[tuple[Container, ...], BeforeValidator(_some)]
    init_containers: tuple[InitContainer, ...] = ()
    volumes: tuple[Volume, ...] = ()
    security_context: PodSecurityContext = PodSecurityContext()
    resources: PodResources = PodResources()
    share_process_namespace: bool = False
    restart_policy: Restart = Restart.ALWAYS
    runtime_class_name: RuntimeName | None = None
    service_account_name: str = "default"
    hostname: Label | None = None
    host_aliases: tuple[HostAlias, ...] = ()
    host_users: Literal[True] = True
    dns_policy: Literal["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"] = "Default"
    dns_config: DnsConfig = DnsConfig()


class Metadata(Model):
    harmless = frozenset(
        {
            "creationTimestamp",
            "finalizers",
            "generateName",
            "generation",
            "managedFields",
            "ownerReferences",
            "resourceVersion",
            "selfLink",
            "uid",
        }
    )
    name: Label
    namespace: str = "default"
    annotations: dict[str, str] = {}
    labels: dict[str, str] = {}


class Pod(Model):
    harmless = frozenset({"status"})
    metadata: Metadata
    spec: PodSpec

    @model_validator(mode="before")
    @classmethod
    def _is_a_pod(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError("a Pod was expected")
        kind, version = data.get("kind"), data.get("apiVersion")
        if (kind, version) != ("Pod", "v1"):
            raise ValueError(f"'kind: Pod' of 'apiVersion: v1' was expected, not {kind} {version}")
        return {k: v for k, v in data.items() if k not in ("kind", "apiVersion")}
