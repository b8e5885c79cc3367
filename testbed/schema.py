"""Reads TOML files that users write into pydantic models; errors are one line with the key."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from testbed.model.errors import Error

M = TypeVar("M", bound="Table")


class Table(BaseModel):
    """Base of models of a TOML table. Errors quote a field's `description` as what is expected."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def word(dots: bool = False) -> Any:
    """A field that holds a name; `dots` are allowed in it if asked for."""
    more = "." if dots else ""
    return Field(
        pattern=rf"^[a-z0-9][a-z0-9{more}_-]*$",
        description=f"a word of lower-case letters, digits, {'., ' if dots else ''}- and _",
    )


def integer(least: int, most: int | None = None, default: Any = ...) -> Any:
    """A field that holds an integer in a range."""
    limit = f" and at most {most}" if most else ""
    words = f"an integer of at least {least}{limit}"
    return Field(default, ge=least, le=most, description=words)


def seconds(least: float, most: float = 3600, default: Any = ...) -> Any:
    """A field that holds a time in seconds in a range."""
    words = f"seconds from {least:g} to {most:g}"
    return Field(default, ge=least, le=most, allow_inf_nan=False, description=words)


def one_of(kind: type[StrEnum]) -> Any:
    """A field that holds the value of a member of `kind`."""
    return Field(strict=False, description=f"one of {', '.join(kind)}")


def toml(path: Path, what: str, hint: str | None = None) -> dict[str, Any]:
    """Read a TOML file. Errors call the file `what` it is."""
    return parse(text(path, what, hint), f"{what} {path}")


def text(path: Path, what: str, hint: str | None = None) -> str:
    """Read a file that is text, with the ends of lines that it has. Errors: see `toml`."""
    try:
        return path.read_bytes().decode()
    except OSError as e:
        raise Error(f"{what} {path}: {e.strerror}", hint) from e
    except UnicodeDecodeError as e:
        raise Error(f"{what} {path}: not text ({e.reason} at byte {e.start})") from e


def parse(text: str, where: str) -> dict[str, Any]:
    """Parse TOML text. Errors call the text `where`."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise Error(f"{where}: not TOML: {e}") from e


def read(model: type[M], table: Mapping[str, Any], where: str) -> M:
    """Validate a table as a model, with the tables in it.

    Raises `Error` with the table, the wrong key and what was expected.
    """
    try:
        return model.model_validate(table)
    except ValidationError as e:
        fault = min(e.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    at: type[Table] = model
    key, *rest = map(str, fault["loc"])
    while rest and (inner := _table_of(at, key)):
        at, table, where = inner, table[key], f"{where}: [{key}]"
        key, *rest = rest
    if fault["type"] == "extra_forbidden":
        raise Error(f"{where}: {key}: no such key", f"keys are {', '.join(at.model_fields)}")
    raise wrong(where, key, table.get(key), at.model_fields[key].description or fault["msg"])


def _table_of(model: type[Table], key: str) -> type[Table] | None:
    """The model of the table that a field holds, or None."""
    kind = model.model_fields[key].annotation
    kinds = (kind, *get_args(kind))
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, Table)), None)


def tables(data: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    """The `[[key]]` tables of a file. Raises `Error` if there are none."""
    found = data.get(key)
    if isinstance(found, list) and found and all(isinstance(table, dict) for table in found):
        return found
    raise wrong(where, key, found, f"one or more [[{key}]] tables")


def wrong(where: str, key: str, value: object, expected: str) -> Error:
    """The error for a value that is not as `expected`; a value of None is missing."""
    found = "nothing" if value is None else repr(value)
    return Error(f"{where}: {key}: expected {expected}, found {found}")
