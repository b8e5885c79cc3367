"""Packs and unpacks cpio archives ("newc"), the format of an initramfs.

Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path
from typing import Any

from testbed.images import rofs, rootfs
from testbed.images.rofs import Directory, Node, Symlink, Tree
from testbed.model.errors import Error

MAGIC = b"070701"
HEADER = struct.Struct("6s" + "8s" * 13)
END = "TRAILER!!!"
BLOCK = 512
"""Size in bytes of the blocks of which an archive has a whole number."""


def pack(tree: Tree) -> bytearray:
    """Pack an initramfs. All files are executable, owned by root and dated 1970.

    /dev/console is added, since the kernel opens it for init before anything is mounted.
    """
    archive = Archive()
    add = archive.add

    def walk(directory: Any, prefix: str) -> None:
        for name, node in sorted(directory.items()):
            path = f"{prefix}{name}"
            if isinstance(node, dict):
                add(path, stat.S_IFDIR | 0o755)
                walk(node, f"{path}/")
            elif isinstance(node, Symlink):
                add(path, stat.S_IFLNK | 0o777, node.target.encode())
            else:
                add(path, stat.S_IFREG | 0o755, node)

    walk(rofs.nested(tree), "")
    add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    return archive.end()


def pack_folder(root: Path) -> bytearray:
    """Pack a folder, with owners and permissions, dated 1970. Hard links become files.

    An initramfs may have several archives, one behind the other. Raises `Error` if it is too large.
    """
    archive, names = Archive(), rootfs.files(root)
    rootfs.check_size((root / name).lstat().st_size for name in names)
    for name in names:
        found = (root / name).lstat()
        data = b""
        if stat.S_ISREG(found.st_mode):
            data = (root / name).read_bytes()
        elif stat.S_ISLNK(found.st_mode):
            data = os.fsencode((root / name).readlink())
        device = (os.major(found.st_rdev), os.minor(found.st_rdev))
        archive.add(name, found.st_mode, data, device, (found.st_uid, found.st_gid))
    return archive.end()


class Archive:
    """A cpio archive that is being written."""

    def __init__(self) -> None:
        self._data, self._files = bytearray(), 0

    def add(
        self,
        name: str,
        mode: int,
        data: bytes = b"",
        device: tuple[int, int] = (0, 0),
        owner: tuple[int, int] = (0, 0),
    ) -> None:
        """Add a file. `data` of a symbolic link is its target."""
        self._files += 1
        encoded = os.fsencode(name) + b"\0"
        sizes = (len(data), 0, 0, *device, len(encoded), 0)
        fields = (self._files, mode, *owner, 1, 0, *sizes)
        self._data.extend(MAGIC + b"".join(b"%08X" % value for value in fields))
        for part in (encoded, data):
            self._data.extend(part)
            self._data.extend(bytes(-len(self._data) % 4))

    def end(self) -> bytearray:
        """Return the whole archive, in blocks. It is not copied, as it may be large."""
        self.add(END, 0)
        self._data.extend(bytes(-len(self._data) % BLOCK))
        return self._data


def unpack(archive: bytes) -> dict[str, Node]:
    """Unpack an initramfs, without device files. Raises `Error` if it is damaged.

    Files of a later archive replace those of an earlier one.
    """
    tree: dict[str, Node] = {}
    offset, ended = 0, False
    try:
        while not ended or offset < len(archive):
            magic, *fields = HEADER.unpack_from(archive, offset)
            if magic != MAGIC:
                raise ValueError(f"no header at byte {offset}")
            values = [int(value, 16) for value in fields]
            mode, size, name_size = values[1], values[6], values[11]
            offset += HEADER.size
            name = os.fsdecode(archive[offset : offset + name_size - 1])
            offset += name_size + -(offset + name_size) % 4
            data = archive[offset : offset + size]
            if len(data) != size:
                raise ValueError(f"{name} is cut off")
            offset += size + -(offset + size) % 4
            ended = name == END
            if ended:
                offset += -offset % BLOCK
            elif stat.S_ISDIR(mode):
                tree[f"/{name}"] = Directory()
            elif stat.S_ISLNK(mode):
                tree[f"/{name}"] = Symlink(os.fsdecode(data))
            elif stat.S_ISREG(mode):
                tree[f"/{name}"] = data
        return tree
    except (struct.error, ValueError) as e:
        raise Error(f"initramfs is damaged: {e}") from e
