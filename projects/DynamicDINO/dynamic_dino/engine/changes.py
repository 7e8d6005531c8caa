"""What a resumed run does otherwise than it began."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ..config import ConfigError, flat, load_config

# What decides where, how fast and how often something is done, not what is learned (fnmatch)
INCIDENTAL = (
    "train.output_dir",
    "train.device",
    "train.num_threads",
    "train.accumulate",
    "train.log_period",
    "train.eval_*",
    "train.checkpointer.*",
    "train.ddp.*",
    "train.init_checkpoint",  # a resumed run starts from its own
    "train.init_except",
    "dataloader.train.num_workers",
    "dataloader.train.pin_memory",
    "dataloader.train.prefetch_factor",
    "optimizer.fused",
    "dataloader.test.*",
    "dataloader.evaluator.*",
)


def changes(config_file: Path, cfg: DictConfig) -> list[str]:
    """ "data.train_json was 'a.json' and is 'b.json'", for each key of the run's config.yaml that
    has another value in `cfg` and changes what is learned. A file that no longer can be read says
    nothing."""
    try:
        before = flat(load_config(config_file, to_build=False))
    except (ConfigError, OSError, ValueError):
        return []
    now = flat(cfg)
    return [
        f"{key} was {_said(before, key)} and is {_said(now, key)}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key, _ABSENT) != now.get(key, _ABSENT)
        and not any(fnmatchcase(key, pattern) for pattern in INCIDENTAL)
    ]


_ABSENT = object()


def _said(values: dict[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not there"
