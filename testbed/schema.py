"""Files that people write, read into models: what a value must be, and one line where it is not."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from testbed.model.errors import Error

M = TypeVar("M", bound="Table")


class Table(BaseModel):
    """A table of a TOML file. A field's `description` says in errors what it must be."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def word(dots: bool = False) -> Any:
    """A field that is a name."""
    more = "." if dots else ""
    return Field(
        pattern=rf"^[a-z0-9][a-z0-9{more}_-]*$",
        description=f"a word of lower-case letters, digits, {'., ' if dots else ''}- and _",
    )


def integer(least: int, most: int | None = None, default: Any = ...) -> Any:
    """A field that is an integer in a range."""
    limit = f" and at most {most}" if most else ""
    words = f"an integer of at least {least}{limit}"
    return Field(default, ge=least, le=most, description=words)


def seconds(least: float, most: float = 3600, default: Any = ...) -> Any:
    """A field that is a time in a range."""
    words = f"seconds from {least:g} to {most:g}"
    return Field(default, ge=least, le=most, allow_inf_nan=False, description=words)


def one_of(kind: type[StrEnum]) -> Any:
    """A field that is a member of `kind`, by its value."""
    return Field(strict=False, description=f"one of {', '.join(kind)}")


def toml(path: Path, what: str, hint: str | None = None) -> dict[str, Any]:
    """The tables of a TOML file. Raises `Error` that says `what` it is."""
    try:
        return parse(path.read_text(), f"{what} {path}")
    except OSError as e:
        raise Error(f"{what} {path}: {e.strerror}", hint) from e
    except UnicodeDecodeError as e:
        raise Error(f"{what} {path}: not text ({e.reason} at byte {e.start})") from e


def parse(text: str, where: str) -> dict[str, Any]:
    """The tables of TOML text; `where` is what errors call it."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise Error(f"{where}: not TOML: {e}") from e


def read(model: type[M], table: Mapping[str, Any], where: str) -> M:
    """A table as a model. Raises `Error` with the first key at fault and what was expected."""
    try:
        return model.model_validate(table)
    except ValidationError as e:
        fault = min(e.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    key = str(fault["loc"][0]) if fault["loc"] else ""
    if fault["type"] == "extra_forbidden":
        raise Error(f"{where}: {key}: no such key", f"keys are {', '.join(model.model_fields)}")
    raise wrong(where, key, table.get(key), model.model_fields[key].description or fault["msg"])


def tables(data: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    """The `[[key]]` tables. Raises `Error` if there are none."""
    found = data.get(key)
    if isinstance(found, list) and found and all(isinstance(table, dict) for table in found):
        return found
    raise wrong(where, key, found, f"one or more [[{key}]] tables")


def wrong(where: str, key: str, value: object, expected: str) -> Error:
    """The error of a value that is not what it must be; None: it is missing."""
    found = "nothing" if value is None else repr(value)
    return Error(f"{where}: {key}: expected {expected}, found {found}")
