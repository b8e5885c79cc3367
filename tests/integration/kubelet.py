"""Pods of Kubernetes manifests, made by the calls that kubelet sends to containerd.

It knows the fields that the manifests of deploy/ have, and refuses others.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from testbed.host import cgroups

from .cri import CALL_S, PROTOCOL, Containerd
from .sockets import wait_until

POD = {
    "automountServiceAccountToken",
    "containers",
    "hostNetwork",
    "hostPID",
    "initContainers",
    "nodeSelector",
    "priorityClassName",
    "runtimeClassName",
    "tolerations",
    "volumes",
}
CONTAINER = {"name", "image", "command", "readinessProbe", "securityContext", "volumeMounts"}
PROPAGATION = {None: "PRIVATE", "Bidirectional": "BIDIRECTIONAL"}


@dataclass(frozen=True)
class Image:
    """What an image has: here, folders of this machine and variables."""

    mounts: tuple[Path, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Kubelet:
    """The part of kubelet that makes a node's pods."""

    containerd: Containerd
    work: Path
    images: Mapping[str, Image]
    config_maps: dict[str, Path] = field(default_factory=dict)
    """Name of a ConfigMap → folder with a file for each key."""
    handlers: dict[str, str] = field(default_factory=dict)
    """Name of a RuntimeClass → its handler."""
    pods: dict[str, Pod] = field(default_factory=dict)

    def start(self, name: str, template: Mapping[str, Any]) -> Pod:
        """Start a pod. `template` is a Pod, or a DaemonSet's template of one."""
        self.pods[name] = Pod(self, name, template)
        self.pods[name].start()
        return self.pods[name]

    def remove(self, name: str) -> None:
        self.pods.pop(name).remove()


class Pod:
    """A pod with its containers."""

    def __init__(self, kubelet: Kubelet, name: str, template: Mapping[str, Any]) -> None:
        self._containerd, self._kubelet, self._spec = kubelet.containerd, kubelet, template["spec"]
        assert set(self._spec) <= POD
        metadata, uid = template["metadata"], str(uuid.uuid4())
        self._cgroup = self._containerd.cgroup / f"pod{uid}"
        self._logs = kubelet.work / "logs" / uid
        self._namespaces = {
            "network": "NODE" if self._spec.get("hostNetwork") else "POD",
            "pid": "NODE" if self._spec.get("hostPID") else "CONTAINER",
        }
        self._config: dict[str, Any] = {
            "metadata": {"name": name, "uid": uid, "namespace": "default"},
            "hostname": "" if self._spec.get("hostNetwork") else name,
            "log_directory": str(self._logs),
            "labels": {"io.kubernetes.pod.name": name, "io.kubernetes.pod.namespace": "default"},
            "annotations": metadata.get("annotations", {}),
            "linux": {
                "cgroup_parent": f"/{self._cgroup.relative_to(cgroups.mount_point())}",
                "security_context": {
                    "namespace_options": self._namespaces,
                    "privileged": any(map(_is_privileged, self._spec["containers"])),
                },
            },
        }
        self.id = ""
        self.containers: dict[str, str] = {}

    def start(self) -> None:
        """Run the containers that initialize one by one, then start the others."""
        self._cgroup.mkdir()
        self._logs.mkdir(parents=True)
        handler = self._kubelet.handlers.get(self._spec.get("runtimeClassName", ""), "")
        request = PROTOCOL.RunPodSandboxRequest(config=self._config, runtime_handler=handler)
        self.id = self._containerd.runtime.RunPodSandbox(request, CALL_S).id
        for container in self._spec.get("initContainers", ()):
            self._start(container)
            wait_until(partial(self._has_ended, container), f"{container['name']} ends", 60)
            assert self._status(container).exit_code == 0, self.log(container["name"])
        for container in self._spec["containers"]:
            self._start(container)

    def remove(self) -> None:
        """The cgroup goes last, and has to be empty."""
        for container in self.containers.values():
            stop = PROTOCOL.StopContainerRequest(container_id=container, timeout=10)
            self._containerd.runtime.StopContainer(stop, CALL_S)
        self._containerd.remove(PROTOCOL.PodSandbox(id=self.id))
        self._cgroup.rmdir()

    def execute(self, container: str, *command: str) -> tuple[int, str]:
        """Run a command in a container: (exit status, output)."""
        request = PROTOCOL.ExecSyncRequest(container_id=self.containers[container], cmd=command)
        done = self._containerd.runtime.ExecSync(request, CALL_S)
        return done.exit_code, done.stdout.decode() + done.stderr.decode()

    def wait_ready(self) -> None:
        """Wait until all readiness probes succeed."""
        for container in filter(lambda c: "readinessProbe" in c, self._spec["containers"]):
            wait_until(partial(self._is_ready, container), f"{container['name']} is ready", 60)

    def log(self, container: str) -> str:
        """What a container has printed."""
        return (self._logs / container).read_text()

    def _start(self, container: Mapping[str, Any]) -> None:
        assert set(container) <= CONTAINER
        image = self._kubelet.images.get(container["image"], Image())
        of_image = [{"container_path": str(p), "host_path": str(p)} for p in image.mounts]
        security = {"privileged": _is_privileged(container), "namespace_options": self._namespaces}
        config = {
            "metadata": {"name": container["name"]},
            "image": {"image": container["image"]},
            "command": container["command"],
            "envs": [{"key": key, "value": value} for key, value in image.variables.items()],
            "mounts": [*of_image, *map(self._mount, container.get("volumeMounts", ()))],
            "log_path": container["name"],
            "linux": {"security_context": security},
        }
        create = PROTOCOL.CreateContainerRequest(
            pod_sandbox_id=self.id, config=config, sandbox_config=self._config
        )
        id = self._containerd.runtime.CreateContainer(create, CALL_S).id
        self._containerd.runtime.StartContainer(PROTOCOL.Container(id=id), CALL_S)
        self.containers[container["name"]] = id

    def _mount(self, mount: Mapping[str, str]) -> dict[str, str]:
        [volume] = [v for v in self._spec["volumes"] if v["name"] == mount["name"]]
        if "configMap" in volume:
            path = str(self._kubelet.config_maps[volume["configMap"]["name"]])
        else:
            path, kind = volume["hostPath"]["path"], volume["hostPath"]["type"]
            if kind == "DirectoryOrCreate":
                self._containerd.run("mkdir", "-p", "--mode=755", path)
            else:
                assert kind == "Directory"
                self._containerd.run("test", "-d", path)
        propagation = PROPAGATION[mount.get("mountPropagation")]
        return {
            "container_path": mount["mountPath"],
            "host_path": path,
            "propagation": propagation,
        }

    def _status(self, container: Mapping[str, Any]) -> Any:
        request = PROTOCOL.ContainerStatusRequest(container_id=self.containers[container["name"]])
        return self._containerd.runtime.ContainerStatus(request, CALL_S).status

    def _has_ended(self, container: Mapping[str, Any]) -> bool:
        return bool(self._status(container).state == PROTOCOL.EXITED)

    def _is_ready(self, container: Mapping[str, Any]) -> bool:
        assert not self._has_ended(container), self.log(container["name"])
        probe = container["readinessProbe"]["exec"]["command"]
        return self.execute(container["name"], *probe)[0] == 0


def _is_privileged(container: Mapping[str, Any]) -> bool:
    return bool(container.get("securityContext", {}).get("privileged"))
