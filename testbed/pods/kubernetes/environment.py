"""Environment variables of a container: values, `$(NAME)`, and the downward API."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterable

from testbed.model.errors import Error
from testbed.model.manifest import late
from testbed.pods.kubernetes.schema import Container, Env, FieldRef, Pod, ResourceFieldRef

LATE = ("status.podIP", "status.podIPs", "status.hostIP")
"""Fields that are known when the pod is built."""


def variables(pod: Pod, container: Container) -> dict[str, str]:
    """Variables of a container in order. Raises `Error` for a value that nobody can know here."""
    env: dict[str, str] = {}
    for variable in container.env:
        value = _value(pod, container, variable)
        if value is not None:
            env[variable.name] = value if variable.value_from else expanded(value, env)
    return env


def expanded(text: str, env: dict[str, str]) -> str:
    """Expand $(NAME) of defined variables, and $$ to a dollar sign, as Kubernetes does."""

    def replace(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else env.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([ -'*-<>-~]+)\)", replace, text)


def _value(pod: Pod, container: Container, variable: Env) -> str | None:
    """Text of a variable; None if it is optional, and there is none."""
    source = variable.value_from
    who = f"container {container.name!r}, variable {variable.name}"
    if source is None:
        return variable.value
    for key in filter(None, (source.config_map_key_ref, source.secret_key_ref)):
        if key.optional:
            return None
        raise Error(
            f"{who}: there are no ConfigMaps and Secrets here", hint="write its value into env"
        )
    if source.field_ref:
        return _field(pod, source.field_ref, who)
    if source.resource_field_ref:
        return _amount(pod, container, source.resource_field_ref, who)
    raise Error(f"{who}: no source in valueFrom", hint="fieldRef or resourceFieldRef")


def _field(pod: Pod, ref: FieldRef, who: str) -> str:
    path, metadata = ref.field_path, pod.metadata
    if path in LATE:
        return late(path)
    fields = {
        "metadata.name": metadata.name,
        "metadata.namespace": metadata.namespace,
        "spec.nodeName": platform.node(),
        "spec.serviceAccountName": pod.spec.service_account_name,
    }
    if found := re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path):
        return {"labels": metadata.labels, "annotations": metadata.annotations}[found[1]].get(
            found[2], ""
        )
    if path not in fields:
        known = (*fields, "metadata.labels['…']", "metadata.annotations['…']", *LATE)
        raise Error(f"{who}: no field {path!r}", hint=f"one of {', '.join(known)}")
    return fields[path]


def _amount(pod: Pod, container: Container, ref: ResourceFieldRef, who: str) -> str:
    """A limit or request in units of the divisor, rounded up.

    Without a limit it is what this machine has; without a request it is the limit, if there is one.
    """
    name = ref.container_name or container.name
    containers: Iterable[Container] = (*pod.spec.init_containers, *pod.spec.containers)
    named = next((c for c in containers if c.name == name), None)
    if named is None:
        raise Error(f"{who}: no container {name!r}")
    kind, _, what = ref.resource.partition(".")
    given: float | None = getattr(named.resources.limits, what)
    if kind == "requests":
        asked: float | None = getattr(named.resources.requests, what)
        given = asked if asked is not None else given or 0
    if given is None:
        pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        given = pages if what == "memory" else os.cpu_count() or 1
    return str(math.ceil(round(given / (ref.divisor or 1), 6)))
