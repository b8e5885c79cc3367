"""Inventories are read strictly: what is wrong is refused by file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.model.errors import Error
from testbed.remote import inventory, package

GOOD = """
known_hosts = "known"

[[hosts]]
name = "kvm1"
address = "192.0.2.11"
labels = ["kvm"]

[[hosts]]
name = "kvm2"
address = "kvm2.example.org"
port = 2222
user = "measure"
key = "id"
sudo = true
labels = ["kvm", "lab"]
cpus = [2, 3]
directory = "/srv/testbed"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "known").touch()
    (tmp_path / "id").touch()
    return tmp_path


def load(folder: Path, text: str) -> tuple[inventory.Host, ...]:
    (folder / "hosts.toml").write_text(text)
    return inventory.load(folder / "hosts.toml")


def test_what_is_left_out_has_a_default_and_paths_are_beside_the_file(folder: Path) -> None:
    first, second = load(folder, GOOD)
    assert first == inventory.Host("kvm1", "192.0.2.11", folder / "known", labels=("kvm",))
    assert second == inventory.Host(
        "kvm2",
        "kvm2.example.org",
        folder / "known",
        2222,
        "measure",
        folder / "id",
        True,
        ("kvm", "lab"),
        (2, 3),
        "/srv/testbed",
    )


def test_hosts_are_chosen_by_name_or_label(folder: Path) -> None:
    hosts = load(folder, GOOD)
    assert inventory.choose(hosts, []) == hosts
    assert inventory.choose(hosts, ["lab", "kvm1"]) == hosts
    assert inventory.choose(hosts, ["lab"]) == hosts[1:]
    with pytest.raises(Error, match="no host has the name or label 'kvm3'"):
        inventory.choose(hosts, ["kvm1", "kvm3"])


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('name = "kvm1"', 'nam = "kvm1"', "[[hosts]] 1: nam: no such key"),
        ('name = "kvm1"', "", "[[hosts]] 1: name: expected a word"),
        ('name = "kvm1"', 'name = "../kvm1"', "[[hosts]] 1: name: expected a word"),
        ('name = "kvm1"', 'name = "kvm2"', "two hosts are called kvm2"),
        ("port = 2222", "port = 0", "[[hosts]] 2: port: expected a port, found 0"),
        ("port = 2222", "port = true", "[[hosts]] 2: port: expected a port, found True"),
        ("sudo = true", 'sudo = "yes"', "[[hosts]] 2: sudo: expected true or false"),
        ("[2, 3]", '["2"]', "[[hosts]] 2: cpus: expected a list of numbers of CPUs"),
        ('"/srv/testbed"', '"testbed"', "[[hosts]] 2: directory: expected an absolute path"),
        ('key = "id"', 'key = "none"', "[[hosts]] 2: key: no file"),
        ('known_hosts = "known"', "known_host = 1", "known_host: no such key"),
        ("[[hosts]]", "[hosts]", "not TOML"),
        (GOOD, "", "hosts: expected one or more [[hosts]] tables, found nothing"),
    ],
)
def test_bad_input_is_refused_with_file_and_key(
    folder: Path, old: str, new: str, says: str
) -> None:
    with pytest.raises(Error) as caught:
        load(folder, GOOD.replace(old, new))
    assert str(folder / "hosts.toml") in str(caught.value)
    assert says in str(caught.value)


def test_an_inventory_that_is_missing_is_told_with_an_example(tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"none\.toml: No such file.*hosts\.example\.toml"):
        inventory.load(tmp_path / "none.toml")


def test_the_example_is_an_inventory() -> None:
    hosts = inventory.load(Path(__file__).parents[2] / "experiments/hosts.example.toml")
    assert [host.name for host in hosts] == ["kvm1", "kvm2"]


def test_a_package_is_known_by_its_content_and_leaves_out_what_hosts_do_not_need() -> None:
    carried = package.package()
    assert {"bootstrap", "testbed/campaigns/worker.py", "bpf/capture.c", "agent/main.c"} <= set(
        carried.files
    )
    assert not any(name.startswith(("tests/", "paper/", ".git/")) for name in carried.files)
    assert len(carried.sha256) == len(carried.environment) == 64
