"""Calls of the CNI plugin `testbed-cni`: add guests to a pod that a container runtime is making.

It is chained after a main plugin (CNI specification 1.1.0). It adds the guests' links to that
plugin's result. In the network's configuration:

    {"type": "testbed-cni", "guests": "/etc/testbed/guests", "capabilities":
        {"cgroupPath": true, "dns": true, "io.kubernetes.cri.pod-annotations": true}}

`guests` is a manifest (its path, or the manifest itself in JSON) for all pods, or a folder with a
NAME.yaml for each pod that gets guests (NAMESPACE/NAME.yaml outside of the namespace `default`);
other pods are left as they are. NAME is the annotation `testbed/guests`, or the pod's name. The
pod of the guests is called by the container's identifier, since a runtime may have several
sandboxes of one pod. Optional are `datapath`, `osvKernel`, and `cgroup`, if the runtime does not
have that capability. The supervisor process of the pod attaches the guests, and goes on when the
call's process ends, which is a child of the node daemon (`noded`).
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from testbed import runtimes
from testbed.host import cgroups
from testbed.model.addresses import pod_link
from testbed.model.errors import Error
from testbed.model.manifest import Spec
from testbed.model.terms import Family, Runtime
from testbed.pods import control, kubernetes
from testbed.pods.kubernetes import conversion
from testbed.pods.network.resolv_conf import text as resolv_conf_of
from testbed.pods.sandbox import Sandbox
from testbed.pods.supervisor import Order, Starting
from testbed.runtimes.interface import Options

VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""Supported versions of the specification. Earlier ones have another format of results. The plugin
itself answers VERSION, by a list of its own."""
OWN = {"guests", "datapath", "osvKernel", "cgroup"}
OTHERS = {
    "cniVersion",
    "name",
    "type",
    "prevResult",
    "args",
    "capabilities",
    "runtimeConfig",
    "dns",
    "ipMasq",
    "ipam",
    "disableCheck",
}
"""Keys that the specification or its conventions define for all plugins."""
ANNOTATION, ANNOTATIONS = "testbed/guests", "io.kubernetes.cri.pod-annotations"
"""A pod's annotation that chooses its guests, and the capability that hands annotations over."""
NEEDED = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "GC": (),
    "STATUS": (),
}
ATTACHMENTS = "cni.dev/valid-attachments"
"""Key of the attachments that a GC leaves."""
INCOMPATIBLE, UNSUPPORTED, ENVIRONMENT, DECODING, INVALID, FAILED = 1, 2, 4, 6, 7, 100
"""Error codes of the specification. Those from 100 are the plugin's own."""


class _Refusal(Exception):
    """An error with its code in the specification."""

    def __init__(self, code: int, message: str, details: str = "") -> None:
        self.answer = {"code": code, "msg": message, **({"details": details} if details else {})}


def answer(environment: Mapping[str, str], text: str) -> tuple[object, int]:
    """Carry out a call: the answer to print as JSON, or None, and the exit status.

    `environment` are the variables that the specification defines, `text` the configuration.
    """
    version = VERSIONS[-1]
    try:
        try:
            configuration = json.loads(text)
            version = configuration.get("cniVersion", "")
        except (ValueError, AttributeError) as e:
            raise _Refusal(DECODING, "the configuration is no JSON object", str(e)) from e
        return _answer(environment, configuration), 0
    except _Refusal as e:
        return {"cniVersion": version, **e.answer}, 1
    except Error as e:
        return {"cniVersion": version, **_Refusal(FAILED, e.message, e.hint or "").answer}, 1


def _answer(environment: Mapping[str, str], configuration: dict[str, Any]) -> object:
    """Result to print, or None. Raises `_Refusal`, or `Error` if guests cannot be attached."""
    command = environment.get("CNI_COMMAND", "")
    if command not in NEEDED:
        raise _Refusal(ENVIRONMENT, f"CNI_COMMAND is {command!r}", f"one of {', '.join(NEEDED)}")
    version = configuration.get("cniVersion")
    if version not in VERSIONS:
        raise _Refusal(INCOMPATIBLE, f"cniVersion {version!r}", f"one of {', '.join(VERSIONS)}")
    if missing := [name for name in NEEDED[command] if not environment.get(name)]:
        raise _Refusal(ENVIRONMENT, f"{', '.join(missing)} is not set")
    unknown = [k for k in configuration if k not in OWN | OTHERS and not k.startswith("cni.dev/")]
    if unknown:
        raise _Refusal(
            UNSUPPORTED,
            f"{unknown[0]} is {configuration[unknown[0]]!r}",
            f"keys are {', '.join(sorted(OWN))}",
        )
    if command == "STATUS":  # whoever is asked is there
        return None
    if command == "GC":
        _collect(configuration)
        return None
    pod = _Pod(environment, configuration)
    return {"ADD": pod.add, "DEL": pod.delete, "CHECK": pod.check}[command]()


def _collect(configuration: dict[str, Any]) -> None:
    """Take down the guests of all attachments to this network, but those that are still valid.

    Raises `Error` if some could not be taken down, after it has tried all.
    """
    if ATTACHMENTS not in configuration:
        raise _Refusal(INVALID, f"there is no {ATTACHMENTS}")
    network, failures = configuration.get("name"), []
    valid = {
        _id(each.get("containerID"), each.get("ifname"), network)
        for each in configuration[ATTACHMENTS] or ()
    }
    for name in control.names():
        try:
            id = (control.status(name)["sandbox"] or {}).get("id", "")
            if id.endswith(f"@{network}") and id not in valid:
                control.down(name)
        except Error as e:
            failures.append(str(e))
    if failures:
        raise Error("; ".join(failures))


def _id(container: str, ifname: str, network: str | None) -> str:
    """Identifier of an attachment."""
    return f"{container}/{ifname}@{network}"


class _Pod:
    """The pod of a call."""

    def __init__(self, environment: Mapping[str, str], configuration: dict[str, Any]) -> None:
        self.configuration = configuration
        self.container, self.netns = environment["CNI_CONTAINERID"], environment.get("CNI_NETNS")
        self.id = _id(self.container, environment["CNI_IFNAME"], configuration.get("name"))
        words = (pair.partition("=") for pair in environment.get("CNI_ARGS", "").split(";"))
        self.arguments = {key: value for key, _, value in words}
        self.capabilities = configuration.get("runtimeConfig", {})
        self.namespace = self.arguments.get("K8S_POD_NAMESPACE") or "default"
        for name in (self.container, self.namespace):
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,80}", name):
                raise _Refusal(ENVIRONMENT, f"{name!r} is no identifier")

    def add(self) -> object:
        """Attach the guests. Returns the result of the plugin before, with their links."""
        result = self._previous()
        spec = self._guests(self._resolv_conf(result))
        if spec is None:
            return result
        assert self.netns
        order = Order(
            spec,
            self.configuration.get("datapath", "steer"),
            self._options(),
            Sandbox(Path(self.netns), self._cgroup(), self.id),
        )
        with Starting(functools.partial(print, file=sys.stderr)) as starting:
            starting.start(order)
            starting.wait_built()
            interfaces = [*(result.get("interfaces") or ()), *self._links()]
        return result | {"interfaces": interfaces}

    def delete(self) -> None:
        """Take the guests down. It is no error if there are none, or another call's."""
        if self._is_attached():
            control.down(self.container)

    def check(self) -> None:
        """Raises `Error` if guests or links of the result are missing."""
        result = self._previous()
        if self._guests() is None:
            return
        if not self._is_attached():
            raise Error(f"no guests are attached to {self.netns}")
        found = control.describe(self.container)
        existing = {link["name"] for link in found["links"] if link["netns"] == found["netns"]}
        listed = {
            i["name"] for i in result.get("interfaces") or () if i.get("sandbox") == self.netns
        }
        if missing := listed - existing:
            raise Error(f"{', '.join(sorted(missing))} of {self.netns} is gone")

    def _previous(self) -> dict[str, Any]:
        found = self.configuration.get("prevResult")
        if not isinstance(found, dict):
            raise _Refusal(
                INVALID, "there is no prevResult", "chain testbed-cni after a main plugin"
            )
        return found

    def _guests(self, resolv_conf: str | None = None) -> Spec | None:
        """The pod's manifest, by the configuration; None if it gets no guests."""

        @functools.cache
        def best() -> Runtime:
            return runtimes.best(replace(self._options(), say=_log))

        given = self.configuration.get("guests")
        try:
            if isinstance(given, dict):
                found = conversion.spec(given, "guests", Path("/"), best, resolv_conf)
                return replace(found, name=self.container)
            if not isinstance(given, str):
                raise Error("guests is not a manifest", hint="a path, or a Pod in JSON")
            path = Path(given)
            if path.is_dir():
                chosen = self._chosen(path)
                if chosen is None:
                    return None
                path = chosen
            specs = kubernetes.read([path], best, resolv_conf)
            if len(specs) > 1:
                raise Error(f"{path} has {len(specs)} pods, for one namespace", hint="leave one")
        except Error as e:
            raise _Refusal(INVALID, e.message, e.hint or "") from e
        return replace(specs[0], name=self.container)

    def _chosen(self, folder: Path) -> Path | None:
        """The pod's manifest in the folder. Raises `Error` if the annotated one does not exist."""
        if self.namespace != "default":
            folder /= self.namespace
        # Looked up among those that are there: names may be longer than those of files.
        there = {path.stem: path for path in folder.glob("*.yaml")}
        annotated = self.capabilities.get(ANNOTATIONS, {}).get(ANNOTATION)
        if annotated and annotated not in there:
            raise Error(f"the annotation {ANNOTATION}: there is no {folder}/{annotated}.yaml")
        return there.get(annotated or self.arguments.get("K8S_POD_NAME") or self.container)

    def _options(self) -> Options:
        kernel = self.configuration.get("osvKernel")
        return Options(osv_kernel=Path(kernel) if kernel else None)

    def _cgroup(self) -> Path | None:
        """The pod's cgroup, by the configuration or the runtime; None if it is not known."""
        if configured := self.configuration.get("cgroup"):
            return Path(configured)
        path = self.capabilities.get("cgroupPath")
        return cgroups.mount_point() / str(path).lstrip("/") if path else None

    def _resolv_conf(self, result: Mapping[str, Any]) -> str | None:
        """resolv.conf by the runtime, else by the plugin before; None if they name no server."""
        # The convention has these keys in lower case; containerd capitalizes them.
        runtime = {k.lower(): v for k, v in (self.capabilities.get("dns") or {}).items()}
        plugins = result.get("dns") or {}
        if servers := runtime.get("servers"):
            searches, options = runtime.get("searches"), runtime.get("options")
        else:
            servers, options = plugins.get("nameservers"), plugins.get("options")
            searches = plugins.get("search") or list(filter(None, [plugins.get("domain")]))
        return resolv_conf_of(servers, searches or (), options or ()) if servers else None

    def _is_attached(self) -> bool:
        """Whether there are guests that an ADD of this container and network attached."""
        if self.container not in control.names():
            return False
        sandbox = control.status(self.container)["sandbox"]
        return bool(sandbox and sandbox["id"] == self.id)

    def _links(self) -> list[dict[str, Any]]:
        """Guests' links in the pod's namespace, in the format of a result's interfaces."""
        found, ours = control.describe(self.container), tuple(f"{pod_link(f)}/" for f in Family)
        return [
            {"name": link["name"], "mac": link["mac"], "sandbox": self.netns}
            for link in found["links"]
            if link["netns"] == found["netns"]
            and any(address.startswith(ours) for address in link["addresses"])
        ]


def _log(text: str) -> None:
    """Write to the log of the node daemon."""
    print(f"testbed-cni: {text}", file=sys.stderr, flush=True)
