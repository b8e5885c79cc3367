"""Data types of the conformance suite: check, case, result; and the decorator `check`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from testbed.model.cells import Pair
from testbed.model.terms import Family, Transport

if TYPE_CHECKING:
    from testbed.conformance.bed import Bed

Body = Callable[["Bed"], Iterator[None] | None]

EVERY = frozenset(pair.shape for pair in Pair)
NATIVE_CLIENT = frozenset({Pair.NATIVE_NATIVE, Pair.NATIVE_GUEST})
NATIVE_SERVER = frozenset({Pair.NATIVE_NATIVE, Pair.GUEST_NATIVE})
FROM_GUEST = frozenset({Pair.GUEST_NATIVE})
GUEST_CLIENT = frozenset({Pair.GUEST_NATIVE, Pair.GUEST_GUEST, Pair.GUEST_SELF})
GUEST_SERVER = frozenset({Pair.NATIVE_GUEST, Pair.GUEST_GUEST, Pair.GUEST_SELF})

TCP = (Transport.TCP,)
UDP = (Transport.UDP,)
BOTH = tuple(Transport)
IPV4 = (Family.IPV4,)


class Failure(Exception):
    """A check found something that must not be."""


class Unsupported(Exception):
    """A check cannot be run here, for a reason that is no fault of the datapath."""


class Status(StrEnum):
    """How a case ended."""

    PASS = "pass"
    FAIL = "fail"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True)
class Check:
    """One property that must hold at `localhost`."""

    name: str
    proves: str
    """The property, in one line."""
    standard: str
    """The standard or kernel behavior that it comes from."""
    pairs: frozenset[Pair]
    families: tuple[Family, ...]
    transports: tuple[Transport, ...]
    disruptive: bool
    """Whether it breaks and repairs the pod. Such checks run after all others."""
    body: Body
    """The function. If it is a generator, it is resumed when the other checks are done, so that its
    connections are idle meanwhile."""


@dataclass(frozen=True)
class Case:
    """A check with one pair, family and transport."""

    check: Check
    pair: Pair
    family: Family
    transport: Transport


@dataclass(frozen=True)
class Result:
    """Result of one case."""

    check: str
    datapath: str
    guest: str
    """Runtime of the guests; `foreign` in somebody else's pod; empty without guests."""
    kernel: str
    """Kernel of the guests, if they have one of their own and it is known."""
    pair: Pair
    family: Family
    transport: Transport
    status: Status
    reason: str
    duration_s: float


registered: dict[str, Check] = {}


def check(
    standard: str,
    *,
    pairs: frozenset[Pair] = EVERY,
    families: tuple[Family, ...] = tuple(Family),
    transports: tuple[Transport, ...] = TCP,
    disruptive: bool = False,
) -> Callable[[Body], Body]:
    """Decorator that registers a function as a check.

    The check has the function's name; the first line of the docstring says what it proves.
    """

    def register(body: Body) -> Body:
        name = body.__name__.replace("_", "-")
        proves = (body.__doc__ or "").partition("\n")[0]
        registered[name] = Check(
            name, proves, standard, pairs, families, transports, disruptive, body
        )
        return body

    return register


def expect(holds: bool, otherwise: str) -> None:
    """Raise `Failure` with the text `otherwise`, unless the condition holds."""
    if not holds:
        raise Failure(otherwise)


@contextmanager
def fails_with(*codes: int) -> Iterator[None]:
    """The body of the `with` statement must fail with one of these error numbers."""
    wanted = " or ".join(os.strerror(code) for code in codes)
    try:
        yield
    except OSError as e:
        if e.errno not in codes:
            raise Failure(f"not {wanted}, but {e}") from e
    else:
        raise Failure(f"not {wanted}, but no error")
