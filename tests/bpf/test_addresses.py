"""The address plan in C is the one in Python, for every address of every guest."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from testbed import paths
from testbed.datapaths.ebpf.loopback_side import LINK_MTU
from testbed.model import addresses
from testbed.model.addresses import Address
from testbed.model.terms import Family

from . import syntax

PROGRAM = r"""
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include "addresses.h"

/* For each line `ipv4 ADDRESS` or `ipv6 ADDRESS`: its kind, its number, and the address rendered
 * from them. For each line `mac N`: the MAC of guest N, or of the alias for 0.
 */
int main(void)
{
	char what[8], text[64];
	while (scanf("%7s %63s", what, text) == 2) {
		__be32 a[4] = {0}, b[4] = {0};
		struct address is;
		if (what[0] == 'm') {
			int n = atoi(text);
			u8 guest[6] = GUEST_MAC(n), alias[6] = ALIAS_MAC, *mac = n ? guest : alias;
			for (int i = 0; i < 6; i++)
				printf("%02x%c", mac[i], i < 5 ? ':' : '\n');
			continue;
		}
		if (what[3] == '4') {
			inet_pton(AF_INET, text, a);
			is = classify4(a[0]);
			b[0] = render4(is);
			inet_ntop(AF_INET, b, text, sizeof(text));
		} else {
			inet_pton(AF_INET6, text, a);
			is = classify6(a);
			render6(is, b);
			inet_ntop(AF_INET6, b, text, sizeof(text));
		}
		printf("%d %d %s\n", is.kind, is.n, text);
	}
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`PROGRAM`, compiled."""
    folder = tmp_path_factory.mktemp("addresses")
    (folder / "plan.c").write_text(PROGRAM)
    with syntax.flags() as given:
        command = ["cc", *given, "-o", str(folder / "plan"), str(folder / "plan.c")]
        subprocess.run(command, check=True)
    return folder / "plan"


def answers(program: Path, lines: Iterable[str]) -> list[str]:
    done = subprocess.run(
        [program],
        input="".join(f"{line}\n" for line in lines),
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def classified(program: Path) -> dict[Address, tuple[str, int, str]]:
    """Every address of the plan, as the C code sees it: kind, number, rendered again."""
    enum = re.search(r"enum kind \{(.*?)\};", (paths.BPF / "addresses.h").read_text(), re.DOTALL)
    assert enum
    kinds = re.findall(r"^\t(\w+),", enum[1], re.MULTILINE)
    asked = [address for address, *_ in plan()]
    told = (line.split() for line in answers(program, (f"ipv{a.version} {a}" for a in asked)))
    return {
        a: (kinds[int(kind)], int(n), text) for a, (kind, n, text) in zip(asked, told, strict=True)
    }


def plan() -> list[tuple[Address, str, int]]:
    """(address, kind, n) of the whole plan."""
    singles = {
        "LOOPBACK": addresses.loopback,
        "ALIAS": addresses.alias,
        "POD_LINK": addresses.pod_link,
        "NATIVE_SOURCE": addresses.native_source,
        "NATIVE_SOURCE_ODD": addresses.native_source_odd,
    }
    numbered = {
        "LINK": addresses.guest_link,
        "GUEST_VIEW": addresses.guest_view,
        "NATIVE_VIEW": addresses.native_view,
    }
    return [
        *((address(f), kind, 0) for f in Family for kind, address in singles.items()),
        *(
            (address(f, n), kind, n)
            for f in Family
            for kind, address in numbered.items()
            for n in range(addresses.MAX_GUESTS + 1)
        ),
    ]


def test_every_address_has_its_kind_and_number(
    classified: dict[Address, tuple[str, int, str]],
) -> None:
    wrong = {a: classified[a] for a, kind, n in plan() if classified[a] != (kind, n, str(a))}
    assert not wrong


def test_every_guest_and_the_alias_has_its_mac(program: Path) -> None:
    macs = [addresses.ALIAS_MAC, *map(addresses.guest_mac, range(1, addresses.MAX_GUESTS + 1))]
    assert answers(program, (f"mac {n}" for n in range(len(macs)))) == macs


def test_the_links_mtu_is_the_one_of_the_plan() -> None:
    assert re.search(rf"#define LINK_MTU\s+{LINK_MTU}\n", (paths.BPF / "addresses.h").read_text())
