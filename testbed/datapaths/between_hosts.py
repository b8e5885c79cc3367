"""One end of a link between two hosts: addresses, and what is missing for a family to work."""

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
    """One end of the link, as its host is told of it."""

    number: int
    """Number of its pod (`address_between_hosts`). The other pod's differs in the last bit."""
    via: Mapping[Family, str]
    """The other host's addresses on the link, by family."""
    lacks: Mapping[Family, str] = field(default_factory=dict)
    """Why a family does not work at the other end."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Make one from the JSON of `dataclasses.asdict`."""
        via = {Family(family): address for family, address in data["via"].items()}
        lacks = {Family(family): why for family, why in data["lacks"].items()}
        return cls(data["number"], via, lacks)

    @property
    def other(self) -> dict[Family, Address]:
        """Addresses of the pod at the other end."""
        return {family: address_between_hosts(family, self.number ^ 1) for family in self.via}

    def lacking(self) -> dict[Family, str]:
        """Why a family does not work at this end. It has to be called on the host of this end."""
        host, lacks = platform.node(), {}
        for family, key in FORWARDS.items():
            name = family.replace("ip", "IP")
            if family not in self.via:
                lacks[family] = f"the inventory has no {name} address of the host that {host} meets"
            elif Path("/proc/sys", key).read_text().strip() == "0":
                setting = key.replace("/", ".")
                lacks[family] = f"{host} does not forward {name}; sysctl -w {setting}=1 there"
        return lacks
