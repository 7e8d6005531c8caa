"""The sweep runner with a stand-in for train_net.py, and its page."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import ablations
import numpy as np
import pytest
from dynamic_dino.config import load_config
from helpers.seeds import fresh_rng
from lib import ablations_page
from lib import provenance as report
from lib.sweep_times import step_times
from lib.sweeps import SETTINGS, SWEEPS, Row, Setting, Sweep

TRAIN_NET = """
import json, os, sys, time
from pathlib import Path
options = dict(o.split("=", 1) for o in sys.argv if "=" in o)
folder = Path(options["train.output_dir"])
with (folder / "calls").open("a") as file:
    file.write(" ".join(o for o in sys.argv if o.startswith("--")) + "\\n")
if "fail" in options.get("train.init_checkpoint", ""):
    sys.exit("there is no such checkpoint")
print("[now] dynamic_dino.engine.printer: iter 1/2  eta 0:00:01", flush=True)
time.sleep(float(options.get("sleep", 0)))
if "--eval-only" not in sys.argv:
    rows = [{"iteration": i, "total_loss": 3.0 - i, "time": 0.5} for i in range(2)]
    (folder / "metrics.json").write_text("\\n".join(map(json.dumps, rows)))
    (folder / "log.txt").write_text("Command: " + " ".join(sys.argv))
    (folder / "model_final.pth").touch()
    if options.get("killed"):
        sys.exit(0)
test = folder / "evaluation/val"
test.mkdir(parents=True, exist_ok=True)
(test / "results.json").write_text(json.dumps({"routing": [], "images": 7}))
score = 40.0 + int(options["train.seed"])
(folder / "results.json").write_text(json.dumps({"val/AP50": score, "val/AP": None}))
"""
SETTING = Setting(
    "toy",
    "toys",
    ("val",),
    {"control": Row("dense", "pretrain/nano_drawn"), "other": Row("other", "pretrain/nano_drawn")},
)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A repository with one sweep, whose training is `TRAIN_NET`."""
    script = tmp_path / "train_net.py"
    script.write_text(TRAIN_NET)
    shutil.copytree(ablations.ROOT / "configs", tmp_path / "configs")
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    monkeypatch.setattr(ablations, "SETTINGS", {"toy": SETTING})
    sweep = Sweep("toys", "Toys", "toy", "control", ("control", "other"))
    monkeypatch.setattr(ablations, "SWEEPS", {"toys": sweep})
    monkeypatch.setattr(ablations, "results_folder", lambda device: tmp_path / "results/cpu")
    monkeypatch.setattr(ablations, "measure", lambda *_, **__: {"flops": {}, "parameters": {}})
    monkeypatch.setattr(ablations, "load_config", lambda path, *_: load_config(path))
    monkeypatch.setattr(ablations_page, "main", lambda check=False: 0)
    command = ablations.Run.command

    def stand_in(run, flags=("--resume",)):
        return [str(script), *command(run, flags)[1:]]

    monkeypatch.setattr(ablations.Run, "command", stand_in)
    return tmp_path


def calls(root: Path, row: str = "control", seed: int = 0) -> list[str]:
    file = root / f"output/ablations/toy/{row}/seed{seed}/calls"
    return file.read_text().splitlines() if file.exists() else []


def run(*arguments: str) -> int:
    return ablations.main(["toys", "--device", "cpu", *arguments])


@pytest.mark.slow
def test_each_row_and_seed_is_trained_once(toy, capfd):
    assert run("--seeds", "0", "3") == 0
    files = sorted(path.name for path in (toy / "results/cpu/ablations/toy").iterdir())
    assert files == [f"{row}-seed{seed}.json" for row in ("control", "other") for seed in (0, 3)]
    result = json.loads((toy / "results/cpu/ablations/toy/other-seed3.json").read_text())
    assert result["scores"] == {"val/AP50": 43.0} and result["iterations"] == 2
    assert (result["row"], result["seed"], result["images"]) == ("other", 3, {"val": 7})
    assert {"machine", "versions", "commit", "command"} <= result.keys()
    assert "train.seed=3" in result["command"] and "dataloader.train.seed=3" in result["command"]
    assert "[4/4] toy/other seed 3: AP50 43.0 on val" in capfd.readouterr().err
    assert run("--seeds", "0", "3", "5") == 0
    assert [len(calls(toy, row, 0)) for row in ("control", "other")] == [1, 1]
    assert len(calls(toy, "other", 5)) == 1


def test_control_of_a_seed_comes_before_the_rows_of_the_next(toy, capsys):
    assert run("--seeds", "0", "1", "--dry-run") == 0
    folders = re.findall(r"output_dir=\S*toy/(\S+)", capsys.readouterr().out)
    assert folders == ["control/seed0", "other/seed0", "control/seed1", "other/seed1"]
    assert not calls(toy)


def test_a_result_of_other_settings_is_not_taken_for_done(toy):
    assert run("train.num_threads=1") == 0
    assert run("train.num_threads=2") == 0, "threads don't change a result"
    with pytest.raises(SystemExit, match=r"control-seed0.json .*train.max_iter=7.*delete it"):
        run("train.max_iter=7")


def test_a_failure_is_reported_and_the_others_go_on(toy, capfd, monkeypatch):
    bad = replace(SETTING.rows["control"], overrides=("train.init_checkpoint=fail",))
    rows = {**SETTING.rows, "control": bad}
    monkeypatch.setattr(ablations, "SETTINGS", {"toy": replace(SETTING, rows=rows)})
    assert run() == 1
    error = capfd.readouterr().err
    assert "toy/control seed 0: failed, see" in error and "failed: toy/control seed 0" in error
    log = (toy / "output/ablations/toy/control/seed0/sweep.log").read_text()
    assert "no such checkpoint" in log
    assert (toy / "results/cpu/ablations/toy/other-seed0.json").exists()


def test_what_was_trained_but_not_evaluated_is_evaluated(toy):
    assert run("--only", "control", "killed=yes") == 0
    flags = [["--resume" in line, "--eval-only" in line] for line in calls(toy)]
    assert flags == [[True, False], [True, True]]


def test_a_killed_runner_leaves_no_second_training(toy):
    job = ablations.Run(SETTING, "control", 0, "cpu", ("sleep=3",))

    def train():
        os.setsid()
        ablations.train(job, (), 0, ablations.Progress("killed", alone=True))

    runner = multiprocessing.get_context("fork").Process(target=train)
    runner.start()
    while not calls(toy):
        time.sleep(0.05)
    os.kill(runner.pid, signal.SIGKILL)
    runner.join()
    assert not job.result.exists()
    assert ablations.train(job, (), 0, ablations.Progress("again", alone=True))
    assert job.result.exists() and len(calls(toy)) == 1


@pytest.mark.slow
def test_bases_are_trained_first_and_given_to_those_that_start_from_them(toy, monkeypatch, capsys):
    rows = {name: replace(row, base="base") for name, row in SETTING.rows.items()}
    rows["base"] = Row("base", "pretrain/nano_drawn", base="first")
    rows["first"] = Row("first", "pretrain/nano_drawn", once=True)
    monkeypatch.setattr(ablations, "SETTINGS", {"toy": replace(SETTING, rows=rows)})
    run("--seeds", "4", "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    weights = "train.init_checkpoint=output/ablations/toy/{}/model_final.pth"
    for line, row, base in zip(
        lines,
        ("first/seed0", "base/seed4", "control/seed4", "other/seed4"),
        (None, "first/seed0", "base/seed4", "base/seed4"),
        strict=True,
    ):
        assert f"train.output_dir=output/ablations/toy/{row} " in line
        assert weights.format(base) in line if base else "init_checkpoint" not in line
    assert run("--seeds", "4") == 0
    assert len(calls(toy, "base", 4)) == len(calls(toy, "first", 0)) == 1
    run("--seeds", "5", "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "toy/base/seed5" in lines[0], "the first of all is there now"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toy"], "unknown sweep 'toy'; there are toys"),
        (["toys", "--only", "x3"], "sweep toys has no row 'x3'; it has control, other"),
        (["toys", "--sed", "1"], "unrecognized arguments: --sed 1"),
    ],
)
def test_wrong_arguments(toy, capsys, arguments, message):
    with pytest.raises(SystemExit):
        ablations.main(arguments)
    assert message in capsys.readouterr().err


# ---- what is declared ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=lambda s: s.name)
def test_every_row_is_a_recipe_and_sweeps_compare_runs_of_one_length(setting):
    lengths = {}
    for row in setting.rows:
        run = ablations.Run(setting, row, 1, "cpu")
        cfg = load_config(ablations.ROOT / run.config_file, run.overrides)
        assert cfg.train.seed == cfg.dataloader.train.seed == 1
        assert set(setting.tests) == set(cfg.dataloader.test)
        if base := setting.rows[row].base:
            seed = 0 if setting.rows[base].once else 1
            assert cfg.train.init_checkpoint.endswith(f"{base}/seed{seed}/model_final.pth")
        if "times as long" not in setting.rows[row].title:
            lengths[row] = cfg.train.max_iter, cfg.dataloader.train.total_batch_size
    for sweep in SWEEPS.values():
        if SETTINGS[sweep.setting] is setting:
            assert sweep.control in sweep.rows and set(sweep.rows) <= set(setting.rows)
            assert len({lengths[row] for row in sweep.rows if row in lengths}) == 1, sweep.name


# ---- the page -----------------------------------------------------------------------------------


def test_committed_page_agrees_with_the_results(capsys):
    assert ablations_page.main(check=True) == 0, capsys.readouterr().out


def test_committed_results_are_of_declared_rows_and_committed_code():
    for path in report.results_folder().parent.glob("*/ablations/*/*.json"):
        result = json.loads(path.read_text())
        setting = SETTINGS[path.parent.name]
        assert (
            path.stem == f"{result['row']}-seed{result['seed']}" and result["row"] in setting.rows
        )
        assert re.fullmatch(r"[0-9a-f]{40}", result["commit"]), path
        assert result["config"] == f"configs/{setting.rows[result['row']].config}.py"
    for picture in re.findall(r"!\[.*\]\((.*)\)", ablations_page.PAGE.read_text()):
        assert (ablations_page.PAGE.parent / picture).is_file()


@pytest.fixture
def paper(tmp_path, monkeypatch):
    """A page of one sweep with results of two rows; returns rows, seeds -> AP50."""
    monkeypatch.setattr(ablations_page, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(ablations_page, "PAGE", tmp_path / "ABLATIONS.md")
    monkeypatch.setattr(ablations_page, "SETTINGS", {"toy": SETTING})
    sweep = Sweep("toys", "Toys", "toy", "control", ("control", "other"))
    monkeypatch.setattr(ablations_page, "SWEEPS", {"toys": sweep})
    folder = tmp_path / "results/cpu/ablations/toy"
    folder.mkdir(parents=True)
    rng = fresh_rng()
    scores = {row: rng.uniform(20, 60, 3).tolist() for row in ("control", "other")}
    for row, values in scores.items():
        for seed, value in enumerate(values):
            result = {
                "row": row,
                "seed": seed,
                "scores": {"val/AP50": value, "val/AP": value / 2, "val/AP50r": -1.0},
                "routing": [],
                "iterations": 10,
                "parameters": {"active": 1e6, "total": 2e6, "trainable": 1e6},
                "flops": {"total": 1e9, "stages": {"decoder": 5e8}},
                "machine": "abacus",
                "commit": "f" * 40,
            }
            (folder / f"{row}-seed{seed}.json").write_text(json.dumps(result))
    return scores


def test_page_shows_means_and_paired_differences(paper):
    assert ablations_page.main() == 0 and ablations_page.main(check=True) == 0
    text = ablations_page.PAGE.read_text()
    control, other = np.array(paper["control"]), np.array(paper["other"])
    assert f"{other.mean():.1f} ({other.std(ddof=1):.1f})" in text
    assert f"{(other - control).mean():+.1f} ± " in text
    assert "rare" not in text.split("### Toys")[1], "-1 is no score"
    assert (ablations_page.PAGE.parent / "results/cpu/ablations/toys.png").stat().st_size > 1000


def test_page_disagrees_with_a_changed_or_a_missing_result(paper, capsys):
    ablations_page.main()
    path = ablations_page.RESULTS / "cpu/ablations/toy/other-seed1.json"
    text = path.read_text()
    result = json.loads(text)
    result["scores"]["val/AP50"] += 7
    path.write_text(json.dumps(result))
    assert ablations_page.main(check=True) == 1 and "disagrees" in capsys.readouterr().out
    path.write_text(text)
    assert ablations_page.main(check=True) == 0
    path.unlink()
    assert ablations_page.main(check=True) == 1


def test_rows_and_sweeps_without_results_are_named(paper, monkeypatch):
    rows = {**SETTING.rows, **{n: Row(n, "pretrain/nano_drawn") for n in ("third", "fourth")}}
    monkeypatch.setattr(ablations_page, "SETTINGS", {"toy": replace(SETTING, rows=rows)})
    sweep = Sweep("toys", "Toys", "toy", "control", ("control", "other", "third", "fourth"))
    monkeypatch.setattr(ablations_page, "SWEEPS", {"toys": sweep})
    text = ablations_page.page()
    assert "### Toys" not in text, "one of three rows is no comparison"
    assert "| `toys` | Toys | toy | `control`, `other`, `third`, `fourth` |" in text
    folder = ablations_page.RESULTS / "cpu/ablations/toy"
    result = json.loads((folder / "other-seed1.json").read_text())
    (folder / "third-seed1.json").write_text(json.dumps(result | {"row": "third"}))
    text = ablations_page.page()
    assert "### Toys" in text and "Not run yet: `fourth`." in text


def test_tables_of_name_memory_compare_with_the_base_and_the_control(paper):
    rng = fresh_rng()
    numbers = rng.uniform(10, 90, (2, 3))
    tables = {"width": ("32 units", "64 units"), "tuning": ("dense", "x4")}

    def row(value: float) -> dict:
        tiers = dict.fromkeys(("all", "rare", "common", "frequent"), value)
        return {"scores": tiers, "routing": []}

    seeds = {
        str(seed): {
            kind: {name: row(numbers[i, seed]) for i, name in enumerate(names)}
            for kind, names in tables.items()
        }
        for seed in range(3)
    }
    report = {"machine": "abacus", "commit": "e" * 40, "seeds": seeds}
    report["settings"] = {"steps": 5, "tuning": 4, "batch": 3}
    path = ablations_page.RESULTS / "cpu/name_memory.json"
    path.write_text(json.dumps(report))
    text = ablations_page.page()
    mean = (numbers[0] - numbers[1]).mean()
    assert re.search(rf"\| 32 units \| 3 \| \**\{mean:+.1f} ± ", text)
    assert re.search(rf"\| x4 \| 3 \| \**\{-mean:+.1f} ± ", text)
    assert "5 steps from scratch, 4 of tuning, of 3 objects; commit eeeeeeeeeeee" in text


def test_step_times_are_over_the_controls(paper):
    times = {"control": {"median_ms": 8.0}, "other": {"median_ms": 10.0}}
    (ablations_page.RESULTS / "cpu/ablations/toys-steps.json").write_text(
        json.dumps({"rows": times})
    )
    assert re.search(r"\| other .*\| 1\.25 \|", ablations_page.page())


def test_steps_of_two_recipes_in_turns():
    overrides = ["model.decoder.num_layers=1", "dataloader.train.total_batch_size=1"]
    recipes = {
        row: load_config(ablations.ROOT / f"configs/{config}.py", overrides)
        for row, config in (("dense", "pretrain/nano_drawn"), ("x16", "moe_tuning/nano_x16_drawn"))
    }
    times = step_times(recipes, "cpu", 2)
    assert times.keys() == recipes.keys()
    assert all(0 < t["low_ms"] <= t["median_ms"] <= t["high_ms"] for t in times.values())
