"""Five drawn photos, from the file to the line that runs the detector; then once more."""

import json

import numpy as np
import pytest
from dynamic_dino.config import ConfigError
from dynamic_dino.data.synthetic.drawn import write_drawn_dataset
from dynamic_dino.evaluation.coco import read_ground_truth
from dynamic_dino.evaluation.predictions import DatasetPredictions
from dynamic_dino.finetune import cli, plan
from dynamic_dino.finetune.report import Scores, changes_sheet, f1_of_images
from dynamic_dino.serving.inference import load_detector
from PIL import Image


@pytest.mark.slow
def test_five_photos_suffice(tmp_path, capsys):
    data = write_drawn_dataset(tmp_path, num_images=5, size=96)
    images = tmp_path / "drawn/train"
    output = tmp_path / "out"
    words = [
        str(data),
        f"--images={images}",
        "--experts",
        "--iterations=2",
        "--device=cpu",
        f"--output={output}",
        "inference.size=96",
        "model.canvas=96",
        "dataloader.train.num_workers=0",
        "dataloader.train.total_batch_size=2",
    ]
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    assert "4 images" in told and "1 validation photos are few" in told
    results = json.loads((output / "results.json").read_text())
    assert list(results) == ["before", "x16-Top2"]
    assert results["x16-Top2"]["gains"].keys() >= {"AP", "AP50"}
    assert "AP50 of each name" in (output / "results.txt").read_text()
    assert f"--model {output / 'x16'}" in told
    detector = load_detector(output / "x16", device="cpu")
    photo = next(images.glob("*.png"))
    assert len(detector(photo, ["red circle"], threshold=0.0))

    assert cli.main(words) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*words, "--resume", "optimizer.lr=1.0"]) == 2
    assert "other settings" in capsys.readouterr().err
    before = (output / "x16/model_final.pth").stat().st_mtime_ns
    assert cli.main([*words, "--resume"]) == 0
    assert (output / "x16/model_final.pth").stat().st_mtime_ns == before
    assert capsys.readouterr().out.count("done: ") == 2

    again = plan.find_start(str(output / "x16"), "cpu")  # what was tuned is a start too
    for kind in ("tuned", "x16"):
        cfg = plan.recipe_for(again, kind, "mine", tmp_path / kind, photos=5)
        assert cfg.model.decoder.layer.ffn.router.num_experts == 16
        assert cfg.train.init_checkpoint == str(output / "x16/model_final.pth")
        assert cfg.inference.size == 96
    with pytest.raises(ConfigError, match="has experts already"):
        plan.recipe_for(again, "control", "mine", tmp_path / "control", photos=5)


def test_the_largest_gains_come_first_and_then_the_losses(tmp_path):
    box, far = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 10.0, 10.0]
    truth = read_ground_truth(
        {
            "images": [{"id": i} for i in range(4)],
            "annotations": [
                {"image_id": i, "category_id": 1, "bbox": b}
                for i, b in ((0, box), (1, box), (1, far), (2, box))
            ],
            "categories": [{"id": 1, "name": "cup"}],
        }
    )

    def scores(*found: tuple[int, list[float]]) -> Scores:
        rows = [
            {"image_id": i, "category_id": 1, "bbox": b, "score": 0.5}
            for i, b in [*found, (0, far)]
        ]
        rows[-1]["score"] = 0.1  # below the threshold
        return Scores({}, [], DatasetPredictions.read(rows), 0.4)

    before, after = scores((2, box), (3, box)), scores((0, box), (1, box), (2, far), (3, box))
    assert f1_of_images(truth, before.predictions, 0.4) == {0: 0, 1: 0, 2: 1, 3: 0}
    assert f1_of_images(truth, after.predictions, 0.4) == {
        0: 1,
        1: pytest.approx(2 / 3),
        2: 0,
        3: 0,
    }
    files = {}
    for i in range(4):
        files[i] = str(tmp_path / f"{i}.png")
        Image.fromarray(np.full((32, 32, 3), 60 * i, np.uint8)).save(files[i])
    sheet, gained, lost = changes_sheet(truth, before, after, files, {1: "cup"})
    assert (gained, lost) == (2, 1) and sheet.shape[1] == 1600
    grey = [sheet[int((row + 0.5) * len(sheet) / 3), 800, 0] for row in range(3)]
    assert [round(v / 60) for v in grey] == [0, 1, 2]
    assert changes_sheet(truth, before, before, files, {1: "cup"})[0] is None
