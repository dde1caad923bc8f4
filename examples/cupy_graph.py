"""A decode step captured by CuPy: one graph launch a step, the guard inside it, and a sampler that reads the taint."""

from __future__ import annotations

from typing import Any

import cupy
from device_toy import SOURCE, THREADS, Toy


def kernel_of(module: Any, name: str) -> Any:
    function = module.get_function(name)
    assert function.num_regs  # asks the driver, which loads it: nothing may be loaded inside a capture

    def launch(n_blocks: int, arguments: tuple[Any, ...], stream: Any) -> None:
        with stream:
            function((n_blocks,), (THREADS,), arguments)

    return launch


def main() -> None:
    module = cupy.RawModule(code=SOURCE)
    kernels = {name: kernel_of(module, name) for name in ("next_inputs", "write_kv", "sample")}
    toy, stream = Toy(), cupy.cuda.Stream(non_blocking=True)
    stream.begin_capture()
    toy.launch(kernels, stream)
    graph = stream.end_capture()

    def step() -> None:
        with toy.manager.step(stream):
            graph.launch(stream)

    toy.show(step)


if __name__ == "__main__":
    main()
