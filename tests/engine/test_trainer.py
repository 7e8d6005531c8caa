"""One run of the loop: what stops it, what moves, what is logged, averaged and evaluated."""

import argparse
import json
import math
import platform
import re

import pytest
import torch
from detectron2.config import instantiate
from detectron2.utils import comm
from dynamic_dino.config import ConfigError
from dynamic_dino.engine.allocator import keep_freed_memory
from dynamic_dino.engine.checkpointing import last_checkpoint, trim_metrics
from dynamic_dino.engine.ema import ModelEma
from dynamic_dino.engine.evaluate import do_test, load_for_evaluation
from dynamic_dino.engine.launch import argument_parser, launch
from dynamic_dino.engine.setup import resolve_device, sole_run
from dynamic_dino.engine.train import check_batch, do_train
from dynamic_dino.engine.trainer import NonFiniteLossError, amp_dtype, seed_everything
from dynamic_dino.evaluation import DetectionEvaluator
from helpers import accumulation
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn


@pytest.mark.parametrize("poisoned_at", [6, 19])
def test_nan_stops_and_names_files(recipe, tmp_path, poisoned_at):
    """19 is the last iteration: the run must still not be evaluated, nor saved as final."""
    batches = iter(instantiate(recipe("run").dataloader.train))
    names = [[s["file_name"] for s in next(batches)] for _ in range(poisoned_at + 1)]
    poison = next(n for n in names[-1] if not any(n in batch for batch in names[:-1]))
    with pytest.raises(NonFiniteLossError) as info:
        do_train(recipe("run", f"model.poison={poison}"))
    message = str(info.value)
    assert f"iteration {poisoned_at};" in message and ", ".join(names[-1]) in message
    assert "loss_square=nan" in message and "loss is infinite or NaN" in message
    good = last_checkpoint(tmp_path / "run")
    assert str(good) in message
    state = torch.load(good, weights_only=True)
    assert state["iteration"] == {6: 4, 19: 15}[poisoned_at]  # saved every 4, scored every 5
    assert all(v.isfinite().all() for v in state["model"].values())
    assert not (tmp_path / "run/model_final.pth").exists()
    # The poison taken out, the run goes on from there.
    do_train(recipe("run"), resume=True)


def test_nan_inside_the_model_names_files_too(recipe):
    class Matching(nn.Linear):
        def forward(self, batch):
            raise FloatingPointError("the matching cost is not finite")

    cfg = recipe("run")
    cfg.model = {"_target_": Matching, "in_features": 1, "out_features": 1}
    cfg.optimizer.params.lr_factors = {}
    first = next(iter(instantiate(cfg.dataloader.train)))
    names = ", ".join(sample["file_name"] for sample in first)
    with pytest.raises(
        NonFiniteLossError, match="matching cost is not finite.* at iteration 0;"
    ) as e:
        do_train(cfg)
    assert names in str(e.value) and "no checkpoint was due yet" in str(e.value)


def test_infinite_gradient_of_a_finite_loss_stops(recipe, tmp_path):
    cfg = recipe("run", "train.checkpointer.period=1")
    model = instantiate(cfg.model)

    class Root(nn.Module):
        """sqrt has an infinite slope at 0, where the third iteration puts it."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.5))
            self.model = model

        def forward(self, batch):
            shift = self.weight if self.model.calls < 2 else self.weight - self.weight.detach()
            return {"loss_root": shift.abs().sqrt(), **self.model(batch)}

    cfg.model = {"_target_": Root}
    cfg.optimizer.params.lr_factors = {}
    cfg.dataloader.test = {}
    with pytest.raises(NonFiniteLossError, match="the gradient is infinite or NaN at iteration 2;"):
        do_train(cfg)
    assert last_checkpoint(tmp_path / "run").name == "model_0000001.pth"


def test_frozen_tower_stays_as_it_was(recipe):
    cfg = recipe("run", "train.ema.enabled=false")
    model = do_train(cfg)
    norm = model.tower[1]
    assert not model.tower.training and not norm.training
    assert norm.num_batches_tracked == 0 and (norm.running_mean == 0).all()
    assert model.body[2].training, "dropout of the trained part, also after the evaluations"
    state = torch.load(f"{cfg.train.output_dir}/model_0000015.pth", weights_only=True)["model"]
    assert torch.equal(state["tower.0.weight"], model.tower[0].weight)
    assert not torch.equal(state["body.0.weight"], model.body[0].weight)


def test_ema_follows_and_shares_what_is_frozen():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    ema = ModelEma(model, decay=0.6)
    expected = model[2].weight.detach().clone()
    for t in range(1, 30):
        with torch.no_grad():
            model[2].weight.normal_()
            model[1].running_mean.normal_()
        ema.update()
        decay = min(0.6, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * model[2].weight.detach()
    assert torch.allclose(ema.model[2].weight, expected, atol=1e-6)
    assert torch.equal(ema.model[1].running_mean, model[1].running_mean)
    assert ema.model[0].weight is model[0].weight
    assert not any(name.startswith("0.") for name in ema.state_dict()["weights"])
    assert not ema.model.training and model.training

    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="trained in only one of the two runs, e.g. 0.bias"):
        ModelEma(other, 0.6).load_state_dict(ema.state_dict())


def test_ema_is_what_is_evaluated(recipe, metrics):
    cfg = recipe("run")
    model = do_train(cfg)
    state = torch.load(f"{cfg.train.output_dir}/model_final.pth", weights_only=True)
    logged = metrics("run")[20]["val/AP"]
    raw = do_test(cfg, model)["val/AP"]
    averaged = instantiate(cfg.model)
    averaged.load_state_dict(state["model"] | state["ema"]["weights"])
    assert do_test(cfg, averaged)["val/AP"] == logged
    assert raw != logged


def test_the_start_is_scored_too(recipe, metrics, whole, caplog):
    caplog.set_level("INFO")
    cfg = recipe("run", "train.eval_first=True", "train.eval_period=0")
    do_train(cfg)
    table = next(m for m in caplog.messages if m.startswith("Before and after"))
    before, after = (float(line.split()[-1]) for line in table.splitlines()[2:])
    rows = metrics("run")
    assert rows[0]["val/AP"] == pytest.approx(before, abs=0.01) != pytest.approx(after, abs=0.01)
    assert rows[20]["val/AP"] == pytest.approx(after, abs=0.01)
    # It changes nothing else.
    plain = metrics("whole")
    assert [r["total_loss"] for r in rows.values() if "total_loss" in r] == [
        r["total_loss"] for r in plain.values() if "total_loss" in r
    ]


def test_metrics_reach_json_and_tensorboard(metrics, whole, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = metrics("whole")
    row = rows[7]
    assert row["total_loss"] == pytest.approx(row["loss_square"] + row["loss_absolute"])
    assert {"moe/entropy", "grad_norm", "lr"} <= row.keys()
    assert rows[0]["lr"] == pytest.approx(0.02 * 0.1) and rows[19]["lr"] < 0.001
    assert json.loads((tmp_path / "whole/results.json").read_text()) == {
        "weights": "model_final.pth",
        "iteration": 19,
        "val/AP": rows[20]["val/AP"],
    }
    events = EventAccumulator(str(tmp_path / "whole")).Reload()
    logged = {e.step: e.value for e in events.Scalars("total_loss")}
    assert logged == pytest.approx({i: r["total_loss"] for i, r in rows.items() if i < 20})


@settings(max_examples=2, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_micro_batches_equal_one_large_batch(seed):
    """To rounding in float64: gradients, clipping, the optimizer's steps."""
    expected = accumulation.train(seed, 1)
    for parts in (2, 8):
        found = accumulation.train(seed, parts)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 99), st.integers(1, 70), st.integers(1, 9))
def test_a_batch_that_cannot_be_shared_out_is_refused_with_numbers_that_can(total, ranks, parts):
    cfg = OmegaConf.create(
        {"dataloader": {"train": {"total_batch_size": total}}, "train": {"accumulate": parts}}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "get_world_size", lambda: ranks)
        if total % (ranks * parts) == 0:
            return check_batch(cfg)
        with pytest.raises(ConfigError) as error:
            check_batch(cfg)
    multiples, fewer, steps, at_once = re.search(
        r"\(([\d or]+)\)\..* (\d+) processes with train.accumulate=(\d+), (\d+) images at once",
        str(error.value),
    ).groups()
    assert all(int(m) % (ranks * parts) == 0 for m in multiples.split(" or "))
    assert int(fewer) <= ranks and int(fewer) * int(steps) * int(at_once) == total
    assert int(at_once) <= max(total // (ranks * parts), 1)


def test_gradients_are_clipped(recipe):
    """One step of SGD with rate 1 moves the weights by the clipped gradient."""
    cfg = recipe("run", "train.max_iter=1", "train.clip_grad.max_norm=0.25", "optimizer.lr=1")
    cfg.optimizer._target_ = "torch.optim.SGD"
    del cfg.optimizer.betas
    cfg.optimizer.update(weight_decay=0)
    cfg.optimizer.params.lr_factors = {}
    cfg.lr_multiplier = {
        "_target_": "fvcore.common.param_scheduler.ConstantParamScheduler",
        "value": 1,
    }
    seed_everything(cfg.train.seed)
    before = [p.clone() for p in instantiate(cfg.model).parameters() if p.requires_grad]
    after = [p for p in do_train(cfg).parameters() if p.requires_grad]
    step = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])
    assert step.norm().item() == pytest.approx(0.25, rel=1e-3)


def test_loss_prefix_decides(recipe):
    class NoLoss(nn.Linear):
        def forward(self, batch):
            return {"error": self.weight.sum()}

    cfg = recipe("run")
    cfg.model = {"_target_": NoLoss, "in_features": 1, "out_features": 1}
    cfg.optimizer.params.lr_factors = {}
    with pytest.raises(ValueError, match=r"no 'loss\*' in training, only \['error'\]"):
        do_train(cfg)


def test_evaluator_must_exist(recipe):
    cfg = recipe("run")
    cfg.dataloader.evaluator = {"vall": cfg.dataloader.evaluator.val}
    with pytest.raises(ConfigError, match="dataloader.test.val has no evaluator.*vall"):
        do_test(cfg, instantiate(cfg.model))
    with pytest.raises(ConfigError, match="dataloader.test.val has no evaluator.*vall"):
        do_train(cfg)
    cfg = recipe("run")
    cfg.dataloader.evaluator.val = {"_target_": DetectionEvaluator, "dataset_name": "gone.json"}
    with pytest.raises(ConfigError, match="evaluator.val.dataset_name: .*gone.json"):
        do_train(cfg)  # not when the first evaluation is due


def test_evaluation_needs_weights(recipe):
    with pytest.raises(ConfigError, match="train.init_checkpoint=FILE, or --resume"):
        load_for_evaluation(recipe("run"), resume=False)
    with pytest.raises(ConfigError, match="no checkpoint in .*run"):
        load_for_evaluation(recipe("run"), resume=True)


def test_unwritable_output(tmp_path):
    (tmp_path / "file").touch()
    said = "can't write to .*file/run .*: choose another with train.output_dir=FOLDER"
    with pytest.raises(ConfigError, match=said), sole_run(tmp_path / "file/run"):
        pass


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        resolve_device("cuda")
    with pytest.raises(ConfigError, match="use auto, cuda or cpu"):
        resolve_device("gpu")
    with pytest.raises(ConfigError, match="float16 needs CUDA; use bfloat16"):
        amp_dtype({"enabled": True, "dtype": "float16"}, "cpu")
    with pytest.raises(ConfigError, match="'fp16' is unknown"):
        amp_dtype({"enabled": True, "dtype": "fp16"}, "cuda")
    amp = {"enabled": True, "dtype": "bfloat16"}
    for supported, dtype in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(
            torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda s=supported: s, raising=False
        )
        assert amp_dtype(amp, "cpu") is dtype
        assert amp_dtype(amp, "cuda") is torch.bfloat16
    assert amp_dtype({**amp, "enabled": False}, "cuda") is amp_dtype(None, "cpu") is None

    calls = []
    parser = argument_parser("recipe.py")
    launch(calls.append, parser.parse_args(["train.max_iter=3"]))
    (args,) = calls
    assert isinstance(args, argparse.Namespace) and args.config_file == "recipe.py"
    assert args.opts == ["train.max_iter=3", "train.device=cpu"]
    with pytest.raises(ConfigError, match="has 0 GPUs.*--num-gpus 0"):
        launch(calls.append, parser.parse_args(["--num-gpus", "8"]))


def test_memory_setting(monkeypatch):
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()


def test_help_explains(capsys):
    with pytest.raises(SystemExit):
        argument_parser("the_recipe.py").parse_args(["--help"])
    text = capsys.readouterr().out
    for word in ("torchrun", "srun", "--resume", "--eval-only", "the_recipe.py", "optimizer.lr="):
        assert word in text


def test_trimmed_metrics(tmp_path):
    file = tmp_path / "metrics.json"
    rows = [json.dumps({"iteration": i, "loss": math.pi * i}) for i in range(5)]
    file.write_text("\n".join(rows) + '\n{"iteration": 5, "lo')
    assert trim_metrics(file, 3) == [json.loads(row) for row in rows[:3]]
    assert file.read_text().splitlines() == rows[:3]
