"""The parts of `kvcanary doctor` that ask a driver or a GPU: each in a process of its own, which may crash or hang.

A part is a function without arguments that returns plain values; it answers as JSON on the child's last line.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kvcanary.errors import BackendError

STUB, NO_GPU = 34, 100  # answers of cuInit
_ROOT = str(Path(__file__).resolve().parents[2])
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


def ask(part: str, timeout_s: float) -> Any:
    """What a part of this module returns, from a child process.

    Raises:
        BackendError: it raised, died, or did not answer in time.
    """
    code = f"import sys; sys.path.insert(0, {_ROOT!r}); from kvcanary.cli import child; child.answer({part!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()  # and no wait for its end: a process that hangs inside a driver cannot die
        raise BackendError(f"no answer within {timeout_s:.0f} s: the driver or the GPU hangs; try nvidia-smi") from None
    try:
        answer = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        last = err.strip().splitlines()[-1:] or ["it wrote nothing"]
        raise BackendError(f"the process ended with code {process.returncode}: {last[0]}") from None
    if "error" in answer:
        raise BackendError(answer["error"])
    return answer["value"]


def answer(part: str) -> None:
    """The child's side of `ask`."""
    try:
        result = {"value": {"driver": driver, "kernels": kernels}[part]()}
    except Exception as error:  # noqa: BLE001  CUDA libraries raise anything; the parent reports it
        result = {"error": f"{type(error).__name__}: {error}"}
    print(f"\n{json.dumps(result)}", flush=True)


# ---- the parts -------------------------------------------------------------------------------------------------------
def driver() -> dict[str, Any]:
    """Keys: "status" of cuInit (null = no driver library) with "text", "version" (13000 = CUDA 13.0), "gpus"."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return {"status": None, "text": str(error), "version": 0, "gpus": []}
    status, version, n_gpus = cuda.cuInit(0), ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    if status == 0:
        status = cuda.cuDeviceGetCount(ctypes.byref(n_gpus))
    text = ctypes.c_char_p()
    cuda.cuGetErrorString(status, ctypes.byref(text))
    return {
        "status": status,
        "text": (text.value or b"").decode(errors="replace"),
        "version": version.value,
        "gpus": [_gpu(cuda, i) for i in range(n_gpus.value)],
    }


def _gpu(cuda: Any, index: int) -> dict[str, Any]:
    device, n_bytes, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    major, minor, raw_uuid = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(16)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(n_bytes), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    cuda.cuDeviceGetUuid_v2(raw_uuid, device)
    return {
        "uuid": f"GPU-{uuid.UUID(bytes=raw_uuid.raw)}",  # as nvidia-smi -L and CUDA_VISIBLE_DEVICES have it
        "name": name.value.decode(errors="replace"),
        "capability": [major.value, minor.value],
        "bytes": n_bytes.value,
    }


def kernels() -> list[list[Any]]:
    """[kernel, values compared, problem] of every kernel: the self-test on the current GPU, eager and captured."""
    from kvcanary.backends.cuda import check_driver, import_cuda, make_cuda_backend
    from kvcanary.cli.selftest import self_test

    check_driver()
    cupy, _core = import_cuda()
    return [list(check) for check in self_test(make_cuda_backend, _devices(cupy))]


def _devices(cupy: Any) -> dict[str, Any]:
    from kvcanary.cli.selftest import Device

    stream = cupy.cuda.Stream(non_blocking=True)

    def assign(array: Any, values: np.ndarray[Any, Any]) -> None:
        array.set(values)
        cupy.cuda.runtime.deviceSynchronize()

    def to_device(values: np.ndarray[Any, Any]) -> Any:
        array = cupy.empty(values.shape, values.dtype)
        assign(array, values)
        return array

    def run_eagerly(launch: Any) -> Any:
        def run() -> None:
            launch(stream)
            stream.synchronize()

        return run

    def capture(launch: Any) -> Any:
        stream.begin_capture()
        try:
            launch(stream)
        finally:
            graph = stream.end_capture()
        return run_eagerly(graph.launch)

    device = partial(Device, to_device, cupy.asnumpy, assign)
    return {"eager": device(run_eagerly), "captured": device(capture)}
