"""What a CUDA graph couldn't record, found without a GPU, on tensors that only say they are on one.

PyTorch's `FakeTensorMode` runs a function on tensors that have a device and a shape but no data; a
`TorchDispatchMode` sees every operator. What isn't seen: our own operators from inside, since their
fake implementations are called; and kernels of PyTorch's that wait for the GPU by themselves, but
for those that `WAITING` names.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = "cuda"  # of fake tensors: no GPU needs to be there
HERE = Path(__file__).resolve()
COPIES = {"aten::_to_copy", "aten::copy_", "aten::copy"}
WAITING = {"aten::bincount", "aten::equal", "aten::histc"}  # their kernels read data on the host


class Scan(TorchDispatchMode):
    """Collects the `faults` of all that runs in it on fake tensors, as "FILE:FUNCTION: OPERATOR
    WHAT IS WRONG", the function being the innermost one that isn't a library's."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.operators = 0  # on the GPU

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = tensors((args, kwargs)), tensors(result)
        if any(on_gpu(t) for t in (*given, *made)):
            self.operators += 1
            if why := wrong(func, given, made):
                self.faults.append(f"{caller()}: {func.name()} {why}")
        return result


def wrong(func, given: list[Tensor], made: list[Tensor]) -> str:
    name = func.name()
    if name in COPIES and len({on_gpu(t) for t in (*given, *made)}) == 2:
        return "copies from the host" if on_gpu(made[0]) else "copies to the host"
    if not any(on_gpu(t) for t in given):
        return ""
    if torch.Tag.data_dependent_output in func.tags or name in WAITING:
        return "is read by the host"
    # An index has such a shape only where it is a mask.
    masks = not name.startswith("aten::index.") or any(t.dtype == torch.bool for t in given[1:])
    if torch.Tag.dynamic_output_shape in func.tags and masks:
        return "has a shape that depends on data"
    return ""


def on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == CUDA


def tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def caller() -> str:
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.resolve() != HERE and "site-packages" not in path.parts:
            return f"{path.name}:{frame.name}"
    return "?"


@contextmanager
def fake_gpu() -> Iterator[None]:
    """In this context tensors are fake, and CUDA of compute capability 9.0 seems to be there."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True),
        patched(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
    ):
        yield


@contextmanager
def patched(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def scan(function: Callable, *args) -> list[str]:
    """The faults of a call; raises AssertionError if nothing of it ran on the GPU."""
    with Scan() as found, suppress(GuardOnDataDependentSymNode):  # a branch on data is the last one
        function(*args)
    assert found.operators
    return found.faults


def faked(module: nn.Module) -> nn.Module:
    """A module on the meta device, with fake tensors on a GPU for its parameters and buffers."""
    mode = detect_fake_mode()
    with no_dispatch():
        for part in module.modules():
            for tensors_of in (part._parameters, part._buffers):
                for name, tensor in tensors_of.items():
                    if tensor is not None:
                        tensors_of[name] = FakeTensor(mode, tensor, torch.device(CUDA, 0))
    return module
