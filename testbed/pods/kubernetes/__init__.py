"""Reads Pod manifests of Kubernetes (v1, YAML or JSON, several to a file) as `Spec`s.

`schema` says which fields are understood, `conversion` makes a `Spec` of a pod, `environment` finds
values of variables, and `images` says which image stands for a name of a registry.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from testbed.model.errors import Error
from testbed.model.manifest import Spec
from testbed.model.terms import Runtime
from testbed.pods.kubernetes import conversion
from testbed.pods.kubernetes.images import WELL_KNOWN_ONLY, Images

STDIN = Path("-")


def read(
    paths: Sequence[Path],
    best: Callable[[], Runtime],
    resolv_conf: str | None = None,
    images: Images = WELL_KNOWN_ONLY,
) -> list[Spec]:
    """Read all pods of some files; `STDIN` is standard input.

    `best` finds the runtime of guests that name none. `resolv_conf`: text of the resolv.conf that
    pods have unless they say otherwise; None: this host's. Raises `Error` with file, document, path
    and what was expected.
    """
    specs = [
        conversion.spec(document, where, folder, best, resolv_conf, images)
        for path in paths
        for document, where, folder in _documents(path)
    ]
    names = [spec.name for spec in specs]
    if twice := {name for name in names if names.count(name) > 1}:
        files = ", ".join(map(_shown, paths))
        raise Error(f"{files}: two pods are named {twice.pop()!r}", hint="rename one")
    return specs


def _documents(path: Path) -> Iterator[tuple[object, str, Path]]:
    """Objects in a file: (object, where it stands, the folder that its images are relative to)."""
    shown = _shown(path)
    try:
        text = sys.stdin.read() if path == STDIN else path.read_text()
        documents = list(yaml.load_all(text, _Loader))
    except OSError as e:
        raise Error(f"cannot read {shown}: {e.strerror}") from e
    except (yaml.YAMLError, ValueError) as e:
        raise Error(f"{shown} is not YAML: {' '.join(str(e).split())}") from e
    except RecursionError as e:
        raise Error(f"{shown} is nested too deeply to be a manifest") from e
    found = [
        (item, where)
        for number, document in enumerate(documents, start=1)
        if document is not None
        for item, where in _items(document, f"{shown}, document {number}")
    ]
    if not found:
        raise Error(f"{shown} holds no pod", hint="a pod has 'apiVersion: v1' and 'kind: Pod'")
    for item, where in found:
        yield item, where, path.parent


def _items(document: object, where: str) -> Iterator[tuple[object, str]]:
    """The items of a List or PodList with where they stand, or the document itself."""
    if not isinstance(document, dict) or document.get("kind") not in ("List", "PodList"):
        yield document, where
        return
    items = document.get("items")
    if not isinstance(items, list):
        raise Error(f"{where}, items: a list was expected")
    for number, item in enumerate(items):
        # The items of a PodList are pods, and need not say so.
        kind = {"apiVersion": "v1", "kind": "Pod"} if document["kind"] == "PodList" else {}
        yield ({**kind, **item} if isinstance(item, dict) else item), f"{where}, items.{number}"


def _shown(path: Path) -> str:
    return "standard input" if path == STDIN else str(path)


class _Loader(yaml.SafeLoader):
    """Loader that rejects duplicate keys, of which yaml would use the last. Dates are text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice.pop()!r} stands there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
