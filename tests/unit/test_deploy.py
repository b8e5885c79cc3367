"""The files of deploy/ fit Kubernetes, each other, and the commands that they call."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from noxfile import MANIFESTS
from testbed import paths
from testbed.cli import parser
from testbed.pods import cni, networks

OLDEST = "1.30"
"""Version of Kubernetes, besides the newest that the schemas are there for."""


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((paths.DEPLOY / name).read_text())
    return found


def containers(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from spec.get("initContainers", ())
    yield from spec["containers"]


KUSTOMIZATION = read("kustomization.yaml")
SETS = [read("daemonset.yaml"), read("removal.yaml")]
SPECS = [daemon_set["spec"]["template"]["spec"] for daemon_set in SETS]


def test_lint_looks_at_every_manifest() -> None:
    there = {str(file.relative_to(paths.ROOT)) for file in paths.DEPLOY.rglob("*.yaml")}
    assert set(MANIFESTS) == there - {"deploy/kustomization.yaml"}


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_fit_the_schemas(name: str, version: str) -> None:
    manifest = yaml.safe_load((paths.ROOT / name).read_text())
    kubernetes_validate.validate(manifest, version, strict=True)


def misspell(spec: dict[str, Any]) -> None:
    spec["hostNetwrok"] = spec.pop("hostNetwork")


def mistype(spec: dict[str, Any]) -> None:
    spec["hostPID"] = "true"


def forget(spec: dict[str, Any]) -> None:
    del spec["containers"][0]["name"]


@pytest.mark.parametrize("breaks", [misspell, mistype, forget])
def test_a_broken_manifest_is_refused(breaks: Callable[[dict[str, Any]], None]) -> None:
    broken = copy.deepcopy(SETS[0])
    breaks(broken["spec"]["template"]["spec"])
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, OLDEST, strict=True)


def test_the_kustomization_lists_what_is_there() -> None:
    assert set(KUSTOMIZATION) == {"apiVersion", "kind", "resources", "configMapGenerator"}
    files = {file.name for file in paths.DEPLOY.glob("*.yaml")}
    applied_alone = {"kustomization.yaml", "removal.yaml", "web.yaml"}
    assert set(KUSTOMIZATION["resources"]) == files - applied_alone
    [generated] = KUSTOMIZATION["configMapGenerator"]
    guests = {f"guests/{file.name}" for file in (paths.DEPLOY / "guests").iterdir()}
    assert set(generated["files"]) == guests
    assert generated["namespace"] == SETS[0]["metadata"]["namespace"]
    [configured] = [v["configMap"]["name"] for v in SPECS[0]["volumes"] if "configMap" in v]
    assert configured == generated["name"]


def test_names_agree() -> None:
    namespace, runtime, pod = read("namespace.yaml"), read("runtimeclass.yaml"), read("web.yaml")
    for daemon_set in SETS:
        assert daemon_set["metadata"]["namespace"] == namespace["metadata"]["name"]
        selected = daemon_set["spec"]["selector"]["matchLabels"]
        assert selected == daemon_set["spec"]["template"]["metadata"]["labels"]
    assert pod["spec"]["runtimeClassName"] == runtime["metadata"]["name"]
    for spec in SPECS:
        assert spec["nodeSelector"] == runtime["scheduling"]["nodeSelector"]
    chosen = pod["metadata"]["annotations"][cni.ANNOTATION]
    assert (paths.DEPLOY / f"guests/{chosen}.yaml").exists()
    image = re.search(r"podman build --tag (\S+)", (paths.DEPLOY / "Containerfile").read_text())
    assert image
    assert {c["image"] for spec in SPECS for c in containers(spec)} == {image[1]}


@pytest.mark.parametrize("spec", SPECS)
def test_every_volume_is_there_and_used(spec: dict[str, Any]) -> None:
    mounted = {m["name"] for c in containers(spec) for m in c.get("volumeMounts", ())}
    assert mounted == {volume["name"] for volume in spec["volumes"]}


def test_commands_are_understood_and_their_folders_are_those_of_the_host() -> None:
    unit = (paths.DEPLOY / "testbed-noded.service").read_text()
    started = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    assert started
    assert parser().parse_args(shlex.split(started[1])[1:]).plugin == Path("/opt/cni/bin")
    for spec in SPECS:
        folders = {v["name"]: v["hostPath"]["path"] for v in spec["volumes"] if "hostPath" in v}
        for container in containers(spec):
            for mount in container.get("volumeMounts", ()):
                if mount["name"] in folders and mount["name"] != "roots":
                    assert mount["mountPath"] == folders[mount["name"]]
            if container["command"][0] == "testbed":
                given = parser().parse_args(container["command"][1:])
                assert {str(given.plugin), str(given.network)} <= set(folders.values())


def test_the_shipped_list_ends_with_the_plugin() -> None:
    network = json.loads(networks.SHIPPED.read_text())
    assert network["cniVersion"] in cni.VERSIONS
    entry = networks.entry()
    assert entry["type"] == "testbed-cni"
    assert set(entry) <= cni.OWN | cni.OTHERS
    assert entry["capabilities"] == {"cgroupPath": True, "dns": True, cni.ANNOTATIONS: True}
    guests = [v["hostPath"]["path"] for v in SPECS[0]["volumes"] if v["name"] == "guests"]
    assert guests == [entry["guests"]]
