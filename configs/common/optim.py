"""AdamW, and schedules as fractions of a run."""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from dynamic_dino.engine.optim import get_param_groups
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler

optimizer = L(torch.optim.AdamW)(
    params=L(get_param_groups)(lr_factors={}, no_weight_decay_norm=True),
    lr=4e-4,
    betas=(0.9, 0.999),
    weight_decay=1e-4,
)


def step_schedule(milestones: list[float], warmup: float):
    """Divides the rate by ten at each milestone; milestones and warm-up in parts of the run."""
    parts = 1_000_000  # fvcore counts steps, of which there must be more than milestones
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(
            values=[0.1**i for i in range(len(milestones) + 1)],
            milestones=[round(milestone * parts) for milestone in milestones],
            num_updates=parts,
        ),
        warmup_factor=0.001,
        warmup_length=warmup,
        warmup_method="linear",
    )


def cosine_schedule(warmup: float):
    """Anneals the rate to a hundredth along a half cosine."""
    return L(WarmupParamScheduler)(
        scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.01),
        warmup_factor=0.01,
        warmup_length=warmup,
        warmup_method="linear",
    )
