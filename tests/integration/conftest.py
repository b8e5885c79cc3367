"""Pods of stand-ins for the tests, all of one owner; programs are compiled once for all of them."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from textwrap import dedent

import pytest

from testbed import datapaths, runtimes
from testbed.host.ledger import Owner
from testbed.model.manifest import Manifest
from testbed.model.terms import Runtime
from testbed.pods import control
from testbed.pods.pod import Pod
from testbed.runtimes.interface import Options, Prepared

from .sockets import MANIFEST, Bench

Build = Callable[..., Pod]


@pytest.fixture(scope="session")
def owner() -> Iterator[Owner]:
    with Owner() as owner:
        yield owner


@pytest.fixture(scope="session")
def prepared() -> dict[Runtime, Prepared]:
    """Runtimes without a hypervisor."""
    return {r: runtimes.prepare(r, Options()) for r in (Runtime.PROCESS, Runtime.STANDIN)}


@pytest.fixture(scope="module")
def build(
    owner: Owner, prepared: dict[Runtime, Prepared], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Build]:
    """Builds pods, which are taken down at the end of the module."""
    consoles = tmp_path_factory.mktemp("consoles")
    with ExitStack() as stack:

        def build(
            name: str,
            manifest: Manifest = MANIFEST,
            datapath: str = "capture",
            runtimes: dict[Runtime, Prepared] = prepared,
        ) -> Pod:
            pod = Pod(owner, name, manifest, datapaths.get(datapath), runtimes, consoles / name)
            return stack.enter_context(pod)

        yield build


@pytest.fixture(scope="module")
def pod(build: Build, request: pytest.FixtureRequest) -> Pod:
    """A pod with the links and the datapath of `MANIFEST`, whose workloads are not started."""
    return build(Path(request.module.__file__).stem.removeprefix("test_"))


@pytest.fixture(scope="module")
def bench(pod: Pod) -> Bench:
    return Bench(pod)


@pytest.fixture
def name() -> Iterator[str]:
    """Of a pod that is taken down afterwards, if it stands."""
    name = f"t{secrets.token_hex(3)}"
    yield name
    if name in control.names():
        control.down(name)


@pytest.fixture
def manifest(tmp_path: Path, name: str) -> Callable[..., Path]:
    """Writes a manifest: containers as YAML, then further lines of the spec.

    `runtimes` are those of some containers (`guests` are run as stand-ins), whatever the `runtime`
    of the others is.
    """

    def write(
        containers: str,
        spec: str = "",
        runtime: str = "process",
        guests: Sequence[str] = (),
        runtimes: Mapping[str, str] = {},
    ) -> Path:
        file = tmp_path / "pod.yaml"
        lines = (dedent(spec).strip() + "\ncontainers:\n" + dedent(containers).strip()).splitlines()
        others = {**dict.fromkeys(guests, "standin"), **runtimes}
        chosen = "".join(f"    testbed/runtime.{each}: {kind}\n" for each, kind in others.items())
        annotations = f"  annotations:\n{chosen}" if others else ""
        file.write_text(
            f"apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n{annotations}"
            f"spec:\n  runtimeClassName: {runtime}\n" + "".join(f"  {line}\n" for line in lines)
        )
        return file

    return write
