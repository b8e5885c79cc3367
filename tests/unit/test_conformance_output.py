"""Forms in which conformance results are written."""

from __future__ import annotations

from testbed.conformance import output
from testbed.conformance.check import Result, Status
from testbed.model.cells import Pair
from testbed.model.terms import Family, Transport


def result(datapath: str, guest: str, status: Status, reason: str = "") -> Result:
    case = (Pair.NATIVE_NATIVE, Family.IPV4, Transport.TCP)
    return Result("connect", datapath, guest, "", *case, status, reason, 0.1)


def test_tap_has_one_point_per_case_and_says_why_one_failed_or_was_skipped() -> None:
    results = [
        result("loopback", "", Status.PASS),
        result("steer", "standin", Status.FAIL, 'received b"x"\nand no more'),
        result("steer", "standin", Status.UNSUPPORTED, "the guest\nhas no such thing"),
    ]
    assert output.tap(results).splitlines() == [
        "TAP version 14",
        "1..3",
        "ok 1 - loopback connect native-native ipv4 tcp",
        "not ok 2 - steer (standin) connect native-native ipv4 tcp",
        "  ---",
        '  message: "received b\\"x\\"\\nand no more"',
        "  ...",
        "ok 3 - steer (standin) connect native-native ipv4 tcp # SKIP the guest has no such thing",
    ]
