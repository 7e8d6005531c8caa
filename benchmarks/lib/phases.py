"""Where a mixture of experts spends its time, and the memory it needs, by PyTorch's profiler.

The phases are those of DynMoE's Table 4 (arXiv 2405.14297), whose "gating" is what we call dispatch
and combine. Operators and kernels are told apart by their names; what is called by one of them
counts as its caller.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatch

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

ROUTING = "phase: routing"  # what a candidate calls its router in
CALL = "phase: all"
PHASES = {
    "routing": (ROUTING, "dynamic_dino::route*"),
    "dispatch": (
        # which slots are whose, and their rows
        *("aten::eq", "aten::where", "aten::nonzero*", "aten::sort", "aten::argsort", "aten::div"),
        *("aten::bincount", "aten::histc", "aten::one_hot", "aten::cumsum", "aten::searchsorted"),
        *("aten::floor_divide", "aten::arange", "aten::index_select", "aten::index"),
        *("aten::le", "aten::bitwise_and", "aten::amin", "aten::new_zeros"),
        *("count_experts*", "place_slots*", "moe_ops::permute*"),
    ),
    "experts": (
        *("aten::addmm", "aten::mm", "aten::bmm", "aten::linear", "aten::*grouped_mm*"),
        *("aten::relu", "aten::clamp_min", "aten::add", "transformers::*grouped_mm*"),
        *("fused_ffn*", "grouped_linear*", "moe_ops::grouped_gemm*"),
    ),
    "combine": (
        *("aten::embedding_bag", "aten::_embedding_bag*", "aten::index_add*", "aten::index_copy*"),
        *(
            "aten::cat",
            "aten::mul",
            "aten::sum",
            "aten::layer_norm",
            "combine_slots*",
            "moe_ops::unpermute*",
        ),
    ),
}


def time_by_phase(call: Callable[[], object], repeats: int, cuda: bool) -> dict[str, float]:
    """Seconds of one call by phase; "other" is the rest, Python's and the profiler's on a CPU."""
    call()
    with _profiled(cuda) as result:
        for _ in range(repeats):
            with record_function(CALL):
                call()
        if cuda:
            torch.cuda.synchronize()
    times: Counter = Counter(dict.fromkeys(PHASES, 0.0))
    whole = 0.0
    for event in result.events():
        if event.name == CALL and event.device_type == torch.autograd.DeviceType.CPU:
            whole += event.device_time_total if cuda else event.cpu_time_total
        if cuda:
            for kernel in event.kernels:
                times[_phase_of(kernel.name) or _phase_of_event(event)] += kernel.duration
        elif event.name != CALL:
            times[_phase_of_event(event)] += event.self_cpu_time_total
    found = {phase: times[phase] / 1e6 / repeats for phase in PHASES}
    return found | {"other": max(0.0, whole / 1e6 / repeats - sum(found.values()))}


def peak_bytes(call: Callable[[], object], cuda: bool) -> int:
    """The most that one call allocates at a time, beyond what there was."""
    call()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _profiled(False, profile_memory=True) as result:
        call()
    events = [e for e in result.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _profiled(cuda: bool, **options) -> profile:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    return profile(activities=activities, acc_events=True, **options)


def _phase_of_event(event: FunctionEvent) -> str:
    """That of the innermost caller whose name tells."""
    while event is not None:
        if phase := _phase_of(event.name):
            return phase
        event = event.cpu_parent
    return "other"


def _phase_of(name: str) -> str | None:
    for phase, patterns in PHASES.items():
        if any(fnmatch(name, pattern) for pattern in patterns):
            return phase
    return None
