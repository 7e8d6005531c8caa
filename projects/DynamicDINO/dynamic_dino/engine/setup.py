"""What a run needs before it starts: a device, a writable output folder, logs, a saved config."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from io import TextIOWrapper
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from ..config import ConfigError, input_errors, save_config
from ..files import FolderInUseError, LogFile, sole_writer, writable_folder
from .allocator import keep_freed_memory
from .changes import changes
from .checkpointing import last_checkpoint
from .output import copied, description, local_folder

logger = logging.getLogger(__name__)

LOGGERS = ("detectron2", "fvcore", "dynamic_dino", "dynamic_dino_kernels")  # that a run sets up
_log_file = lru_cache(maxsize=None)(LogFile)  # one for all loggers
MOST_FILES = 2**16


@contextmanager
def sole_run(
    output_dir: str | Path, option: str = "train.output_dir=FOLDER", new: bool = False
) -> Iterator[None]:
    """Meanwhile this run alone, all of its processes, writes into its output folder, which `option`
    chooses; a run that does already may do so again. What it writes is copied where that is at an
    address, see `output.copied`, also for `new`. Collective. Raises `ConfigError` in every process
    where another run does, or the folder can't be written."""
    with ExitStack() as stack:
        problem = ""
        if comm.is_main_process():
            try:
                folder = writable_folder(local_folder(output_dir), f"choose another with {option}")
                stack.enter_context(sole_writer(folder))
            except FolderInUseError as error:
                problem = (
                    f"{error}; wait until it has ended, or stop it, or choose another folder with "
                    f"{option}"
                )
            except OSError as error:
                problem = str(error)
        if problem := comm.all_gather(problem)[0]:
            raise ConfigError(problem)
        stack.enter_context(copied(output_dir, new))
        yield


def setup(cfg: DictConfig, resume: bool = False) -> None:
    """Prepares this process. Sets ``train.device`` to what "auto" stands for. With `resume` warns
    of what differs from the config.yaml with which the run was last started.

    Raises `ConfigError` where the output folder can't be written or the device is absent.
    """
    train = cfg.train
    train.device = resolve_device(train.device)
    if train.device == "cpu" and dist.is_initialized() and dist.get_backend() == "nccl":
        raise ConfigError("several processes on CPU next to GPUs: start them with --num-gpus 0")
    with sole_run(train.output_dir):
        _setup(cfg, resume)


def _setup(cfg: DictConfig, resume: bool) -> None:
    folder = local_folder(cfg.train.output_dir)
    train = cfg.train
    for name in LOGGERS:
        setup_logger(str(folder), distributed_rank=comm.get_rank(), name=name)
        for handler in logging.getLogger(name).handlers:
            stream = handler.stream  # Detectron2's, of log.txt or log.txt.rank1; or a console
            # A console may have a number for its name, or none.
            file = Path(str(getattr(stream, "name", "")))
            if isinstance(stream, TextIOWrapper) and file.name.startswith("log.txt"):
                handler.setStream(_log_file(file))
    _open_more_files()
    if train.num_threads:
        torch.set_num_threads(train.num_threads)
    if train.device == "cpu":
        keep_freed_memory()
    logger.info("Command: %s", " ".join(sys.argv))
    logger.info(
        "Python %s, torch %s, %s, process %d of %d, %d threads",
        sys.version.split()[0],
        torch.__version__,
        torch.cuda.get_device_name() if train.device == "cuda" else "CPU",
        comm.get_rank(),
        comm.get_world_size(),
        torch.get_num_threads(),
    )
    if comm.is_main_process():
        if told := description(train.output_dir):
            logger.info(told)
        path = folder / "config.yaml"
        with input_errors():
            resumed = resume and last_checkpoint(folder)
        if resumed and path.is_file():
            if found := changes(path, cfg):
                logger.warning(
                    "This run is resumed with other settings than it had: %s. It goes on with the "
                    "new ones; if that isn't meant, stop it, and give the former ones.",
                    "; ".join(found),
                )
        save_config(cfg, path)
        logger.info("Full config: %s", path)


def _open_more_files() -> None:
    """Each tensor that a loader's worker has ready is an open file of this process: of images by
    the dozen, more than the 1,024 that most systems allow unless a program asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def resolve_device(name: str) -> str:
    """ "cuda" or "cpu" for "auto"; raises `ConfigError` for an unknown or absent device."""
    if name not in ("auto", "cuda", "cpu"):
        raise ConfigError(f"train.device={name!r} is unknown; use auto, cuda or cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda, but torch sees no CUDA device; use auto or cpu")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name
