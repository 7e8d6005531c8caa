"""What a training step of each row of a sweep takes, on noise: rows take turns.

The times that runs log depend on what else the machine did meanwhile. Here features of the backbone
are computed beforehand, as caches are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from dynamic_dino.engine.allocator import keep_freed_memory
from dynamic_dino.engine.optim import build_optimizer
from dynamic_dino.engine.trainable import set_trainable
from dynamic_dino.engine.trainer import Trainer
from omegaconf import DictConfig

from lib.detectors import training_batch
from lib.interleaved import interleave, quartiles, timed


def step_times(
    recipes: Mapping[str, DictConfig], device: str, repeats: int
) -> dict[str, dict[str, float]]:
    """{row: quartiles of its steps in ms}; the recipes share image size, batch and prompt."""
    torch.manual_seed(0)
    if device == "cpu":
        keep_freed_memory()
    steps = {row: training(cfg, device) for row, cfg in recipes.items()}
    for step in steps.values():
        step()  # makes the optimizer's state
    timers = {row: lambda step=step: timed(step, device) for row, step in steps.items()}
    return {row: quartiles(times) for row, times in interleave(timers, repeats).items()}


def training(cfg: DictConfig, device: str) -> Callable[[], None]:
    """One step of a recipe, again and again on the same batch."""
    model = instantiate(cfg.model).to(device)
    set_trainable(model, cfg.train.trainable)
    loader = cfg.dataloader.train
    names = min(loader.mapper.max_phrases, 80)
    batch = training_batch(cfg.model.canvas, loader.total_batch_size, names, boxes=4)
    with torch.no_grad():
        features = model.eval().extract_features([sample.pop("image") for sample in batch])
    for i, sample in enumerate(batch):
        sample["features"] = {name: x[i].cpu() for name, x in features.items()}
    optimizer = build_optimizer(cfg.optimizer, model)
    clipping = cfg.train.clip_grad
    trainer = Trainer(model, itertools.repeat(batch), optimizer, clip_grad=clipping)
    trainer.storage = EventStorage()
    return trainer.run_step
