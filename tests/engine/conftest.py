"""The tiny recipe, ready to run in a temporary folder."""

import json
from pathlib import Path

import pytest
from dynamic_dino.config import load_config

RECIPE = Path(__file__).parents[1] / "helpers/tiny_recipe.py"


@pytest.fixture
def recipe(tmp_path):
    """recipe("folder", "key=value", ...) -> config that writes to that folder."""

    def load(folder: str, *overrides: str):
        return load_config(RECIPE, [f"train.output_dir={tmp_path / folder}", *overrides])

    return load


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
