"""Runs one compiled WASI component: python -m testbed.runtimes.wasi COMPILED [ARGUMENT…]

It is the process of a `wasm` workload. The component has the environment, output and network of
this process. The exit status is 0 if the component's `run` succeeds, else 1. This module imports
nothing but wasmtime, to start as fast as a plain program.
"""

from __future__ import annotations

import os
import sys

from wasmtime import Config, Engine, ExitTrap, Store, WasiConfig, WasmtimeError, _ffi
from wasmtime.component import Component, Linker

RUN = "wasi:cli/run@0.2."


def engine() -> Engine:
    """The engine for compiling and for running: a compiled component needs the same settings."""
    return Engine(Config())


def main(path: str, *arguments: str) -> int:
    """Run a compiled component to its end, and return the exit status."""
    wasm_engine = engine()
    component = Component.deserialize_file(wasm_engine, path)
    wasi = WasiConfig()
    wasi.inherit_stdout()
    wasi.inherit_stderr()
    wasi.argv = [path, *arguments]
    wasi.env = list(os.environ.items())
    _ffi.wasi_config_inherit_network(wasi.ptr())  # WasiConfig has no method for it
    _ffi.wasi_config_allow_ip_name_lookup(wasi.ptr(), True)
    store = Store(wasm_engine)
    store.set_wasi(wasi)
    linker = Linker(wasm_engine)
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
