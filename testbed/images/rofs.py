"""Packs and unpacks disks with OSv's read-only file system (ROFS), in memory.

The disk begins with an MBR, whose second slot is the ROFS partition (OSv counts slots from 0 and
mounts `/dev/vblk0.1`). The ROFS has a super block, file data, directory entries, symlinks and
inodes, in blocks of 512 bytes, little endian. Source: OSv's `fs/rofs/rofs.hh`. It stores no times,
permissions or owners.

Both functions are pure, and `pack` is deterministic: entries are sorted. `compose` decides which
files an image has.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from testbed.model.errors import Error

BLOCK = 512
MAGIC = 0xDEADBEAD
VERSION = 1
NAME_MAX = 255

_SUPER = struct.Struct("<8Q")
_SLOT = struct.Struct("<8B2L")
_SLOT_OFFSET = 0x1CE  # slot 1; slot 0 (0x1be) stays empty, it is the boot part of OSv's own images
_MBR_SIGNATURE = b"\x55\xaa"
_ENTRY = struct.Struct("<QH")
_SYMLINK = struct.Struct("<H")
_INODE = struct.Struct("<LLQQQ")
_DIRECTORY, _FILE, _LINK = 0x4000, 0x8000, 0xA000


@dataclass(frozen=True)
class Symlink:
    """A symbolic link."""

    target: str


@dataclass(frozen=True)
class Directory:
    """An empty directory, such as a mount point. Others follow from the paths in them."""


Node = bytes | Symlink | Directory
Tree = Mapping[str, Node]
"""Absolute path (`/etc/hosts`) → node. Parent directories need not be named."""

_Nested = dict[str, "bytes | Symlink | _Nested"]


def nested(tree: Tree) -> _Nested:
    """Convert a tree to nested dictionaries, with names sorted.

    Raises `Error` for a path that is not absolute and plain, or that runs through a file.
    """
    root: _Nested = {}
    for path, node in sorted(tree.items()):
        *parents, name = _parts(path)
        directory = root
        for parent in parents:
            child = directory.setdefault(parent, {})
            if not isinstance(child, dict):
                raise Error(f"{path}: {parent} is not a directory")
            directory = child
        if isinstance(node, Directory):
            if not isinstance(directory.setdefault(name, {}), dict):
                raise Error(f"{path} is there already, and no directory")
        elif name in directory:
            raise Error(f"{path} is there already")
        else:
            directory[name] = node
    return root


def _parts(path: str) -> list[str]:
    root, *parts = path.split("/")
    if root or not parts or any(p in ("", ".", "..") or "\0" in p for p in parts):
        raise Error(f"{path!r} is not an absolute, plain path")
    for part in parts:
        if len(os.fsencode(part)) > NAME_MAX:
            raise Error(f"{path}: name is longer than {NAME_MAX} bytes")
    return parts


def pack(tree: Tree) -> bytes:
    """Pack a tree into the bytes of a disk. Raises `Error` for a tree that is not valid."""
    entries: list[bytes] = []
    symlinks: list[bytes] = []
    inodes: list[tuple[int, int, int]] = []
    data: list[bytes] = []
    next_block = 1

    # Breadth first, so that a directory's entries are contiguous, and the root is inode 1.
    queue: deque[bytes | Symlink | _Nested] = deque([nested(tree)])
    while queue:
        node = queue.popleft()
        if isinstance(node, dict):
            inodes.append((_DIRECTORY, len(entries), len(node)))
            for name, child in sorted(node.items()):
                queue.append(child)
                encoded = os.fsencode(name)
                entries.append(_ENTRY.pack(len(inodes) + len(queue), len(encoded)) + encoded)
        elif isinstance(node, Symlink):
            inodes.append((_LINK, len(symlinks), 1))
            target = os.fsencode(node.target)
            symlinks.append(_SYMLINK.pack(len(target)) + target)
        else:
            inodes.append((_FILE, next_block if node else 0, len(node)))
            data += (node, bytes(-len(node) % BLOCK))
            next_block += _blocks(len(node))

    table = b"".join(
        _INODE.pack(mode, 0, number, offset, count)
        for number, (mode, offset, count) in enumerate(inodes, 1)
    )
    structures = b"".join((*entries, *symlinks, table))
    structures += bytes(-len(structures) % BLOCK)
    blocks = next_block + len(structures) // BLOCK
    superblock = _SUPER.pack(
        MAGIC,
        VERSION,
        BLOCK,
        next_block,
        len(structures) // BLOCK,
        len(entries),
        len(symlinks),
        len(inodes),
    )
    # Type 0x83 (Linux) and CHS sector 1: OSv skips a slot that has a zero in either.
    slot = _SLOT.pack(0, 0, 1, 0, 0x83, 0, 1, 0, 1, blocks)
    mbr = (bytes(_SLOT_OFFSET) + slot).ljust(BLOCK - 2, b"\0") + _MBR_SIGNATURE
    return b"".join((mbr, superblock.ljust(BLOCK, b"\0"), *data, structures))


def unpack(disk: bytes) -> dict[str, Node]:
    """Unpack the tree of a disk. Only empty directories have entries of their own.

    Raises `Error` with the reason if OSv could not read the disk.
    """
    fs = _partition(disk)
    if len(fs) < BLOCK:
        raise Error("no room for a ROFS super block")
    magic, version, block, first, blocks, n_entries, n_symlinks, n_inodes = _SUPER.unpack_from(fs)
    if magic != MAGIC:
        raise Error(f"not a ROFS: magic is {magic:#x}, not {MAGIC:#x}")
    if (version, block) != (VERSION, BLOCK):
        raise Error(f"ROFS version {version} with blocks of {block} bytes is not known")
    area = fs[first * BLOCK : (first + blocks) * BLOCK]
    if len(area) != blocks * BLOCK or not blocks:
        raise Error("ROFS is cut off: its structures are beyond its end")
    try:
        entries, offset = [], 0
        for _ in range(n_entries):
            number, length = _ENTRY.unpack_from(area, offset)
            offset += _ENTRY.size
            entries.append((number, _text(area, offset, length)))
            offset += length
        symlinks = []
        for _ in range(n_symlinks):
            (length,) = _SYMLINK.unpack_from(area, offset)
            offset += _SYMLINK.size
            symlinks.append(_text(area, offset, length))
            offset += length
        inodes = [_INODE.unpack_from(area, offset + i * _INODE.size) for i in range(n_inodes)]
    except (struct.error, UnicodeDecodeError) as e:
        raise Error(f"ROFS structures are damaged: {e}") from e
    return _walk(fs, entries, symlinks, inodes)


def _partition(disk: bytes) -> memoryview:
    if len(disk) < BLOCK or disk[BLOCK - 2 : BLOCK] != _MBR_SIGNATURE:
        raise Error("not a disk image: it has no MBR signature")
    slot = _SLOT.unpack_from(disk, _SLOT_OFFSET)
    start_sector, kind, lba, sectors = slot[2], slot[4], slot[8], slot[9]
    if kind == 0 or start_sector & 0x3F == 0:
        raise Error("the MBR has no partition in its second slot (OSv's vblk0.1)")
    if (lba + sectors) * BLOCK > len(disk):
        raise Error(f"disk image is cut off: {len(disk)} of {(lba + sectors) * BLOCK} bytes")
    return memoryview(disk)[lba * BLOCK : (lba + sectors) * BLOCK]


def _text(area: memoryview, offset: int, length: int) -> str:
    if offset + length > len(area):
        raise struct.error(f"a name of {length} bytes goes beyond the end")
    return os.fsdecode(area[offset : offset + length].tobytes())


def _walk(
    fs: memoryview,
    entries: list[tuple[int, str]],
    symlinks: list[str],
    inodes: list[tuple[int, ...]],
) -> dict[str, Node]:
    tree: dict[str, Node] = {}
    seen: set[int] = set()

    def visit(path: str, number: int) -> None:
        if not 1 <= number <= len(inodes):
            raise Error(f"{path or '/'}: inode {number} of {len(inodes)} does not exist")
        mode, _, own_number, offset, count = inodes[number - 1]
        if own_number != number:
            raise Error(f"{path or '/'}: inode {number} says that it is {own_number}")
        if mode & 0xF000 == _DIRECTORY:
            if number in seen:
                raise Error(f"{path or '/'}: directory is its own ancestor, or has two parents")
            seen.add(number)
            if offset + count > len(entries):
                raise Error(f"{path or '/'}: entries are beyond the table's end")
            if not count and path:
                tree[path] = Directory()
            for child, name in entries[offset : offset + count]:
                below = f"{path}/{name}"
                _parts(below)
                if "/" in name or below in tree:
                    raise Error(f"{below} is not a name, or is there twice")
                visit(below, child)
        elif mode & 0xF000 == _LINK:
            if offset >= len(symlinks):
                raise Error(f"{path}: target is beyond the table's end")
            tree[path] = Symlink(symlinks[offset])
        elif mode & 0xF000 == _FILE:
            start = offset * BLOCK
            if start + count > len(fs):
                raise Error(f"{path}: data is beyond the end of the file system")
            tree[path] = bytes(fs[start : start + count])
        else:
            raise Error(f"{path or '/'}: mode {mode:#x} is none of directory, file, symlink")

    visit("", 1)
    return tree


def _blocks(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK)
