"""Debian roots: what they get from this machine, and what tests in them came to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.machines import fresh, roots

TARGETS = """\
http://mirror.example/debian/ bookworm bookworm
http://mirror.example/debian/ bookworm-updates
http://security.example/debian-security/ stable-security bookworm-security
http://other.example/packages nodistro
"""


def test_archives_are_those_of_this_machine() -> None:
    assert roots.archives(TARGETS, "bookworm") == {
        "": "http://mirror.example/debian/",
        "-updates": "http://mirror.example/debian/",
        "-security": "http://security.example/debian-security/",
    }
    assert roots.archives(TARGETS, "noble") == {}


def test_apt_settings_say_how_to_reach_archives_and_name_no_file() -> None:
    dump = """\
APT::Architecture "amd64";
Acquire::http::Proxy "http://proxy.example:3128";
Acquire::http::Proxy-Auto-Detect "/usr/local/bin/proxy";
Acquire::https::CaInfo "/etc/ssl/own.pem";
Acquire::Check-Valid-Until "false";
DPkg::Pre-Install-Pkgs:: "/usr/sbin/dpkg-preconfigure --apt || true";
"""
    assert roots.apt_settings(dump) == (
        'Acquire::http::Proxy "http://proxy.example:3128";\nAcquire::Check-Valid-Until "false";\n'
    )


def test_pip_settings_are_those_of_files_and_environment_without_folders(tmp_path: Path) -> None:
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://index.example/100%25\nfind-links = /opt/wheels\n"
        "extra-index-url =\n  file:///opt/simple\n  https://extra.example\n"
    )
    assert roots.pip_variables([file, tmp_path / "none"], {"PIP_TIMEOUT": "9"}) == {
        "PIP_INDEX_URL": "https://index.example/100%25",
        "PIP_EXTRA_INDEX_URL": "https://extra.example",
        "PIP_TIMEOUT": "9",
    }
    overridden = roots.pip_variables([file], {"PIP_INDEX_URL": "https://own.example"})
    assert overridden["PIP_INDEX_URL"] == "https://own.example"


def test_a_week_is_in_the_order_of_names() -> None:
    assert re.fullmatch(r"20\d\d-W\d\d", roots.week())


@pytest.mark.parametrize(
    ("line", "closing"),
    [
        ("== 2 failed, 9 passed, 5 skipped, 1 warning in 754.33s (0:12:34) ==", (9, 2, 5)),
        ("===== 3 passed, 1 xfailed, 1 error in 0.12s =====", (4, 1, 0)),
        ("7 passed, 2 skipped in 416.82s (0:06:56)", (7, 0, 2)),
        ("== no tests ran in 0.01s ==", (0, 0, 0)),
        ("3 passed", (0, 0, 0)),
        ("==== short test summary info ====", (0, 0, 0)),
    ],
)
def test_what_pytest_counts_is_summed(line: str, closing: tuple[int, int, int]) -> None:
    counts = fresh.pytest_counts(line)
    assert tuple(counts[kind] for kind in fresh.KINDS) == closing
    assert fresh.closing_line(counts + counts) == (
        f"{2 * closing[0]} passed, {2 * closing[1]} failed, {2 * closing[2]} skipped"
    )


def test_what_apt_installed_is_told_by_transaction(tmp_path: Path) -> None:
    log = tmp_path / "var/log/apt/history.log"
    log.parent.mkdir(parents=True)
    log.write_text(
        "\nStart-Date: 2026-01-01  00:00:00\nCommandline: apt-get install gcc\n"
        "Install: gcc:amd64 (4:12.2.0-3), libc6-dev:amd64 (2.36, automatic)\nEnd-Date: 2026\n"
        "\nStart-Date: 2026-01-01  00:01:00\nCommandline: apt-get remove gcc\n"
        "Remove: gcc:amd64 (4:12.2.0-3)\nEnd-Date: 2026\n"
    )
    assert list(fresh.apt_history(tmp_path)) == ["apt installed 2 packages: apt-get install gcc"]
    assert list(fresh.apt_history(tmp_path / "none")) == []
