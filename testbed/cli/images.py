"""Command `image`: builds and inspects OSv images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from testbed import paths
from testbed.cli.common import Commands
from testbed.model.errors import Error


def add(commands: Commands) -> None:
    """Add the command `image`."""
    image = commands.add_parser(
        "image", help="compose and inspect images of OSv guests; others need none"
    )
    kinds = image.add_subparsers(dest="kind", required=True, metavar="build|inspect")
    build = kinds.add_parser("build", help="compose an image from a definition in osv/")
    build.set_defaults(call=_image_build)
    build.add_argument("definition", help="name in osv/, or a TOML file")
    build.add_argument("--output", "-o", type=Path, required=True, metavar="FILE")
    build.add_argument("--stock-hosts", action="store_true", help="leave out the hosts patch")
    inspect = kinds.add_parser("inspect", help="list an image's files")
    inspect.set_defaults(call=_image_inspect)
    inspect.add_argument("image", type=Path)
    inspect.add_argument("--json", action="store_true")


def _image_build(arguments: argparse.Namespace) -> int:
    from testbed.images import compose, kernels

    definition = compose.find_definition(arguments.definition)
    if definition is None:
        raise Error(
            f"no image definition {arguments.definition!r}",
            hint=f"a name in {paths.OSV}, or FILE.toml; OCI images are named in manifests instead",
        )
    kernel = kernels.find_osv(download=False)
    image = compose.build(definition, arguments.output, hosts_patch=not arguments.stock_hosts)
    print(f"{arguments.output}: {image.size_bytes} bytes, sha256 {image.sha256}")
    if kernel and (lacking := compose.lacking(definition, kernel)):
        print(f"functions that OSv {kernel.version} lacks: {' '.join(lacking)}")
    return 0


def _image_inspect(arguments: argparse.Namespace) -> int:
    from testbed.images import compose

    found = compose.inspect(arguments.image)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    print(f"{found['format']} image, {found['size_bytes']} bytes, sha256 {found['sha256']}")
    print(f"localhost is {' and '.join(found['localhost']) or 'unknown'}")
    for path, node in found["files"].items():
        target = f" -> {node['target']}" if "target" in node else ""
        print(f"{node.get('size_bytes', node['type']):>10}  {path}{target}")
    return 0
