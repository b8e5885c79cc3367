"""The plugin in lists of networks that somebody else wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from testbed.model.errors import Error
from testbed.pods import networks

FLANNEL = {
    "cniVersion": "0.3.1",
    "name": "cbr0",
    "plugins": [{"type": "flannel"}, {"type": "portmap", "capabilities": {"portMappings": True}}],
}


def types(file: Path) -> list[str]:
    return [plugin["type"] for plugin in json.loads(file.read_text())["plugins"]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With two networks, of which runtimes read the first, and a file that is none."""
    (tmp_path / "10-flannel.conflist").write_text(json.dumps(FLANNEL))
    (tmp_path / "20-other.conflist").write_text(json.dumps(FLANNEL))
    (tmp_path / "05-old.conflist.bak").write_text("")
    return tmp_path


def test_the_plugin_comes_last_in_the_list_that_runtimes_read(folder: Path) -> None:
    first = folder / "10-flannel.conflist"
    first.chmod(0o600)
    assert networks.add(folder) == first
    changed = json.loads(first.read_text())
    assert changed == FLANNEL | {"plugins": [*FLANNEL["plugins"], networks.entry()]}
    assert first.stat().st_mode & 0o777 == 0o600
    assert types(folder / "20-other.conflist") == ["flannel", "portmap"]
    assert sorted(file.name for file in folder.iterdir()) == [
        "05-old.conflist.bak",
        "10-flannel.conflist",
        "20-other.conflist",
    ]


def test_a_list_that_has_it_stays_as_it_is(folder: Path) -> None:
    networks.add(folder)
    first = folder / "10-flannel.conflist"
    before = (first.read_text(), first.stat().st_ino)
    assert networks.add(folder) is None
    assert (first.read_text(), first.stat().st_ino) == before


def test_it_is_taken_out_of_all_lists(folder: Path) -> None:
    networks.add(folder)
    (folder / "00-before.conflist").write_text(json.dumps(FLANNEL))
    networks.add(folder)
    assert [file.name for file in networks.remove(folder)] == [
        "00-before.conflist",
        "10-flannel.conflist",
    ]
    for file in folder.glob("*.conflist"):
        assert json.loads(file.read_text()) == FLANNEL
    assert networks.remove(folder) == []


def test_a_file_that_no_runtime_can_read_keeps_it_in_no_list(folder: Path) -> None:
    networks.add(folder)
    for name, text in (("05-broken.conf", "{ not"), ("15-none.json", "[1]")):
        (folder / name).write_text(text)
    assert networks.remove(folder) == [folder / "10-flannel.conflist"]


def test_a_list_that_cannot_be_written_is_named(folder: Path) -> None:
    (folder / ".10-flannel.conflist.new").mkdir()
    with pytest.raises(Error, match=r"cannot write .*10-flannel.conflist: Is a directory"):
        networks.add(folder)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (None, "", "has no network for pods"),
        ("10-bridge.conf", '{"type": "bridge"}', "is one plugin, not a list"),
        ("10-bridge.json", "{", "cannot read"),
        ("10-bridge.conflist", "[]", "is no network configuration"),
        ("10-bridge.conflist", '{"plugins": {}}', "is no network configuration"),
    ],
)
def test_what_is_no_list_is_refused(
    tmp_path: Path, name: str | None, text: str, words: str
) -> None:
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises(Error, match=words):
        networks.add(tmp_path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ([text] if name else [])


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(Error, match="none: No such file or directory"):
        networks.add(tmp_path / "none")
