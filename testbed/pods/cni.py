"""The CNI plugin `testbed-cni`: guests join a pod that a container runtime is making.

It is chained after a main plugin (CNI specification 1.0.0), whose result it passes on with the
guests' links added. In the network's configuration:

    {"type": "testbed-cni", "guests": "/etc/testbed/guests", "capabilities": {"cgroupPath": true}}

`guests` is a manifest, by its path or itself in JSON, or a folder with a NAME.yaml for each pod
that gets some; others pass. Optional are `datapath`, `osvKernel`, and a `cgroup` where the runtime
does not tell it by that capability. Guests are attached, and kept when this process has ended, by
their pod's keeper.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.host import cgroups
from testbed.model.addresses import pod_link
from testbed.model.errors import Error
from testbed.model.terms import Family, Runtime
from testbed.pods import control

if TYPE_CHECKING:
    from testbed.model.manifest import Spec
    from testbed.runtimes.interface import Options

VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0")
"""Of the specification; results, which are passed on, were others before."""
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
"""Keys that the specification or its conventions give to every plugin."""
NEEDED = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "VERSION": (),
}
INCOMPATIBLE, UNSUPPORTED, ENVIRONMENT, DECODING, INVALID, FAILED = 1, 2, 4, 6, 7, 100
"""Error codes of the specification; from 100 they are the plugin's own."""


class _Refusal(Exception):
    def __init__(self, code: int, message: str, details: str = "") -> None:
        self.answer = {"code": code, "msg": message, **({"details": details} if details else {})}


def main() -> int:
    """Entry of `testbed-cni`: configuration on standard input, result on standard output."""
    version, text = VERSIONS[-1], sys.stdin.read()
    answer: object
    try:
        try:
            configuration = json.loads(text)
            version = configuration.get("cniVersion", "")
        except (ValueError, AttributeError) as e:
            raise _Refusal(DECODING, "the configuration is no JSON object", str(e)) from e
        answer, status = _answer(os.environ, configuration), 0
    except _Refusal as e:
        answer, status = {"cniVersion": version, **e.answer}, 1
    except Error as e:
        refused = _Refusal(FAILED, e.message, e.hint or "").answer
        answer, status = {"cniVersion": version, **refused}, 1
    if answer is not None:
        print(json.dumps(answer))
    return status


def _answer(environment: Mapping[str, str], configuration: dict[str, Any]) -> object:
    """What to print. Raises `_Refusal`, or `Error` if the guests cannot be attached."""
    command = environment.get("CNI_COMMAND", "")
    if command not in NEEDED:
        raise _Refusal(ENVIRONMENT, f"CNI_COMMAND is {command!r}", f"one of {', '.join(NEEDED)}")
    version = configuration.get("cniVersion")
    if command == "VERSION":
        return {"cniVersion": version or VERSIONS[-1], "supportedVersions": VERSIONS}
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
    pod = _Pod(environment, configuration)
    return {"ADD": pod.add, "DEL": pod.delete, "CHECK": pod.check}[command]()


class _Pod:
    """The pod that a call is about."""

    def __init__(self, environment: Mapping[str, str], configuration: dict[str, Any]) -> None:
        self.configuration = configuration
        self.container, self.netns = environment["CNI_CONTAINERID"], environment.get("CNI_NETNS")
        self.id = f"{self.container}/{environment['CNI_IFNAME']}@{configuration.get('name')}"
        words = (pair.partition("=") for pair in environment.get("CNI_ARGS", "").split(";"))
        arguments = {key: value for key, _, value in words}
        self.name = arguments.get("K8S_POD_NAME") or self.container
        if arguments.get("K8S_POD_NAMESPACE", "default") != "default":
            self.name += f".{arguments['K8S_POD_NAMESPACE']}"
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,80}", self.name):
            raise _Refusal(ENVIRONMENT, f"{self.name!r} is no name of a pod")

    def add(self) -> object:
        """Attach the guests: the result of the plugin before, and their links."""
        result = self._previous()
        spec = self._guests()
        if spec is None:
            return result
        from testbed.pods.sandbox import Sandbox
        from testbed.pods.supervisor import Order, Starting

        assert self.netns
        order = Order(
            spec,
            self.configuration.get("datapath", "steer"),
            self._options(),
            Sandbox(Path(self.netns), self._cgroup(), self.id),
        )
        with Starting() as starting:
            starting.start(order)
            starting.wait_built()
        return result | {"interfaces": [*result.get("interfaces", ()), *self._links()]}

    def delete(self) -> None:
        """Take the guests down. None of them, or others', is no error."""
        if self._is_there():
            control.down(self.name)

    def check(self) -> None:
        """Whether all that the result tells of is there."""
        result = self._previous()
        if self._guests() is None:
            return
        if not self._is_there():
            raise Error(f"no guests are attached to {self.netns}")
        found = control.describe(self.name)
        there = {link["name"] for link in found["links"] if link["netns"] == found["netns"]}
        told = {i["name"] for i in result.get("interfaces", ()) if i.get("sandbox") == self.netns}
        if missing := told - there:
            raise Error(f"{', '.join(sorted(missing))} of {self.netns} is gone")

    def _previous(self) -> dict[str, Any]:
        found = self.configuration.get("prevResult")
        if not isinstance(found, dict):
            raise _Refusal(
                INVALID, "there is no prevResult", "chain testbed-cni after a main plugin"
            )
        return found

    def _guests(self) -> Spec | None:
        """What the configuration says of this pod."""
        from dataclasses import replace

        from testbed.pods import kubernetes

        @functools.cache
        def best() -> Runtime:
            from testbed import runtimes

            return runtimes.best(replace(self._options(), say=_log))

        given = self.configuration.get("guests")
        try:
            if isinstance(given, dict):
                return replace(kubernetes.spec(given, "guests", Path("/"), best), name=self.name)
            if not isinstance(given, str):
                raise Error("guests is no manifest", hint="a path, or a Pod in JSON")
            path = Path(given)
            if path.is_dir():
                path /= f"{self.name}.yaml"
                if not path.exists():
                    return None
            specs = kubernetes.read(path, best)
            if len(specs) > 1:
                raise Error(f"{path} has {len(specs)} pods, for one namespace", hint="leave one")
        except Error as e:
            raise _Refusal(INVALID, e.message, e.hint or "") from e
        return replace(specs[0], name=self.name)

    def _options(self) -> Options:
        from testbed.runtimes.interface import Options

        kernel = self.configuration.get("osvKernel")
        return Options(osv_kernel=Path(kernel) if kernel else None)

    def _cgroup(self) -> Path | None:
        """The pod's cgroup, if it is known."""
        if named := self.configuration.get("cgroup"):
            return Path(named)
        told = self.configuration.get("runtimeConfig", {}).get("cgroupPath")
        if not told:
            return None

        return cgroups.mount_point() / str(told).lstrip("/")

    def _is_there(self) -> bool:
        """Whether guests stand that were attached by this very call."""
        try:
            sandbox = control.status(self.name)["sandbox"]
        except Error:
            return False
        return bool(sandbox and sandbox["id"] == self.id)

    def _links(self) -> list[dict[str, Any]]:
        """Guests' links in the pod's namespace, as interfaces of a result."""
        found, ours = control.describe(self.name), tuple(f"{pod_link(f)}/" for f in Family)
        return [
            {"name": link["name"], "mac": link["mac"], "sandbox": self.netns}
            for link in found["links"]
            if link["netns"] == found["netns"]
            and any(address.startswith(ours) for address in link["addresses"])
        ]


def _log(text: str) -> None:
    """For the log of the container runtime: standard output is for the result alone."""
    print(f"testbed-cni: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
