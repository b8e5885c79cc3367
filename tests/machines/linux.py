"""Downloads Debian's kernels of any suite, with their modules; they are unpacked, not installed.

`kernel` gives the newest generic kernel of some suites, from the cache folder, or else from the
archives that a Debian root of this machine uses. Kernels are downloaded anew each week.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from testbed.host.cache import cache_folder
from testbed.images.kernels import LinuxKernel
from testbed.model.errors import Error
from tests.machines import roots

SUITES = {
    "5.10": ("bullseye",),
    "6.1": ("bookworm",),
    "6.12": ("trixie",),
    "newest": ("trixie-backports", "sid"),
}
"""Name of a kernel → the suites that have it."""

_FETCHED_BY = "bookworm"
"""Suite whose root downloads kernels; its keyring has the keys of older and newer suites."""

# Runs in a temporary root, and leaves /kernel/lib/modules/RELEASE there.
_FETCH = """
set -e
apt-get -qq update
apt-get -qq install --yes --no-install-recommends kmod
read -r _ archive _ < <(grep '^deb ' /etc/apt/sources.list)
rm -f /etc/apt/sources.list.d/*
for suite in {suites}; do echo "deb $archive $suite main"; done >/etc/apt/sources.list
dpkg --add-architecture {arch}
apt-get -qq update
apt-cache show linux-image-{arch}:{arch} | awk '
    /^Version:/ {{ version = $2 }}
    /^Depends:/ {{ for (n = 2; n <= NF; n++) if ($n ~ /^linux-image-[0-9]/) print version, $n }}
    ' >/versions
newest= image=
while read -r version name; do
    if [ -z "$newest" ] || dpkg --compare-versions "$version" gt "$newest"; then
        newest=$version image=$name
    fi
done </versions
# Since 6.17 the image and its modules are separate packages, which this package depends on.
parts=$(apt-cache depends --important "$image:{arch}" |
    sed -nE 's/^ *Depends: (linux-(binary|modules)-[^: ]+).*/\\1:{arch}/p')
mkdir /kernel
cd /kernel
apt-get -qq -o APT::Sandbox::User=root download "$image:{arch}" $parts
for package in *.deb; do dpkg-deb --extract "$package" .; rm "$package"; done
if [ ! -e lib ]; then ln -s usr/lib lib; fi
release=$(ls lib/modules)
if [ ! -e "lib/modules/$release/vmlinuz" ]; then
    mv "boot/vmlinuz-$release" "lib/modules/$release/vmlinuz"
fi
depmod -b /kernel "$release"
"""


def kernel(name: str, arch: str = "") -> LinuxKernel:
    """The kernel with this name in `SUITES`. Raises `Error` if it cannot be downloaded."""
    arch = arch or roots.architecture()
    folder = cache_folder() / "debian-kernels" / f"{name}-{arch}-{roots.week()}"
    with roots.lock(f"kernel-{name}-{arch}"):
        if not folder.exists():
            _fetch(SUITES[name], arch, folder)
            for old in folder.parent.glob(f"{name}-{arch}-*"):
                if old != folder:
                    shutil.rmtree(old)
    (image,) = folder.glob("*/vmlinuz")
    return LinuxKernel(
        path=image,
        modules=image.parent,
        release=image.parent.name,
        sha256=hashlib.sha256(image.read_bytes()).hexdigest(),
        source=f"Debian {', '.join(SUITES[name])}",
    )


def _fetch(suites: tuple[str, ...], arch: str, folder: Path) -> None:
    """Download a kernel to `folder`/RELEASE, with image and modules, atomically."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    said: list[str] = []
    with roots.copy(roots.base(_FETCHED_BY)) as root:
        script = _FETCH.format(suites=" ".join(suites), arch=arch)
        if roots.run(root, ["bash", "-c", script], on_line=said.append):
            last = (said or ["it said nothing"])[-1]
            raise Error(
                f"no kernel of {' or '.join(suites)} for {arch}: {last}", hint="check the network"
            )
        (root / "kernel/lib/modules").resolve().rename(folder)
