"""Images that stand for names of registries, since nothing is pulled.

The user says which (`--image NAME=REF`, `--image-map FILE`). Without that, some well-known names
stand for programs of this host, and the user is told so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from testbed import paths, schema
from testbed.images import compose, rootfs
from testbed.model.errors import Error
from testbed.model.terms import Runtime

WELL_KNOWN = {
    "alpine": "host:,printenv",
    "busybox": "host:,printenv",
    "debian": "host:,bash,printenv",
    "nginx": "osv/web.toml",
    "nginx-slim": "osv/web.toml",
    "redis": "host:redis-server,redis-cli",
    "ubuntu": "host:,bash,printenv",
}
"""Short names → images of containers. (Debian's busybox has no printenv.)"""

UNPACKING = (Runtime.CONTAINER, Runtime.GVISOR, Runtime.LINUX, Runtime.OSV, Runtime.WASM)
"""Runtimes whose images may be files and folders."""


@dataclass(frozen=True)
class Images:
    """Names of images, as in manifests → images as runtimes take them."""

    given: Mapping[str, str] = field(default_factory=dict)
    """What the user says. A name without a tag is for all tags."""
    used: set[str] = field(default_factory=set, compare=False)
    """Names of `given` that `find` was asked for."""

    def find(self, image: str, runtime: Runtime, folder: Path) -> tuple[str, str]:
        """The image that a manifest in `folder` means, and what the user is to be told of it.

        Raises `Error` for a name without `/` and `.` that is only that of a file or folder there.
        """
        bare, short = _bare(image), _short(image)
        for name in (image, bare, short):
            if name in self.given:
                self.used.add(name)
                return self.given[name], ""
        there = located(image, folder)
        if there != image:
            return there, ""
        is_container = runtime in (Runtime.CONTAINER, Runtime.GVISOR)
        if is_container and short in WELL_KNOWN:
            known = WELL_KNOWN[short]
            return located(known, paths.ROOT), _told(image, known)
        # A name alone is that of a definition on purpose, but in a container also a registry's.
        taken = runtime.is_guest if short != image else is_container
        if taken and image != rootfs.AGENT and compose.definition_file(short):
            return short, _told(image, f"osv/{short}.toml")
        is_name = runtime not in UNPACKING or compose.definition_file(image)
        if image and "/" not in image and not is_name and (folder / image).exists():
            raise Error(f"no image {image!r}", hint=f"what is beside the manifest is ./{image}")
        return image, ""


WELL_KNOWN_ONLY = Images()
"""The user says nothing."""


def of_user(pairs: Iterable[str], file: Path | None) -> Images:
    """What the options say: NAME=REF, and a TOML file with a line `"NAME" = "REF"` for each image.

    Raises `Error` if they are not such.
    """
    given: dict[str, str] = {}
    if file:
        table = schema.toml(file, "image map")
        try:
            names = TypeAdapter(dict[str, str]).validate_python(table)
        except ValidationError as e:
            [name, *_] = e.errors()[0]["loc"]
            raise Error(
                f'image map {file}, {name}: a line \'"NAME" = "IMAGE"\' was expected'
            ) from e
        given |= {name: located(image, file.parent) for name, image in names.items()}
    for pair in pairs:
        name, _, image = pair.partition("=")
        if not name or not image:
            raise Error(f"--image {pair}: no image", hint="--image nginx=oci-archive:nginx.tar")
        given[name] = located(image, Path())
    return Images(given)


def _told(image: str, known: str) -> str:
    """What the user is told of an image that stands for a well-known name."""
    what = known
    if known.startswith(rootfs.HOST):
        what = ", ".join(["busybox", *filter(None, known.removeprefix(rootfs.HOST).split(","))])
    return (
        f"{image} is not pulled: it is put together from this host's {what} "
        f"(--image {image}=… takes another)"
    )


def located(image: str, folder: Path) -> str:
    """Resolve an image that is a path, relative to a folder.

    A word without `/` and `.` is not a path.
    """
    kind, colon, rest = image.partition(":")
    if colon and kind in rootfs.LOCATED:
        return f"{kind}:{folder.absolute() / rest}"
    path = folder.absolute() / image
    return str(path) if re.search(r"[/.]", image) and path.exists() else image


def _bare(image: str) -> str:
    """The name of an image without tag and digest."""
    return re.sub(r":[\w.-]+$", "", image.partition("@")[0])


def _short(image: str) -> str:
    """The name of an image without registry, tag and digest: `nginx` of docker.io/library/nginx:1.

    A name of somebody's own, as in registry.example/team/nginx, keeps the owner.
    """
    *owners, name = _bare(image).split("/")
    if owners and re.search(r"[.:]|^localhost$", owners[0]):
        owners = owners[1:]
    return "/".join([*(owner for owner in owners if owner != "library"), name])
