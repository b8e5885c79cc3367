"""Runs one WASI component: python -m testbed.runtimes.wasi COMPILED [ARGUMENT…]

A process of its own, which has this process's namespaces, environment, output and network. Its
status is 0 if the component's `run` was well, else 1. Imports nothing but wasmtime: it is to start
as fast as a program does.
"""

from __future__ import annotations

import os
import sys

from wasmtime import Config, Engine, ExitTrap, Store, WasiConfig, WasmtimeError, _ffi
from wasmtime.component import Component, Linker

RUN = "wasi:cli/run@0.2."


def engine() -> Engine:
    """The same for compiling and for running: what is compiled is bound to its settings."""
    return Engine(Config())


def main(path: str, *arguments: str) -> int:
    """Run a compiled component to its end."""
    machine = engine()
    component = Component.deserialize_file(machine, path)
    wasi = WasiConfig()
    wasi.inherit_stdout()
    wasi.inherit_stderr()
    wasi.argv = [path, *arguments]
    wasi.env = list(os.environ.items())
    _ffi.wasi_config_inherit_network(wasi.ptr())  # no method of WasiConfig does
    _ffi.wasi_config_allow_ip_name_lookup(wasi.ptr(), True)
    store = Store(machine)
    store.set_wasi(wasi)
    linker = Linker(machine)
    linker.add_wasip2()
    instance = linker.instantiate(store, component)
    for patch in range(10):  # 0.2.0 and its compatible successors
        if interface := instance.get_export_index(store, f"{RUN}{patch}"):
            index = instance.get_export_index(store, "run", interface)
            run = instance.get_func(store, index) if index else None
            assert run is not None
            return 0 if getattr(run(store), "tag", "ok") == "ok" else 1
    print(f"{path} exports no {RUN}x", file=sys.stderr)
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except ExitTrap as e:
        sys.exit(e.code)
    except WasmtimeError as e:
        print(e, file=sys.stderr)
        sys.exit(1)
