"""Kernels: the order they are looked for in, what is refused, and the download over real HTTP."""

from __future__ import annotations

import gzip
import hashlib
import re
import shutil
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from testbed.images import kernels
from testbed.model.errors import Error


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and an environment that names no kernel and no proxy."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("TESTBED_OSV_KERNEL", "http_proxy", "HTTP_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


def make_kernel(path: Path, version: str = "v0.57.0-398-g0e34e4dc") -> Path:
    """An ELF file that says of itself what an OSv kernel says."""
    text = f"OSv {version}\\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["cc", "-x", "c", "-", "-o", path],
        check=True,
        text=True,
        input=f'const char text[] = "{text}"; int main(void) {{ return text[0]; }}',
    )
    return path


def in_cache(cache: Path, flavor: str) -> Path:
    return make_kernel(cache / f"testbed/kernels/osv-{flavor}/kernel.elf")


def test_what_the_kernel_says_of_itself_is_told(tmp_path: Path) -> None:
    for version in ("v0.57.0-398-g0e34e4dc", "v0.57.0"):
        kernel = kernels.read_osv(make_kernel(tmp_path / "k", version), "here")
        assert kernel.version == version
        assert not kernel.listed
        assert kernel.sha256 == hashlib.sha256((tmp_path / "k").read_bytes()).hexdigest()


@pytest.mark.parametrize("flavor", kernels.FLAVORS)
def test_real_kernel_is_known_for_what_it_is(flavor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    kernel = kernels.find_osv(flavor=flavor, download=False)
    if kernel is None:
        pytest.skip(f"no OSv kernel of flavor {flavor} here")
    assert re.fullmatch(r"v\d+\.\d+\.\d+(-\d+-g[0-9a-f]+)?", kernel.version)


def test_order_is_option_environment_tree_cache(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = partial(kernels.find_osv, download=False)
    assert find() is None
    master = in_cache(own_cache, "master")
    assert getattr(find(), "path", None) == master
    ipv6 = in_cache(own_cache, "ipv6")
    assert getattr(find(), "path", None) == ipv6
    assert getattr(find(flavor="master"), "path", None) == master

    built = make_kernel(tmp_path / "osv/build/release.x64/loader.elf")
    monkeypatch.setenv("TESTBED_OSV_KERNEL", str(tmp_path / "osv"))
    assert getattr(find(), "path", None) == built
    stripped = make_kernel(tmp_path / "osv/build/release.x64/loader-stripped.elf")
    assert getattr(find(), "path", None) == stripped
    other = make_kernel(tmp_path / "other.elf")
    monkeypatch.setenv("TESTBED_OSV_KERNEL", str(other))
    assert getattr(find(), "path", None) == other
    found = find(tmp_path / "osv")
    assert found
    assert found.path == stripped
    assert "--osv-kernel" in found.source


def test_named_file_that_is_no_kernel_is_refused_and_not_passed_over(
    tmp_path: Path, own_cache: Path
) -> None:
    in_cache(own_cache, "master")
    (tmp_path / "text").write_text("OSv v0.57.0")
    for path, complaint in (
        (tmp_path / "nothing", "No such file"),
        (tmp_path / "text", "not an ELF file"),
        (Path("/bin/true"), "is no OSv kernel"),
        (tmp_path, r"has no build/release\.x64"),
    ):
        with pytest.raises(Error, match=complaint):
            kernels.find_osv(path)
    foreign = make_kernel(tmp_path / "foreign")
    data = bytearray(foreign.read_bytes())
    data[18] = 183
    foreign.write_bytes(data)
    with pytest.raises(Error, match="is for aarch64"):
        kernels.find_osv(foreign)


def test_on_another_machine_than_osvs_none_is_looked_for_and_a_named_one_refused(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_cache(own_cache, "master")
    named = make_kernel(tmp_path / "named")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert kernels.find_osv() is None
    with pytest.raises(Error, match="OSv guests need an x86_64 machine, this one is aarch64"):
        kernels.find_osv(named)
    with pytest.raises(Error, match="this one is aarch64"):
        kernels.download_osv("master")


def test_unknown_flavor_is_refused() -> None:
    with pytest.raises(Error, match="no OSv kernel flavor 'ipv5'"):
        kernels.find_osv(flavor="ipv5")


# --- download -------------------------------------------------------------------------------


class Quiet(SimpleHTTPRequestHandler):
    """Files of a folder."""

    def log_message(self, format: str, *args: object) -> None:
        pass


class Proxy(BaseHTTPRequestHandler):
    """Fetches what it is asked for, by absolute URL, and remembers it."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(self.path.replace("osv.invalid", "127.0.0.1")) as response:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(response.read())

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Waits for its threads when it is closed."""

    daemon_threads = False


@contextmanager
def served(handler: Any) -> Iterator[str]:
    """An HTTP server on loopback: `127.0.0.1:PORT`."""
    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def published(tmp_path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """A server with one published kernel: its kernels.toml, and the kernel's bytes."""
    kernel = make_kernel(tmp_path / "built").read_bytes()
    asset = tmp_path / "www/ci-master-latest/loader.elf.gz"
    asset.parent.mkdir(parents=True)
    asset.write_bytes(gzip.compress(kernel))
    with served(partial(Quiet, directory=str(tmp_path / "www"))) as address:
        entry = {"release": "ci-master-latest", "asset": "loader.elf.gz"}
        yield {"url": f"http://{address}", "flavor": {"master": entry}}, kernel


def test_published_kernel_comes_into_the_cache_and_shows_progress(
    published: tuple[dict[str, Any], bytes], own_cache: Path
) -> None:
    listing, content = published
    seen: list[tuple[int, int | None]] = []
    kernel = kernels.download_osv("master", listing=listing, progress=lambda *a: seen.append(a))
    assert kernel.path.read_bytes() == content
    assert kernel.path.is_relative_to(own_cache)
    size = len(gzip.compress(content))
    assert seen[-1] == (size, size)
    again = kernels.find_osv(download=False)
    assert again
    assert again.path == kernel.path
    assert listing["url"] in again.source
    assert {p.name for p in kernel.path.parents[1].iterdir()} == {"osv-master", "releases.json"}


def test_a_release_that_has_moved_is_told_also_after_its_kernel_left_the_cache(
    published: tuple[dict[str, Any], bytes], tmp_path: Path
) -> None:
    listing, _ = published
    said: list[str] = []
    fetch = partial(kernels.download_osv, "master", listing=listing, say=said.append)
    before = fetch()
    assert fetch() == before
    assert not said
    shutil.rmtree(before.path.parent)
    moved = make_kernel(tmp_path / "moved", "v0.58.0").read_bytes()
    asset = tmp_path / "www/ci-master-latest/loader.elf.gz"
    asset.write_bytes(gzip.compress(moved))
    after = fetch()
    assert after.version == "v0.58.0"
    [line] = said
    assert f"{listing['url']}/ci-master-latest/loader.elf.gz has moved" in line
    assert after.sha256[:12] in line
    assert before.sha256[:12] in line
    fetch()
    assert len(said) == 1


def test_download_goes_through_the_proxy(
    published: tuple[dict[str, Any], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    listing, content = published
    Proxy.asked = []
    with served(Proxy) as proxy:
        monkeypatch.setenv("http_proxy", f"http://{proxy}")
        url = listing["url"].replace("127.0.0.1", "osv.invalid")  # only the proxy knows it
        kernel = kernels.download_osv("master", listing={**listing, "url": url})
    assert kernel.path.read_bytes() == content
    assert Proxy.asked == [f"{url}/ci-master-latest/loader.elf.gz"]


def test_checksum_decides(published: tuple[dict[str, Any], bytes], own_cache: Path) -> None:
    listing, content = published
    entry = listing["flavor"]["master"]
    entry["sha256"] = "0" * 64
    with pytest.raises(Error, match="not 000"):
        kernels.download_osv("master", listing=listing)
    assert not list(own_cache.rglob("kernel.elf"))
    entry["sha256"] = hashlib.sha256(content).hexdigest()
    kernels.download_osv("master", listing=listing)


def test_what_is_not_what_it_should_be_leaves_nothing_behind(
    published: tuple[dict[str, Any], bytes], own_cache: Path, tmp_path: Path
) -> None:
    listing, content = published
    asset = tmp_path / "www/ci-master-latest/loader.elf.gz"
    asset.write_bytes(gzip.compress(Path("/bin/true").read_bytes()))
    with pytest.raises(Error, match="is no OSv kernel"):
        kernels.download_osv("master", listing=listing)
    asset.write_bytes(gzip.compress(content)[:-100])
    with pytest.raises(Error, match="damaged"):
        kernels.download_osv("master", listing=listing)
    asset.unlink()
    with pytest.raises(Error, match="404"):
        kernels.download_osv("master", listing=listing)
    assert not list(own_cache.rglob("*.elf"))


def test_without_a_network_there_is_soon_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
    assert kernels.find_osv() is None
    with pytest.raises(kernels.Unreachable, match="cannot download"):
        kernels.download_osv("master")


# --- Linux ----------------------------------------------------------------------------------


def test_newest_linux_kernel_of_the_cache_is_taken(own_cache: Path) -> None:
    for release in ("6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64"):
        boot = own_cache / "testbed/kernels/linux" / f"linux-image-{release}" / "boot"
        boot.mkdir(parents=True)
        (boot / f"vmlinuz-{release}").write_bytes(b"kernel")
    kernel = kernels.linux_kernel(download=False)
    assert kernel.release == "6.1.0-56-cloud-amd64"
    assert kernel.modules.parts[-4:] == (*boot.parts[-2:-1], "lib", "modules", kernel.release)
    (boot.parent / "usr/lib/modules").mkdir(parents=True)
    kernel = kernels.linux_kernel(download=False)
    assert kernel.modules.parts[-4:] == ("usr", "lib", "modules", kernel.release)


def test_no_linux_kernel_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Error, match="no Linux kernel") as error:
        kernels.linux_kernel(download=False)
    assert error.value.hint
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Error, match="no apt"):
        kernels.linux_kernel()
