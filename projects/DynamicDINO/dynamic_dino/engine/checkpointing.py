"""Checkpoints that survive a kill at any moment, and the best one by a metric."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicCheckpointer as _PeriodicCheckpointer
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer as _Checkpointer
from torch import Tensor, nn

from ..checkpoint.files import check_checksums, why_unreadable
from ..config import nearest
from ..files import DiskFullError, disk_full, write_text, written_whole

logger = logging.getLogger(__name__)

BEST, FINAL = "model_best", "model_final"


class Checkpointer(_Checkpointer):
    """fvcore's checkpointer, with files that are whole or absent, and loads that are exact.

    A checkpoint holds ``model``, ``iteration`` and the state of each of the `checkpointables`.
    ``last_checkpoint`` in the directory names the one to resume from.
    """

    def __init__(self, model: nn.Module, save_dir: str | Path, **checkpointables: Any) -> None:
        main = comm.is_main_process()
        super().__init__(model, str(save_dir), save_to_disk=main, **checkpointables)
        self.saved = -1  # the iteration of the last resumable checkpoint
        self.before_saving: Callable[[], None] = lambda: None

    def save(self, name: str, *, resumable: bool = True, **extra: Any) -> None:
        """Writes `name`.pth; the run resumes from it unless `resumable` is False, and results.json,
        which older weights have, is removed. Raises `DiskFullError`."""
        if not self.save_to_disk:
            return
        self.before_saving()
        state = {key: value.state_dict() for key, value in self.checkpointables.items()}
        state = {"model": self.model.state_dict(), **state, **extra}
        path = Path(self.save_dir) / f"{name}.pth"
        needed = _bytes(state)
        try:
            with written_whole(path, binary=True, needed=needed) as file:
                torch.save(state, file)
        except RuntimeError as error:  # torch's own, where a write fails
            raise disk_full(path, needed, str(error)) from None
        if resumable:
            (path.parent / "results.json").unlink(missing_ok=True)
            self.tag_last_checkpoint(path.name)
            self.saved = extra.get("iteration", -1)
        logger.info("Saved %s", path)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(Path(self.save_dir) / "last_checkpoint", last_filename_basename)

    def keep_final(self) -> None:
        """model_final.pth, of a run that ended before it was written: as the checkpoint of its last
        iteration, which is there. Raises `DiskFullError`."""
        final, last = Path(self.save_dir) / f"{FINAL}.pth", last_checkpoint(self.save_dir)
        if not self.save_to_disk or final.is_file() or last is None:
            return
        with last.open("rb") as source, written_whole(final, binary=True) as file:
            shutil.copyfileobj(source, file)
        self.tag_last_checkpoint(final.name)
        logger.info("Saved %s, which is %s", final, last.name)

    def resume(self) -> int:
        """Restores the last checkpoint, if there is one; returns the iteration to go on with. Where
        it is damaged, a warning says so, and the one before takes its place.

        Collective. Raises ValueError where all are damaged, for another architecture, and where the
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
        path, checkpoint = self._read_last_good(path)
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
        self.saved = checkpoint["iteration"]
        return checkpoint["iteration"] + 1

    def _read_last_good(self, last: Path) -> tuple[Path, dict[str, Any]]:
        """The same one in all processes: that which the main one can read."""
        path, checkpoint, problem = last, None, ""
        if comm.is_main_process():
            for path in (last, *_older(last)):
                try:
                    checkpoint = read_checkpoint(path)
                    break
                except ValueError as error:
                    logger.warning("%s", error)
                    problem = problem or f"{error}; there is no older one that can be read"
        path, found, problem = comm.all_gather((path, checkpoint is not None, problem))[0]
        if not found:
            raise ValueError(problem)
        if path != last:
            logger.warning("Going on from %s instead: what came after it is lost", path)
        return path, checkpoint or read_checkpoint(path)

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
    """Detectron2's hook; after a resume it goes on deleting the old checkpoints too, and it saves
    when asked to. `after`: called when there is a new one, and the old one is gone."""

    def __init__(
        self, *arguments: Any, after: Callable[[], None] = lambda: None, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.after = after

    def step(self, iteration: int, **kwargs: Any) -> None:
        before = self.checkpointer.saved
        super().step(iteration, **kwargs)
        if self.checkpointer.saved != before:
            self.after()

    def before_train(self) -> None:
        super().before_train()
        if self.trainer.start_iter > 0:
            folder = Path(self.checkpointer.save_dir)
            files = sorted(folder.glob(f"{self.file_prefix}_[0-9]*.pth"))
            # Those that the run died before pointing to are written again.
            name = f"{self.file_prefix}_{self.trainer.start_iter:07d}.pth"
            self.recent_checkpoints = [str(file) for file in files if file.name < name]

    def save_now(self) -> None:
        """Saves this iteration, unless that is done."""
        if self.checkpointer.saved != self.trainer.iter:
            period, self.period = self.period, 1
            try:
                self.step(self.trainer.iter)
            finally:
                self.period = period


class BestCheckpointer(HookBase):
    """Keeps the weights with the highest `metric` as model_best.pth; asked after each evaluation.

    The value stands in the file itself, so a resumed run knows what it has to beat. Stands before
    the hook that evaluates.
    """

    def __init__(self, checkpointer: Checkpointer, metric: str) -> None:
        self.checkpointer, self.metric = checkpointer, metric
        self.best = -math.inf

    def before_train(self) -> None:
        path = Path(self.checkpointer.save_dir) / f"{BEST}.pth"
        if self.trainer.start_iter > 0 and path.is_file():
            try:
                best = read_checkpoint(path, mmap=True).get("best", {})
            except ValueError as error:
                logger.warning("%s; the next evaluation takes its place", error)
            else:
                self.best = best.get(self.metric, self.best)

    def keep_if_best(self) -> None:
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
            best = {self.metric: value}
            try:
                self.checkpointer.save(BEST, resumable=False, iteration=iteration, best=best)
            except DiskFullError as error:
                logger.warning("%s. The run goes on", error)
                return
            self.best = value
            logger.info("Best %s so far: %.2f", self.metric, value)


def last_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint that a run in `folder` resumes from, None where there is none.

    Raises FileNotFoundError where ``last_checkpoint`` names a file that is gone, ValueError where
    it names none of this folder.
    """
    tag = Path(folder) / "last_checkpoint"
    if not tag.is_file():
        return None
    name = tag.read_bytes().decode("utf-8", "replace").strip()
    if not re.fullmatch(r"[\w.\- ]+\.pth", name):
        raise ValueError(
            f"{tag} should hold the name of a checkpoint in its folder, such as model_0004999.pth, "
            f"and holds {name[:80]!r}; write such a name into it, or delete it to start anew. To "
            "start from the weights of another run: train.init_checkpoint=FILE"
        )
    path = Path(folder) / name
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
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch's own errors are of many types
        raise ValueError(f"checkpoint {path} {why_unreadable(path, error)}") from error
    if not mmap:
        check_checksums(path)
    return checkpoint


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of metrics.json, without what a kill cut short."""
    return [row for line in _lines(path) if (row := _row(line))]


def trim_metrics(path: Path, start_iter: int) -> list[dict[str, float]]:
    """Drops the rows of metrics.json that a resumed run will write again; returns the others."""
    lines = _lines(path)
    kept = [line for line in lines if _row(line).get("iteration", math.inf) < start_iter]
    if len(kept) < len(lines):
        write_text(path, "".join(f"{line}\n" for line in kept))
    return [_row(line) for line in kept]


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _row(line: str) -> dict[str, float]:
    try:
        row = json.loads(line)
        return row if math.isfinite(row["iteration"]) else {}
    except (ValueError, KeyError, TypeError):  # a line cut short by a kill
        return {}


def _older(last: Path) -> list[Path]:
    """The checkpoints of its folder before this one, the newest first."""
    numbered = sorted(last.parent.glob("model_[0-9]*.pth"), reverse=True)
    final = not last.stem.removeprefix("model_").isdigit()
    return [path for path in numbered if final or path.name < last.name]


def _bytes(state: Any) -> int:
    """Of all tensors in it."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    values = state.values() if isinstance(state, dict) else state
    return sum(map(_bytes, values)) if isinstance(state, dict | list | tuple) else 0
