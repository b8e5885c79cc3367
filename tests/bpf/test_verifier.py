"""Programs are far from the verifier's limit, whichever kernel and compiler it is.

What the verifier goes through varies severalfold between kernels and compilers, and it refuses more
than a million instructions. So each program, the traced ones too, has to do with a tenth.
"""

from __future__ import annotations

import os

import pytest

from testbed import bpf, datapaths
from testbed.bpf import bytecode
from testbed.bpf.programs import remove_user
from testbed.host.ledger import Owner

pytestmark = pytest.mark.root

LIMIT = 100_000

OF_DATAPATHS = {p for name in datapaths.names() for p in datapaths.get(name).programs}
SETS = sorted(OF_DATAPATHS | {"checksum", "tap"})
TRACED = [name + bytecode.TRACED for name in SETS if name in datapaths.names()]


@pytest.mark.parametrize("name", [*SETS, *TRACED])
def test_a_program_takes_at_most_a_tenth_of_what_the_verifier_allows(name: str) -> None:
    compiled, pins = bytecode.get(name), bpf.PINS / f"test-{os.getpid()}"
    with Owner() as owner:
        bpf.load("probe", owner).close()  # bpffs is mounted
        owner.defer(remove_user, pins=str(pins), user="")
        pins.mkdir()
        compiled.load(pins)
        processed = compiled.processed(pins)
    assert processed.keys() == {program.name for program in compiled.programs}
    assert {program: n for program, n in processed.items() if n > LIMIT} == {}
