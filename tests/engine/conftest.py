"""The tiny recipe, ready to run in a temporary folder."""

import json
import shutil
from pathlib import Path

import pytest
from dynamic_dino.config import load_config
from dynamic_dino.engine.train import do_train
from helpers.s3 import bucket, server  # noqa: F401

RECIPE = Path(__file__).parents[1] / "helpers/tiny_recipe.py"


@pytest.fixture
def recipe(tmp_path):
    """recipe("folder", "key=value", ...) -> config that writes to that folder."""

    def load(folder: str, *overrides: str):
        return load_config(RECIPE, [f"train.output_dir={tmp_path / folder}", *overrides])

    return load


@pytest.fixture(scope="session")
def _whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("tiny") / "whole"
    do_train(load_config(RECIPE, [f"train.output_dir={output}"]))
    return output


@pytest.fixture
def whole(_whole, recipe, tmp_path):
    """The config of an uninterrupted run without overrides, which lies in the folder "whole"."""
    shutil.copytree(_whole, tmp_path / "whole")
    return recipe("whole")


@pytest.fixture
def metrics(tmp_path):
    """metrics("folder") -> {iteration: {name: value}}, without times."""

    def read(folder: str) -> dict[int, dict[str, float]]:
        rows = [
            json.loads(r) for r in (tmp_path / folder / "metrics.json").read_text().split("\n") if r
        ]
        times = ("time", "data_time", "eta_seconds")
        names = [{k: v for k, v in row.items() if k not in times} for row in rows]
        assert len({row["iteration"] for row in rows}) == len(rows), "an iteration appears twice"
        return {row.pop("iteration"): row for row in names}

    return read
