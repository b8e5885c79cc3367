"""One end of a link between two hosts: what its host is told, and what it lacks."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from testbed.model.addresses import Address, address_between_hosts
from testbed.model.terms import Family

FORWARDS = {Family.IPV4: "net/ipv4/ip_forward", Family.IPV6: "net/ipv6/conf/all/forwarding"}


@dataclass(frozen=True)
class Side:
    """One of the two ends, as its host is told of it."""

    number: int
    """Of its pod, as in `address_between_hosts`; the other's differs in the last bit."""
    via: Mapping[Family, str]
    """The other host's address on their link, in the families that it has there."""
    lacks: Mapping[Family, str] = field(default_factory=dict)
    """Why a family cannot be had at the other end."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict` after JSON."""
        via = {Family(family): address for family, address in data["via"].items()}
        lacks = {Family(family): why for family, why in data["lacks"].items()}
        return cls(data["number"], via, lacks)

    @property
    def other(self) -> dict[Family, Address]:
        """The addresses of the pod at the other end."""
        return {family: address_between_hosts(family, self.number ^ 1) for family in self.via}

    def lacking(self) -> dict[Family, str]:
        """Why a family cannot be had at this end, on the host that this is called on."""
        here, lacks = platform.node(), {}
        for family, key in FORWARDS.items():
            name = family.replace("ip", "IP")
            if family not in self.via:
                lacks[family] = f"the inventory has no {name} address of the host that {here} meets"
            elif Path("/proc/sys", key).read_text().strip() == "0":
                setting = key.replace("/", ".")
                lacks[family] = f"{here} does not forward {name}; sysctl -w {setting}=1 there"
        return lacks
