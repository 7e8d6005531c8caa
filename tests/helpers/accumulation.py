"""Training in float64 on samples with none to several objects, of which a loss is the mean; for
tests that micro-batches and processes change nothing but rounding."""

import itertools

import torch
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from dynamic_dino.engine.trainer import Trainer
from dynamic_dino.modeling.losses.criterion import mean_objects
from torch import nn

BATCH = 8


class Counted(nn.Module):
    """One loss is a mean over objects, as the detector's, the other over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 2))

    def forward(self, batch: list[dict], objects: torch.Tensor | None = None):
        objects = self.mean_objects([batch]) if objects is None else objects
        found = self.body(torch.cat([sample["instances"] for sample in batch]))
        whole = self.body(torch.stack([sample["x"] for sample in batch]))
        return {
            "loss_objects": found.sin().square().sum() / objects,
            "loss_samples": whole.cos().mean(),
        }

    def mean_objects(self, batches: list[list[dict]]) -> torch.Tensor:
        counts = [sum(len(sample["instances"]) for sample in batch) for batch in batches]
        return mean_objects(counts, torch.device("cpu"))


def train(seed: int, accumulate: int, **ddp) -> torch.Tensor:
    """The weights after a few steps, float64 [N], from the samples that follow from the seed."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = Counted().double()

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rank, size = comm.get_rank(), BATCH // comm.get_world_size()
    batches = []
    for most in (5, 1, 2):  # 0 objects in all, and 0 in some of the parts
        counts = torch.randint(most, (BATCH,), generator=generator).tolist()
        batch = [{"x": draw(5), "instances": draw(n, 5)} for n in counts]
        batches.append(batch[rank * size : (rank + 1) * size])
    wrapped = create_ddp_model(model, device_ids=None, **ddp)
    trainer = Trainer(
        wrapped,
        itertools.cycle(batches),
        torch.optim.AdamW(model.parameters(), lr=0.05),
        clip_grad={"enabled": True, "max_norm": 0.3},
        accumulate=accumulate,
    )
    with EventStorage() as trainer.storage:
        for trainer.iter in range(4):
            trainer.run_step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()
