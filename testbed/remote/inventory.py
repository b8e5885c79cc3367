"""Inventory: the hosts of a TOML file, chosen by name or label."""

from __future__ import annotations

import re
import socket
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from testbed.model.errors import Error
from testbed.model.terms import Family


@dataclass(frozen=True)
class Host:
    """One `[[hosts]]` table of an inventory."""

    name: str
    address: str
    known_hosts: Path
    """Where the host's key is on file; one file for the whole inventory."""
    port: int = 22
    user: str = "root"
    key: Path | None = None
    """Private key; None: the agent's keys, and those in ~/.ssh."""
    sudo: bool = False
    """Become root there by `sudo -n`."""
    labels: tuple[str, ...] = ()
    """Names of groups, for --on."""
    cpus: tuple[int, ...] = ()
    """CPUs to use; none: all."""
    directory: str = "/var/lib/testbed"
    """Where to work there."""
    link: tuple[str, ...] = ()
    """Its addresses on the link to other hosts, for cells between two; none: `address`."""

    @property
    def on_link(self) -> dict[Family, str]:
        """Where it is met on that link. Raises `Error` for a name that has no address."""
        found: dict[Family, str] = {}
        for word in self.link or (self.address,):
            try:
                infos = socket.getaddrinfo(word, None, type=socket.SOCK_STREAM)
            except OSError as e:
                raise Error(f"{self.name}: {word} has no address: {e.strerror}") from e
            for *_, (address, *_) in infos:
                found.setdefault(Family(f"ipv{ip_address(address).version}"), str(address))
        return found


_HOST_KEYS = (
    "name",
    "address",
    "port",
    "user",
    "key",
    "sudo",
    "labels",
    "cpus",
    "directory",
    "link",
)


def load(path: Path) -> tuple[Host, ...]:
    """The hosts of an inventory; paths in it are relative to it.

    Raises `Error` that names file, key and what was expected there.
    """
    try:
        data = tomllib.loads(path.read_text())
    except OSError as e:
        raise Error(f"inventory {path}: {e.strerror}", "see experiments/hosts.example.toml") from e
    except ValueError as e:
        raise Error(f"inventory {path}: not TOML: {e}") from e
    _only(data, ("known_hosts", "hosts"), str(path))
    tables = data.get("hosts")
    if not (isinstance(tables, list) and tables and all(isinstance(t, dict) for t in tables)):
        raise _wrong(str(path), "hosts", tables, "one or more [[hosts]] tables")
    known = _file(data, "known_hosts", path, str(path)) or Path("~/.ssh/known_hosts").expanduser()
    hosts = tuple(
        _host(table, known, path, f"{path}: [[hosts]] {n}") for n, table in enumerate(tables, 1)
    )
    names = [host.name for host in hosts]
    if twice := {name for name in names if names.count(name) > 1}:
        raise Error(f"inventory {path}: two hosts are called {', '.join(sorted(twice))}")
    return hosts


def choose(hosts: Sequence[Host], wanted: Sequence[str]) -> tuple[Host, ...]:
    """The hosts that are wanted by name or label, in the inventory's order; all if none is named.

    Raises `Error` for a word that is neither.
    """
    for word in wanted:
        if not any(word in (host.name, *host.labels) for host in hosts):
            raise Error(
                f"no host has the name or label {word!r}",
                f"hosts are {', '.join(host.name for host in hosts)}",
            )
    return tuple(h for h in hosts if not wanted or {h.name, *h.labels} & set(wanted))


def _host(table: Mapping[str, Any], known_hosts: Path, path: Path, where: str) -> Host:
    _only(table, _HOST_KEYS, where)

    def get(key: str, default: Any, expected: str, good: Callable[[Any], object]) -> Any:
        value = table.get(key, default)
        if not good(value):
            raise _wrong(where, key, value, expected)
        return value

    def word(value: object) -> object:
        return isinstance(value, str) and re.fullmatch(r"[a-z0-9][a-z0-9._-]*", value)

    def text(value: object) -> bool:
        return isinstance(value, str) and bool(value) and value.isprintable()

    def number(value: object, low: int, high: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    def several(value: object, good: Callable[[Any], object]) -> bool:
        return isinstance(value, list | tuple) and all(good(v) for v in value)

    return Host(
        name=get("name", None, "a word of lower-case letters, digits, ., - and _", word),
        address=get("address", None, "a name or an IP address", text),
        known_hosts=known_hosts,
        port=get("port", 22, "a port", lambda v: number(v, 1, 65535)),
        user=get("user", "root", "a user's name", text),
        key=_file(table, "key", path, where),
        sudo=get("sudo", False, "true or false", lambda v: isinstance(v, bool)),
        labels=tuple(get("labels", (), "a list of words", lambda v: several(v, word))),
        cpus=tuple(
            get(
                "cpus",
                (),
                "a list of numbers of CPUs",
                lambda v: several(v, lambda n: number(n, 0, 1 << 16)),
            )
        ),
        directory=get(
            "directory",
            "/var/lib/testbed",
            "an absolute path",
            lambda v: text(v) and v.startswith("/"),
        ),
        link=tuple(get("link", (), "a list of names or IP addresses", lambda v: several(v, text))),
    )


def _file(table: Mapping[str, Any], key: str, beside: Path, where: str) -> Path | None:
    value = table.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise _wrong(where, key, value, "a path")
    file = beside.parent / Path(value).expanduser()
    if not file.is_file():
        raise Error(f"inventory {where}: {key}: no file {file}")
    return file


def _wrong(where: str, key: str, value: object, expected: str) -> Error:
    found = "nothing" if value is None else repr(value)
    return Error(f"inventory {where}: {key}: expected {expected}, found {found}")


def _only(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise Error(f"inventory {where}: {key}: no such key", f"keys are {', '.join(known)}")
