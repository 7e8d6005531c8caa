"""A GPU that isn't there, for what Python does on the way to it.

Triton's own path runs to its end, with its binder, its specialisations and its compiler for the
chosen architecture; only the driver is replaced: loading a kernel and launching it do nothing but
being counted. Tensors lie on the CPU, whose device counts as the GPU. Results are garbage.

    pretend("sm_90")    # before the first launch, never with TRITON_INTERPRET=1
"""

from __future__ import annotations

from types import SimpleNamespace

import dynamic_dino_kernels.backend as backend
import dynamic_dino_kernels.deform_attn as deform_attn
import dynamic_dino_kernels.launch as launch
import dynamic_dino_kernels.moe as moe
import torch
from dynamic_dino_kernels.aot import TARGETS
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

CPU = torch.tensor(0).get_device()  # the number of the CPU among devices, -1


class Launches:
    """(name of the kernel, grid, arguments) of all launches while `kept` is a list."""

    kept: list[tuple] | None = None


def pretend(target: str = "sm_90") -> None:
    """Makes Triton compile for `target`, of `aot.TARGETS`, and every operator choose Triton."""
    if backend.interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 replaces Triton's path by its interpreter: unset it")
    gpu = TARGETS[target]
    driver.set_active(_Driver(gpu))
    launch._query = lambda device: gpu
    backend.obstacle_of = lambda device: ""
    moe.resolve_backend = deform_attn.resolve_backend = _resolve
    moe.checks._ids_are_checked = lambda ids: False  # as on CUDA


def _resolve(name: str = "auto", device="cpu") -> str:
    """With the real one's cost, which is part of what is measured."""
    chosen = backend.resolve_backend(name, device)
    return "triton" if name == "auto" else chosen


class _Launcher:
    def __init__(self, source, metadata) -> None:
        self.name = metadata.name

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        if Launches.kept is not None:
            Launches.kept.append((self.name, (x, y, z), args))


class _Driver:
    launcher_cls = _Launcher

    def __init__(self, gpu: launch.GPU) -> None:
        self._target = GPUTarget("cuda", int(gpu.name.removeprefix("sm_")), 32)
        properties = dict(max_shared_mem=gpu.shared_memory, multiprocessor_count=gpu.processors)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda name, kernel, shared, device: (None, None, 0, 0, 1024),
        )

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return CPU

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")
