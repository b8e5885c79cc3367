"""ROFS: what is packed is read back, the same tree gives the same bytes, damage is named."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.images import rofs
from testbed.images.rofs import BLOCK, Directory, Node, Symlink
from testbed.model.errors import Error

TREE: dict[str, Node] = {
    "/agent": b"\x7fELF" + bytes(1000),
    "/etc/hosts": b"169.254.77.1 localhost\n",
    "/etc/empty": b"",
    "/dev": Directory(),
    "/usr/lib/libx.so.1": b"x" * BLOCK,
    "/usr/lib/libx.so": Symlink("libx.so.1"),
}

names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20)
plain = names.filter(lambda name: name not in (".", ".."))
leaves: st.SearchStrategy[object] = st.one_of(
    st.binary(max_size=3 * BLOCK), st.builds(Symlink, names), st.just({})
)


def flat(directory: dict[str, object], prefix: str = "") -> dict[str, Node]:
    """Nested dictionaries as a tree, directories named only where they are empty."""
    tree: dict[str, Node] = {}
    for name, node in directory.items():
        if isinstance(node, dict):
            tree |= flat(node, f"{prefix}/{name}") or {f"{prefix}/{name}": Directory()}
        else:
            assert isinstance(node, bytes | Symlink)
            tree[f"{prefix}/{name}"] = node
    return tree


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(plain, st.recursive(leaves, lambda n: st.dictionaries(plain, n))))
def test_any_tree_is_read_back_as_it_was_packed(directory: dict[str, object]) -> None:
    tree = flat(directory)
    assert rofs.unpack(rofs.pack(tree)) == tree


def test_same_tree_in_another_order_gives_the_same_bytes() -> None:
    assert rofs.pack(TREE) == rofs.pack(dict(reversed(TREE.items())))


def test_disk_is_described_by_the_second_slot_of_the_mbr() -> None:
    disk = rofs.pack(TREE)
    assert len(disk) % BLOCK == 0
    assert disk[0x1BE:0x1CE] == bytes(16)
    assert disk[510:512] == b"\x55\xaa"
    kind, (lba, sectors) = disk[0x1CE + 4], struct.unpack_from("<2L", disk, 0x1CE + 8)
    assert (kind, lba, sectors) == (0x83, 1, len(disk) // BLOCK - 1)


def test_root_is_inode_one_and_files_start_on_blocks() -> None:
    fs = rofs.pack(TREE)[BLOCK:]
    _, _, _, first, _, entries, symlinks, inodes = struct.unpack_from("<8Q", fs)
    # root, dev, etc, usr, usr/lib and five files or links
    assert (entries, symlinks, inodes) == (9, 1, 10)
    assert TREE["/agent"] == fs[BLOCK : BLOCK + 1004]
    area = fs[first * BLOCK :]
    table = area[area.index(struct.pack("<LLQQ", 0x4000, 0, 1, 0)) :]
    assert struct.unpack_from("<Q", table, 24) == (4,)  # entries of the root


@pytest.mark.parametrize(
    ("tree", "complaint"),
    [
        ({"agent": b""}, "not an absolute"),
        ({"/a/../b": b""}, "not an absolute"),
        ({"/": b""}, "not an absolute"),
        ({"/" + "x" * 256: b""}, "longer than 255"),
        ({"/a": b"", "/a/b": b""}, "a is not a directory"),
    ],
)
def test_tree_that_cannot_be_is_refused(tree: dict[str, Node], complaint: str) -> None:
    with pytest.raises(Error, match=complaint):
        rofs.pack(tree)


def damaged(offset: int, data: bytes) -> bytes:
    disk = bytearray(rofs.pack(TREE))
    disk[offset : offset + len(data)] = data
    return bytes(disk)


def inode(number: int) -> int:
    """Offset of an inode's number on the disk."""
    disk = rofs.pack(TREE)
    first = struct.unpack_from("<Q", disk, BLOCK + 24)[0]
    table = disk.index(struct.pack("<LLQQ", 0x4000, 0, 1, 0), (first + 1) * BLOCK)
    return table + 32 * (number - 1) + 8


@pytest.mark.parametrize(
    ("disk", "complaint"),
    [
        (b"", "no MBR signature"),
        (bytes(4096), "no MBR signature"),
        (damaged(0x1CE + 4, b"\0"), "no partition in its second slot"),
        (rofs.pack(TREE)[:-BLOCK], "cut off"),
        (damaged(BLOCK, b"ELF!"), "not a ROFS"),
        (damaged(BLOCK + 8, b"\2"), "version 2"),
        (damaged(BLOCK + 24, b"\xff\xff"), "beyond its end"),
        (damaged(BLOCK + 40, b"\xff\xff"), "damaged"),
        (damaged(inode(2), b"\x07"), "says that it is 7"),
        (damaged(inode(2) + 8, b"\xff"), "beyond"),
        (damaged(inode(2) - 8, b"\x00\x10"), "mode 0x1000 is none of"),
    ],
)
def test_damaged_disk_is_refused_in_words(disk: bytes, complaint: str) -> None:
    with pytest.raises(Error, match=complaint):
        rofs.unpack(disk)


def test_directory_loop_is_found() -> None:
    disk = bytearray(rofs.pack({"/a/b": Directory()}))
    first = struct.unpack_from("<Q", disk, BLOCK + 24)[0]
    entry_of_b = (first + 1) * BLOCK + 11
    assert disk[entry_of_b + 10 : entry_of_b + 11] == b"b"
    struct.pack_into("<Q", disk, entry_of_b, 2)  # b is a itself
    with pytest.raises(Error, match="its own ancestor"):
        rofs.unpack(bytes(disk))
