"""Tuning: its bookkeeping with a bench that measures nothing, and all of it on the interpreter."""

import itertools
import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from dynamic_dino_kernels import aot, expert_ffn, tune
from dynamic_dino_kernels.launch import GPU, recorded_launches
from dynamic_dino_kernels.moe import tuned
from dynamic_dino_kernels.moe.tiles import Problem, Tiles, choose_tiles, pinned_tiles
from helpers.compiler import leave_out_machine_code
from helpers.processes import run_python

CPU = torch.device("cpu")
H100 = GPU("sm_90", 132, 232448, product="NVIDIA H100 PCIe")


@pytest.fixture(autouse=True)
def files(monkeypatch, tmp_path):
    monkeypatch.setenv(tuned.ENVIRONMENT_VARIABLE, str(tmp_path / "cache" / "tuned.json"))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped.json")
    tuned.table.cache_clear()
    yield
    tuned.table.cache_clear()


def problem(tokens=900, dtype=torch.float16, backward=False):
    return Problem(2 * tokens, 16, 256, 1024, dtype, backward, 2)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class FakeBench:
    """Takes a second a candidate; times by a rule; compiler and launch fail for some."""

    def __init__(self, clock, time_of=lambda tiles: tiles.rows * tiles.stages, broken=(), wrong=()):
        self.clock, self.time_of, self.broken, self.wrong = clock, time_of, broken, wrong
        self.measured, self.batches, self.checks = [], [], 0

    def __call__(self, problem, device):
        return self

    def compile(self, ways, workers):
        self.batches.append(list(ways))
        return {tiles: "PTXASError: no" for tiles in ways if tiles in self.wrong}

    def seconds(self, tiles, repeats):
        assert any(tiles in batch for batch in self.batches), "measured before it was compiled"
        self.clock.now += 1
        self.measured.append(tiles)
        if tiles in self.broken:
            raise RuntimeError("PassManager::run failed")
        return self.time_of(tiles)

    def check(self):
        self.checks += 1


def run(problems, bench, **options):
    kept = {}
    with recorded_launches(H100):
        tune.tune(problems, CPU, kept.__setitem__, bench=bench, clock=bench.clock, **options)
    return kept


def test_the_fastest_way_of_each_problem_is_kept():
    bench, problems = FakeBench(Clock()), [problem(), problem(14400)]
    kept = run(problems, bench)
    assert set(kept) == set(problems)
    for wanted, best in kept.items():
        tried = [t for t in tune.candidates(wanted, H100)]
        assert bench.time_of(best) == min(bench.time_of(t) for t in tried)
    with recorded_launches(H100):
        assert bench.measured[0] == choose_tiles(problem(), CPU)  # the estimate comes first


def test_the_budget_is_shared_and_never_exceeded():
    bench, problems = FakeBench(Clock()), [problem(t) for t in (900, 1800, 14400)]
    kept = run(problems, bench, budget=30)
    assert bench.clock.now <= 31 and set(kept) == set(problems)
    bench = FakeBench(Clock())
    assert not run(problems, bench, budget=0) and not bench.measured
    # What a problem does not use, the next ones have.
    short, rest = problem(dtype=torch.float64, backward=True), problem()
    bench = FakeBench(Clock())
    run([short, rest], bench, budget=60)
    count = len(tune.candidates(short, H100))
    assert count < 30 and len(bench.measured) >= count + min(40, 60 - count)


def test_candidates_that_fail_are_skipped_and_said(capsys):
    with recorded_launches(H100):
        first, second, third, *_ = tune.candidates(problem(), H100)
    bench = FakeBench(Clock(), lambda tiles: tiles.rows, broken=[first], wrong=[second, third])
    kept = run([problem()], bench)
    assert kept[problem()] not in (first, second, third)
    assert second not in bench.measured and bench.checks == 1
    said = "".join(capsys.readouterr())
    assert said.count("skipped") == 3 and "PassManager::run failed" in said and "PTXASError" in said


def test_what_was_measured_is_kept_when_the_run_is_interrupted():
    class Interrupted(FakeBench):
        def seconds(self, tiles, repeats):
            if len(self.measured) == 5:
                raise KeyboardInterrupt
            return super().seconds(tiles, repeats)

    bench, kept = Interrupted(Clock()), {}
    with recorded_launches(H100), pytest.raises(KeyboardInterrupt):
        tune.tune([problem()], CPU, kept.__setitem__, bench=bench, clock=bench.clock)
    assert bench.time_of(kept[problem()]) == min(map(bench.time_of, bench.measured))


def test_a_gpu_that_no_longer_answers_ends_the_run():
    class Dead(FakeBench):
        def check(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with recorded_launches(H100):
        first = tune.candidates(problem(), H100)[0]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run([problem()], Dead(Clock(), broken=[first]))


@pytest.mark.parametrize("gpu", aot.TARGETS.values(), ids=lambda gpu: gpu.name)
def test_candidates(gpu):
    types = [(torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "tf32x3")]
    for (dtype, precision), backward in itertools.product(types, (False, True)):
        if backward and precision == "tf32x3":
            precision = "ieee"
        wanted = Problem(1800, 16, 256, 1024, dtype, backward, 2, precision)
        short, full = (tune.candidates(wanted, gpu, exhaustive) for exhaustive in (False, True))
        with recorded_launches(gpu):
            assert choose_tiles(wanted, CPU) in short
        assert 2 <= len(short) <= tune.SHORT < len(full)
        assert len(set(full)) == len(full)
        assert all(t.form == "fused" for t in full) == backward


def test_order_of_problems():
    arguments = dict(experts=16, top_k=2, dim=256, hidden=1024, tokens=[900, 1800])
    options = tune.argparse.Namespace(
        **arguments, dtypes=["float16", "float32", "tf32"], forward_only=False
    )
    found = tune.problems_of(options, H100)
    assert [p.slots for p in found] == [1800] * 6 + [3600] * 6
    assert [p.backward for p in found[:6]] == [False] * 3 + [True] * 3
    assert [p.precision for p in found[:6]] == ["ieee", "tf32x3", "tf32", "ieee", "ieee", "tf32"]
    options.forward_only = True
    assert not any(p.backward for p in tune.problems_of(options, H100))


def test_results_go_to_the_users_file_or_are_shipped(capsys):
    tune.Keeper(H100)(problem(), Tiles(rows=16))
    tune.Keeper(H100)(problem(14400), Tiles(rows=64))
    own = json.loads(tuned.user_file().read_text())
    assert set(own) == {problem(t).key("NVIDIA H100 PCIe") for t in (900, 14400)}
    tune.Keeper(H100, ship=True)(problem(), Tiles(rows=16))
    shipped = tuned.read(tuned.SHIPPED)
    assert shipped == {problem().key(n): Tiles(rows=16) for n in ("NVIDIA H100 PCIe", "sm_90")}


def test_an_unwritable_file_is_said_once(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(tuned.ENVIRONMENT_VARIABLE, str(tmp_path / "file" / "tuned.json"))
    keeper = tune.Keeper(H100)
    keeper(problem(), Tiles(rows=16))
    keeper(problem(14400), Tiles(rows=64))
    assert capsys.readouterr().err.count(tuned.ENVIRONMENT_VARIABLE) == 1
    assert len(keeper.unwritten) == 2


def test_needs_cuda():
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            tune.main([])


@pytest.mark.slow
def test_compiles_for_a_gpu_that_is_not_there(tmp_path):
    """Triton's own compiler in two threads: what fits, what doesn't, and what is no kernel."""
    done = run_python(__file__, env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    fits, large, tiny = json.loads(done.stdout)
    assert fits is None
    assert large.startswith("needs ") and large.endswith(f" bytes of {H100.shared_memory}")
    assert tiny.startswith("CompilationError: ")


def compile_three():
    """Without the interpreter, on a driver that knows only which GPU it would be."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    wanted = problem(64)
    ways = [Tiles(rows=16), Tiles(rows=128, hidden=64, warps=8, stages=4), Tiles(hidden=8)]
    with recorded_launches(H100):
        wrong = tune.Bench(wanted, CPU).compile(ways, workers=2)
    print(json.dumps([wrong.get(tiles) for tiles in ways]))


@pytest.mark.parametrize("backward", [False, True])
def test_all_of_it_at_a_tiny_size(monkeypatch, backward):
    """Real kernels and a real file; only the clock of the GPU is replaced."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(tune, "captured", lambda step: step)

        def seconds(step):
            start = time.perf_counter()
            step()
            return time.perf_counter() - start

        monkeypatch.setattr(tune, "seconds", seconds)
    monkeypatch.setattr(tune, "LAYERS", 1)
    device = torch.get_default_device()
    wanted = Problem(14, 3, 16, 32, torch.float32, backward, 2)
    few = [Tiles(rows=16, hidden=16), Tiles(rows=16, hidden=16, splits=2)]
    monkeypatch.setattr(tune, "candidates", lambda *_: few)
    keeper = tune.Keeper(tune.gpu_of(device))
    tune.tune([wanted], device, keeper, repeats=1, workers=2)
    (best,) = tuned.read(tuned.user_file()).values()
    assert choose_tiles(wanted, device) == best
    x, w1, b1 = torch.randn(7, 16), torch.randn(3, 32, 16), torch.randn(3, 32)
    w2, b2, gates = torch.randn(3, 16, 32), torch.randn(3, 16), torch.ones(7, 2)
    ids = torch.randint(0, 3, (7, 2), dtype=torch.int32)
    with pinned_tiles(best):
        y = expert_ffn(x, w1, b1, w2, b2, ids, gates, backend="triton")
    torch.testing.assert_close(
        y, expert_ffn(x, w1, b1, w2, b2, ids, gates, backend="sequential"), rtol=1e-4, atol=1e-4
    )


if __name__ == "__main__":
    leave_out_machine_code(memory=True)
    compile_three()
