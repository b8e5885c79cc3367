"""OCI images, as umoci makes them."""

from __future__ import annotations

import subprocess
from pathlib import Path


def image(layout: Path, root: Path, *config: str) -> str:
    """Make an image layout with one image, tagged v1, of a root file system.

    `config`: options of `umoci config` without their prefix: `entrypoint=/bin/sh`. Returns the
    image's name as a manifest has it.
    """
    tagged = f"{layout}:v1"
    for command in (
        ("init", "--layout", str(layout)),
        ("new", "--image", tagged),
        ("insert", "--image", tagged, str(root), "/"),
        ("config", "--image", tagged, *(f"--config.{option}" for option in config)),
    ):
        subprocess.run(["umoci", *command], check=True, capture_output=True)
    return f"oci:{tagged}"
