"""Two processes with gloo on CPU, started as by torchrun, against one process."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from dynamic_dino.config import load_config
from dynamic_dino.engine.launch import launch
from dynamic_dino.engine.train import do_train
from helpers import accumulation
from helpers.ranks import run_ranks
from helpers.seeds import VARIABLE
from helpers.two_ranks import main as train_by_two
from helpers.two_ranks import survive

HERE = Path(__file__).parent
POISON = "041.png"
SEED = int(os.environ.get(VARIABLE, "0"))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    output = tmp_path_factory.mktemp("two_ranks")
    run_ranks(train_by_two, output=output, poison=POISON, seed=SEED)
    return output


@pytest.fixture
def tmp_path(two_ranks):
    """`recipe` and `metrics` look into the folder of the two processes."""
    return two_ranks


@pytest.mark.slow
def test_two_ranks_and_micro_batches_equal_one_large_batch(two_ranks):
    expected = accumulation.train(SEED, 1)
    for rank in (0, 1):
        found = torch.load(two_ranks / f"accumulated{rank}.pth")
        for name, weights in found.items():
            torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.slow
def test_two_ranks_equal_one_with_two_micro_batches(recipe, metrics, two_ranks):
    """Noise, dropout, what BatchNorm learns, and what isn't a mean over samples: all of it."""
    model = do_train(recipe("accumulated", "model.norm=batch", "train.accumulate=2"))
    single, double = metrics("accumulated"), metrics("norms")
    assert len(double) > 10
    for i in double:
        assert double[i] == pytest.approx({k: single[i][k] for k in double[i]}, rel=1e-4), i
    by_two = torch.load(two_ranks / "norms0.pth")
    for name, value in model.state_dict().items():
        if "num_batches" not in name and name != "calls":
            torch.testing.assert_close(value, by_two[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_ranks_resume_exactly(metrics, two_ranks):
    assert metrics("cut") == metrics("random")
    a, b = (torch.load(two_ranks / n / "model_final.pth") for n in ("cut", "random"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert all(
        torch.equal(a["ema"]["weights"][k], b["ema"]["weights"][k]) for k in a["ema"]["weights"]
    )


def launch_late(main, args) -> None:
    """One process comes first after the restart, and must not find what was true before."""
    if os.environ["RANK"] == "0" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
        time.sleep(0.5)
    launch(main, args)


@pytest.mark.slow
def test_a_killed_rank_costs_nothing_but_a_restart(metrics, two_ranks):
    run_ranks(survive, max_restarts=1, start=launch_late, output=two_ranks)
    assert "Resuming from" in (two_ranks / "killed/log.txt").read_text()
    assert metrics("killed") == metrics("random")
    a, b = (torch.load(two_ranks / n / "model_final.pth")["model"] for n in ("killed", "random"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_every_rank_names_the_batch_that_was_nan(two_ranks):
    errors = [(two_ranks / f"error{rank}.txt").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1]
    (batch,) = [line for line in errors[0].split("\n") if "batch:" in line]
    names = batch.split(":")[1].split(",")
    assert POISON in batch and len(names) == 4, "the half batch of one rank"


@pytest.mark.slow
def test_ranks_agree_on_running_statistics(metrics, two_ranks):
    """What is scored in the run is what is saved; and a signal to one rank ends both, in the same
    iteration, after which the run goes on to the same bits."""
    first, second = (torch.load(two_ranks / f"norms{rank}.pth") for rank in (0, 1))
    assert first["body.1.running_mean"].abs().sum() > 0
    assert all(torch.equal(first[name], second[name]) for name in first)
    scores = json.loads((two_ranks / "norms_file.json").read_text())
    assert scores["val/AP"] == metrics("norms")[20]["val/AP"]

    assert metrics("norms_cut") == metrics("norms")
    whole, cut = (torch.load(two_ranks / n / "model_final.pth") for n in ("norms", "norms_cut"))
    assert all(torch.equal(whole["model"][k], cut["model"][k]) for k in whole["model"])
    assert "ends after iteration 6, which is saved" in (two_ranks / "norms_cut/log.txt").read_text()


# DynMoE ------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_two_ranks_choose_the_same_experts(metrics, two_ranks):
    """Each rank sees half of the tokens; both end with the same experts, and so does one process
    that sees all of them."""
    first, second = (torch.load(two_ranks / f"adaptive{rank}.pth") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    cfg = [f"train.output_dir={two_ranks / 'adaptive_single'}", "model.dropout=0", "model.noise=0"]
    do_train(load_config(HERE.parent / "helpers/adaptive_recipe.py", cfg))
    single, double = metrics("adaptive_single"), metrics("adaptive")
    keys = {"moe/layer0/removed", "moe/layer0/added", "moe/experts"}
    changes = [{k: row[k] for k in keys & row.keys()} for row in single.values()]
    assert changes == [{k: row[k] for k in keys & row.keys()} for row in double.values()]
    assert sum(len(change) > 1 for change in changes) >= 1


@pytest.mark.slow
def test_two_ranks_resume_across_a_change_of_experts(metrics):
    assert metrics("adaptive_cut") == metrics("adaptive_random")
