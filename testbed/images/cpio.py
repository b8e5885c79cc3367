"""Packs and unpacks cpio archives ("newc"), the format of an initramfs.

Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
import struct
from typing import Any

from testbed.images import rofs
from testbed.images.rofs import Directory, Node, Symlink, Tree
from testbed.model.errors import Error

MAGIC = b"070701"
HEADER = struct.Struct("6s" + "8s" * 13)
END = "TRAILER!!!"


def pack(tree: Tree) -> bytes:
    """Pack an initramfs. All files are executable, owned by root and dated 1970.

    /dev/console is added, since the kernel opens it for /init before anything is mounted.
    """
    archive = bytearray()

    def add(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        encoded = name.encode() + b"\0"
        fields = (len(archive), mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        archive.extend(MAGIC + b"".join(b"%08X" % value for value in fields))
        for part in (encoded, data):
            archive.extend(part)
            archive.extend(bytes(-len(archive) % 4))

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
    add(END, 0)
    return bytes(archive.ljust(-(-len(archive) // 512) * 512, b"\0"))


def unpack(archive: bytes) -> dict[str, Node]:
    """Unpack an initramfs, without device files. Raises `Error` if it is damaged."""
    tree: dict[str, Node] = {}
    offset = 0
    try:
        while True:
            magic, *fields = HEADER.unpack_from(archive, offset)
            if magic != MAGIC:
                raise ValueError(f"no header at byte {offset}")
            values = [int(value, 16) for value in fields]
            mode, size, name_size = values[1], values[6], values[11]
            offset += HEADER.size
            name = archive[offset : offset + name_size - 1].decode()
            offset += name_size + -(offset + name_size) % 4
            data = archive[offset : offset + size]
            if len(data) != size:
                raise ValueError(f"{name} is cut off")
            offset += size + -(offset + size) % 4
            if name == END:
                return tree
            if stat.S_ISDIR(mode):
                tree[f"/{name}"] = Directory()
            elif stat.S_ISLNK(mode):
                tree[f"/{name}"] = Symlink(data.decode())
            elif stat.S_ISREG(mode):
                tree[f"/{name}"] = data
    except (struct.error, ValueError) as e:
        raise Error(f"initramfs is damaged: {e}") from e
