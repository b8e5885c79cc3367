"""Inventory: reads the hosts of a TOML file, and chooses among them by name or label."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from testbed import schema
from testbed.model.errors import Error
from testbed.model.terms import Family
from testbed.schema import Table

_TEXT = r"^[^\x00-\x1f\x7f]+$"
"""Text without control characters."""


@dataclass(frozen=True)
class Host:
    """One `[[hosts]]` table of an inventory."""

    name: str
    address: str
    known_hosts: Path
    """The known_hosts file with the host's key; one file for the whole inventory."""
    port: int = 22
    user: str = "root"
    key: Path | None = None
    """Private key. None: the keys of the SSH agent, and those in ~/.ssh."""
    sudo: bool = False
    """Whether to become root on the host by `sudo -n`."""
    labels: tuple[str, ...] = ()
    """Names of groups, for --on."""
    cpus: tuple[int, ...] = ()
    """CPUs to use. Empty: all CPUs."""
    directory: str = "/var/lib/testbed"
    """Directory of the testbed on the host."""
    link: tuple[str, ...] = ()
    """Addresses on the link to other hosts, for cells between two hosts. Empty: `address`."""

    @property
    def on_link(self) -> dict[Family, str]:
        """Address on that link, by family. Raises `Error` for a name that has no address."""
        found: dict[Family, str] = {}
        for word in self.link or (self.address,):
            try:
                infos = socket.getaddrinfo(word, None, type=socket.SOCK_STREAM)
            except OSError as e:
                raise Error(f"{self.name}: {word} has no address: {e.strerror}") from e
            for *_, (address, *_) in infos:
                found.setdefault(Family(f"ipv{ip_address(address).version}"), str(address))
        return found


class _Inventory(Table):
    """Schema of an inventory file."""

    known_hosts: str | None = Field(None, min_length=1, description="a path")
    hosts: list[dict[str, Any]]


class _Host(Table):
    """Schema of a `[[hosts]]` table."""

    name: str = schema.word(dots=True)
    address: str = Field(pattern=_TEXT, description="a name or an IP address")
    port: int = Field(22, ge=1, le=65535, description="a port")
    user: str = Field("root", pattern=_TEXT, description="a user's name")
    key: str | None = Field(None, min_length=1, description="a path")
    sudo: bool = Field(False, description="true or false")
    labels: list[Annotated[str, schema.word(dots=True)]] = Field([], description="a list of words")
    cpus: list[Annotated[int, Field(ge=0, le=1 << 16)]] = Field(
        [], description="a list of numbers of CPUs"
    )
    directory: str = Field(
        "/var/lib/testbed", pattern=rf"^/{_TEXT[1:]}", description="an absolute path"
    )
    link: list[Annotated[str, Field(pattern=_TEXT)]] = Field(
        [], description="a list of names or IP addresses"
    )


def load(path: Path) -> tuple[Host, ...]:
    """Read the hosts of an inventory. Paths in the file are relative to it.

    Raises an `Error` that names the file, the key and what was expected.
    """
    where = f"inventory {path}"
    data = schema.toml(path, "inventory", "see experiments/hosts.example.toml")
    tables = schema.tables(data, "hosts", where) if data.keys() <= {"known_hosts", "hosts"} else []
    given = schema.read(_Inventory, data, where)
    known = _file(given.known_hosts, "known_hosts", path, where)
    known = known or Path("~/.ssh/known_hosts").expanduser()
    hosts = tuple(
        _host(table, known, path, f"{where}: [[hosts]] {n}") for n, table in enumerate(tables, 1)
    )
    names = [host.name for host in hosts]
    if twice := {name for name in names if names.count(name) > 1}:
        raise Error(f"{where}: two hosts are called {', '.join(sorted(twice))}")
    return hosts


def _host(table: Mapping[str, Any], known_hosts: Path, path: Path, where: str) -> Host:
    given = schema.read(_Host, table, where)
    lists = {name: tuple(getattr(given, name)) for name in ("labels", "cpus", "link")}
    key = _file(given.key, "key", path, where)
    return Host(**{**dict(given), **lists, "known_hosts": known_hosts, "key": key})


def _file(name: str | None, key: str, beside: Path, where: str) -> Path | None:
    if name is None:
        return None
    file = beside.parent / Path(name).expanduser()
    if not file.is_file():
        raise Error(f"{where}: {key}: no file {file}")
    return file


def choose(hosts: Sequence[Host], wanted: Sequence[str]) -> tuple[Host, ...]:
    """The hosts with a wanted name or label, in the inventory's order; all hosts if none is wanted.

    Raises `Error` for a word that is neither a name nor a label.
    """
    for word in wanted:
        if not any(word in (host.name, *host.labels) for host in hosts):
            raise Error(
                f"no host has the name or label {word!r}",
                f"hosts are {', '.join(host.name for host in hosts)}",
            )
    return tuple(h for h in hosts if not wanted or {h.name, *h.labels} & set(wanted))
