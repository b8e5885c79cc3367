"""Application: real server and client programs in the place of the traffic agents of a cell.

An application is a TOML file, in a folder `applications` beside a plan or in
`experiments/applications`. Cells name it by its file's name, and a case of its client after a dot:
`redis.get`. This module reads and checks such files, and fills in what a program is told. It starts
no program (`testbed.campaigns.applications`) and makes no image.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from testbed import schema
from testbed.model.errors import Error
from testbed.schema import Table

FOLDER = "applications"
"""Folder of applications, beside plans."""

OF_SERVER = frozenset({"bind", "port", "listen"})
"""What a server is told: the address and port to listen at, apart and together."""
OF_CLIENT = frozenset({"host", "port", "authority"})
"""What a client is told: the name or address and the port to dial, apart and together."""
OF_SIDECAR = OF_SERVER | {"server_host", "server_port", "server_authority"}
"""What a sidecar is told: where to listen, and where the server is."""
PARAMETERS = frozenset({"family", "size_bytes", "streams", "rate_per_s"})
"""Fields of a cell that a client can be told."""
LENGTHS = frozenset({"duration_s", "requests"})
"""How long a client is to run: in whole seconds, or in requests."""

UNITS_US = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}
"""Unit of times that a client prints → its microseconds."""

_NAME = re.compile(r"\{([a-z_]+)\}")
"""A placeholder. Braces with anything else between them are the program's own."""


class Program(Table):
    """What all programs of an application have in common: what is in their image."""

    programs: list[str] = Field(
        min_length=1,
        description="one or more names, or patterns of paths, of programs; `agent` is the agent",
    )
    package: str = Field("", description="the name of a Debian package")
    copies: list[str] = Field([], description="patterns of paths of this host's files and folders")
    files: dict[str, str] = Field({}, description="a table: path = text of the file")
    env: dict[str, str] = Field({}, description="a table: name of a variable = its value")


class Server(Program):
    """Schema of the tables `[server]` and `[sidecar]`."""

    args: list[str] = Field([], description="a list of words, with which the first program runs")
    script: str = Field("", description="a shell script, in place of args")

    def texts(self) -> list[str]:
        """All texts that may have placeholders."""
        return [*self.args, self.script, *self.files.values(), *self.env.values()]


class Client(Program):
    """Schema of the table `[client]`."""

    prepare: str = Field("", description="a shell script, which runs before each trial")
    run: str = Field(min_length=1, description="a shell script, which prints the results")
    cases: dict[str, str] = Field({}, description="a table: name = words in the place of {case}")

    def texts(self) -> list[str]:
        """All texts that may have placeholders."""
        return [self.prepare, self.run]

    @property
    def counts(self) -> bool:
        """Whether it is told a number of requests, and not a time."""
        return "requests" in names(self.run)


def _pattern(groups: int, default: Any = "") -> Any:
    ones = "a group" if groups == 1 else f"{groups} groups"
    return Field(default, description=f"a regular expression with {ones}")


class Output(Table):
    """Schema of the table `[output]`: regular expressions for what the client prints."""

    unit: Literal["s", "ms", "us", "ns"] = Field(description=f"one of {', '.join(UNITS_US)}")
    """Of times."""
    per_s: str = _pattern(1, ...)
    """Requests per second."""
    requests: str = _pattern(1)
    """Number of requests. Not needed of a client that is told it."""
    errors: str = _pattern(1)
    """Number of requests that failed. All that are found must be 0."""
    p50: str = _pattern(1)
    p99: str = _pattern(1)
    """Percentiles of the time of a request."""
    histogram: str = _pattern(2)
    """In place of percentiles: a time, and the number of requests that took it. It is found any
    number of times."""

    @field_validator("per_s", "requests", "errors", "p50", "p99", "histogram")
    @classmethod
    def _is_pattern(cls, text: str, info: Any) -> str:
        groups = 2 if info.field_name == "histogram" else 1
        assert not text or _groups(text) == groups
        return text


class Application(Table):
    """Schema of an application's file."""

    about: str = Field(min_length=1, description="what it is, in words")
    request_bytes: int = schema.integer(1)
    """Payload that a request and its response have together, at least."""
    server: Server = Field(description="a table [server]")
    client: Client = Field(description="a table [client]")
    output: Output = Field(description="a table [output]")
    sidecar: Server | None = Field(None, description="a table [sidecar]")


def load(name: str, folders: Sequence[Path]) -> Application:
    """Read an application by the name that cells have for it, from the first folder that has it.

    Raises an `Error` that names the file, the table, the key and what was expected.
    """
    stem, _, case = name.partition(".")
    files = [folder / FOLDER / f"{stem}.toml" for folder in folders]
    path = next((file for file in files if file.exists()), files[-1])
    known = ", ".join(sorted({file.stem for f in folders for file in (f / FOLDER).glob("*.toml")}))
    return parse(schema.text(path, "application", f"applications here: {known}"), str(path), case)


def parse(text: str, where: str, case: str = "") -> Application:
    """Parse the TOML text of an application, for a case of its client."""
    where = f"application {where}"
    found = schema.read(Application, schema.parse(text, where), where)
    found = _with_case(found, case, where)
    _check(found, where)
    return found


def names(text: str) -> set[str]:
    """Names of the placeholders in a text."""
    return set(_NAME.findall(text))


def fill(text: str, values: Mapping[str, object]) -> str:
    """The text with values in the place of its placeholders."""
    return _NAME.sub(lambda found: str(values[found[1]]), text)


def takes(application: Application) -> set[str]:
    """Those of `PARAMETERS` that the client is told."""
    return {name for text in application.client.texts() for name in names(text)} & PARAMETERS


def _check(application: Application, where: str) -> None:
    """Raises `Error` for placeholders that nothing is put in the place of, and for contradictions
    between keys.
    """
    client, output = application.client, application.output
    tables = [
        ("server", application.server.texts(), OF_SERVER),
        ("client", client.texts(), OF_CLIENT | PARAMETERS | LENGTHS),
    ]
    if application.sidecar:
        tables.append(("sidecar", application.sidecar.texts(), OF_SIDECAR))
    for name, texts, known in tables:
        for found in sorted(set().union(*map(names, texts)) - known):
            raise Error(
                f"{where}: [{name}]: nothing is put in the place of {{{found}}}",
                f"placeholders are {', '.join(sorted(known))}",
            )
    for name, server in (("server", application.server), ("sidecar", application.sidecar)):
        if server and server.args and server.script:
            raise Error(f"{where}: [{name}]: both args and script", "give one of them")
    if len(names(client.run) & LENGTHS) != 1:
        expected = "{duration_s} or {requests}"
        raise schema.wrong(f"{where}: [client]", "run", client.run, expected)
    if not (client.counts or output.requests):
        raise schema.wrong(
            f"{where}: [output]", "requests", None, "a regular expression: run has no {requests}"
        )
    if bool(output.histogram) == bool(output.p50 and output.p99):
        raise Error(f"{where}: [output]: expected either p50 and p99 or histogram")


def _with_case(application: Application, case: str, where: str) -> Application:
    """The application with the words of a case in its client's scripts."""
    client = application.client
    if case not in (client.cases or {"": ""}):
        known = ", ".join(client.cases) or "none"
        raise Error(f"{where}: there is no case {case!r}", f"its cases are {known}")
    words = client.cases.get(case, "")
    changed = {name: getattr(client, name).replace("{case}", words) for name in ("run", "prepare")}
    return application.model_copy(update={"client": client.model_copy(update=changed)})


def _groups(pattern: str) -> int:
    try:
        return re.compile(pattern).groups
    except re.error:
        return -1
