"""Checkpoints that survive a kill at any moment, and the best one by a metric."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicCheckpointer as _PeriodicCheckpointer
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer as _Checkpointer
from torch import nn

from ..config import nearest
from ..files import write_text, written_whole

logger = logging.getLogger(__name__)

BEST = "model_best"


class Checkpointer(_Checkpointer):
    """fvcore's checkpointer, with files that are whole or absent, and loads that are exact.

    A checkpoint holds ``model``, ``iteration`` and the state of each of the `checkpointables`.
    ``last_checkpoint`` in the directory names the one to resume from.
    """

    def __init__(self, model: nn.Module, save_dir: str | Path, **checkpointables: Any) -> None:
        main = comm.is_main_process()
        super().__init__(model, str(save_dir), save_to_disk=main, **checkpointables)

    def save(self, name: str, *, resumable: bool = True, **extra: Any) -> None:
        """Writes `name`.pth; the run resumes from it unless `resumable` is False."""
        if not self.save_to_disk:
            return
        state = {key: value.state_dict() for key, value in self.checkpointables.items()}
        state = {"model": self.model.state_dict(), **state, **extra}
        path = Path(self.save_dir) / f"{name}.pth"
        with written_whole(path, binary=True) as file:
            torch.save(state, file)
        if resumable:
            self.tag_last_checkpoint(path.name)
        logger.info("Saved %s", path)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(Path(self.save_dir) / "last_checkpoint", last_filename_basename)

    def resume(self) -> int:
        """Restores the last checkpoint, if there is one; returns the iteration to go on with.

        Collective. Raises ValueError for a damaged file or another architecture, and where the
        processes don't see the same checkpoint.
        """
        path = last_checkpoint(self.save_dir)
        seen = comm.all_gather(path and path.name)
        if len(set(seen)) > 1:
            raise ValueError(
                f"the processes see different checkpoints in {self.save_dir}: {seen}; "
                "train.output_dir must be on a file system that all machines share"
            )
        if path is None:
            return 0
        checkpoint = read_checkpoint(path)
        self._load_exactly(checkpoint, path)
        for key, value in self.checkpointables.items():
            if key not in checkpoint:
                raise ValueError(
                    f"{path} holds no {key!r} to resume (it holds {', '.join(checkpoint)}): it was "
                    "written with other settings; resume with those, or start a new run from it "
                    f"with train.init_checkpoint={path}"
                )
            value.load_state_dict(checkpoint[key])
        logger.info("Resuming from %s, iteration %d", path, checkpoint["iteration"])
        return checkpoint["iteration"] + 1

    def _load_exactly(self, checkpoint: dict, path: Path) -> None:
        try:
            self.model.load_state_dict(checkpoint["model"])
        except (RuntimeError, KeyError) as error:
            raise ValueError(
                f"{path} was written by another architecture, this run can't resume from it; use "
                f"the config of that run ({path.parent / 'config.yaml'}) or another "
                f"train.output_dir. {error}"
            ) from error


class PeriodicCheckpointer(_PeriodicCheckpointer):
    """Detectron2's hook; after a resume it goes on deleting the old checkpoints too."""

    def before_train(self) -> None:
        super().before_train()
        if self.trainer.start_iter > 0:
            folder = Path(self.checkpointer.save_dir)
            files = sorted(folder.glob(f"{self.file_prefix}_[0-9]*.pth"))
            self.recent_checkpoints = [str(file) for file in files]


class BestCheckpointer(HookBase):
    """Keeps the weights with the highest `metric` of the periodic evaluation as model_best.pth.

    The value stands in the file itself, so a resumed run knows what it has to beat. Stands behind
    the hook that evaluates.
    """

    def __init__(self, checkpointer: Checkpointer, metric: str, eval_period: int) -> None:
        self.checkpointer, self.metric, self.eval_period = checkpointer, metric, eval_period
        self.best = -math.inf

    def before_train(self) -> None:
        path = Path(self.checkpointer.save_dir) / f"{BEST}.pth"
        if self.trainer.start_iter > 0 and path.is_file():
            self.best = read_checkpoint(path, mmap=True).get("best", {}).get(self.metric, self.best)

    def after_step(self) -> None:
        step = self.trainer.iter + 1
        if self.eval_period > 0 and step % self.eval_period == 0 and step < self.trainer.max_iter:
            self._keep_if_best()

    def after_train(self) -> None:
        self._keep_if_best()

    def _keep_if_best(self) -> None:
        latest = self.trainer.storage.latest()
        if self.metric not in latest:
            near = nearest(self.metric, (key for key in latest if "/" in key))
            logger.warning(
                "train.best_metric=%s is not among the results, no best checkpoint is kept%s",
                self.metric,
                f"; did you mean {' or '.join(near)}?" if near else "",
            )
            return
        value, iteration = latest[self.metric]
        if value > self.best:
            self.best = value
            self.checkpointer.save(
                BEST, resumable=False, iteration=iteration, best={self.metric: value}
            )
            logger.info("Best %s so far: %.2f", self.metric, value)


def last_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint that a run in `folder` resumes from, None where there is none.

    Raises FileNotFoundError where ``last_checkpoint`` names a file that is gone.
    """
    tag = Path(folder) / "last_checkpoint"
    if not tag.is_file():
        return None
    path = Path(folder) / tag.read_text().strip()
    if not path.is_file():
        others = sorted(p.name for p in Path(folder).glob("*.pth"))
        raise FileNotFoundError(
            f"{tag} names {path.name}, which does not exist; write the name of another checkpoint "
            f"into it ({', '.join(others) or 'there is none'}), or delete it to start anew"
        )
    return path


def read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Reads one of our checkpoints, tensors on the CPU; with `mmap` they are read when used.

    Raises ValueError for a damaged file.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch's own errors are of many types
        raise ValueError(f"{path} can't be read as a checkpoint, is it damaged? {error}") from error


def trim_metrics(path: Path, start_iter: int) -> None:
    """Drops the rows of metrics.json that a resumed run will write again."""
    if path.is_file():
        rows = path.read_text().splitlines()
        kept = [row for row in rows if _iteration(row) < start_iter]
        if len(kept) < len(rows):
            write_text(path, "".join(f"{row}\n" for row in kept))


def _iteration(row: str) -> float:
    try:
        return json.loads(row)["iteration"]
    except (ValueError, KeyError):  # a line cut short by a kill
        return math.inf
