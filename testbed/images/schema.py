"""Schema of the files that define images (`osv/*.toml`)."""

from __future__ import annotations

from pydantic import Field

from testbed.schema import Table


class DefinitionFile(Table):
    """A definition as it is written: `compose.load` looks for its files."""

    program: str = Field(min_length=1, description='program = "PATH"')
    """A name is looked for beside the definition, then among this host's programs."""
    package: str = Field("", description="the name of a Debian package")
    others: list[str] = Field([], description="a list of programs, which OSv does without")
    arguments: list[str] = Field([], description="a list of words")
    files: dict[str, str] = Field({}, description="a table: path in the guest = path here")
    folders: list[str] = Field([], description="a list of patterns of paths, as /usr/lib/python3.*")
    shim: bool = Field(True, description="true or false")
