"""The same with cuda.core: its compiler, its launches, and its graph builder, which the guard takes as a stream."""

from __future__ import annotations

from typing import Any

from cuda.core import Device, LaunchConfig, Program, ProgramOptions, launch
from device_toy import SOURCE, THREADS, Toy


def kernel_of(module: Any, name: str) -> Any:
    kernel = module.get_kernel(name)
    assert kernel.attributes.num_regs  # loads it: nothing may be loaded inside a capture

    def run(n_blocks: int, arguments: tuple[Any, ...], stream: Any) -> None:
        pointers = [array.data.ptr for array in arguments]
        launch(stream, LaunchConfig(grid=n_blocks, block=THREADS), kernel, *pointers)

    return run


def main() -> None:
    device = Device()
    device.set_current()
    options = ProgramOptions(std="c++17", arch=f"sm_{device.arch}")
    module = Program(SOURCE, code_type="c++", options=options).compile("cubin")
    kernels = {name: kernel_of(module, name) for name in ("next_inputs", "write_kv", "sample")}
    toy, stream = Toy(), device.create_stream()
    builder = stream.create_graph_builder()
    builder.begin_building()
    toy.launch(kernels, builder)
    builder.end_building()
    graph = builder.complete()

    def step() -> None:
        with toy.manager.step(stream):
            graph.launch(stream)

    toy.show(step)


if __name__ == "__main__":
    main()
