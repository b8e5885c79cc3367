"""What a check is: a function that says what it proves, and through which pairs it runs."""

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
GUEST_CLIENT = frozenset({Pair.GUEST_NATIVE, Pair.GUEST_GUEST, Pair.GUEST_SELF})
GUEST_SERVER = frozenset({Pair.NATIVE_GUEST, Pair.GUEST_GUEST, Pair.GUEST_SELF})

TCP = (Transport.TCP,)
UDP = (Transport.UDP,)
BOTH = tuple(Transport)
IPV4 = (Family.IPV4,)


class Failure(Exception):
    """What a check found is not what it must be."""


class Unsupported(Exception):
    """The check cannot be made here, through no fault of the datapath."""


class Status(StrEnum):
    """How a case ended."""

    PASS = "pass"
    FAIL = "fail"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True)
class Check:
    """One thing that must hold."""

    name: str
    proves: str
    """In one line."""
    standard: str
    """Which standard or kernel behavior it stands for."""
    pairs: frozenset[Pair]
    families: tuple[Family, ...]
    transports: tuple[Transport, ...]
    disruptive: bool
    """It breaks and mends the pod: runs after all others."""
    body: Body
    """A generator is resumed when the others are done: what lies idle meanwhile."""


@dataclass(frozen=True)
class Case:
    """A check through one pair, family and transport."""

    check: Check
    pair: Pair
    family: Family
    transport: Transport


@dataclass(frozen=True)
class Result:
    """What came of a case."""

    check: str
    datapath: str
    guest: str
    """What runs the guests: a runtime, `foreign` in another's pod, empty where there are none."""
    kernel: str
    """Of the guests, where it is their own and known."""
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
    """Make a check of a function: named as it is, proving what its docstring's first line says."""

    def register(body: Body) -> Body:
        name = body.__name__.replace("_", "-")
        proves = (body.__doc__ or "").partition("\n")[0]
        registered[name] = Check(
            name, proves, standard, pairs, families, transports, disruptive, body
        )
        return body

    return register


def expect(holds: bool, otherwise: str) -> None:
    """Raise `Failure` with what was found instead."""
    if not holds:
        raise Failure(otherwise)


@contextmanager
def fails_with(*codes: int) -> Iterator[None]:
    """What is done in here must fail with one of these error numbers."""
    wanted = " or ".join(os.strerror(code) for code in codes)
    try:
        yield
    except OSError as e:
        if e.errno not in codes:
            raise Failure(f"not {wanted}, but {e}") from e
    else:
        raise Failure(f"not {wanted}, but no error")
