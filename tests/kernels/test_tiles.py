"""The choice of tiles: what it depends on, that it fits, and what happens where it does not."""

import itertools
import json
import logging
import os
import sys
from dataclasses import replace

import pytest
import torch
from dynamic_dino_kernels import aot
from dynamic_dino_kernels.launch import GPU, recorded_launches
from dynamic_dino_kernels.moe import ops, tiles, tuned
from dynamic_dino_kernels.moe.precision import choose_precision
from dynamic_dino_kernels.moe.tiles import (
    Problem,
    Tiles,
    best_splits,
    choose_tiles,
    pinned_tiles,
    resident,
    run_fitting,
    shared_memory,
)
from helpers.compiler import leave_out_machine_code
from helpers.processes import run_python
from triton.runtime.errors import OutOfResources

CPU = torch.device("cpu")
TYPES = [
    (torch.float16, "ieee"),
    (torch.bfloat16, "ieee"),
    (torch.float32, "tf32"),
    (torch.float32, "tf32x3"),
    (torch.float32, "ieee"),
    (torch.float64, "ieee"),
]


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch, tmp_path):
    monkeypatch.setenv(tuned.ENVIRONMENT_VARIABLE, str(tmp_path / "tuned.json"))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped.json")
    monkeypatch.setattr(tiles, "_unfit", set())
    tuned.table.cache_clear()
    tiles._estimate.cache_clear()
    yield
    tuned.table.cache_clear()
    tiles._estimate.cache_clear()


def problem(
    tokens=900, dtype=torch.float16, precision="ieee", backward=False, dim=256, hidden=1024
):
    return Problem(2 * tokens, 16, dim, hidden, dtype, backward, 2, precision)


@pytest.mark.parametrize("gpu", aot.TARGETS.values(), ids=lambda gpu: gpu.name)
def test_estimates_fit_in_shared_memory_and_in_one_wave(gpu):
    for (dtype, precision), tokens, backward in itertools.product(
        TYPES, (0, 1, 30, 900, 14400), (False, True)
    ):
        if backward and precision == "tf32x3":
            continue
        wanted = problem(tokens, dtype, precision, backward)
        with recorded_launches(gpu):
            chosen = choose_tiles(wanted, CPU)
        if shared_memory(wanted, chosen, gpu) > gpu.shared_memory:
            *_, smallest = tiles.ways(wanted, gpu)  # there is nothing else to try
            assert replace(chosen, splits=1) == smallest and dtype == torch.float64 and backward
            continue
        if chosen.splits > 1:
            at_a_time = resident(gpu, chosen.warps, 255, shared_memory(wanted, chosen, gpu))
            programs = wanted.slots / chosen.rows + min(16, wanted.slots) / 2
            assert round(programs) * chosen.splits <= gpu.processors * at_a_time


def test_splits_stop_before_a_second_wave():
    """36 tiles on 108 multiprocessors with one program each: three splits, not four."""
    gpu, chosen = aot.TARGETS["sm_80"], Tiles("fused", 64, 64, 1, 8, 2)
    assert best_splits(problem(), chosen, gpu) == 3
    assert best_splits(problem(), chosen, replace(gpu, processors=107)) == 2
    assert best_splits(problem(14400), chosen, gpu) == 1
    assert best_splits(problem(hidden=64), chosen, gpu) == 1


COMPILED = [
    (torch.float16, "ieee", False, Tiles("fused", 64, 64, 1, 8, 1)),
    (torch.float16, "ieee", False, Tiles("fused", 64, 64, 1, 8, 2)),
    (torch.bfloat16, "ieee", False, Tiles("fused", 64, 32, 1, 4, 3)),
    (torch.float16, "ieee", False, Tiles("fused", 32, 64, 1, 4, 3)),
    (torch.float32, "tf32", False, Tiles("fused", 32, 32, 1, 4, 2)),
    (torch.float32, "tf32x3", False, Tiles("two_gemms", 64, 32, 1, 4, 3)),
    (torch.float32, "ieee", False, Tiles("two_gemms", 64, 32, 1, 8, 3)),
    (torch.float16, "ieee", True, Tiles("fused", 32, 32, 1, 4, 2)),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sm_86"])  # test_aot.py compiles for sm_90
def test_shared_memory_against_the_compiler(name, tmp_path):
    """Never below what the compiled kernels ask for, and not much above."""
    done = run_python(__file__, name, env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    for case, needed in zip(COMPILED, json.loads(done.stdout), strict=True):
        dtype, precision, backward, way = case
        wanted = problem(900, dtype, precision, backward)
        estimate = shared_memory(wanted, way, aot.TARGETS[name])
        assert needed <= estimate <= 1.1 * needed + 16384, (case, needed, estimate)


def compiled_shared_memory(name, dtype, precision, backward, way):
    """What Triton's compiler says, of the hungriest kernel of a forward or backward pass."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    weights = [empty(16, 1024, 256), empty(16, 1024), empty(16, 256, 1024), empty(16, 256)]
    x, gates = empty(900, 256), empty(900, 2, dtype=torch.float32)
    ids, rest = empty(900, 2, dtype=torch.int32), [None] * 4
    with recorded_launches(aot.TARGETS[name]) as launches, pinned_tiles(way):
        _, *plan, z, _, _ = ops.forward(x, *weights, ids, gates, *rest, 0.0, "relu", True, True)
        if backward:
            launches.clear()
            ops.backward(x, x, *weights, ids, gates, *plan, z[:0], "relu", False)
    products = [launch for launch in launches if "PRECISION" in launch[2]]
    jobs = [aot._job(name, "", k, a, meta | {"PRECISION": precision}) for k, a, meta in products]
    return max(aot.compiled_kernel(job).metadata.shared for job in jobs)


def test_programs_at_a_time():
    a100, a6000 = aot.TARGETS["sm_80"], aot.TARGETS["sm_86"]
    assert resident(a100, 8, 255, 0) == 1 and resident(a100, 4, 255, 0) == 2  # registers
    assert resident(a100, 4, 32, 82432) == 2 and resident(a100, 4, 32, 83968) == 1
    assert resident(a100, 4, 32, 0) == 16 and resident(a6000, 4, 32, 0) == 12  # warps
    assert resident(a6000, 32, 255, 10**6) == 1


def test_precision_is_chosen_by_pytorchs_setting_then_by_the_gpu():
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        for setting, gpu, backward, expected in [
            ("none", "sm_80", False, "tf32x3"),
            ("none", "sm_90", False, "tf32x3"),
            ("none", "sm_90", True, "ieee"),  # there is no kernel for it
            ("none", "sm_86", False, "ieee"),  # its matrix units would take longer
            ("none", "interpreter", False, "ieee"),
            ("ieee", "sm_90", False, "ieee"),
            ("tf32", "sm_86", True, "tf32"),
        ]:
            settings.fp32_precision = setting
            assert choose_precision(torch.float32, GPU(gpu, 1, 1), backward) == expected
            assert choose_precision(torch.float16, GPU(gpu, 1, 1), backward) == "ieee"
    finally:
        settings.fp32_precision = before


def test_the_key_names_all_that_matters():
    first = problem()
    others = [
        replace(first, experts=8), replace(first, dim=128), replace(first, hidden=512),
        replace(first, backward=True), replace(first, top_k=1), replace(first, slots=14400),
        replace(first, dtype=torch.bfloat16), replace(first, dtype=torch.float32),
        replace(first, dtype=torch.float32, precision="tf32"),
        replace(first, dtype=torch.float32, precision="tf32x3"),
    ]  # fmt: skip
    keys = {p.key("sm_90") for p in (first, *others)} | {first.key("NVIDIA H200")}
    assert len(keys) == len(others) + 2
    assert replace(first, slots=2000).key("sm_90") == first.key("sm_90")  # 125 or 112 an expert


def chosen_on(gpu, wanted=None):
    with recorded_launches(gpu):
        return choose_tiles(wanted or problem(), CPU)


def test_measured_tiles_beat_the_estimate_by_product_then_by_architecture():
    gpu = GPU("sm_90", 132, 232448, product="NVIDIA H200")
    estimate, own, kin, shipped = chosen_on(gpu), Tiles(rows=16), Tiles(rows=128), Tiles(rows=32)
    key = problem().key
    tuned.save(tuned.SHIPPED, {key("sm_90"): kin})
    assert chosen_on(gpu) == kin
    assert chosen_on(replace(gpu, name="sm_80")) != kin
    assert chosen_on(gpu, problem(14400)) not in (kin, estimate)
    tuned.save(tuned.SHIPPED, {key("NVIDIA H200"): shipped})
    assert chosen_on(gpu) == shipped and chosen_on(replace(gpu, product="H100")) == kin
    tuned.save(tuned.user_file(), {key("NVIDIA H200"): own})
    assert chosen_on(gpu) == own
    assert json.loads(tuned.SHIPPED.read_text()).keys() == {key("sm_90"), key("NVIDIA H200")}


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"a": 1}', '{"a": {"rows": 17}}', '{"a": {"wings": 2}}', '{"a": {"rows": "16"}}'],
)
def test_a_corrupt_user_file_is_said_once_and_ignored(text, caplog):
    gpu, path = GPU("sm_90", 132, 232448), tuned.user_file()
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        first, second = chosen_on(gpu), chosen_on(gpu, problem(14400))
    assert {first.form, second.form} == {"fused"}
    (record,) = caplog.records
    assert str(path) in record.getMessage() and "tune" in record.getMessage()
    tuned.save(path, {problem().key("sm_90"): Tiles(rows=16)})  # replaces it
    assert chosen_on(gpu) == Tiles(rows=16)


@pytest.mark.parametrize(
    "fields", [dict(form="three"), dict(rows=24), dict(warps=3), dict(splits=0), dict(stages=1.5)]
)
def test_tiles_that_no_kernel_takes(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Tiles(**fields)


def test_smaller_tiles_where_compiled_kernels_do_not_fit():
    """The kernel's own word decides, and is remembered; whatever the number of tokens."""
    gpu, tried = GPU("sm_90", 132, 232448), []

    def run(chosen, limit=60000):
        tried.append(chosen)
        needed = shared_memory(problem(), chosen, gpu)
        if needed > limit:
            raise OutOfResources(needed, limit, "shared memory")
        return chosen

    with recorded_launches(gpu):
        first = choose_tiles(problem(), CPU)
        found = run_fitting(problem(), CPU, run)
        assert tried[0] == first != found == tried[-1] and len(set(tried)) == len(tried)
        assert choose_tiles(problem(), CPU) == found
        assert choose_tiles(problem(880), CPU) == found
        assert choose_tiles(problem(backward=True), CPU).stages == 2
        with pytest.raises(RuntimeError, match="choose backend='grouped'"):
            run_fitting(problem(), CPU, lambda chosen: run(chosen, limit=0))
        with pytest.raises(OutOfResources), pinned_tiles(first):
            run_fitting(problem(), CPU, lambda chosen: run(chosen, limit=0))


def test_measured_tiles_that_do_not_fit_give_way():
    gpu, measured = GPU("sm_90", 132, 232448), Tiles("fused", 128, 128, 1, 8, 4)
    tuned.save(tuned.user_file(), {problem().key("sm_90"): measured})

    def run(chosen):
        if chosen == measured:
            raise OutOfResources(2, 1, "shared memory")
        return chosen

    with recorded_launches(gpu):
        assert run_fitting(problem(), CPU, run) == choose_tiles(problem(), CPU) != measured


if __name__ == "__main__":
    leave_out_machine_code(memory=True)
    print(json.dumps([compiled_shared_memory(sys.argv[1], *case) for case in COMPILED]))
