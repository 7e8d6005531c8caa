"""What a finished run of train_net.py left in its folder."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FinishedRun:
    """commands: how it was started, and gone on with; scores: results.json; metrics: the rows of
    metrics.json; log: the text of log.txt."""

    commands: list[str]
    iterations: int
    scores: dict[str, float]
    metrics: list[dict]
    log: str


def read_scores(folder: Path) -> dict[str, float]:
    """Of results.json, without the lines that say of which weights they are."""
    content = json.loads((folder / "results.json").read_text())
    return {key: value for key, value in content.items() if "/" in key}


def read_folder(folder: Path) -> FinishedRun:
    """Raises SystemExit where the run is not finished."""
    try:
        scores = read_scores(folder)
        log = (folder / "log.txt").read_text()
        metrics = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    except FileNotFoundError as error:
        raise SystemExit(f"{folder} is not a finished run of train_net.py: {error}") from None
    commands = re.findall(r"Command: (.*)", log)
    last = max(row["iteration"] for row in metrics if "total_loss" in row)
    return FinishedRun(commands, last + 1, scores, metrics, log)
