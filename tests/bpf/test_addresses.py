"""The address plan in C is the one in Python, for every address of every guest."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from testbed import bpf, paths
from testbed.datapaths.capture import REASONS
from testbed.datapaths.ebpf.loopback_side import LINK_MTU
from testbed.model import addresses
from testbed.model.addresses import Address
from testbed.model.terms import Family

PRELUDE = r"""
#include <arpa/inet.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
typedef uint8_t u8;
typedef uint32_t u32;
typedef uint32_t __be32;
#define __always_inline inline __attribute__((always_inline))
#define bpf_ntohl ntohl
#define bpf_htonl htonl
"""
MAIN = r"""
/* For each line `family address`: its kind, its number, and the address made from them again. */
int main(void)
{
	char family[8], text[64];
	while (scanf("%7s %63s", family, text) == 2) {
		__be32 a[4] = {0}, b[4] = {0};
		struct address is;
		if (family[3] == '4') {
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
def classified(tmp_path_factory: pytest.TempPathFactory) -> dict[Address, tuple[str, int, str]]:
    """Every address of the plan, as the C code sees it: kind, number, made again."""
    folder = tmp_path_factory.mktemp("addresses")
    header = (paths.BPF / "addresses.h").read_text()
    (folder / "plan.c").write_text(PRELUDE + header + MAIN)
    subprocess.run(["cc", "-o", folder / "plan", folder / "plan.c"], check=True)
    enum = re.search(r"enum kind \{(.*?)\};", header, re.DOTALL)
    assert enum
    kinds = re.findall(r"^\t(\w+),", enum[1], re.MULTILINE)

    asked = [address for address, *_ in plan()]
    lines = "".join(f"ipv{a.version} {a}\n" for a in asked)
    done = subprocess.run(
        [folder / "plan"], input=lines, capture_output=True, text=True, check=True
    )
    answers = (line.split() for line in done.stdout.splitlines())
    return {
        a: (kinds[int(kind)], int(n), text)
        for a, (kind, n, text) in zip(asked, answers, strict=True)
    }


def plan() -> list[tuple[Address, str, int]]:
    """(address, kind, n) of the whole plan."""
    singles = {"LOOPBACK": addresses.loopback, "ALIAS": addresses.alias,
               "POD_LINK": addresses.pod_link,
               "NATIVE_SOURCE": addresses.native_source,
               "NATIVE_SOURCE_ODD": addresses.native_source_odd}  # fmt: skip
    numbered = {
        "LINK": addresses.guest_link,
        "GUEST_VIEW": addresses.guest_view,
        "NATIVE_VIEW": addresses.native_view,
    }
    return [
        *((address(f), kind, 0) for f in Family for kind, address in singles.items()),
        *((address(f, n), kind, n) for f in Family for kind, address in numbered.items()
          for n in range(addresses.MAX_GUESTS + 1)),
    ]  # fmt: skip


def test_every_address_has_its_kind_and_number(
    classified: dict[Address, tuple[str, int, str]],
) -> None:
    wrong = {a: classified[a] for a, kind, n in plan() if classified[a] != (kind, n, str(a))}
    assert not wrong


def test_the_links_mtu_is_the_one_of_the_plan() -> None:
    assert re.search(rf"#define LINK_MTU +{LINK_MTU}\n", bpf.source("capture"))


def test_reasons_are_counted_under_their_names() -> None:
    enum = re.search(
        r"enum reason \{(.*?)\};", (Path(paths.BPF) / "capture.c").read_text(), re.DOTALL
    )
    assert enum
    names = re.findall(r"REASON_(\w+),", enum[1])
    assert tuple(name.lower() for name in names) == REASONS
