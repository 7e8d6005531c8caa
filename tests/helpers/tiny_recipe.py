"""A recipe for tests: a regression in a few dozen parameters that uses every kind of randomness,
a frozen part with BatchNorm, and samples that look like a detector's."""

import os
import random
import signal
import time
from collections import OrderedDict
from itertools import count

import numpy as np
import torch
from detectron2.config import LazyCall as L
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import WarmupParamScheduler
from detectron2.utils import comm
from dynamic_dino.engine.optim import get_param_groups
from fvcore.common.param_scheduler import CosineParamScheduler
from torch import nn
from torch.utils.data import DataLoader, IterableDataset


class TinyModel(nn.Module):
    def __init__(self, dim: int, dropout: float, noise: float, poison: str, norm: str) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(dim, dim), nn.BatchNorm1d(dim)).requires_grad_(False)
        norm = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}[norm](dim)
        self.body = nn.Sequential(nn.Linear(dim, dim), norm, nn.Dropout(dropout))
        self.head = nn.Linear(dim, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.noise, self.poison = noise, poison

    def forward(self, batch: list[dict]):
        x = torch.stack([sample["x"] for sample in batch]).to(self.head.weight.device)
        y = torch.stack([sample["y"] for sample in batch]).to(x)
        if self.training:
            self.calls += 1
            noise = random.random() + np.random.rand() + torch.rand(())
            x = x + self.noise * noise
        prediction = self.head(self.body(self.tower(x)).relu()).squeeze(-1)
        if not self.training:
            return [{"prediction": p.item()} for p in prediction]
        error = prediction - y
        if any(sample["file_name"] == self.poison for sample in batch):
            error = error * float("nan")
        return {
            "loss_square": error.square().mean(),
            "loss_absolute": 0.1 * error.abs().mean(),
            "moe/entropy": prediction.detach().std(),
        }


def sample(index: int) -> dict:
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(8, generator=generator)
    return {"file_name": f"{index:03d}.png", "x": x, "y": x.square().sum().sqrt()}


class Stream(IterableDataset):
    """An endless stream; batch i of a rank depends on (seed, i, rank) only. Breaks at `stop_at`; in
    iteration `ask_at` the last rank gets a signal, and in `kill_at` the first one is killed, if
    torchrun hasn't started it again."""

    def __init__(
        self,
        total_batch_size: int,
        seed: int,
        start_iter: int,
        stop_at,
        ask_at,
        ask_by,
        kill_at,
        delay,
    ) -> None:
        self.size, self.seed, self.start_iter = total_batch_size, seed, start_iter
        self.stop_at, self.ask_at, self.kill_at, self.delay = stop_at, ask_at, kill_at, delay
        self.ask_by = getattr(signal, ask_by)

    def __iter__(self):
        for i in count(self.start_iter):
            time.sleep(self.delay)
            if i == self.stop_at:
                raise InterruptedError
            if i == self.ask_at and comm.get_rank() == comm.get_world_size() - 1:
                os.kill(os.getpid(), self.ask_by)
            if i == self.kill_at and comm.get_rank() == 0:
                if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                    os.kill(os.getpid(), signal.SIGKILL)
            order = np.random.default_rng((self.seed, i)).permutation(64)[: self.size]
            yield [sample(int(j)) for j in np.split(order, comm.get_world_size())[comm.get_rank()]]


class Evaluator(DatasetEvaluator):
    def __init__(self, sign: float) -> None:
        self.sign = sign

    def reset(self) -> None:
        self.errors = []

    def process(self, inputs, outputs) -> None:
        self.errors += [
            abs(i["y"].item() - o["prediction"]) for i, o in zip(inputs, outputs, strict=True)
        ]

    def evaluate(self):
        errors = [e for part in comm.gather(self.errors) for e in part]
        return OrderedDict(AP=self.sign * float(np.mean(errors))) if errors else None


def test_loader(first: int) -> list[list[dict]]:
    batches = [[sample(first + 4 * i + j) for j in range(4)] for i in range(4)]
    return batches[comm.get_rank() :: comm.get_world_size()]


def train_loader(**options) -> DataLoader:
    return DataLoader(Stream(**options), batch_size=None)


model = L(TinyModel)(dim=8, dropout=0.2, noise=0.3, poison="", norm="layer")
optimizer = L(torch.optim.AdamW)(
    params=L(get_param_groups)(lr_factors={"head.*": 0.5}),
    lr=0.02,
    betas=(0.9, 0.99),
    weight_decay=0.01,
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_factor=0.1,
    warmup_length=0.2,
)
dataloader = dict(
    train=L(train_loader)(
        total_batch_size=8,
        seed=3,
        start_iter=0,
        stop_at=None,
        ask_at=None,
        ask_by="SIGUSR1",
        kill_at=None,
        delay=0.0,
    ),
    test=dict(val=L(test_loader)(first=100)),
    evaluator=dict(val=L(Evaluator)(sign=-1.0)),
)
train = dict(
    max_iter=20,
    log_period=1,
    eval_period=5,
    best_metric="val/AP",
    device="cpu",
    amp=dict(enabled=False),
    clip_grad=dict(enabled=True, max_norm=1.0, norm_type=2.0),
    ema=dict(enabled=True, decay=0.9),
    checkpointer=dict(period=4, max_to_keep=2),
)
