"""Definitions of images for the programs of an application, in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from testbed.application import Program
from testbed.host import cache
from testbed.images import rootfs
from testbed.model.errors import Error


def define(program: Program, files: Mapping[str, str]) -> Path:
    """File with the definition of an image that has the program's programs, copies and `files`.

    `files`: path in the image → text. Raises `Error` if this host lacks a program.
    """
    first, *others = find(program)
    copied = {str(path): str(path) for pattern in program.copies for path in _matching(pattern)}
    digest = hashlib.sha256(
        json.dumps([str(first), *map(str, others), copied, dict(files)]).encode()
    ).hexdigest()

    def write(folder: Path) -> None:
        folder.mkdir()
        given = dict(copied)
        for n, (path, text) in enumerate(files.items()):
            (folder / f"{n}").write_text(text)
            given[path] = f"{n}"
        # Strings and lists of JSON are such of TOML, too.
        lines = [f"program = {json.dumps(str(first))}"]
        lines += [f"others = {json.dumps([str(path) for path in others])}", "[files]"]
        lines += [f"{json.dumps(path)} = {json.dumps(source)}" for path, source in given.items()]
        (folder / "image.toml").write_text("\n".join(lines) + "\n")

    return cache.made(cache.cache_folder() / "applications" / digest, write) / "image.toml"


def find(program: Program) -> list[Path]:
    """The program's programs on this host. Raises `Error` if one, or what it copies, is lacking."""
    found = [_find(name, program.package) for name in program.programs]
    for pattern in program.copies:
        if not any(Path("/").glob(pattern.lstrip("/"))):
            raise _lacking(f"nothing at {pattern}", program.package)
    return found


def _find(name: str, package: str) -> Path:
    """The program of this host with a name, or the last that a pattern of paths matches."""
    if name == rootfs.AGENT:
        return rootfs.programs(name)[0]
    found = rootfs.on_host(name) if "/" not in name else max(_matching(name), default=None)
    if found is None:
        raise _lacking(f"no program {name}", package)
    return found


def _lacking(what: str, package: str) -> Error:
    return Error(f"this host has {what}" + (f": apt-get install {package}" if package else ""))


def _matching(pattern: str) -> list[Path]:
    """Files that a pattern of paths matches, and all files of folders that it matches."""
    matching = sorted(Path("/").glob(pattern.lstrip("/")))
    within = (file for path in matching for file in (path.rglob("*") if path.is_dir() else [path]))
    return [file for file in within if file.is_file()]
