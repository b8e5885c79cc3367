"""Images: what is in them, the same bytes each time, and the command lines that boot them."""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shlex
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface
from itertools import pairwise
from pathlib import Path

import pytest

from testbed import paths
from testbed.host import architecture, compiler
from testbed.images import compose, cpio, elf, rofs, rootfs
from testbed.images.compose import Definition
from testbed.images.kernels import LinuxKernel, OsvKernel
from testbed.images.rofs import Directory, Node, Symlink
from testbed.images.rootfs import Process, Root
from testbed.model.addresses import alias, guest_mac, loopback
from testbed.model.errors import Error
from testbed.model.terms import Family
from testbed.runtimes import linux, osv
from testbed.runtimes.vm import qemu
from testbed.runtimes.vm.capabilities import Capabilities
from testbed.runtimes.vm.qemu import Vm


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/testbed/images"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program that needs libc and a library of its own."""
    library, main = tmp_path / "libown.so.1", tmp_path / "main"
    for out, source, options in (
        (library, "int own(void) { return 0; }", ["-shared", "-fPIC", "-Wl,-soname,libown.so.1"]),
        (
            main,
            "int own(void); int main(void) { return own(); }",
            ["-pie", "-fPIE", f"-Wl,-rpath,{tmp_path}", str(library)],
        ),
    ):
        subprocess.run(
            ["cc", "-xc", "-", "-xnone", "-o", out, *options], input=source, text=True, check=True
        )
    return main


@pytest.fixture
def linux_kernel(tmp_path: Path) -> LinuxKernel:
    """A kernel whose modules depend on each other as virtio's do."""
    depends = {
        "virtio_net": "virtio,net_failover",
        "net_failover": "failover",
        "failover": "",
        "virtio_pci": "virtio",
        "virtio": "virtio_ring",  # and that is built in
        "unrelated": "",
    }
    for name, others in depends.items():
        source = f'__attribute__((section(".modinfo"))) const char i[] = "depends={others}";'
        subprocess.run(
            ["cc", "-xc", "-", "-c", "-o", tmp_path / f"{name}.ko"],
            input=source,
            text=True,
            check=True,
        )
    return LinuxKernel(tmp_path / "vmlinuz", tmp_path, "6.1.0", "0" * 64, "test")


@pytest.mark.parametrize("family", Family)
def test_hosts_patch_and_address_plan_agree(family: Family) -> None:
    patched, stock = (compose.hosts_file(patched=p).read_text() for p in (True, False))
    assert str(alias(family)) in compose.localhost(patched)
    assert str(loopback(family)) in compose.localhost(stock)


def test_hosts_files_are_as_osv_reads_them() -> None:
    for patched in (True, False):
        text = compose.hosts_file(patched=patched).read_text()
        # OSv takes the first line that holds a name, whatever its family, and whole lines only.
        first, second = compose.localhost(text)
        assert isinstance(ip_address(first), IPv4Address)
        assert isinstance(ip_address(second), IPv6Address)
        assert "ip6-localhost" in text
        assert text.endswith("\n")
        assert all(len(line) < 512 for line in text.splitlines())


def test_osv_image_holds_the_program_and_what_osv_lacks(program: Path) -> None:
    image = compose.compose_osv(Definition(program, ("-x",), shim=False))
    assert image.process.command == ("/main", "-x")
    assert set(image.files) == {
        "/main",
        "/usr/lib/libown.so.1",
        "/etc/hosts",
        "/etc/fstab",
        "/dev",
        "/proc",
        "/sys",
        "/tmp",
    }
    tree = rofs.unpack(image.path.read_bytes())
    assert tree["/main"] == program.read_bytes()
    assert tree["/etc/hosts"] == compose.hosts_file().read_bytes()
    assert image.sha256 == hashlib.sha256(image.path.read_bytes()).hexdigest()
    assert image.size_bytes == image.path.stat().st_size


def test_same_input_gives_the_same_bytes_in_any_process(program: Path, own_cache: Path) -> None:
    first = compose.compose_osv(Definition(program))
    os.utime(program, (0, 0))
    code = f"""if True:
        from pathlib import Path
        from testbed.images import compose
        print(compose.compose_osv(compose.Definition(Path({str(program)!r}))).path)"""
    for seed in ("1", "2"):
        cache = own_cache.parents[1] / seed
        env = {**os.environ, "PYTHONHASHSEED": seed, "XDG_CACHE_HOME": str(cache)}
        out = subprocess.check_output([sys.executable, "-c", code], env=env, text=True, cwd="/")
        again = Path(out.strip())
        assert again.name == first.path.name
        assert again.read_bytes() == first.path.read_bytes()


def test_image_that_was_cut_off_in_the_cache_is_made_again(program: Path) -> None:
    image = compose.compose_osv(Definition(program))
    image.path.chmod(0o644)
    image.path.write_bytes(b"half")
    assert compose.compose_osv(Definition(program)) == image
    assert image.path.stat().st_size == image.size_bytes
    assert [p.name for p in image.path.parent.iterdir()] == [image.path.name]


def test_a_definition_brings_folders_and_the_libraries_of_modules(
    program: Path, tmp_path: Path
) -> None:
    (tmp_path / "lib-1/deep").mkdir(parents=True)
    (tmp_path / "lib-1/deep/text").write_text("text")
    (tmp_path / "lib-1/module.so").write_bytes(program.read_bytes())
    definition = tmp_path / "own.toml"
    words = f'program = "/usr/bin/env"\nshim = false\nfolders = ["{tmp_path}/lib-*"]\n'
    definition.write_text(words)
    tree = compose.osv_tree(compose.load(definition))
    assert tree[f"{tmp_path}/lib-1/deep/text"] == b"text"
    assert "/usr/lib/libown.so.1" in tree
    definition.write_text(words.replace("lib-*", "none-*"))
    with pytest.raises(Error, match="there is no folder .*none-"):
        compose.load(definition)


def test_what_osv_lacks_for_a_program_is_told(program: Path, tmp_path: Path) -> None:
    library = tmp_path / "libown.so.1"
    libc = elf.closure(elf.read(program))["libc.so.6"]
    kernel = OsvKernel(libc, "v1", "0" * 64, listed=False, source="test")
    assert compose.lacking(Definition(program), kernel) == []
    command = ["cc", "-xc", "-", "-shared", "-fPIC", "-Wl,-soname,libown.so.1", "-o", str(library)]
    subprocess.run(command, input="int another;", text=True, check=True)
    assert compose.lacking(Definition(program), kernel) == ["own"]


def test_functions_that_osv_lacks_are_told_calmly() -> None:
    assert osv.lacks("redis-cli", ["waitid"]) == (
        "OSv lacks a function that redis-cli or its libraries name (waitid); "
        "it ends with 127 if it calls it"
    )
    assert osv.lacks("redis-cli", list("abcdefg")) == (
        "OSv lacks 7 functions that redis-cli or its libraries name (a, b, c, d, e, …); "
        "it ends with 127 if it calls one"
    )


def test_images_that_nobody_used_for_long_are_removed(program: Path) -> None:
    old, kept = (
        compose.compose_osv(Definition(program, (), files, False)).path
        for files in ({"/a": program}, {"/b": program})
    )
    os.utime(old, (0, 0))
    (old.parent / ".new-by-another").mkdir()
    compose.compose_osv(Definition(program, (), {"/b": program}, False))
    assert (old.exists(), kept.exists()) == (False, True)


def test_without_the_patch_only_the_hosts_file_differs(program: Path) -> None:
    with_patch = compose.osv_tree(Definition(program))
    without = compose.osv_tree(Definition(program), hosts_patch=False)
    assert {p for p in with_patch if with_patch[p] != without[p]} == {"/etc/hosts"}
    assert with_patch.keys() == without.keys()


def test_linux_image_holds_all_libraries_and_modules_in_order(
    program: Path, linux_kernel: LinuxKernel
) -> None:
    root = rootfs.of_programs([program], {}, ())
    image = compose.compose_linux(root, linux_kernel)
    tree = cpio.unpack(image.path.read_bytes())
    libraries = {"/usr/lib/libown.so.1", "/usr/lib/libc.so.6", elf.read(program).interpreter}
    assert {"/.guest/init", "/bin/busybox", "/usr/bin/main", *libraries} <= tree.keys()
    modules = b"virtio\nvirtio_pci\nfailover\nnet_failover\nvirtio_net\n"
    assert tree["/.guest/modules/list"] == modules
    assert "/.guest/modules/unrelated.ko" not in tree
    assert image == compose.compose_linux(root, linux_kernel)


def test_compressed_modules_are_unpacked(program: Path, linux_kernel: LinuxKernel) -> None:
    root = rootfs.of_programs([program], {}, ())
    plain = compose.compose_linux(root, linux_kernel)
    for module in linux_kernel.modules.glob("*.ko"):
        (module.parent / f"{module.name}.xz").write_bytes(lzma.compress(module.read_bytes()))
        module.unlink()
    assert compose.compose_linux(root, linux_kernel) == plain


def test_initramfs_is_read_alike_by_us_and_by_cpio() -> None:
    tree: dict[str, Node] = {
        "/init": b"#!/bin/sh\n",
        "/a/b/c": b"x" * 1001,
        "/a/l": Symlink("b/c"),
        "/dev": Directory(),
    }
    archive = bytes(cpio.pack(tree))
    assert rofs.nested(cpio.unpack(archive)) == rofs.nested(tree)
    listed = (
        subprocess.run(["busybox", "cpio", "-t"], input=archive, capture_output=True, check=True)
        .stdout.decode()
        .split()
    )
    assert set(listed) == {"init", "a", "a/b", "a/b/c", "a/l", "dev", "dev/console"}
    assert listed.index("dev") < listed.index("dev/console")


@pytest.mark.root
def test_a_linux_image_keeps_what_a_root_file_system_has(
    linux_kernel: LinuxKernel, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    (root / "usr/bin").mkdir(parents=True)
    (root / "bin").symlink_to("usr/bin")
    (root / "usr/bin/prog").write_bytes(b"prog")
    os.chown(root / "usr/bin/prog", 12, 34)
    (root / "usr/bin/prog").chmod(0o4711)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    process = Process(("prog",), ("it's",), ("A=x y\nz",), "/data", 12, 34, (56,))
    image = compose.compose_linux(Root(root, process), linux_kernel)
    tree = cpio.unpack(image.path.read_bytes())
    assert {"/bin", "/usr/bin/prog", "/null", "/etc/hosts", "/.guest/run_as"} <= {*image.files}
    assert (tree["/bin"], tree["/usr/bin/prog"]) == (Symlink("usr/bin"), b"prog")
    script = tree["/.guest/program"]
    assert isinstance(script, bytes)
    before, _, words = script.decode().partition("exec ")
    assert "mkdir -p -- /data\n" in before
    assert shlex.split(words) == [
        *("/.guest/busybox", "env", "-i", "--", "A=x y\nz"),
        *("/.guest/run_as", "12", "34,56", "/data", "prog", "it's", "$@"),
    ]
    listed = subprocess.run(
        ["busybox", "cpio", "-tv"], input=cpio.pack_folder(root), capture_output=True, check=True
    ).stdout.decode()
    assert re.search(r"^-rws--x--x +12/34 +4 1970-\S+ \S+ usr/bin/prog$", listed, re.MULTILINE)
    assert re.search(r"^crw-r--r-- .* null$", listed, re.MULTILINE)


def test_a_large_root_file_system_is_in_memory_once(
    linux_kernel: LinuxKernel, tmp_path: Path
) -> None:
    """Besides its largest file, which is read before it is added."""
    root = tmp_path / "root"
    root.mkdir()
    sizes = {"a": 32 << 20, "b": 32 << 20}
    for name, size in sizes.items():
        with (root / name).open("wb") as sparse:
            sparse.truncate(size)
    tracemalloc.start()
    compose.compose_linux(Root(root, Process(("a",))), linux_kernel)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.9 * sum(sizes.values())


def test_a_root_file_system_that_is_too_large_is_refused(
    linux_kernel: LinuxKernel, program: Path, tmp_path: Path
) -> None:
    with (tmp_path / "lastlog").open("wb") as sparse:
        sparse.truncate(rootfs.MAX_BYTES + 1)
    too_large = "have 2048 MiB, more than the 2048 that a guest's image may hold"
    with pytest.raises(Error, match=too_large):
        compose.compose_linux(Root(tmp_path, Process(("a",))), linux_kernel)
    with pytest.raises(Error, match=too_large):
        compose.compose_osv(Definition(program, root=program.parent))
    with pytest.raises(Error, match=too_large):
        compose.compose_osv(Definition(program, files={"/lastlog": tmp_path / "lastlog"}))


@pytest.mark.parametrize("folder", ["/tmp/build", "/dev/x/y", "/proc/1", "/sys/x", "/var/tmp/a"])
def test_what_osv_mounts_over_is_refused(program: Path, tmp_path: Path, folder: str) -> None:
    """By links of the image, too."""
    root = tmp_path / "root"
    (root / "var").mkdir(parents=True)
    (root / "var/tmp").symlink_to("/tmp")
    (root / "tmp").mkdir()
    for name in ("main", "tmp/main"):
        (root / name).write_bytes(program.read_bytes())
    within = Definition(root / "main", root=root)
    for definition in (Definition(program), within):
        process = replace(definition.process, working_dir="/tmp")
        assert compose.compose_osv(definition, process)
        if definition.root or folder != "/var/tmp/a":
            process = replace(process, working_dir=folder)
            with pytest.raises(Error, match=f"the working folder {folder} is not there in OSv"):
                compose.compose_osv(definition, process)
    with pytest.raises(Error, match="the program /tmp/main is not there in OSv, which mounts"):
        compose.compose_osv(Definition(root / "tmp/main", root=root))


@pytest.fixture
def deep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with nested folders whose path is longer than the kernel takes."""
    folder = tmp_path_factory.mktemp("deep")
    inner = os.open(folder, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=inner)
        outer, inner = inner, os.open("d", os.O_RDONLY, dir_fd=inner)
        os.close(outer)
    os.close(inner)
    yield folder
    subprocess.run(["rm", "-r", folder], check=True)


def test_a_fault_of_an_image_has_the_images_name(
    linux_kernel: LinuxKernel, deep: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever the fault is: it is one line, not a traceback."""
    long = tmp_path_factory.mktemp("long")
    (long / "etc").symlink_to("x" * 300)
    for root, complaint in (
        # Python 3.11 walks folders by recursion, later ones do not.
        (deep, "(its folders are nested too deeply|File name too long: )"),
        (long, "File name too long: '.*xxx'"),
    ):
        with pytest.raises(Error, match=f"image 'a.tar': {complaint}"), rootfs.reading("a.tar"):
            compose.compose_linux(Root(root, Process(("a",))), linux_kernel)


@pytest.mark.parametrize("merged", [False, True])
def test_osv_gets_a_whole_root_file_system(program: Path, tmp_path: Path, merged: bool) -> None:
    """Links within it stay within it, whatever they say."""
    root = tmp_path / "root"
    (root / "usr/lib/x86_64-linux-gnu").mkdir(parents=True)
    (root / "usr/lib/x86_64-linux-gnu/libown.so.1").write_bytes(b"own")
    (root / "usr/lib/a-linux-b").symlink_to("/usr/lib")
    (root / "lib").symlink_to("usr/lib" if merged else "/usr/lib")
    (root / "private").mkdir()
    (root / "etc").symlink_to("private/etc")
    (root / "private/etc").mkdir()
    (root / "app/bin").mkdir(parents=True)
    (root / "app/bin/program-1").write_bytes(program.read_bytes())
    (root / "app/program").symlink_to("/app/bin/program-1")
    (root / os.fsdecode(b"app/n\xe9")).write_bytes(b"")
    for command in ("./program", "program"):
        env = ("PATH=/nowhere:/app",)
        described = Process((command, "-x"), (), env, "/app")
        definition, process = compose.find_program(root, described)
        assert process.command == ("/app/./program" if "/" in command else "/app/program", "-x")
        image = compose.compose_osv(definition)
        tree = rofs.unpack(image.path.read_bytes())
        assert tree["/app/program"] == Symlink("/app/bin/program-1")
        assert tree["/app/bin/program-1"] != program.read_bytes()  # it has the shim
        assert tree["/usr/lib/libown.so.1"] == Symlink("/usr/lib/x86_64-linux-gnu/libown.so.1")
        assert "/private/etc/hosts" in tree
        assert not any("libc" in name for name in tree)
    (root / "app/start.sh").write_text("#!/bin/sh\n")
    with pytest.raises(Error, match=r"/app/start\.sh is a script, and OSv runs none"):
        compose.find_program(root, Process(("/app/start.sh",)))
    with pytest.raises(Error, match="the image has no program gone"):
        compose.find_program(root, Process(("gone",)))


@pytest.mark.root
def test_a_program_that_cannot_be_run_in_a_linux_guest_is_named() -> None:
    runs = compiler.build("test", "run_as", paths.OSV / "linux", compose._LINUX_FLAGS)
    for command, said, status in (
        ("/app/nosuch", "guest: cannot run /app/nosuch: No such file or directory\n", 127),
        ("/etc/passwd", "guest: cannot run /etc/passwd: Permission denied\n", 126),
    ):
        words = [str(runs), "0", "0", "/", command]
        ran = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (ran.stderr, ran.returncode) == (said, status)


@pytest.mark.parametrize("cut", [0, 100, 600])
def test_damaged_initramfs_is_refused(cut: int) -> None:
    archive = bytes(cpio.pack({"/init": b"x" * 1000}))
    with pytest.raises(Error, match="initramfs is damaged"):
        cpio.unpack(archive[:cut])


def test_inspect_tells_what_is_in_an_image(
    program: Path, linux_kernel: LinuxKernel, tmp_path: Path
) -> None:
    definition = tmp_path / "own.toml"
    definition.write_text('program = "main"\nshim = false\n')
    built = compose.build(compose.load(definition), tmp_path / "own.img")
    data = compose.inspect(tmp_path / "own.img")
    assert (data["format"], data["sha256"]) == ("rofs", built.sha256)
    assert data["localhost"] == [str(alias(family)) for family in Family]
    assert data["files"]["/main"]["size_bytes"] == program.stat().st_size
    assert data["files"]["/tmp"] == {"type": "directory"}
    root = rootfs.of_programs([program], {}, ())
    other = compose.inspect(compose.compose_linux(root, linux_kernel).path)
    assert other["format"] == "cpio"
    assert other["localhost"] == data["localhost"]
    with pytest.raises(Error, match="no MBR"):
        compose.inspect(program)


def test_definition_brings_arguments_and_files(program: Path, tmp_path: Path) -> None:
    definition = tmp_path / "own.toml"
    definition.write_text(
        'program = "main"\narguments = ["--port", "80"]\n[files]\n"/etc/app.conf" = "own.toml"\n'
    )
    loaded = compose.load(definition)
    assert loaded.process.command == ("/main", "--port", "80")
    assert compose.osv_tree(loaded)["/etc/app.conf"] == definition.read_bytes()


def test_a_definition_may_name_a_program_of_this_host(program: Path, tmp_path: Path) -> None:
    definition = tmp_path / "own.toml"
    definition.write_text('program = "env"\n')
    assert compose.load(definition).program == Path("/usr/bin/env")
    definition.write_text('program = "main"\n')
    assert compose.load(definition).program == program  # the one beside it


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("program = ", "not TOML"),
        ("", 'program: expected program = "PATH", found nothing'),
        ("program = 'main'\nimage = 1", "image: no such key"),
        ("program = 'main'\narguments = 'x'", "arguments: expected a list of words"),
        ("program = 'main'\nshim = 1", "shim: expected true or false"),
        ("program = '/usr/bin/no'\npackage = 'nono'", "no /usr/bin/no.*apt-get install nono"),
        ("program = 'nothing'", "nothing: No such file"),
        ("program = 'own.toml'", "not an ELF file"),
        ("program = 'main'\n[files]\n'/x' = 'nothing'", "nothing: No such file"),
        ("program = 'main'\n[files]\n'/etc/hosts' = 'main'", "is in every image already"),
        ("program = 'main'\n[files]\n'x' = 'main'", "not an absolute"),
    ],
)
@pytest.mark.usefixtures("program")
def test_definition_that_cannot_be_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    definition = tmp_path / "own.toml"
    definition.write_text(text)
    with pytest.raises(Error, match=complaint):
        compose.build(compose.load(definition), tmp_path / "own.img")
    assert not (tmp_path / "own.img").exists()


@pytest.mark.parametrize(
    ("image", "complaint", "hint"),
    [
        ("./nothere/root", "no file or folder ./nothere/root", None),
        ("/nothere", "no file or folder /nothere", None),
        ("team/app:1", "no image 'team/app:1'", "skopeo copy docker://team/app:1"),
        ("a" * 300, f"no image '{'a' * 200}': File name too long", None),
    ],
)
def test_an_image_that_is_not_there_is_called_what_it_looks_like(
    image: str, complaint: str, hint: str | None
) -> None:
    with pytest.raises(Error) as error:
        rootfs.unpack(image)
    assert error.value.message == complaint
    assert (hint or "") in (error.value.hint or "")
    assert bool(error.value.hint) is bool(hint)


def test_a_path_without_toml_names_no_definition(program: Path, tmp_path: Path) -> None:
    beside = tmp_path / "web.toml"
    beside.write_text(f'program = "{program}"\n')
    assert compose.find_definition(str(beside)) == Definition(program)
    outside = os.path.relpath(tmp_path / "web", paths.OSV)
    many = "host:" + ",".join(["busybox"] * 99)
    for image in (str(tmp_path / "web"), outside, "nothing", many):
        assert compose.find_definition(image) is None
    assert compose.definition_file("agent") == compose.AGENT


@pytest.mark.parametrize("family", Family)
def test_address_that_is_the_alias_is_refused(family: Family) -> None:
    compose.check_alias([alias(family) + 1])
    with pytest.raises(Error, match="localhost") as error:
        compose.check_alias([alias(family) + 1, alias(family)])
    assert error.value.hint


# --- command lines --------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path) -> Vm:
    return Vm(
        "tcg",
        "tap0",
        guest_mac(1),
        qemu.link_addresses(1),
        tmp_path / "console.log",
        gateways=(ip_address("169.254.77.3"), ip_address("fd77::3")),
    )


def option(argv: list[str], name: str) -> list[str]:
    """Values of an option."""
    return [value for key, value in pairwise(argv) if key == name]


def test_osv_is_told_addresses_of_the_families_that_it_speaks(machine: Vm, program: Path) -> None:
    image = compose.compose_osv(Definition(program))
    ipv4 = "--ip=eth0,169.254.78.1,255.255.240.0"
    only_ipv4, both = frozenset({Family.IPV4}), frozenset(Family)
    gateway = "--defaultgw=169.254.77.3"
    for families, addresses, gateways in (
        (only_ipv4, ipv4, gateway),
        (both, f"{ipv4} --ip=eth0,fd77::78:1,64", f"{gateway} --defaultgw=fd77::3"),
    ):
        can = Capabilities(families, only_ipv4, multiqueue=False, smp=True)
        argv = osv.command(machine, Path("/k"), can, image, ["--port", "1"])
        assert option(argv, "-append") == [
            f'--rootfs=rofs --power-off-on-abort {addresses} {gateways} "/main" "--port" "1"'
        ]
        (nic,) = (device for device in option(argv, "-device") if "net" in device)
        assert guest_mac(1) in nic


def test_osv_has_checksum_offload_if_it_or_the_host_can_do_without_partial_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both, only_ipv4, none = frozenset(Family), frozenset({Family.IPV4}), frozenset[Family]()
    off = "guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off"
    for has_tcx in (True, False):  # Linux 6.6
        monkeypatch.setattr("testbed.bpf.has_tcx", lambda has=has_tcx: has)
        for families, partial, needs, text in (
            (both, only_ipv4, has_tcx, "ipv6 checksums by host" if has_tcx else off),
            (only_ipv4, only_ipv4, False, ""),
            (both, both, False, ""),
            (both, none, False, off),
        ):
            can = Capabilities(families, partial, multiqueue=False, smp=True)
            assert osv.needs_ipv6_checksums(can) is needs
            assert osv.offloads(can) == text
            assert ",".join(osv.nic(can)) == (off if text == off else "")


def test_osv_words_are_quoted_and_variables_refused(machine: Vm) -> None:
    line = osv.boot_line(machine, frozenset(Family), Process(("/a",), ('b "c"', "d;e", "\\")))
    assert line.endswith('"/a" "b \\"c\\"" "d;e" "\\\\"')
    for word in ("$HOME", "a\nb", "a\tb"):
        for process in (Process((word,)), Process(env=(f"A={word}",)), Process(working_dir=word)):
            with pytest.raises(Error, match=r"OSv takes only printable \w+, without '\$': "):
                osv.boot_line(machine, frozenset(Family), process)


def test_osv_words_are_ascii_and_variables_and_folder_need_not_be(machine: Vm) -> None:
    process = Process(("/a",), env=("A=é",), working_dir="/é")
    assert "--env=A=é --cwd=/é" in osv.boot_line(machine, frozenset(Family), process)
    with pytest.raises(Error, match="OSv takes only printable ASCII"):
        osv.boot_line(machine, frozenset(Family), Process(("/a",), ("é",)))


def test_osv_is_told_variables_and_the_folder(machine: Vm) -> None:
    process = Process(("/a",), ("b",), ("A=1 \\2", "B="), "/data")
    line = osv.boot_line(machine, frozenset(Family), process)
    assert line.endswith(r' --env=A=1\ \\2 --env=B= --cwd=/data "/a" "b"')


def test_a_line_that_osv_does_not_take_is_refused(machine: Vm) -> None:
    """Letters of several bytes and what escapes them count, too."""
    longest = Process(("/a",), env=("A=" + "x" * (osv.MAX_PROGRAM_BYTES - len('--env=A= "/a"')),))
    assert len(osv.program_line(longest)) == osv.MAX_PROGRAM_BYTES
    line = osv.boot_line(machine, frozenset(Family), longest)
    assert len(line) <= osv.MAX_PROGRAM_BYTES + 200
    for one in ("x", " ", "\u00fc"):
        size = (osv.MAX_PROGRAM_BYTES - len('--env=A= "/a"')) // len(one.encode()) + 1
        process = Process(("/a",), env=(f"A={one * size}",))
        with pytest.raises(Error, match="of /a have [0-9]+ bytes, more than the 3000") as error:
            osv.boot_line(machine, frozenset(Family), process)
        assert error.value.hint


def test_linux_is_told_addresses_and_words(machine: Vm) -> None:
    assert linux.boot_line(machine, ["/a", "b c"]) == (
        f"{architecture.native().linux_options} quiet panic=-1 rdinit=/.guest/init "
        '"guest_addresses=169.254.78.1/20 fd77::78:1/64" '
        '"guest_gateways=169.254.77.3 fd77::3" -- "/a" "b c"'
    )


def test_machine_is_as_asked(tmp_path: Path) -> None:
    emulated = Vm("tcg", "t", guest_mac(1), (), tmp_path / "a,b")
    argv = qemu.command(emulated, Path("/k"), "")
    assert "a,,b" in option(argv, "-chardev")[0]
    assert option(argv, "-cpu") != ["host"]
    assert not option(argv, "-qmp")
    fast = Vm("kvm", "t", guest_mac(1), (), tmp_path / "c", vhost=True, qmp=tmp_path / "qmp")
    argv = qemu.command(fast, Path("/k"), "")
    assert option(argv, "-cpu") == ["host"]
    assert "vhost=on" in option(argv, "-netdev")[0]
    assert "queues" not in option(argv, "-netdev")[0]
    assert option(argv, "-qmp") == [f"unix:{tmp_path}/qmp,server=on,wait=off"]


@pytest.mark.parametrize("name", ["x86_64", "aarch64"])
def test_machine_and_console_are_of_the_hosts_architecture(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: name)
    guest = Vm("tcg", "t", guest_mac(1), (), tmp_path / "c")
    argv = qemu.command(guest, Path("/k"), linux.boot_line(guest, []))
    known = {"x86_64": ("q35", "ttyS0"), "aarch64": ("virt", "ttyAMA0")}
    board, console = known[name]
    assert argv[0] == f"qemu-system-{name}"
    assert option(argv, "-machine")[0].startswith(f"{board},")
    assert option(argv, "-append")[0].startswith(f"console={console} ")


def test_a_machine_that_nobody_tried_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(Error, match="is riscv64; testbed knows x86_64 and aarch64"):
        architecture.native()


def test_machine_with_two_cpus_has_two_pairs_of_queues(tmp_path: Path) -> None:
    two = Vm("tcg", "t", guest_mac(1), (), tmp_path / "c", vcpus=2, queues=2)
    argv = qemu.command(two, Path("/k"), "", nic=("guest_csum=off",))
    assert option(argv, "-smp") == ["2"]
    assert option(argv, "-netdev")[0].endswith(",queues=2")
    assert option(argv, "-device")[0].endswith(",guest_csum=off,mq=on,vectors=6")


def test_guest_that_is_given_the_alias_is_not_started(tmp_path: Path) -> None:
    address = ip_interface(f"{alias(Family.IPV4)}/20")
    with pytest.raises(Error, match="localhost"):
        qemu.command(Vm("tcg", "t", guest_mac(1), (address,), tmp_path / "c"), Path("/k"), "")
