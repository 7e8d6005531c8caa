"""What is read off a run's folder."""

import json

import finetune_public
import pytest
from helpers.seeds import fresh_rng
from lib import tables as results


def write_run(folder, first: dict, after: dict) -> None:
    folder.mkdir()
    rows = [
        {"iteration": 0, **first},
        {"iteration": 19, "total_loss": 3.0},
        {"iteration": 29, "total_loss": 2.0},
        {"iteration": 30, **after},
    ]
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.json").write_text(json.dumps({**after, "val/APs": float("nan")}))
    (folder / "log.txt").write_text(
        "[x] a: Command: train_net.py train.output_dir=elsewhere/run --config-file a.py\n"
        "[x] a: Resuming from elsewhere/run/model_0000019.pth, iteration 19\n"
        "[x] a: Command: train_net.py --resume\n"
    )


def test_read_run(tmp_path):
    before, after = fresh_rng().uniform(0, 100, 2).round(4).tolist()
    write_run(tmp_path / "a", {"val/AP": before, "val/AP50": 1.0}, {"val/AP": after})
    run = finetune_public.read_run(tmp_path / "a")
    assert run["commands"][0].split()[1] == f"train.output_dir={tmp_path / 'a'}"
    assert run["resumed_at"] == [20] and run["iterations"] == 30 and len(run["commands"]) == 2
    assert run["before"]["val/AP"] == before and run["after"] == {"val/AP": after}
    run["after"]["val/AP50"] = 2.0
    assert f"| a | 30 | 20 | {before:.1f} -> {after:.1f} | 1.0 -> 2.0 |" in results.finetune_public(
        {"runs": {"a": run}}
    )


def test_scores_from_another_folder(tmp_path):
    write_run(tmp_path / "a", {}, {"val/AP": 2.0})
    write_run(tmp_path / "b", {}, {"val/AP": 1.0})
    with pytest.raises(SystemExit, match="no scores from before"):
        finetune_public.read_run(tmp_path / "a")
    run = finetune_public.read_run(tmp_path / "a", tmp_path / "b")
    assert run["before"] == {"val/AP": 1.0} and run["after"] == {"val/AP": 2.0}
    (tmp_path / "a/results.json").unlink()
    with pytest.raises(SystemExit, match="not a finished run"):
        finetune_public.read_run(tmp_path / "a")
