"""Runtime `wasm`: a WASI 0.2 component, run by wasmtime in the pod's namespace.

Each component has a process of its own. An image is a component, or a Python program, from which
componentize-py makes one: a file, or a package (a folder with __main__.py, as for `python -m`). The
traffic agent is such a package. Components are compiled to machine code once, and cached by
content.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from testbed import paths
from testbed.host import cache, process
from testbed.images import rootfs
from testbed.model.errors import Error
from testbed.model.manifest import Program, Workload
from testbed.model.terms import Family, Runtime
from testbed.runtimes.interface import (
    Description,
    Options,
    Placement,
    Prepared,
    refuse_isolation,
    refuse_limits,
)

_WORLD = """\
package testbed:program;
world program {
  import wasi:cli/environment@0.2.0;
  export wasi:cli/run@0.2.0;
}
"""
_WASI = """\
package wasi:cli@0.2.0;
interface run { run: func() -> result; }
interface environment {
  get-environment: func() -> list<tuple<string, string>>;
  get-arguments: func() -> list<string>;
}
"""
# This runs while the component is made, when there still is a file system to import from. So it
# imports now what the program will import: the modules of its package, and all that its files name.
# Later `run` executes the program. Its globals are never freed, since the destructor of a socket
# that is left open would end the component.
_MAIN = """\
import ast, contextlib, encodings.idna, importlib, os, pathlib, sys, traceback
from componentize_py_types import Err
from wit_world.imports import environment

names = []
for file in sorted(pathlib.Path(__file__).with_name("program").glob("*.py")):
    tree = ast.parse(file.read_text())
    if file.stem == "__main__":
        code = compile(tree, "program", "exec")
    else:
        importlib.import_module(f"program.{file.stem}")
    for node in ast.walk(tree):
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
for name in names:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
scope = {"__name__": "__main__", "__package__": "program"}


class Run:
    def run(self):
        sys.argv = list(environment.get_arguments())
        os.environ.clear()
        os.environ.update(environment.get_environment())
        status = None
        try:
            exec(code, scope)
        except SystemExit as e:
            status = e.code
        except BaseException:
            traceback.print_exc()
            status = 1
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        if status:
            raise Err(None)
"""


def prepare(options: Options) -> Wasm:
    """Find wasmtime. Raises `Error` without it."""
    try:
        return Wasm(metadata.version("wasmtime"), options.say)
    except metadata.PackageNotFoundError as e:
        raise Error("no wasmtime, to run components", hint="./bootstrap") from e


class Wasm(Prepared):
    """Prepared runtime of WASI components."""

    families = frozenset(Family)
    uses_tap = multiqueue = has_shell = False
    kernel_has_sockets = True
    ready_limit_s = 10.0

    def __init__(self, version: str, say: Callable[[str], None]) -> None:
        self.version, self._say = version, say
        self.description = Description(Runtime.WASM, kernel=f"wasmtime {version}")

    def dialed(self, family: Family) -> str:
        return "localhost"

    def compose(self, workload: Workload) -> None:
        refuse_limits(workload)
        refuse_isolation(workload)
        if workload.program and (workload.program.command or workload.program.working_dir):
            raise Error(
                f"{workload.name!r}: a component has neither command nor workingDir",
                hint="give it args",
            )
        self._compile(workload.program or _agent(workload))

    def start(self, place: Placement) -> subprocess.Popen[bytes]:
        program = place.workload.program or _agent(place.workload)
        return process.spawn(
            [
                sys.executable,
                "-P",
                "-m",
                "testbed.runtimes.wasi",
                self._compile(program),
                *program.args,
            ],
            cgroup=place.cgroup,
            netns=place.netns,
            cpus=place.workload.cpus,
            binds=place.etc,
            output=place.console,
            env={"PATH": rootfs.PATH, **dict(program.env)},
        )

    def runs(self, place: Placement) -> bool:
        return True

    def enter(self, place: Placement, *, terminal: bool = False) -> list[str]:
        raise Error(f"{place.workload.name!r} is a component: it runs nothing but itself")

    def _compile(self, program: Program) -> Path:
        """Path of an image's machine code. It is compiled unless it is in the cache."""
        source = Path(program.image)
        is_python = source.suffix == ".py" or source.is_dir()
        try:
            files = _python_files(source) if is_python else {"": source.read_bytes()}
        except OSError as e:
            raise Error(
                f"no component {source}: {e.strerror}",
                hint="a .wasm component, a .py file or a folder with __main__.py",
            ) from e
        maker = f"{_MAIN} {metadata.version('componentize-py')}" if is_python else ""
        digest = hashlib.sha256(f"{maker}\0{self.version}".encode())
        for name, data in files.items():
            digest.update(f"\0{name}\0{len(data)}\0".encode() + data)
        compiled = cache.cache_folder() / "wasm" / f"{digest.hexdigest()}.cwasm"

        def make(new: Path) -> None:
            self._say(f"compiling {source.name}, once")
            component = _of_python(source, files, new.parent) if is_python else source
            new.write_bytes(_machine_code(component))

        return cache.made(compiled, make)


def _agent(workload: Workload) -> Program:
    """The traffic agent in Python, as a program."""
    port = str(workload.control_port)
    return Program(str(paths.AGENT / "python"), args=("--control-port", port))


def _machine_code(component: Path) -> bytes:
    from wasmtime import WasmtimeError
    from wasmtime.component import Component

    from testbed.runtimes import wasi

    try:
        return bytes(Component.from_file(wasi.engine(), component).serialize())
    except WasmtimeError as e:
        reason = " ".join(str(e).split())
        raise Error(f"{component} is no component for WASI 0.2: {reason}") from e


def _python_files(source: Path) -> dict[str, bytes]:
    """Files of a Python program, by their names in its package."""
    if not source.is_dir():
        return {"__main__.py": source.read_bytes()}
    (source / "__main__.py").stat()
    return {path.name: path.read_bytes() for path in sorted(source.glob("*.py"))}


def _of_python(source: Path, files: dict[str, bytes], scratch: Path) -> Path:
    """Make a component of a Python program, with the modules that it imports."""
    tool = shutil.which("componentize-py", path=str(Path(sys.executable).parent))
    if tool is None:
        raise Error(f"no componentize-py, to make a component of {source}", hint="./bootstrap")
    wit, component = scratch / "wit", scratch / "component.wasm"
    (wit / "deps/cli").mkdir(parents=True)
    (wit / "world.wit").write_text(_WORLD)
    (wit / "deps/cli/wasi.wit").write_text(_WASI)
    (scratch / "main.py").write_text(_MAIN)
    (scratch / "program").mkdir()
    for name, data in files.items():
        (scratch / "program" / name).write_bytes(data)
    done = subprocess.run(
        [
            tool,
            "-q",
            "-d",
            wit,
            "-w",
            "program",
            "componentize",
            "main",
            "-p",
            scratch,
            "-o",
            component,
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=scratch,
    )
    if done.returncode:
        raise Error(f"{source} cannot be made a component: {done.stderr.strip()[-300:]}")
    return component
